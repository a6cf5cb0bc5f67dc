"""The process of a stage, forked from a warm server, and how a stage is followed until it ends; see also `launch`."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from pipeline import secret
from pipeline.errors import StageFailed
from pipeline.plan.step import Step
from pipeline.run import worker
from pipeline.saves import artifact
from pipeline.saves.artifact import SPEC
from stages.model.device import has_gpu
from stages.runtime.errors import DISK_FULL, KILLED, OUT_OF_MEMORY, Interrupted
from stages.runtime.events import ENDED, EVENTS_FILE
from stages.runtime.figures import size_of

# Only without a GPU: some of these modules open the GPU when they are imported, and CUDA does not survive a fork.
PRELOAD = [
    "torch",
    "pipeline.run.worker",
    "datasets",
    "peft",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "transformers.models.auto.modeling_auto",
]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # models are fetched before the first stage, by the runner
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # a tokenizer's threads and a fork do not go together
    "PYTHONHASHSEED": "0",  # PEFT writes a set into adapter_config.json: each run, the same order
    "PYTHONSAFEPATH": "1",  # a file of the user such as stages.py must not take the place of a module of ours
}

INTERNAL = "failed with an internal error; please report this:"
"""In the message of a stage whose error is no mistake of the user."""
ROOM = 64 * 2**10
"""Bytes of a disk without which a stage cannot even write what went wrong."""


class View(Protocol):
    """Progress callbacks for the view."""

    def step(self, step: Step, state: str) -> None: ...
    def event(self, step: Step, event: dict[str, Any]) -> None: ...


class Child(Protocol):
    """A stage's process: forked, or the launcher of several."""

    pid: int | None

    def is_alive(self) -> bool: ...
    def wait(self, seconds: float) -> None: ...
    def exit_code(self) -> int | None: ...
    def kill(self) -> None: ...


class Stop:
    """How often the user asked the run to stop."""

    count = 0


def follow(step: Step, view: View, stop: Stop, folder: Path, start: Callable[[], Child]) -> dict[str, Any]:
    """Start a process that works in `folder` and pass its events to the view until it ends; returns the `done` event.

    Secrets of the environment are masked in what it has written.

    Raises:
        Interrupted, StageFailed: as `run`.
    """
    try:
        return _followed(step, view, stop, folder, start)
    finally:
        for name in (artifact.LOG, EVENTS_FILE):
            secret.mask_file(folder / name)


def _followed(step: Step, view: View, stop: Stop, folder: Path, start: Callable[[], Child]) -> dict[str, Any]:
    events = Events(folder / EVENTS_FILE)
    child = start()
    asked = 0
    try:
        while child.is_alive():
            child.wait(0.1)
            for event in events.new():
                view.event(step, event)
            if stop.count > asked and _ask_to_stop(child, events, step, view, hard=stop.count > 1):
                asked = stop.count
    finally:
        if child.is_alive():  # the view has failed, as when its output was a pipe that is closed
            child.kill()
    for event in events.new():
        view.event(step, event)
    return _result(step, folder, child.exit_code(), events.last, stop.count > 0)


def _ask_to_stop(child: Child, events: "Events", step: Step, view: View, *, hard: bool) -> bool:
    """Ask the stage to stop at its next step, or end it; False if its process cannot be asked yet."""
    if hard:
        child.kill()
        return True
    pid = events.last.get("start", {}).get("pid") or child.pid
    if pid is None:
        return False
    view.event(step, {"kind": "note", "text": "stopping; Ctrl-C again leaves at once"})
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    return True


