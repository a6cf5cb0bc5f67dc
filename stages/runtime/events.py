"""Events from a running stage to the runner: one JSON object per line, appended to `events.jsonl` in its folder.

A file, not a pipe: it works alike for one process, for several processes of a launcher and for several machines on one
file system, and the curves of a run can be read from it later.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
LAUNCHED = "PIPELINE_LAUNCHED"  # their `Sharing`, set in the processes of a launcher; only there `RANK` counts
REPORTS = "PIPELINE_REPORTS"  # a folder, set on a machine that follows another one: its processes report there
LAUNCHER = "PIPELINE_LAUNCHER"  # the pid of the launcher, set there too
ENDED = "ended"  # of several processes, which one ended first before the work was done


def main_process() -> bool:
    """Whether this is the one process of a launched group that reports and writes files."""
    return LAUNCHED not in os.environ or os.environ.get("RANK", "0") == "0"


def read_events(out: Path) -> Iterator[dict[str, Any]]:
    """The events of a stage so far; incomplete lines are skipped."""
    try:
        lines = (out / EVENTS_FILE).read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "kind" in event:
                yield event


def emit(out: Path, kind: str, **values: object) -> None:
    """Append one event. `kind` is start, total, step, log, note, done, interrupted, ended or error.

    Only the main process emits events, except errors: the process that fails first knows the cause. On a machine that
    follows another one its first process emits events, into a folder of that machine.
    """
    reports = os.environ.get(REPORTS)
    first = reports is not None and os.environ.get("LOCAL_RANK", "0") == "0"
    if main_process() or first or kind == "error":
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, ensure_ascii=False)
        with open(Path(reports or out) / EVENTS_FILE, "a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass(frozen=True)
class Attempts:
    """The earlier attempts of a stage that was stopped and resumed."""

    count: int = 0
    began: float | None = None
    """When the first attempt started, in seconds since 1970; None without one."""
    seconds: float = 0.0
    """How long all of them ran together."""
    memory: tuple[Mapping[str, int | None], ...] = ()
    """The peak memory of each attempt that reported it."""

    def most_memory(self, last: Mapping[str, int | None]) -> dict[str, int | None]:
        """The largest value of `host` and of `gpu`, over these attempts and the last one."""
        most: dict[str, int | None] = dict(last)
        for memory in self.memory:
            for name, value in memory.items():
                most[name] = max((known for known in (most.get(name), value) if known is not None), default=None)
        return most


def earlier_attempts(out: Path) -> Attempts:
    """Read the earlier attempts from the events of a stage. Each begins with `start` and lasts until its last event."""
    spans: list[list[float]] = []
    memory = []
    for event in read_events(out):
        if event["kind"] == "start":
            spans.append([event["time"], event["time"]])
        elif spans:
            spans[-1][1] = max(spans[-1][1], event["time"])
        if isinstance(event.get("memory"), dict):
            memory.append(event["memory"])
    seconds = sum(end - begin for begin, end in spans)
    return Attempts(len(spans), spans[0][0] if spans else None, seconds, tuple(memory))
