"""A run on several machines: which of them this one is, and what machine 0 (`leading.py`) and the others
(`following.py`) share.

Every machine runs the same command, with `saves` on a disk that all of them share. The leader does what a run on one
machine does: it alone makes, renames and removes folders, and runs the stages that need no group. A follower plans
too, compares its plan with the leader's over a line (`line.py`), and starts its processes of a training stage when the
leader starts its own. When a machine ends, the stage ends on all of them.
"""

import hashlib
import hmac
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.pipeline import Launch
from pipeline.errors import ConfigError
from pipeline.plan.step import Plan, Step, begin
from pipeline.run.line import Line, interface_of
from pipeline.run.process import INTERNAL, Child
from stages.runtime.errors import Interrupted, PipelineError

RANKS = ("NODE_RANK", "SKYPILOT_NODE_RANK", "SLURM_NODEID", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "RANK")
"""Variables of the environment that `rank: env` reads, the first one that is set. RANK is the last: a cluster that sets
it starts one program on each machine."""
PATIENCE = 10.0
"""Seconds that processes have to end by themselves, and machines to say why, after one of them has failed."""
REPORTS = "logs"
"""In the config's folder of links: a folder `machine_N` with the log and the events of each machine that follows."""
AGAIN = "run the same command on every machine again to go on"


@dataclass(frozen=True)
class Here:
    """Which of the machines this is, and where they meet."""

    rank: int
    machines: int
    host: str
    port: int
    launch: Launch

    @property
    def name(self) -> str:
        return machine_name(self.rank, platform.node())

    @property
    def where(self) -> str:
        return f"{self.host}:{self.port}"


def machine_name(rank: int, host: str) -> str:
    return f"machine {rank} ({host})"


def here(planned: Plan) -> Here | None:
    """Which machine this is; None if the config is for one machine, or if nothing is left to do.

    Raises:
        ConfigError: the environment does not say it.
    """
    launch = next((step.entry.launch for step in planned.steps if step.entry.launch.machines > 1), None)
    if launch is None or all(step.state == "done" for step in planned.steps):
        return None
    rank = launch.rank if isinstance(launch.rank, int) else _rank(launch.machines)
    host, _, port = _rendezvous(launch).rpartition(":")
    return Here(rank, launch.machines, host.strip("[]"), int(port), launch)


def _rank(machines: int) -> int:
    name = next((name for name in RANKS if os.environ.get(name)), None)
    if name is None:
        way = "set NODE_RANK=0 on the machine that leads, NODE_RANK=1 on the next one, and so on"
        raise ConfigError([f"`launch.rank` is `env`, and none of {', '.join(RANKS)} is set; {way}"])
    text = os.environ[name]
    if not text.isascii() or not text.isdigit() or int(text) >= machines:
        wanted = f"with `machines: {machines}` it wants a number from 0 to {machines - 1}"
        raise ConfigError([f"`launch.rank` is `env`, and {name} is `{text}`; {wanted}"])
    return int(text)


def _rendezvous(launch: Launch) -> str:
    if launch.rendezvous != "env":
        return launch.rendezvous
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        found = f"MASTER_ADDR is `{host}` and MASTER_PORT is `{port}`"
        way = "set them to an address of machine 0, or write `launch: {rendezvous: HOST:PORT}`"
        raise ConfigError([f"`launch.rendezvous` is `env`, and {found}; {way}"])
    return f"{host}:{port}"


def leads(planned: Plan) -> bool:
    """Whether this machine does what only one of them does. One machine alone leads."""
    place = here(planned)
    return place is None or place.rank == 0


def first_to_run(planned: Plan) -> Step:
    """The step under which the view shows what happens before the first stage."""
    return next(step for step in planned.steps if step.state != "done")


def reports_of(planned: Plan) -> Path:
    """The folder of the logs of a config's machines."""
    return planned.saves / planned.pipeline.name / REPORTS


def not_shared(name: str, leader: str, saves: Path) -> str:
    text = f"{name} does not see in `{saves}` what {leader} has written there"
    return f"{text}; `saves` must be on a disk that all machines share"


# What both sides do


def contents_of(planned: Plan) -> dict[str, Any]:
    """Name of a stage → what must be the same on every machine, as JSON."""
    found = {}
    for step in planned.steps:
        launch = step.entry.launch
        begun = begin(step, planned)
        found[step.name] = {
            **{name: begun[name] for name in ("fingerprint", "recipe", "versions", "gpu")},
            "inputs": dict(step.identities),
            "launch": {"processes": launch.processes, "machines": launch.machines, "strategy": launch.strategy},
        }
    return dict(json.loads(json.dumps(found)))


def disagreement(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first stage on which the contents of two machines differ, and in what, as a clause; None if they agree."""
    if list(one) != list(other):
        return f"run {', '.join(one)} on the first and {', '.join(other)} on the second"
    for name, content in one.items():
        parts = (("recipe", ""), ("inputs", "inputs"), ("versions", "versions"), ("launch", "launch"), ("gpu", "gpu"))
        found = [text for part, path in parts for text in _differences(content[part], other[name].get(part), path)]
        if not found and content["fingerprint"] != other[name].get("fingerprint"):
            found = ["its fingerprint differs"]
        if found:
            return f"disagree on stage `{name}`: {', '.join(found[:3])}" + (
                f" and {len(found) - 3} more" if found[3:] else ""
            )
    return None


def _differences(one: Any, other: Any, path: str) -> Iterator[str]:
    """Clauses that name each value in which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        first, second = (json.dumps(value, ensure_ascii=False) for value in (one, other))
        long = len(first) + len(second) > 100
        yield f"`{path}` differs" if long else f"`{path}` is {first} on the first and {second} on the second"


def proof(secret: str, nonce: str, rank: int) -> str:
    """Shows that a machine can read the leader's file, without sending what is in it."""
    return hmac.new(secret.encode(), f"{nonce} {rank}".encode(), hashlib.sha256).hexdigest()


def use_interface(line: Line) -> None:
    """Let the processes of a stage talk over the network on which the machines met, unless the user chose another."""
    name = interface_of(line.address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


class Watched:
    """Processes of a stage that are killed when other machines have ended and they do not end by themselves."""

    def __init__(self, child: Child, patience: Callable[[], float | None]) -> None:
        """`patience`: seconds that the processes have after another machine has ended; None while none has."""
        self.child, self.patience = child, patience
        self.pid = child.pid
        self.since: float | None = None
        self.killed = False

    def is_alive(self) -> bool:
        return self.child.is_alive()

    def exit_code(self) -> int | None:
        return self.child.exit_code()

    def kill(self) -> None:
        self.child.kill()

    def wait(self, seconds: float) -> None:
        self.child.wait(seconds)
        patience = self.patience()
        if patience is not None:
            self.since = self.since or time.monotonic()
            if time.monotonic() - self.since >= patience and self.child.is_alive():
                self.killed = True
                self.child.kill()

    def ending(self, error: PipelineError) -> "Ending":
        """How this machine ends a stage that raised an error."""
        if isinstance(error, Interrupted):
            return Ending("stopped", str(error))
        return Ending("silence" if self.killed or INTERNAL in str(error) else "failed", str(error))


@dataclass(frozen=True)
class Ending:
    """How a stage ended on a machine, the likeliest cause of all endings first.

    `lost`: the machine said nothing. `failed`: a user can fix it. `stopped`: by a signal. `silence`: other machines had
    ended, or an internal error, which often is the sight of a machine that has ended.
    """

    kind: str
    text: str

    KINDS = ("lost", "failed", "stopped", "silence")
