"""What a running stage tells the runner: one JSON object a line, appended to `events.jsonl` in its folder.

A file and not a pipe, because it works the same for one process, for several started by a launcher and for
several machines on one file system, and because the curves of a run can be read from it later.
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


LAUNCHED = "PIPELINE_LAUNCHED"  # set for the processes of a launched group, whose `RANK` means something


def main_process() -> bool:
    """True in the one process of a launched group that reports and writes files."""
    return LAUNCHED not in os.environ or os.environ.get("RANK", "0") == "0"


def read_events(out: Path) -> Iterator[dict[str, Any]]:
    """What a stage told so far; a line that is torn, or being written, is left out."""
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
    """Append one event. `kind` is start, total, step, log, note, done, interrupted or error.

    Only the main process is heard, except for errors: the first process to fail knows the cause.
    """
    if main_process() or kind == "error":
        line = json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, ensure_ascii=False)
        with open(out / EVENTS_FILE, "a", encoding="utf-8") as file:
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
        """The largest value by kind of memory, over these attempts and the last one."""
        found: dict[str, int | None] = dict(last)
        for memory in self.memory:
            for kind, value in memory.items():
                found[kind] = max((one for one in (found.get(kind), value) if one is not None), default=None)
        return found


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
