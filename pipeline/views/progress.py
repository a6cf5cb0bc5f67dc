"""What people see of a run: one live view on a terminal, plain lines elsewhere, and a table at the end."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.plan.step import Plan, Step
from stages.measuring.table import read_table

MARKS = {"waiting": "·", "running": "▸", "done": "✓", "ran": "✓", "failed": "✗"}


@dataclass
class _Row:
    state: str = "waiting"
    note: str = ""
    step: int = 0
    total: int = 0
    loss: float | None = None
    speed: float | None = None
    started: float = 0.0
    seconds: float = 0.0
    first: tuple[int, float] | None = None
    tokens: tuple[float, float] | None = None


@dataclass
class View:
    """Follows a run; use it as a context. `console` decides between live and plain."""

    plan: Plan
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.rows = {step.name: _Row(note=step.why) for step in self.plan.steps}
        self.live = Live(self, console=self.console, refresh_per_second=5) if self.console.is_terminal else None

    def __enter__(self) -> "View":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        for row in self.rows.values():
            if row.state == "running":
                row.state = "failed"
        if self.live:
            self.live.stop()

    def step(self, step: Step, state: str, detail: str = "") -> None:
        """A step begins (`running`), was run (`ran`), or needs nothing (`done`)."""
        row = self.rows[step.name]
        row.state, now = state, time.monotonic()
        if state == "running":
            row.started = now
            self.say(f"{step.name}: starts; {step.why}")
        elif state == "ran":
            row.seconds = now - row.started
            self.say(f"{step.name}: finished in {row.seconds:.1f} s")

    def event(self, step: Step, event: Mapping[str, Any]) -> None:
        """Take in what the stage's process tells."""
        row = self.rows[step.name]
        kind = event["kind"]
        if kind == "total":
            row.total, row.step = event["steps"], event["step"]
            if "batch" not in event:
                return
            rows = event["batch"] * event["accumulation"] * event["processes"]
            row.note = (
                f"batch {event['batch']} × {event['accumulation']} accumulation × {event['processes']} "
                f"process{'es' if event['processes'] > 1 else ''} = {rows} rows a step"
            )
            self.say(f"{step.name}: {row.total} steps, {row.note}")
        elif kind == "step":
            _advance(row, event["step"], event["time"])
        elif kind == "log":
            self._log(step, row, event)
        elif kind == "note":
            row.note = event["text"]
            self.say(f"{step.name}: {event['text']}")

    def _log(self, step: Step, row: _Row, event: Mapping[str, Any]) -> None:
        _advance(row, event["step"], event["time"])
        if "num_tokens" in event:
            if row.tokens and event["num_tokens"] > row.tokens[0]:
                row.speed = (event["num_tokens"] - row.tokens[0]) / max(event["time"] - row.tokens[1], 1e-6)
            row.tokens = (event["num_tokens"], event["time"])
        if "loss" in event:
            row.loss = event["loss"]
            self.say(f"{step.name}: step {row.step}/{row.total}, {_figures(row)}")

    def say(self, line: str) -> None:
        """A plain line, where no live view shows it."""
        if self.live is None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0), expand=True)
        for _ in range(4):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1, style="dim")  # gives way on a narrow terminal
        for name, row in self.rows.items():
            table.add_row(
                MARKS[row.state],
                name,
                _bar(row),
                Text(_figures(row)),
                Text(row.note),
            )
        return Group(table)


def _advance(row: _Row, step: int, now: float) -> None:
    row.step = max(row.step, step)
    if row.first is None:
        row.first = (step, now)


def _bar(row: _Row) -> str:
    if row.state == "running" and row.total:
        full = round(16 * row.step / row.total)
        return "█" * full + "░" * (16 - full) + f" {row.step}/{row.total}"
    if row.state == "running":
        return f"{time.monotonic() - row.started:.0f} s"
    return f"{row.seconds:.1f} s" if row.seconds else ""


def _figures(row: _Row) -> str:
    parts = []
    if row.loss is not None:
        parts.append(f"loss {row.loss:.4g}")
    if row.speed:
        parts.append(f"{row.speed:,.0f} tokens/s")
    if row.state == "running" and row.first and row.step > row.first[0]:
        each = (time.time() - row.first[1]) / (row.step - row.first[0])
        parts.append(f"{duration(each * (row.total - row.step))} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time for people, such as `12 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_table(planned: Plan) -> Table:
    """What will run and why."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("stage", "plan", "why", "folder"):
        table.add_column(column, overflow="fold")
    words = {"done": "done", "resume": "goes on", "run": "will run", "refused": "refused"}
    for step in planned.steps:
        table.add_row(_label(step), words[step.state], Text(step.why), Text(str(step.folder)))
    return table


def result_table(planned: Plan, records: Sequence[Mapping[str, Any]], ran: Mapping[str, str]) -> Table:
    """What happened to each stage, its time, its key figure, and where it lies."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("stage", "what happened", "time", "key figure", "folder"):
        table.add_column(column, overflow="fold")
    for step, record in zip(planned.steps, records, strict=True):
        what = {"ran": "ran", "done": "was done already"}[ran[step.name]]
        table.add_row(
            _label(step), what, duration(record["seconds"]), Text(key_figure(step, record)), Text(str(step.link))
        )
    return table


def key_figure(step: Step, record: Mapping[str, Any]) -> str:
    """The figure that the stage itself calls its key figure."""
    return str(step.stage.headline(record["metrics"]))


def evaluation_table(folder: Path) -> Table:
    """The figures of an evaluation, a column for each model; why there is none stands in its place."""
    found = read_table(folder)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("metric", "data", *found["models"]):
        table.add_column(column, overflow="fold", max_width=32)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for one in found["figures"]:
        cell = f"({one['why']})" if one["value"] is None else f"{one['value']:.4g}"
        rows.setdefault((one["metric"], one["data"]), {})[one["model"]] = cell
    for (metric, data), cells in rows.items():
        said = [cells.get(model, "(not measured)") for model in found["models"]]
        repeated = [cell if cell not in said[:place] or cell[0] != "(" else "″" for place, cell in enumerate(said)]
        table.add_row(metric, data, *map(Text, repeated))
    return table


def _label(step: Step) -> str:
    return step.name if step.name == step.use else f"{step.name} ({step.use})"
