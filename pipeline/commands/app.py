"""What every command shares: errors → a message and an exit code, the options, and the plan of a config."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    from pipeline.plan.estimate import Ask
    from pipeline.plan.step import Plan


PANELS = ("Start", "Run", "Use", "Inspect", "Clean up")
"""The panels of the help, in their order."""

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

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands by panel; within a panel as they are written."""
        return sorted(super().list_commands(ctx), key=self._panel)

    def _panel(self, name: str) -> int:
        return PANELS.index(vars(self.commands[name])["rich_help_panel"])

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

option: Any = partial(typer.Option, show_default=False)
argument: Any = partial(typer.Argument, show_default=False)


def _complete_stage(ctx: typer.Context) -> list[str]:
    """For shell completion: the stages of the config that is already on the command line."""
    return list(correction.stage_kinds(next(iter(ctx.args), None)))  # an option without its value ends the parsing


def refuse_assignment(word: Any) -> Any:
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
Config = Annotated[Path, argument(metavar="CONFIG", help="A YAML file.", callback=refuse_assignment)]
Saves = Annotated[Path, option("--saves", metavar="DIR", help="The folder of the outputs (default: saves).")]
SET_HELP = "Override one value, such as sft.trainer.learning_rate=2e-5."
Assignments = Annotated[list[str] | None, option("--set", metavar="KEY.PATH=VALUE", help=SET_HELP)]
stage_option: dict[str, Any] = {"metavar": "STAGE", "autocompletion": _complete_stage}
Until = Annotated[str | None, option("--until", help="Stop after this stage.", **stage_option)]
FRESH_HELP = "Start this stage over instead of resuming it or keeping its result."
Fresh = Annotated[list[str] | None, option("--fresh", help=FRESH_HELP, **stage_option)]
Version = Annotated[bool, option("--version", help="Show the version.", is_eager=True, callback=_show_version)]
AsJson = Annotated[bool, option("--json", help="Write JSON for scripts.")]

app = typer.Typer(
    cls=Commands,
    help="One YAML file takes a base model to a domain model: PT, SFT, DPO, merge, 4-bit GPTQ.",
    epilog=f"Example: pipeline plan {EXAMPLE}",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def command(panel: str, example: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register a function as a command; its docstring is the help."""
    return app.command(cls=Command, rich_help_panel=panel, epilog=f"Example: pipeline {example}")


@app.callback()
def _top(version: Version = False) -> None:
    pass


def planned_steps(
    config: Path,
    saves: Path,
    assignments: list[str] | None,
    until: str | None,
    *,
    ask: "Ask | None" = None,
    **more: Any,
) -> "Plan":
    """The plan of a config, with the estimates that are asked for.

    Raises:
        ConfigError: with every problem of the config, the data and the models.
    """
    from pipeline.config.checker import load_config
    from pipeline.plan import estimate, machine
    from pipeline.plan.placing import build_plan
    from pipeline.plan.step import check_plan
    from pipeline.saves.locks import broken_promise

    planned = build_plan(load_config(config, assignments or ()), saves, until=until, **more)
    check_plan(planned)
    if ask is not None:
        planned.estimates = estimate.estimates(planned, ask, lambda line: print(line, file=sys.stderr, flush=True))
    notes = machine.memory_notes(planned) if ask is None or not ask.compute else ()
    planned.notes = list(dict.fromkeys([*planned.notes, *notes, *filter(None, [broken_promise(saves)])]))
    return planned


def print_json(value: Any, indent: int | None = 1) -> int:
    """Print JSON as every reader takes it: a figure that is NaN or infinite is null."""
    print(json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False))
    return 0


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
