"""What the command line prints: tables, coloured text, JSON and errors."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import TyperException

from pipeline.views.controls import without_controls
from stages.chat.encoding import reasons

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.plan.step import Plan
    from pipeline.views.progress import View
    from pipeline.views.samples import DataView


# Tables, coloured text and JSON


def console(*, silent: bool = False) -> "Console":
    """The standard output, 160 columns wide where it is not a terminal; with `silent`, nothing is shown."""
    from rich.console import Console

    if silent:
        return Console(file=StringIO(), width=160)
    return Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def counting(*, silent: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, moved by (done, of); on a pipe, or if silent, nothing is shown."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    out = console(silent=silent)
    if not out.is_terminal:
        yield lambda done, of: None
        return
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=out, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def print_plain(out: "Console", text: str) -> None:
    """Print text without markup, colours and line breaks from rich, and without control characters."""
    out.print(without_controls(text), markup=False, highlight=False, soft_wrap=True)


def print_rows(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows of equal keys as a table; the keys of the first row are the heads of its columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    console().print(table)


_SHOWN = 6000  # characters of a sequence that are shown in the terminal; `--json` has all of them


def print_findings(findings: Sequence[tuple[str, str, str, str]]) -> None:
    """What was looked at, its state (`ok`, `note` or `wrong`), what was found, and the cure."""
    out = console()
    colours = {"ok": "green", "note": "yellow", "wrong": "red"}
    for what, state, text, cure in findings:
        out.print(f"{state:6}", style=colours[state], end="", highlight=False)
        line = f"{what}: {text}" + (f"; {cure}" if cure else "")
        out.print(without_controls(line), markup=False, highlight=False, soft_wrap=True)


def print_data(out: "Console", view: "DataView") -> None:
    """Print one data set as one stage reads it. Trained text is green, or between ⟦ and ⟧ without a terminal.

    Of a long sequence the start and the end are printed.
    """
    from rich.text import Text

    out.print(Text(f"{view.data}, as `{view.stage}` reads it", style="bold"))
    for line in _data_summary(view):
        out.print(Text(f"  {line}"), soft_wrap=True)
    for number, sample in enumerate(view.samples, 1):
        label = f", {sample.label}" if sample.label else ""
        text = Text(f"  sequence {number}{label}\n", style="dim")
        for part, in_loss, missing in _shortened(sample.parts):
            if missing:
                text.append(f"\n  … {missing:,} characters are not shown …\n", style="yellow")
            shown = without_controls(part)
            marked = shown if out.is_terminal else f"⟦{shown}⟧"
            text.append(marked if in_loss else shown, style="not dim green" if in_loss else "not dim")
        if sample.rest:
            text.append(f"\n  … {sample.rest}", style="yellow")
        out.print(text, soft_wrap=True)
    out.print()


def _shortened(parts: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, bool, int]]:
    """The start and the end of a long sequence, or all of a short one.

    Yields a text, whether it is in the loss, and the number of characters that are left out before it.
    """
    length = sum(len(text) for text, _ in parts)
    first, last = (length, length) if length <= _SHOWN else (_SHOWN * 3 // 4, length - _SHOWN // 4)
    left_out, start = last - first, 0
    for text, in_loss in parts:
        if head := text[: max(0, first - start)]:
            yield head, in_loss, 0
        if tail := text[max(0, last - start) :] if last < start + len(text) else "":
            yield tail, in_loss, left_out
            left_out = 0
        start += len(text)


def _data_summary(view: "DataView") -> Iterator[str]:
    """How many rows and tokens a stage reads, drops and trains on."""
    account, tokens = view.account, view.tokens
    yield f"{account.read:,} rows read, {account.kept:,} kept, {account.changed:,} of them changed by cleaning"
    for reason, dropped in account.dropped.items():
        yield f"{dropped.rows:,} dropped, {reason}: {'; '.join(dropped.first)}"
    for kind, count in account.personal_data.items():
        yield f"{count:,} {kind} found"
    yield from account.notes
    if tokens is None:
        yield "no tokens yet: the model that the stage starts from does not exist yet"
        return
    share = tokens.trained / max(1, tokens.tokens)
    yield f"{tokens.tokens:,} tokens in {tokens.sequences:,} sequences, {share:.1%} of them in the loss"
    yield (
        f"longest {tokens.longest:,} tokens, {tokens.truncated:,} cut off at max_length, "
        f"{tokens.untrained:,} dropped because nothing to train is left, {tokens.padding:.1%} padding if not packed"
    )
    if tokens.refused:
        yield f"{tokens.refused:,} dropped, refused by the chat template: {reasons(tokens.why)}"
    if view.warning:
        yield f"warning: {view.warning}"


def print_run(
    out: "Console", planned: "Plan", view: "View", records: Sequence[Mapping[str, Any]], answers: Mapping[str, str]
) -> None:
    """Print the stages of a finished run, the figures of its evaluations, and each model's answer to the question."""
    from pipeline.views.progress import result_table

    out.print()
    out.print(result_table(planned, records, view.states))
    print_evaluations(out, planned, view.states)
    if answers:
        out.print(f"\nThe same question to each model: {planned.pipeline.question}", markup=False, highlight=False)
    for name, text in answers.items():
        print_plain(out, f"  {name}: {text.strip() or '(nothing)'}")
    for number, line in enumerate(view.warnings):
        out.print(f"{'' if number else chr(10)}warning: {line}", style="yellow", markup=False, highlight=False)


