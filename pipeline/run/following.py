"""A machine that follows machine 0: it starts its processes of a stage with those of machine 0, and ends as it does."""

import contextlib
import json
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import ConfigError, GateClosed, StageFailed
from pipeline.plan.step import Plan, Step, begin
from pipeline.run.launch import Launched, Place
from pipeline.run.line import Line
from pipeline.run.machines import (
    AGAIN,
    PATIENCE,
    Here,
    Watched,
    contents_of,
    first_to_run,
    not_shared,
    proof,
    reports_of,
    use_interface,
)
from pipeline.run.process import Stop, View, follow
from pipeline.saves import artifact
from stages.runtime.errors import Interrupted, PipelineError

ERRORS: dict[int, type[PipelineError]] = {3: GateClosed, 75: Interrupted}
"""Exit code of machine 0 → the error with which this machine ends the same way; others are failures."""
HANDSHAKE = 20.0
"""Seconds in which machine 0 must answer a connection."""
DISK = 90.0
"""Seconds until a file that another machine has made is seen here: NFS remembers for a minute what was not there."""


def follow_leader(place: Here, planned: Plan, view: View, stop: Stop) -> list[dict[str, Any]]:
    """Follow machine 0 until the run ends; returns the records of all steps.

    Raises:
        ConfigError, StageFailed, GateClosed, Interrupted: as the run of machine 0 ends, or because that machine cannot
            be reached, is lost, or does not share `saves`.
    """
    line = _reached(place, planned, view, stop)
    if line is None:
        for step in planned.steps:
            view.step(step, "done")
    else:
        with contextlib.closing(line):
            _Following(place, planned, view, stop, line).until_the_end()
    return [artifact.read(step.folder) or {} for step in planned.steps]


def _reached(place: Here, planned: Plan, view: View, stop: Stop) -> Line | None:
    """A line to machine 0; None when machine 0 has finished the run without this one.

    Raises:
        StageFailed: it cannot be reached in time.
        Interrupted: a signal came.
    """
    view.event(first_to_run(planned), {"kind": "note", "text": f"waits for machine 0 at {place.where}"})
    end = time.monotonic() + place.launch.seconds
    while True:
        try:
            return Line(socket.create_connection((place.host, place.port), timeout=5))
        except OSError as error:
            why = error.strerror or str(error)
        if all(artifact.read(step.folder) is not None and not step.fresh for step in planned.steps):
            return None
        if stop.count:
            raise Interrupted(f"stopped while machine 0 was awaited; {AGAIN}")
        if time.monotonic() > end:
            text = f"{place.name} could not reach machine 0 at {place.where} within {place.launch.timeout} ({why})"
            raise StageFailed(f"{text}; start the same command there, or correct `launch.rendezvous`")
        time.sleep(0.5)


