"""Words on a command line in, an exit code out; only this file prints to the terminal.

Exit codes: 0 done, 1 a stage failed, 2 the config or the command line is wrong, 3 a gate failed, 75 interrupted.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.views import correction, tables
from pipeline.views.controls import without_controls
from pipeline.views.correction import EXAMPLE

if TYPE_CHECKING:
    from pipeline.plan.step import Plan


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a character that a GBK or ASCII console lacks becomes `?`, not an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    return int(typer.main.get_command(app).main(words, prog_name="pipeline", standalone_mode=False) or 0)


# Errors → a message and an exit code


class Command(TyperCommand):
    """One command. The next option is not taken as the missing value of an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        valued = {name for param in self.params for name in param.opts if name[0] == "-" and not _is_flag(param)}
        if not ctx.resilient_parsing and any(a in valued and b.startswith("--") for a, b in pairwise(args)):
            raise typer.BadParameter("a value is missing")
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_type(super().get_params(ctx))


class Commands(TyperGroup):
    """All commands. Errors are printed here in our form instead of Typer's."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        self.words = list(args)
        with self.errors_printed():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> None:
        with self.errors_printed():
            raise typer.Exit(super().invoke(ctx) or 0)

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_type(super().get_params(ctx))

    @contextmanager
    def errors_printed(self) -> Iterator[None]:
        """Turn an error that the user can fix into its message and its exit code; every other error is raised again."""
        try:
            yield
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(75) from None
        except BrokenPipeError:  # the reader closed the pipe, as in `pipeline plan … | head`
            sys.stderr.close()
            raise typer.Exit(1) from None
        except Exception as error:
            code, lines = tables.error_message(error, self.commands, self.words)
            if not lines:
                raise
            print(*map(without_controls, lines), sep="\n", file=sys.stderr)
            raise typer.Exit(code) from None


def _is_flag(param: Any) -> bool:
    return bool(getattr(param, "is_flag", False))


def _without_type(params: list[Any]) -> list[Any]:
    """Parameters for the help, which shows a flag without `<bool>`."""
    for param in filter(_is_flag, params):
        param.metavar = ""
    return params


# The options, each defined once

_option: Any = partial(typer.Option, show_default=False)
_argument: Any = partial(typer.Argument, show_default=False)


def _complete_stage(ctx: typer.Context) -> list[str]:
    """For shell completion: the stages of the config that is already on the command line."""
    return list(correction.stage_kinds(next(iter(ctx.args), None)))  # an option without its value ends the parsing


def _refuse_assignment(word: Any) -> Any:
    """Refuse `sft.trainer.max_steps=3` as an argument: it is neither a config nor the name of a data set."""
    if word is not None and correction.is_assignment(str(word)):
        raise typer.BadParameter("it needs `--set`")
    return word


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"stagewise {version('stagewise')}")
        raise typer.Exit


SAVES = Path("saves")
Config = Annotated[Path, _argument(metavar="CONFIG", help="A YAML file.", callback=_refuse_assignment)]
Saves = Annotated[Path, _option("--saves", metavar="DIR", help="The folder of the outputs (default: saves).")]
SET_HELP = "Override one value, such as sft.trainer.learning_rate=2e-5."
Assignments = Annotated[list[str] | None, _option("--set", metavar="KEY.PATH=VALUE", help=SET_HELP)]
_stage = {"metavar": "STAGE", "autocompletion": _complete_stage}
Until = Annotated[str | None, _option("--until", help="Stop after this stage.", **_stage)]
FRESH_HELP = "Start this stage over instead of resuming it or keeping its result."
Fresh = Annotated[list[str] | None, _option("--fresh", help=FRESH_HELP, **_stage)]
Version = Annotated[bool, _option("--version", help="Show the version.", is_eager=True, callback=_show_version)]
AsJson = Annotated[bool, _option("--json", help="Write JSON for scripts.")]

app = typer.Typer(
    cls=Commands,
    help="One YAML file takes a base model to a domain model: PT, SFT, DPO, merge, 4-bit GPTQ.",
    epilog=f"Example: pipeline plan {EXAMPLE}",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _command(panel: str, example: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function as a command; its docstring is the help."""
    return app.command(cls=Command, rich_help_panel=panel, epilog=f"Example: pipeline {example}")


@app.callback()
def _top(version: Version = False) -> None:
    pass


# The commands


