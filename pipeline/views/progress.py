"""What people see of a run: a live view on a terminal, plain lines elsewhere, and tables before and after the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from pipeline.plan.history import NEW
from pipeline.plan.step import Plan, Step
from pipeline.saves import artifact
from pipeline.views.controls import without_controls
from stages.runtime.errors import Interrupted

MARKS = {
    "waiting": ("·", "dim"),
    "running": ("▸", "bold cyan"),
    "done": ("✓", "green"),
    "ran": ("✓", "green"),
    "failed": ("✗", "red"),
    "stopped": ("■", "yellow"),
}
"""State of a stage → its mark, and the style of the mark and the name."""


# The run


@dataclass
class StageProgress:
    """What is shown of one stage."""

    task: Task
    """Its steps, bar and times, kept by rich."""
    message: str
    """Why the stage will run, then what it is doing, and when it is finished its key figure."""
    expected: float | None = None
    """Seconds that it took when it ran last; None if it is done or that is not known."""
    estimated: float | None = None
    """Seconds that it takes by its estimate; None if that is not known."""
    state: str = "waiting"
    """A key of MARKS."""
    last_log: tuple[float, float] | None = None
    """Tokens and time of the last log with a count of tokens."""


@dataclass
class View:
    """Shows a run while the view is used as a context: live if `console` is a terminal, as plain lines if not."""

    plan: Plan
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.progress = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # a narrow terminal shortens the bar first
            _StepsColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            _TimeLeftColumn(table_column=Column(no_wrap=True)),
            console=self.console,
            expand=True,
            speed_estimate_period=float("inf"),  # rich's 30 s would drop all samples when a step takes a minute
        )
        self.stages = {step.name: self._waiting(step) for step in self.plan.steps}
        self.warnings: dict[str, None] = {}
        self.live = Live(self, console=self.console, refresh_per_second=5) if self.console.is_terminal else None

    def _waiting(self, step: Step) -> StageProgress:
        task_id = self.progress.add_task(step.name, start=False, total=None, loss="", speed="")
        previous = artifact.read(step.link.resolve()) if step.state != "done" else None
        last, estimate = (previous or {}).get("seconds"), self.plan.estimates.get(step.name)
        seconds = estimate.seconds if estimate is not None and step.state != "done" else None
        return StageProgress(self.progress.tasks[task_id], step.why, expected=last, estimated=seconds)

    def __enter__(self) -> "View":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for stage in self.stages.values():
            if stage.state == "running":
                stage.state = "stopped" if isinstance(error, Interrupted) else "failed"
                self.progress.stop_task(stage.task.id)
        if self.live:
            self.live.stop()

    @property
    def states(self) -> dict[str, str]:
        """Name of each stage → its state, a key of MARKS."""
        return {name: stage.state for name, stage in self.stages.items()}

    def step(self, step: Step, state: str) -> None:
        """Show that a step starts (`running`), has been run (`ran`), or was finished before this run (`done`)."""
        stage = self.stages[step.name]
        stage.state = state
        if state == "running":
            stage.message = step.why if step.state == "resume" else "starts"
            self.progress.start_task(stage.task.id)
            self.print_line(f"{step.name}: starts" + ("" if step.why == NEW else f"; {step.why}"))
            return
        if state == "ran":
            self.progress.stop_task(stage.task.id)
            self.print_line(f"{step.name}: finished in {stage.task.elapsed:.1f} s")
        if self.live and (record := artifact.read(step.folder)) is not None:
            stage.message = key_figure(step, record)

    def event(self, step: Step, event: Mapping[str, Any]) -> None:
        """Show an event of the stage's process."""
        stage = self.stages[step.name]
        kind = event["kind"]
        if kind == "total":
            self.progress.update(stage.task.id, total=event["steps"], completed=event["step"])
            if "batch" in event:
                batch = _batch_size(event)
                stage.message = f"trains with {batch}"
                self.print_line(f"{step.name}: {event['steps']} steps, {batch}")
        elif kind == "step":
            self._advance(stage, event["step"])
        elif kind == "log":
            self._log(step, stage, event)
        elif kind == "note":
            self._note(step, stage, event)

    def _note(self, step: Step, stage: StageProgress, event: Mapping[str, Any]) -> None:
        """Show what a stage says. Warnings, and notes to be kept, stay above the live view; a warning is shown once.

        A note of the plan with the same words was shown before the run.
        """
        text = without_controls(event["text"])
        line = f"{step.name}: {text}"
        if event.get("warning"):
            if line not in self.warnings and f"stage `{step.name}`: {text}" not in self.plan.notes:
                self.warnings[line] = None
                self.console.print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
            return
        stage.message = text
        if self.live is not None and event.get("keep"):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.print_line(line)

    def _advance(self, stage: StageProgress, step: int) -> None:
        self.progress.update(stage.task.id, completed=max(stage.task.completed, step))

    def _log(self, step: Step, stage: StageProgress, event: Mapping[str, Any]) -> None:
        self._advance(stage, event["step"])
        task = stage.task
        if "num_tokens" in event:
            tokens, time = event["num_tokens"], event["time"]
            if stage.last_log and tokens > stage.last_log[0]:
                speed = (tokens - stage.last_log[0]) / max(time - stage.last_log[1], 1e-6)
                self.progress.update(task.id, speed=f"{speed:,.0f} tokens/s")
            stage.last_log = tokens, time
        if "loss" in event:
            self.progress.update(task.id, loss=f"loss {event['loss']:.4g}")
            shown = (task.fields["loss"], task.fields["speed"], _time_left(task))
            figures = ", ".join(filter(None, shown))
            self.print_line(f"{step.name}: step {task.completed:.0f}/{task.total or 0:.0f}, {figures}")

    def print_line(self, line: str) -> None:
        """Print a plain line if there is no live view."""
        if self.live is None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        table = Table.grid(Column(), Column(no_wrap=True), Column(ratio=1), padding=(0, 1), expand=True)
        for name, stage in self.stages.items():
            mark, style = MARKS[stage.state]
            table.add_row(Text(mark, style), Text(name, style), self._progress_of(stage))
        return Group(
            table, Text(self._run_left(), "dim"), ""
        )  # a short last line: the echo of Ctrl-C at the end of a full one would scroll

    def _run_left(self) -> str:
        """How far the run is, and the time that it takes at least: that of this stage, and of later ones what they took
        before, or what their estimates say at the measured speed.

        Empty before the first stage has started.
        """
        stages = self.stages.values()
        finished = sum(stage.state in ("done", "ran") for stage in stages)
        running = next((stage for stage in stages if stage.state == "running"), None)
        if running is None:
            return ""
        waiting = [self._expected(stage) for stage in stages if stage.state == "waiting"]
        now = running.task.time_remaining
        if now is None and running.expected is not None:
            now = max(0.0, running.expected - (running.task.elapsed or 0))
        known = [seconds for seconds in (now, *waiting) if seconds is not None]
        least = "" if len(known) == 1 + len(waiting) else "at least "
        left = f", {least}{duration(sum(known))} left of the run" if known else ""
        return f"{finished} of {len(self.stages)} stages done{left}"

    def _expected(self, stage: StageProgress) -> float | None:
        """The seconds that a waiting stage takes: as when it ran last, or by its estimate.

        An estimate is corrected by the last stage of this run whose real time is known: that shows how fast this
        machine is.
        """
        if stage.expected is not None or stage.estimated is None:
            return stage.expected
        for other in reversed(self.stages.values()):
            left = other.task.time_remaining if other.state == "running" else 0.0
            if other.estimated and other.task.elapsed and other.state in ("ran", "running") and left is not None:
                return stage.estimated * (other.task.elapsed + left) / other.estimated
        return None

    def _progress_of(self, stage: StageProgress) -> RenderableType:
        """One line for a stage that waits or is finished; a bar and a line for one that runs, or has failed."""
        is_finished = stage.state in ("done", "ran")
        message = Text(stage.message, "" if is_finished else "dim", no_wrap=True, overflow="ellipsis")
        if stage.state == "waiting" or not stage.task.started:
            return message
        if is_finished:
            return Text.assemble(f"{stage.task.elapsed:6.1f} s  ", message, no_wrap=True, overflow="ellipsis")
        return Group(self.progress.make_tasks_table([stage.task]), message)


