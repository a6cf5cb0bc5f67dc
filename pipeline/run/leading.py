"""Machine 0 of several: it waits for the others, says when a stage starts, and finds out why one ended."""

import contextlib
import hmac
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import ConfigError, StageFailed
from pipeline.plan.step import Plan, Step
from pipeline.run.launch import Launched, Place
from pipeline.run.line import Line, free_port, listening, token
from pipeline.run.machines import (
    AGAIN,
    PATIENCE,
    Ending,
    Here,
    Watched,
    contents_of,
    disagreement,
    first_to_run,
    machine_name,
    not_shared,
    proof,
    reports_of,
    use_interface,
)
from pipeline.run.process import Stop, View, follow
from stages.runtime.errors import Interrupted, PipelineError


@dataclass
class Follower:
    """A machine that follows, as the leader knows it."""

    name: str
    line: Line
    ending: Ending | None = None

    def ended(self) -> bool:
        """Whether it has ended, or has said that its part of the stage has."""
        for message in self.line.new():
            if message["kind"] in Ending.KINDS:
                self.ending = Ending(message["kind"], str(message.get("text")))
        if self.line.closed and self.ending is None:
            self.ending = Ending("lost", "")
        return self.ending is not None


class Group:
    """The machines of a run, as the one that leads knows them."""

    def __init__(self, place: Here, planned: Plan) -> None:
        self.place, self.planned = place, planned
        self.followers: dict[int, Follower] = {}
        self.asked: dict[Line, str] = {}
        """Connections whose other end has not yet said who it is → what it was given to prove it with."""
        self.refused: dict[int, str] = {}
        """Machine → why one that says it is that machine was sent away."""

    def meet(self, view: View, stop: Stop) -> None:
        """Wait until every machine is here, sees the same `saves`, and plans the same.

        Raises:
            ConfigError: two machines plan different things.
            StageFailed: a machine does not come in time, or does not see `saves`; the port is taken.
            Interrupted: a signal came.
        """
        place, count = self.place, self.place.machines - 1
        text = f"waits at {place.where} for {count} other machine{'s' if count > 1 else ''}"
        view.event(first_to_run(self.planned), {"kind": "note", "text": text})
        reports = reports_of(self.planned)
        reports.mkdir(parents=True, exist_ok=True)
        secret, file = token(), reports / f"meeting-{token()}"
        file.write_text(secret, encoding="utf-8")
        end = time.monotonic() + place.launch.seconds
        try:
            with listening(place.port) as server:
                while len(self.followers) < count:
                    if stop.count:
                        raise Interrupted(f"stopped while other machines were awaited; {AGAIN}")
                    if time.monotonic() > end:
                        raise StageFailed(self._missing())
                    with contextlib.suppress(TimeoutError):
                        self._ask(Line(server.accept()[0]), file)
                    self._hear(secret)
        except (StageFailed, Interrupted) as error:
            for line in self.asked:  # a machine of this run may be among them
                line.send("end", code=error.exit_code, text=str(error))
            raise
        finally:
            file.unlink(missing_ok=True)
            for line in self.asked:
                line.close()

    def _missing(self) -> str:
        """Which machines did not come, and why as far as it is known."""
        away = [rank for rank in range(1, self.place.machines) if rank not in self.followers]
        ranks = ", ".join(map(str, away))
        who = f"machine{'s' if len(away) > 1 else ''} {ranks} of {self.place.machines}, counted from 0,"
        known = [self.refused[rank] for rank in away if rank in self.refused]
        way = "start the same command there, and look whether that address can be reached from there"
        why = "; ".join(known) if known else way
        return f"{who} did not come to {self.place.where} within {self.place.launch.timeout}; {why}"

    def _ask(self, line: Line, file: Path) -> None:
        """Let the other end of a connection say who it is."""
        self.asked[line] = nonce = token()
        line.send("challenge", nonce=nonce, file=file.name, machine=self.place.name)

    def _hear(self, secret: str) -> None:
        """Read who has said who it is; one that says nothing keeps nobody waiting."""
        for line in list(self.asked):
            messages = line.new()
            if messages or line.closed:
                nonce = self.asked.pop(line)
                if not messages or not self._welcome(line, messages[0], secret, nonce):
                    line.close()

    def _welcome(self, line: Line, hello: dict[str, Any], secret: str, nonce: str) -> bool:
        """Take a machine into the group; False if it is none of this run.

        Raises:
            ConfigError, StageFailed: it is one of this run, and the run cannot go on with it.
        """
        rank, host, contents = hello.get("rank"), hello.get("host"), hello.get("contents")
        if type(rank) is not int or not isinstance(host, str) or not isinstance(contents, dict):
            return False
        if len(host) > 253 or not host.isprintable():  # no name of a machine
            return False
        name = machine_name(rank, host)
        shown = str(hello.get("proof")).encode(errors="replace")
        if hello["kind"] == "blind" or not hmac.compare_digest(shown, proof(secret, nonce, rank).encode()):
            # It may also be a machine of another run, or no machine at all.
            text = not_shared(name, self.place.name, self.planned.saves)
            if 0 < rank < self.place.machines:
                self.refused[rank] = text
            line.send("end", code=StageFailed.exit_code, text=text)
            return False
        if rank == 0 or (rank in self.followers and not self.followers[rank].ended()):
            taken = self.followers[rank].name if rank else self.place.name
            text = f"{host} says that it is machine {rank}, and {taken} is that one; give each machine its own rank"
            line.send("end", code=StageFailed.exit_code, text=text)
            raise StageFailed(text)
        self.followers[rank] = Follower(name, line)
        if found := disagreement(contents_of(self.planned), contents):
            way = "give all machines the same file, options and versions"
            raise ConfigError([f"{self.place.name} and {name} {found}; {way}"])
        use_interface(line)
        line.send("welcome")
        return True

    def tell(self, kind: str, **values: Any) -> None:
        for follower in self.followers.values():
            follower.line.send(kind, **values)

    def some_ended(self) -> bool:
        return any(follower.ended() for follower in self.followers.values())

    def patience(self) -> float | None:
        """Seconds that the processes of this machine have when another one has ended; none if that one is lost."""
        if not self.some_ended():
            return None
        lost = [one for one in self.followers.values() if one.ending is not None and one.ending.kind == "lost"]
        return 0.0 if lost else PATIENCE

    def run(self, step: Step, view: View, stop: Stop) -> dict[str, Any]:
        """Run a stage on all machines; returns the `done` event of this one.

        Raises:
            Interrupted, StageFailed: as `follow`, for all machines.
        """
        if self.some_ended():
            self._explain(step, None)
        port = free_port()
        self.tell("launch", stage=step.name, port=port)
        place = Place(0, self.place.host, port)
        child = Watched(Launched(step.entry.launch, step.part, place), self.patience)
        try:
            return follow(step, view, stop, step.part, lambda: child)
        except (StageFailed, Interrupted) as error:
            self._explain(step, child.ending(error))

    def _explain(self, step: Step, own: Ending | None) -> NoReturn:
        """Say why a stage ended; `own` is how it ended here.

        Raises:
            Interrupted, StageFailed: always one of them.
        """
        end = time.monotonic() + (PATIENCE if own is None or own.kind == "silence" else 1)
        while time.monotonic() < end and not all(follower.ended() for follower in self.followers.values()):
            time.sleep(0.1)
        found = [(self.place.name, own)] + [(one.name, one.ending) for one in self.followers.values()]
        endings = [(name, ending) for name, ending in found if ending is not None]
        name, ending = min(endings, key=lambda one: Ending.KINDS.index(one[1].kind))
        if ending.kind == "lost":
            raise Interrupted(f"{name} ended without a word at stage `{step.name}`; {AGAIN}")
        raise (Interrupted if ending.kind == "stopped" else StageFailed)(f"{name}: {ending.text}")


class Shown:
    """A view that the other machines have, too: each learns which step runs or has ended."""

    def __init__(self, view: View, group: Group) -> None:
        self.view, self.group = view, group

    def step(self, step: Step, state: str) -> None:
        self.view.step(step, state)
        self.group.tell("step", stage=step.name, state=state)

    def event(self, step: Step, event: dict[str, Any]) -> None:
        self.view.event(step, event)


@contextlib.contextmanager
def gathered(place: Here | None, planned: Plan, view: View, stop: Stop) -> Iterator[Group | None]:
    """The machines of a run, for the one that leads; None for one machine. When the run ends, all of them know why.

    Raises:
        ConfigError, StageFailed, Interrupted: as `Group.meet`.
    """
    if place is None:
        yield None
        return
    group = Group(place, planned)
    code, text = 1, "an internal error; its output says which"
    try:
        group.meet(view, stop)
        yield group
        code, text = 0, ""
    except PipelineError as error:
        code, text = error.exit_code, str(error)
        raise
    finally:
        group.tell("end", code=code, text=text)
        for follower in group.followers.values():
            follower.line.close()