@_command("Run", f"run {EXAMPLE} --until sft")
def run(
    config: Config,
    saves: Saves = SAVES,
    assignments: Assignments = None,
    until: Until = None,
    fresh: Fresh = None,
    ignore_gates: Annotated[
        bool, _option("--ignore-gates", help="Go on after a failed gate; this is recorded.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Run every stage that is not done; run it again to go on after a stop."""
    from pipeline.errors import GateClosed
    from pipeline.plan.step import refuse_plan
    from pipeline.run import runner
    from pipeline.run.answers import ask_question
    from pipeline.views.progress import View

    planned = _planned(config, saves, assignments, until, fresh=fresh or (), ignore_gates=ignore_gates, fetch=True)
    refuse_plan(planned)
    out = tables.console(silent=as_json)
    for note in planned.notes:
        tables.print_plain(out, f"note: {note}")
    try:
        with View(planned, out) as view:
            records = runner.run(planned, view)
    except GateClosed:
        tables.print_evaluations(out, planned, view.states)
        raise
    answers = ask_question(planned)
    if as_json:
        return _print_json(tables.run_as_json(planned, records, answers))
    tables.print_run(out, planned, view, records, answers)
    return 0


@_command("Run", f"plan {EXAMPLE} --set sft.trainer.learning_rate=2e-5")
def plan(
    config: Config,
    saves: Saves = SAVES,
    assignments: Assignments = None,
    until: Until = None,
    fresh: Fresh = None,
    as_json: AsJson = False,
) -> int:
    """Show what would run, and why."""
    from pipeline.views.progress import plan_table

    planned = _planned(config, saves, assignments, until, fresh=fresh or ())
    if as_json:
        return _print_json(tables.plan_as_json(planned))
    tables.console().print(plan_table(planned))
    for note in planned.notes:
        print(without_controls(f"note: {note}"))
    return 0


@_command("Run", f"validate {EXAMPLE}")
def validate(
    config: Config, saves: Saves = SAVES, assignments: Assignments = None, until: Until = None, as_json: AsJson = False
) -> int:
    """Check the config, the data and the models; run nothing."""
    planned = _planned(config, saves, assignments, until)
    stages = [step.name for step in planned.steps]
    if as_json:
        return _print_json({"stages": stages, "rows": planned.rows, "notes": planned.notes}, indent=None)
    for note in planned.notes:
        print(without_controls(f"note: {note}"))
    rows = ", ".join(f"{name} {count} rows" for name, count in planned.rows.items())
    print(f"{config}: {len(stages)} stages ({' → '.join(stages)}); {rows or 'no data'}; no problem found")
    return 0


@_command("Inspect", f"data {EXAMPLE} consult --rows 5")
def data(
    config: Config,
    name: Annotated[
        str | None, _argument(metavar="NAME", help="One data set (default: all).", callback=_refuse_assignment)
    ] = None,
    saves: Saves = SAVES,
    rows: Annotated[int, _option("--rows", metavar="N", help="How many rows to show (default: 3).")] = 3,
    assignments: Assignments = None,
    until: Until = None,
    as_json: AsJson = False,
) -> int:
    """Show a summary of the data, and rows as the model sees them with the trained text marked."""
    from pipeline.views import samples

    views = samples.inspect_data(_planned(config, saves, assignments, until), name, rows)
    if as_json:
        return _print_json([asdict(view) for view in views])
    out = tables.console()
    for view in views:
        tables.print_data(out, view)
    return 0


@_command("Inspect", f"status {EXAMPLE}")
def status(
    config: Annotated[Path | None, _argument(metavar="CONFIG", help="A YAML file (default: all).")] = None,
    saves: Saves = SAVES,
    as_json: AsJson = False,
) -> int:
    """Show the state of each stage of one config, or of all configs."""
    from pipeline.config.pipeline import folder_name
    from pipeline.errors import ConfigError
    from pipeline.saves.links import not_the_owner
    from pipeline.views import survey

    if config is not None and (text := not_the_owner(saves / folder_name(config), config)) is not None:
        raise ConfigError([text])
    statuses = survey.stage_statuses(saves, folder_name(config) if config is not None else None)
    rows = [{**asdict(status), "folder": str(status.folder)} for status in statuses]
    if as_json:
        return _print_json(rows)
    if config is not None and not config.is_file():
        raise ConfigError([f"{config}: there is no such file"])
    if rows:
        tables.print_rows(rows)
    else:
        of = f" of `{config}`" if config is not None else ""
        print(f"nothing{of} in {saves} yet; `pipeline run CONFIG` fills it")
    return 0


PAGE_HELP = "The page (default: DIR/CONFIG/report.html)."
CURVES_HELP = "Also write loss.png and metrics.csv of each training stage, in CURVES/STAGE/."


@_command("Inspect", f"report {EXAMPLE} --out report.html")
def report(
    config: Config,
    saves: Saves = SAVES,
    out: Annotated[Path | None, _option("--out", metavar="FILE", help=PAGE_HELP)] = None,
    curves: Annotated[Path | None, _option("--curves", metavar="CURVES", help=CURVES_HELP)] = None,
    assignments: Assignments = None,
    until: Until = None,
    as_json: AsJson = False,
) -> int:
    """Write one HTML page of a run: data, curves, figures, answers, gates, lineage."""
    from pipeline.errors import ConfigError
    from pipeline.views import report as report_view

    planned = _planned(config, saves, assignments, until)
    out = out or saves / planned.pipeline.name / "report.html"
    if out.is_dir():
        raise ConfigError([f"--out {out}: is a folder; name a file, such as {out / 'report.html'}"])
    page = report_view.render(planned, assignments or [])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    written = [str(path) for path in (out, *(report_view.write_curves(planned, curves) if curves else ()))]
    if as_json:
        return _print_json({"written": written}, indent=None)
    print(*written, sep="\n")
    return 0


@_command("Inspect", "diff tiny bloomz_med")
def diff(
    a: Annotated[str, _argument(metavar="A", help="A YAML file, its name in DIR, or a folder such as saves/tiny.")],
    b: Annotated[str, _argument(metavar="B", help="Another.")],
    saves: Saves = SAVES,
    as_json: AsJson = False,
) -> int:
    """Show what differs between two runs: settings, figures, answers."""
    from pipeline.views import diff as diff_view

    difference = diff_view.compare(a, b, saves)
    print(diff_view.as_json(difference) if as_json else diff_view.as_text(difference))
    return 0


@_command("Clean up", "gc --saves saves")
def gc(
    saves: Saves = SAVES,
    yes: Annotated[bool, _option("--yes", help="Remove without asking.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove finished and unfinished work that no config refers to; asks first."""
    from pipeline.saves.artifact import size_of
    from pipeline.views import survey

    leftovers, doubts = survey.find_leftovers(saves)
    rows = [{"folder": str(item.folder), "size": size_of(item.bytes), "why": item.why} for item in leftovers]
    if not as_json:
        for doubt in doubts:
            print(f"note: {doubt}, so it is not known what it needs; finished and unfinished stages are kept")
        if not leftovers:
            print(f"everything in {saves} is in use")
            return 0
        tables.print_rows(rows)
    agreed = yes or (not as_json and _agreed(len(leftovers), size_of(sum(item.bytes for item in leftovers))))
    # Asked again, because a run may have started meanwhile.
    still = {item.folder for item in survey.find_leftovers(saves)[0]} if agreed else set()
    removed = [item for item in leftovers if item.folder in still and survey.remove(item)]
    if as_json:
        names = {str(item.folder) for item in removed}
        return _print_json([{**row, "removed": row["folder"] in names} for row in rows])
    for item in leftovers if removed else []:
        if item not in removed:
            print(f"{item.folder}: kept, because a run has started to use it")
    freed = sum(item.bytes for item in removed)
    print(f"removed {len(removed)} of {len(leftovers)}, {size_of(freed)}" if removed else "nothing was removed")
    return 0


def _agreed(count: int, size: str) -> bool:
    """Ask the user; without a terminal only `--yes` agrees."""
    if not sys.stdin.isatty():
        print("`--yes` removes them without asking")
        return False
    try:
        return input(f"remove these {count}, {size}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _planned(config: Path, saves: Path, assignments: list[str] | None, until: str | None, **more: Any) -> "Plan":
    """The plan of a config.

    Raises:
        ConfigError: with every problem of the config, the data and the models.
    """
    from pipeline.config.checker import load_config
    from pipeline.plan.placing import build_plan
    from pipeline.plan.step import check_plan

    planned = build_plan(load_config(config, assignments or ()), saves, until=until, **more)
    check_plan(planned)
    return planned


def _print_json(value: Any, indent: int | None = 1) -> int:
    print(json.dumps(value, ensure_ascii=False, indent=indent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