class _StepsColumn(MofNCompleteColumn):
    """Steps as `33/132`; for a stage without steps the time that it has taken."""

    def render(self, task: Task) -> Text:
        return Text(duration(task.elapsed or 0)) if task.total is None else super().render(task)


class _TimeLeftColumn(ProgressColumn):
    """The time that the remaining steps of a running stage take."""

    def render(self, task: Task) -> Text:
        return Text("" if task.finished or task.stop_time else _time_left(task))


def _time_left(task: Task) -> str:
    """Such as `12 min left`; empty before the second step."""
    seconds = task.time_remaining
    return "" if seconds is None else f"{duration(seconds)} left"


def _batch_size(event: Mapping[str, Any]) -> str:
    rows = event["batch"] * event["accumulation"] * event["processes"]
    processes = f"{event['processes']} process{'es' if event['processes'] > 1 else ''}"
    return f"batch {event['batch']} × {event['accumulation']} accumulation × {processes} = {rows} rows a step"


def duration(seconds: float) -> str:
    """A time for people, such as `12 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# The tables


def plan_table(planned: Plan) -> Table:
    """Each stage, whether it will run, why, and its folder."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("stage", "plan", "why", "folder"):
        table.add_column(column, overflow="fold")
    words = {"done": "done", "resume": "goes on", "run": "will run", "refused": "refused"}
    for step in planned.steps:
        table.add_row(_label(step), words[step.state], Text(step.why), Text(str(step.folder)))
    return table