def print_next(out: "Console", words: Sequence[str], *, has_model: bool) -> None:
    """Print the commands that make sense after a run; `words` are the config and the options that they need."""
    out.print("\nnext:")
    after = [("report", "figures, curves and answers as one page")]
    if has_model:
        after = [("chat", "talk to the model"), *after, ("serve", "an API, and a page for people")]
    lines = [(shlex.join([program(), command, *words]), what) for command, what in after]
    width = max(len(line) for line, _ in lines)
    for line, what in lines:
        print_plain(out, f"  {line:{width}}  # {what}")


def program() -> str:
    """How this program was called: `pipeline` if the shell finds it by that name, its path if not."""
    called = sys.argv[0]
    found = shutil.which("pipeline")
    if Path(called).name != "pipeline" or (found is not None and os.path.realpath(found) == os.path.realpath(called)):
        return "pipeline"
    near = os.path.relpath(called)
    return called if near.startswith("..") else near


def print_evaluations(out: "Console", planned: "Plan", states: Mapping[str, str]) -> None:
    """Print the table of each evaluation that the run has come to; `states` are those of its view."""
    from pipeline.views.progress import evaluation_table, missing_figures
    from stages.measuring.table import read_table

    for step in planned.reports:
        if states[step.name] in ("done", "ran"):
            evaluation = read_table(step.folder)
            out.print(f"\n{step.name}, all of it in {step.link}", markup=False, highlight=False)
            table = evaluation_table(evaluation)
            is_too_wide = out.measure(table, options=out.options.update(max_width=10_000)).maximum > out.width
            out.print(evaluation_table(evaluation, narrow=True) if is_too_wide else table)
            for line in missing_figures(evaluation):
                print_plain(out, line)


def plan_as_json(planned: "Plan") -> dict[str, Any]:
    """The JSON of `plan --json`."""
    from pipeline.views.estimates import as_json

    known = planned.estimates
    steps = [
        {
            "stage": step.name,
            "use": step.use,
            "state": step.state,
            "why": step.why,
            "folder": str(step.folder),
            "fingerprint": step.fingerprint,
            "recipe": step.recipe,
            "inputs": step.identities,
            **({"estimate": as_json(known[step.name])} if step.name in known else {}),
        }
        for step in planned.steps
    ]
    return {"steps": steps, "rows": planned.rows, "notes": planned.notes}


def run_as_json(planned: "Plan", records: Sequence[Mapping[str, Any]], answers: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of `run --json`."""
    steps = [
        {"stage": step.name, "folder": str(step.folder), "metrics": record["metrics"], "seconds": record["seconds"]}
        for step, record in zip(planned.steps, records, strict=True)
    ]
    return {"steps": steps, "answers": answers}


# Errors


def error_message(error: Exception, commands: Mapping[str, Any], words: Sequence[str]) -> tuple[int, list[str]]:
    """The exit code and the lines for an error that the user can fix; no lines for an internal error.

    `commands` are Click's commands by name, `words` the command line without the name of the program.
    """
    from pipeline.errors import ConfigError
    from pipeline.views.correction import Correction
    from stages.runtime.errors import Interrupted, PipelineError, explain

    if isinstance(error, TyperException):
        return 2, [f"error: {Correction(commands).sentence(words, error.format_message())}"]
    if isinstance(error, ConfigError):
        count = len(error.problems)
        return 2, [*error.problems, *([f"{count} problems; nothing was run"] if count > 1 else [])]
    if isinstance(error, Interrupted):
        return error.exit_code, [str(error)]
    if isinstance(error, PipelineError):
        return error.exit_code, [f"error: {error}"]
    text = explain(error) if isinstance(error, OSError) else None
    return 1, [f"error: {text}"] if text else []
