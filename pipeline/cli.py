"""Words on a command line in, an exit code out; the only place that prints.

Exit codes: 0 done, 1 a stage failed, 2 the config or the command line is wrong, 3 a gate said no, 75 interrupted.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, GateClosed
from stages.runtime.errors import PipelineError, explain

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.plan.step import Plan
    from pipeline.views.samples import Seen


DESCRIPTION = "One YAML file takes a base model to a domain model: PT, SFT, DPO, merge, 4-bit GPTQ."


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = _parser().parse_args(words)
    for stream in (sys.stdout, sys.stderr):  # a GBK or ASCII console shows `?` instead of ending the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code: int = arguments.command(arguments)
    except PipelineError as error:
        _complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 75
    except BrokenPipeError:  # the reader of our output left, as in `pipeline plan … | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        text = explain(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 1
    return code


def _complain(error: PipelineError) -> None:
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    for problem in problems:
        print(f"error: {problem}" if not isinstance(error, ConfigError) else problem, file=sys.stderr)
    if isinstance(error, ConfigError) and len(problems) > 1:
        print(f"{len(problems)} problems; nothing was run", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pipeline", description=DESCRIPTION)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command, text in (
        ("run", _run, "run every stage that is not done; run again to go on after a stop"),
        ("plan", _plan, "show what would run, and why"),
        ("validate", _validate, "check the config, the data and the models; run nothing"),
        ("data", _data, "show what the data comes to, and rows as the model sees them, with what is in the loss"),
        ("status", _status, "show what the stages of a config, or of all, have come to"),
        ("report", _report, "write one HTML page of a run: data, curves, figures, answers, gates, lineage"),
        ("diff", _diff, "show what differs between two runs: settings, figures, answers"),
        ("gc", _gc, "remove finished and unfinished work that no config refers to; asks first"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        if name == "diff":
            sub.add_argument("a", metavar="A", help="a YAML file, its name in DIR, or a folder such as saves/tiny")
            sub.add_argument("b", metavar="B", help="another")
        elif name != "gc":
            sub.add_argument("config", type=Path, nargs="?" if name == "status" else None, help="a YAML file")
        sub.add_argument("--saves", type=Path, default=Path("saves"), metavar="DIR", help="outputs (default: saves)")
        if name == "data":
            sub.add_argument("name", nargs="?", help="one data set; all of them unless named")
            sub.add_argument("--rows", type=int, default=3, metavar="N", help="how many rows to show (default: 3)")
        if name == "gc":
            sub.add_argument("--yes", action="store_true", help="remove without asking")
        if name == "report":
            sub.add_argument("--out", type=Path, metavar="FILE", help="the page (default: DIR/CONFIG/report.html)")
            help_text = "also write loss.png and metrics.csv of each training stage, in CURVES/STAGE/"
            sub.add_argument("--curves", type=Path, metavar="CURVES", help=help_text)
        if name not in ("status", "gc", "diff"):
            sub.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="KEY.PATH=VALUE",
                dest="assignments",
                help="override one value, such as sft.trainer.learning_rate=2e-5",
            )
            sub.add_argument("--until", metavar="STAGE", help="stop after this stage")
        if name in ("plan", "run"):
            sub.add_argument(
                "--fresh",
                action="append",
                default=[],
                metavar="STAGE",
                help="start this stage over, whatever it could go on from",
            )
        if name == "run":
            sub.add_argument("--ignore-gates", action="store_true", help="go on where a gate says no; it is recorded")
        sub.add_argument("--json", action="store_true", help="write JSON for scripts")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"stagewise {version('stagewise')}")
        parser.exit()


def _planned(arguments: argparse.Namespace, *, fetch: bool = False) -> "Plan":
    from pipeline.config.checker import load_config
    from pipeline.plan.placing import build_plan

    pipeline = load_config(arguments.config, arguments.assignments)
    fresh, ignore = getattr(arguments, "fresh", []), getattr(arguments, "ignore_gates", False)
    return build_plan(pipeline, arguments.saves, fetch=fetch, until=arguments.until, fresh=fresh, ignore_gates=ignore)


def _console() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _validate(arguments: argparse.Namespace) -> int:
    from pipeline.plan.step import check_plan

    planned = _planned(arguments)
    check_plan(planned)
    stages = [step.name for step in planned.steps]
    if arguments.json:
        print(json.dumps({"stages": stages, "rows": planned.rows, "notes": planned.notes}, ensure_ascii=False))
        return 0
    for note in planned.notes:
        print(f"note: {note}")
    rows = ", ".join(f"{name} {count} rows" for name, count in planned.rows.items())
    print(f"{arguments.config}: {len(stages)} stages ({' → '.join(stages)}); {rows or 'no data'}; no problem found")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from pipeline.plan.step import check_plan
    from pipeline.views.progress import plan_table

    planned = _planned(arguments)
    check_plan(planned)
    if arguments.json:
        steps = [
            {
                "stage": step.name,
                "use": step.stage.use,
                "state": step.state,
                "why": step.why,
                "folder": str(step.folder),
                "fingerprint": step.fingerprint,
                "recipe": step.recipe,
                "inputs": step.inputs,
            }
            for step in planned.steps
        ]
        print(json.dumps({"steps": steps, "rows": planned.rows, "notes": planned.notes}, ensure_ascii=False, indent=1))
        return 0
    _console().print(plan_table(planned))
    for note in planned.notes:
        print(f"note: {note}")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from pipeline.plan.step import check_plan
    from pipeline.views import samples

    planned = _planned(arguments)
    check_plan(planned)
    found = samples.look(planned, arguments.name, arguments.rows)
    if arguments.json:
        print(json.dumps([asdict(seen) for seen in found], ensure_ascii=False, indent=1))
        return 0
    console = _console()
    for seen in found:
        _print_data(console, seen)
    return 0


def _print_data(console: "Console", seen: "Seen") -> None:
    """One data set as one stage reads it; what is in the loss is green, or between ⟦ and ⟧ where there is no colour."""
    from rich.text import Text

    account, tokens = seen.account, seen.tokens
    lines = [f"{account.read:,} rows read, {account.kept:,} kept, {account.changed:,} of them changed by cleaning"]
    lines += [f"{lost.rows:,} dropped, {reason}: {'; '.join(lost.first)}" for reason, lost in account.dropped.items()]
    lines += [f"{count:,} {kind} found" for kind, count in account.personal_data.items()]
    if tokens is None:
        lines.append("no tokens yet: the model that the stage starts from has not been made")
    else:
        share = tokens.trained / max(1, tokens.tokens)
        lines.append(f"{tokens.tokens:,} tokens in {tokens.sequences:,} sequences, {share:.1%} of them in the loss")
        lines.append(
            f"longest {tokens.longest:,} tokens, {tokens.truncated:,} cut off at max_length, "
            f"{tokens.untrained:,} dropped because nothing to train is left, {tokens.padding:.1%} padding if not packed"
        )
    console.print(Text(f"{seen.data}, as `{seen.stage}` reads it", style="bold"))
    for line in lines:
        console.print(Text(f"  {line}"), soft_wrap=True)
    for number, sample in enumerate(seen.samples, 1):
        text = Text(f"  sequence {number}\n", style="dim")
        for words, in_loss in sample:
            marked = words if console.is_terminal else f"⟦{words}⟧"
            text.append(marked if in_loss else words, style="not dim green" if in_loss else "not dim")
        console.print(text, soft_wrap=True)
    console.print()


def _run(arguments: argparse.Namespace) -> int:
    from pipeline.plan.step import check_plan, refuse_plan
    from pipeline.run import runner
    from pipeline.run.answers import ask_question
    from pipeline.views.progress import View, result_table

    planned = _planned(arguments, fetch=True)
    check_plan(planned)
    refuse_plan(planned)
    console = _console()
    quiet = arguments.json
    for note in [] if quiet else planned.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    try:
        with View(planned, _silent() if quiet else console) as view:
            records = runner.run(planned, view)
    except GateClosed:
        if not quiet:
            _print_evaluations(console, planned)
        raise
    spoken = ask_question(planned)
    if quiet:
        steps = [
            {"stage": step.name, "folder": str(step.folder), "metrics": record["metrics"], "seconds": record["seconds"]}
            for step, record in zip(planned.steps, records, strict=True)
        ]
        print(json.dumps({"steps": steps, "answers": spoken}, ensure_ascii=False, indent=1))
        return 0
    console.print()
    console.print(result_table(planned, records, {name: row.state for name, row in view.rows.items()}))
    _print_evaluations(console, planned)
    if spoken:
        console.print(f"\nThe same question to each model: {planned.pipeline.question}", markup=False, highlight=False)
        for name, text in spoken.items():
            console.print(f"  {name}: {text.strip() or '(nothing)'}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _print_evaluations(console: "Console", planned: "Plan") -> None:
    """The table of each evaluation that is finished."""
    from pipeline.views.progress import evaluation_table

    for step in planned.steps:
        if step.stage.use == "evaluate" and step.folder.is_dir():
            console.print(f"\n{step.name}, all of it in {step.link}", markup=False, highlight=False)
            console.print(evaluation_table(step.folder))


def _silent() -> "Console":
    from io import StringIO

    from rich.console import Console

    return Console(file=StringIO(), width=160)


def _status(arguments: argparse.Namespace) -> int:
    from pipeline.config.pipeline import folder_name
    from pipeline.views import survey

    name = folder_name(arguments.config) if arguments.config is not None else None
    rows = [{**asdict(entry), "folder": str(entry.folder)} for entry in survey.entries(arguments.saves, name)]
    if arguments.json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return 0
    if arguments.config is not None and not arguments.config.is_file():
        raise ConfigError([f"{arguments.config}: there is no such file"])
    if not rows:
        of = f" of `{arguments.config}`" if arguments.config is not None else ""
        print(f"nothing{of} in {arguments.saves} yet; `pipeline run CONFIG` fills it")
        return 0
    _print_table(rows)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pipeline.plan.step import check_plan
    from pipeline.views import report

    planned = _planned(arguments)
    check_plan(planned)
    out = arguments.out or arguments.saves / planned.pipeline.name / "report.html"
    if out.is_dir():
        raise ConfigError([f"--out {out}: is a folder; name a file, such as {out / 'report.html'}"])
    page = report.page(planned, arguments.assignments)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    written = [out, *(report.write_curves(planned, arguments.curves) if arguments.curves else [])]
    if arguments.json:
        print(json.dumps({"written": [str(path) for path in written]}, ensure_ascii=False))
        return 0
    for path in written:
        print(path)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from pipeline.views import diff

    found = diff.compare(arguments.a, arguments.b, arguments.saves)
    print(diff.as_json(found) if arguments.json else diff.text(found))
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    from pipeline.saves import artifact
    from pipeline.views import survey

    found = survey.leftovers(arguments.saves)
    rows = [{"folder": str(item.folder), "size": artifact.size_of(item.bytes), "why": item.why} for item in found]
    if not arguments.json:
        if not found:
            print(f"everything in {arguments.saves} is in use")
            return 0
        _print_table(rows)
    agreed = arguments.yes or _agreed(arguments, found)
    still = {item.folder for item in survey.leftovers(arguments.saves)} if agreed else set()  # a run may have begun
    removed = [item for item in found if item.folder in still and survey.remove(item)]
    if arguments.json:
        names = {str(item.folder) for item in removed}
        print(json.dumps([{**row, "removed": row["folder"] in names} for row in rows], ensure_ascii=False, indent=1))
        return 0
    for item in found if removed else []:
        if item not in removed:
            print(f"{item.folder}: a run has begun to use it, so it stays")
    freed = sum(item.bytes for item in removed)
    print(f"removed {len(removed)} of {len(found)}, {artifact.size_of(freed)}" if removed else "nothing was removed")
    return 0


def _agreed(arguments: argparse.Namespace, found: Sequence[Any]) -> bool:
    """Ask on a terminal; elsewhere only `--yes` removes."""
    from pipeline.saves import artifact

    if arguments.json or not sys.stdin.isatty():
        if not arguments.json:
            print("`--yes` removes them without asking")
        return False
    total = artifact.size_of(sum(item.bytes for item in found))
    try:
        return input(f"remove these {len(found)}, {total}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _print_table(rows: Sequence[dict[str, str]]) -> None:
    """Rows under the names of their values."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    _console().print(table)


if __name__ == "__main__":
    sys.exit(main())