def result_table(planned: Plan, records: Sequence[Mapping[str, Any]], states: Mapping[str, str]) -> Table:
    """Each stage of a finished run: what happened, its time, its key figure and its folder.

    `records` are those of the steps in their order; `states` are the `states` of the run's view.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("stage", "what happened", "time", "key figure", "folder"):
        table.add_column(column, overflow="fold")
    for step, record in zip(planned.steps, records, strict=True):
        what = {"ran": "ran", "done": "was done already"}[states[step.name]]
        table.add_row(
            _label(step), what, duration(record["seconds"]), Text(key_figure(step, record)), Text(str(step.link))
        )
    return table


def key_figure(step: Step, record: Mapping[str, Any]) -> str:
    """The key figure of a finished step, which its kind of stage chooses."""
    return str(step.stage.headline(record["metrics"]))


def evaluation_table(evaluation: Mapping[str, Any], *, narrow: bool = False) -> Table:
    """The figures of an evaluation, a column for each model; with `narrow`, a name goes on below after each `_`."""
    table = Table(box=None, pad_edge=False, padding=(0, 1 if narrow else 2, 0, 0), header_style="bold")
    for column in ("metric", "data"):
        table.add_column(column, no_wrap=True)
    for model in evaluation["models"]:
        table.add_column(model, overflow="fold", max_width=32)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for figure in evaluation["figures"]:
        cell = "–" if figure["value"] is None else f"{figure['value']:.4g}"
        if narrow and len(cell) > 8:
            cell = f"{figure['value']:.2g}"
        rows.setdefault((figure["metric"], figure["data"]), {})[figure["model"]] = cell
    for names, by_model in rows.items():
        cells = [by_model.get(model, "–") for model in evaluation["models"]]
        table.add_row(*(Text(name.replace("_", "_\n") if narrow else name) for name in names), *map(Text, cells))
    return table


def missing_figures(evaluation: Mapping[str, Any]) -> list[str]:
    """Why figures of an evaluation are missing, one line for each model and reason."""
    metrics: dict[tuple[str, str], dict[str, None]] = {}
    for figure in evaluation["figures"]:
        if figure["value"] is None:
            metrics.setdefault((figure["model"], figure["why"]), {})[figure["metric"]] = None
    return [f"– {', '.join(names)} of {model}: {why}" for (model, why), names in metrics.items()]


def _label(step: Step) -> str:
    return step.name if step.name == step.use else f"{step.name} ({step.use})"