class _Following:
    """What this machine does between its greeting and the end of the run."""

    def __init__(self, place: Here, planned: Plan, view: View, stop: Stop, line: Line) -> None:
        self.place, self.planned, self.view, self.stop, self.line = place, planned, view, stop, line
        self.steps = {step.name: step for step in planned.steps}
        self.waiting: list[dict[str, Any]] = []
        """Messages that came while this machine did something else."""
        self.leader = "machine 0"
        self.reports = reports_of(planned) / f"machine_{place.rank}"

    def until_the_end(self) -> None:
        """
        Raises:
            PipelineError: as `follow_leader`.
        """
        self.greet()
        while True:
            message = self.next_message()
            if message["kind"] == "end":
                return self.end(message)
            if message["kind"] == "launch":
                self.run(self.steps[message["stage"]], int(message["port"]))
            elif message["kind"] == "step":
                self.view.step(self.steps[message["stage"]], message["state"])

    def greet(self) -> None:
        """Show machine 0 that this machine sees the same `saves`, and tell it what this machine plans.

        Raises:
            StageFailed: another program answers, or `saves` is not shared.
            PipelineError: as machine 0 ended meanwhile.
            Interrupted: a signal came.
        """
        challenge = self.line.next(HANDSHAKE)
        if challenge.get("kind") != "challenge":
            text = f"what answers at {self.place.where} is not machine 0 of this run"
            raise StageFailed(f"{text}; correct `launch.rendezvous`, or choose another port")
        self.leader = str(challenge["machine"])
        who: dict[str, Any] = {"rank": self.place.rank, "host": platform.node(), "contents": contents_of(self.planned)}
        file = reports_of(self.planned) / Path(challenge["file"]).name
        if not self.sees(file):
            self.line.send("blind", **who)
            raise StageFailed(not_shared(self.place.name, self.leader, self.planned.saves))
        shown = proof(file.read_text(encoding="utf-8"), challenge["nonce"], self.place.rank)
        self.line.send("hello", proof=shown, **who)
        use_interface(self.line)

    def next_message(self) -> dict[str, Any]:
        """
        Raises:
            Interrupted: machine 0 has ended without a word, or a signal came.
        """
        while not self.waiting:
            self.waiting = self.line.new()
            if self.waiting:
                break
            if self.line.closed:
                self.lost()
            self.check_stop()
            self.line.wait(0.2)
        return self.waiting.pop(0)

    def check_stop(self) -> None:
        """
        Raises:
            Interrupted: a signal came.
        """
        if self.stop.count:
            self.line.send("stopped", text=f"was stopped; {AGAIN}")
            raise Interrupted(f"stopped while {self.leader} was at work; {AGAIN}")

    def lost(self) -> NoReturn:
        raise Interrupted(f"{self.leader} ended without a word; {AGAIN}")

    def end(self, message: dict[str, Any]) -> None:
        """End as machine 0 does.

        Raises:
            PipelineError: unless it ended well.
        """
        code, text = int(message["code"]), str(message["text"])
        if code == ConfigError.exit_code:
            raise ConfigError(text.splitlines())
        if code:
            raise ERRORS.get(code, StageFailed)(text if text.startswith("machine ") else f"{self.leader}: {text}")

    def run(self, step: Step, port: int) -> None:
        """Run this machine's processes of a stage.

        Raises:
            PipelineError: as the stage ended on all machines.
        """
        self.reports.mkdir(parents=True, exist_ok=True)
        if not self.sees(step.part / artifact.SPEC):
            text = not_shared(self.place.name, self.leader, self.planned.saves)
            self.line.send("failed", text=text)
            raise StageFailed(text)
        spec = begin(step, self.planned) | {"out": str(step.part)}
        (self.reports / artifact.SPEC).write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        place = Place(self.place.rank, self.place.host, port)
        child = Watched(Launched(step.entry.launch, self.reports, place), self.patience)
        try:
            follow(step, self.view, self.stop, self.reports, lambda: child)
        except (StageFailed, Interrupted) as error:
            own = child.ending(error)
            self.line.send(own.kind, text=own.text)
            self.last_word()
            raise

    def sees(self, file: Path) -> bool:
        """Whether a file in `saves` that machine 0 has made is seen here, at once or in time.

        Raises:
            PipelineError: as machine 0 ended meanwhile.
            Interrupted: a signal came.
        """
        end = time.monotonic() + DISK
        while not file.is_file():
            if time.monotonic() > end:
                return False
            self.check_stop()
            if self.leader_ended():
                self.last_word()
            for folder in reversed(file.parents):
                if folder.is_relative_to(self.planned.saves):
                    with contextlib.suppress(OSError):
                        os.listdir(folder)  # lets NFS ask the server again
            self.line.wait(0.5)
        return True

    def patience(self) -> float | None:
        """Seconds that the processes of this machine have when machine 0 has ended; none if it is lost."""
        if not self.leader_ended():
            return None
        return PATIENCE if self.waiting else 0.0

    def leader_ended(self) -> bool:
        self.waiting += self.line.new()
        return self.line.closed or any(message["kind"] == "end" for message in self.waiting)

    def last_word(self) -> None:
        """End as machine 0 says that the run ends, if it says so in time.

        Raises:
            PipelineError: as machine 0 ended.
        """
        end = time.monotonic() + 3 * PATIENCE
        while not self.leader_ended() and time.monotonic() < end:
            self.line.wait(0.2)
        for message in self.waiting:
            if message["kind"] == "end":
                self.end(message)
        if self.line.closed:
            self.lost()