def _result(step: Step, folder: Path, code: int | None, last: dict[str, dict[str, Any]], asked: bool) -> dict[str, Any]:
    if code == 0 and "done" in last:
        return last["done"]
    last = json.loads(secret.mask(json.dumps(last, ensure_ascii=False)))
    log = f"its log is {folder / artifact.LOG}"
    internal = last.get("error", {}).get("text", "") is None  # such as a helper that got the same signal
    if "interrupted" in last or (asked and ("error" not in last or internal)):
        how = last.get("interrupted", {}).get("text", "stopped")
        raise Interrupted(f"stage `{step.name}` {how}; run the same command again to go on")
    died = last.get(ENDED, {}).get("code", 0) < 0  # then the errors of the other processes are about its silence
    if "error" in last and not died:
        error = last["error"]
        text = error["text"] or f"{INTERNAL}\n{error['traceback'].rstrip()}"
        least = f"\n{_least(step)}" if text.startswith((OUT_OF_MEMORY, KILLED)) and step.needs.memory else ""
        raise StageFailed(f"stage `{step.name}`: {text}{least}\n{log}")
    if shutil.disk_usage(folder).free < ROOM:
        raise StageFailed(f"stage `{step.name}`: {DISK_FULL}\n{log}")
    who = ""
    if ENDED in last:  # one of several processes
        code = last[ENDED]["code"]
        who = f": process {last[ENDED]['rank']} of {step.entry.launch.world}, counted from 0,"
    least = f"; {_least(step)}" if code == -signal.SIGKILL and step.needs.memory else ""
    if code == -signal.SIGKILL and step.stage.more_memory is not None:
        least += f"; if memory ran out, {step.stage.more_memory(step.entry.config)}"
    go_on = " to go on from its last checkpoint" if (folder / artifact.CHECKPOINTS).is_dir() else ""
    raise StageFailed(f"stage `{step.name}`{who} {_death(code)}{least}; {log}; run again{go_on}")


def _least(step: Step) -> str:
    on_top = ", and activations come on top" if step.entry.training is not None else ""
    return f"it takes at least {size_of(step.needs.memory)} of memory{on_top}"


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = {
            "SIGKILL": " (kill -9, or the system ran out of memory)",
            "SIGSEGV": " (a crash in native code)",
        }
        return f"was ended by signal {-code} {name}{hint.get(name, '')}"
    return f"ended with exit code {code} and no result"


class Events:
    """Reads new events from a growing events file; those of earlier attempts are history and are not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.is_file() else 0
        self.last: dict[str, dict[str, Any]] = {}

    def new(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.position)
            chunk = file.read()
        end = chunk.rfind(b"\n") + 1
        self.position += end
        found = [event for line in chunk[:end].splitlines() if (event := _event(line)) is not None]
        for event in found:
            if event["kind"] != "error" or "error" not in self.last:  # the first error has the cause
                self.last[event["kind"]] = event
        return found


def _event(line: bytes) -> dict[str, Any] | None:
    """An event, or None for a line that a full disk cut off."""
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return event


class Forked:
    """A stage forked from the warm server."""

    def __init__(self, part: Path, hook: worker.Hook = "run") -> None:
        self.process = fork(part / artifact.LOG, worker.main, str(part / SPEC), hook)
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float) -> None:
        self.process.join(seconds)

    def exit_code(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def fork(log: Path, work: Callable[..., object], *arguments: Any) -> BaseProcess:
    """A process of the warm server that does some work; the server's own output goes to the log.

    Raises:
        StageFailed: the server has ended.
    """
    _warm(log)
    process = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
    try:
        process.start()
    except (EOFError, ConnectionError):
        raise StageFailed(f"the training libraries cannot be imported; {log} ends with the reason") from None
    return process


def _warm(log: Path) -> None:
    """Start the server that stages are forked from, unless it runs already; its output goes to the log."""
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    preload = ["pipeline.run.worker"] if has_gpu() else PRELOAD
    multiprocessing.set_forkserver_preload(["pipeline.run.server", *preload])
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    # The server inherits this: the runner alone handles Ctrl-C, a closed terminal, and the SIGTERM that Slurm and
    # systemd send to every process. Without its server a stage would be killed before it has saved a checkpoint.
    ignored = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        forkserver.ensure_running()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, handle):
            os.close(descriptor)
