"""A plan in, finished folders out. The runner makes, renames and removes folders; it never imports torch.

Each stage runs in a child forked from a server that has imported torch, transformers, trl and peft once, so a
crash cannot take the runner with it, memory comes back, and the imports are paid once a run. With several
processes a stage goes through accelerate's launcher instead.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline import artifact, card, content, plan, secret, worker
from pipeline.artifact import SPEC
from pipeline.errors import Busy, GateClosed, Interrupted, StageFailed
from stages import _events
from stages._processes import end_with_parent

# Not with a GPU: some of these open it while they are imported, and CUDA does not survive a fork.
PRELOAD = [
    "torch",
    "pipeline.worker",
    "datasets",
    "peft",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "transformers.models.auto.modeling_auto",
]
GATES = "gates.json"  # what the gates of a config's last run said
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # models are fetched before the first stage, by the runner
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # a tokenizer's threads and a fork do not go together
    "GPTQMODEL_CPU_WORKERS": "2",  # its thread pool fails on machines with two cores or less
}


class View(Protocol):
    """What the runner tells whoever draws."""

    def step(self, step: plan.Step, state: str, detail: str = "") -> None: ...
    def event(self, step: plan.Step, event: dict[str, Any]) -> None: ...


class Child(Protocol):
    """A stage's process: forked, or the launcher of several."""

    pid: int | None

    def is_alive(self) -> bool: ...
    def wait(self, seconds: float) -> None: ...
    def exit_code(self) -> int | None: ...
    def kill(self) -> None: ...


def run(planned: plan.Plan, view: View) -> list[dict[str, Any]]:
    """Run every step that is not done, in order; the records of all of them.

    Raises:
        StageFailed: a stage ended without a result.
        Interrupted: a signal came; running again goes on.
        Busy: another run is at work on the same stage.
        GateClosed: a gate said no, and the plan does not ignore gates.
    """
    records: list[dict[str, Any]] = []
    gates = _Gates(planned)
    content.clear_torn(planned.saves)
    _claim(planned)
    for step in planned.steps:
        if step.state == "done":  # linked before the first stage starts, so that `gc` knows that they are needed
            artifact.link(step.folder, step.link)
    with _signals() as stop:
        for step in planned.steps:
            record = artifact.read(step.folder)
            if record is not None and step.state == "done":
                _tidy(step)
                view.step(step, "done")
            else:
                there = zip(planned.steps, records, strict=False)
                before = [card.Made(above, known.get("metrics", {})) for above, known in there]
                record = _run_step(step, planned, view, stop, gates, before)
            artifact.link(step.folder, step.link)
            records.append(record)
            gates.judge(step)
    return records


class _Gates:
    """What the gates of this run have said; kept in `gates.json` beside the links."""

    def __init__(self, planned: plan.Plan) -> None:
        self.planned, self.said = planned, []  # type: plan.Plan, list[dict[str, Any]]
        self.ignored: list[str] = []

    def judge(self, step: plan.Step) -> None:
        """Go on, or stop the run.

        Raises:
            GateClosed: a gate says no, and gates are not ignored.
        """
        verdicts = plan.verdicts(step, self.planned)
        if not verdicts:
            return
        closed = [verdict.text for verdict in verdicts if not verdict.passed]
        self.said += [
            {"stage": step.name, "folder": step.folder.name, "passed": verdict.passed, "text": verdict.text}
            for verdict in verdicts
        ]
        file = self.planned.saves / self.planned.pipeline.name / GATES
        content = {"ignored": self.planned.ignore_gates, "gates": self.said}
        file.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        if self.planned.ignore_gates:
            self.ignored += closed
        elif closed:
            raise GateClosed(
                "\n".join([f"the gates of `{step.name}` say no, and nothing after it was run:", *closed])
                + f"\nall figures are in {step.link}; change what made them worse, or the gate, or go on all the same "
                "with `--ignore-gates`"
            )


def _claim(planned: plan.Plan) -> None:
    """Say beside the links whose they are."""
    links = planned.saves / planned.pipeline.name
    if (owner := plan.belongs(links)) is not None and owner.exists() and owner.samefile(planned.pipeline.path):
        return
    links.mkdir(parents=True, exist_ok=True)
    config = os.path.relpath(planned.pipeline.path.resolve(), links.resolve())
    content = {"config": config, "absolute": str(planned.pipeline.path.resolve())}
    (links / plan.BELONGS).write_text(json.dumps(content), encoding="utf-8")


def _tidy(step: plan.Step) -> None:
    """Delete what a run that was killed at its very end left in a finished folder."""
    if any((step.folder / name).exists() for name in artifact.TO_GO_ON):
        with contextlib.suppress(Busy), _locked(step):  # a run that still holds it deletes it itself
            artifact.clear_leftovers(step.folder)


class _Stop:
    """How often the user asked to stop."""

    count = 0


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM are counted instead of ending the runner."""
    stop = _Stop()

    def handler(number: int, frame: object) -> None:
        stop.count += 1

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def _run_step(
    step: plan.Step, planned: plan.Plan, view: View, stop: _Stop, gates: _Gates, before: Sequence[card.Made]
) -> dict[str, Any]:
    """Run one step to its finished folder, and hold its lock until that has its name."""
    began, clock = time.time(), time.monotonic()
    hashes = planned.hashes
    with _locked(step):
        record = artifact.read(step.folder)
        if record is not None and not step.fresh and artifact.damage(step.folder, record, hashes) is None:
            view.step(step, "done")  # another run finished it while this one worked on earlier steps
            return record
        plan.check_unchanged(step, hashes, read=True)
        _make_room(step)
        spec = step.part / f"{SPEC}.new"
        spec.write_text(json.dumps(plan.begin(step, planned), ensure_ascii=False, indent=1), encoding="utf-8")
        spec.replace(step.part / SPEC)
        view.step(step, "running")
        try:
            done = _follow(step, view, stop)
        finally:
            for name in (worker.LOG, _events.FILE):
                secret.mask_file(step.part / name)
        plan.check_unchanged(step, hashes)
        versions = plan.versions(step.stage.use)
        if getattr(step.stage.module, "CARD", False):
            card.write(step.part, step, done["metrics"], planned, before, versions)
        secret.forbid(step.part, step.name)
        record = {
            "stage": step.name,
            "use": step.stage.use,
            "fingerprint": step.fingerprint,
            "recipe": dict(step.recipe),
            "inputs": dict(step.inputs),
            "model": step.produces,
            "stands_on": plan.stands_on(step),
            "metrics": done["metrics"],
            "inexact_after_a_stop": step.inexact,
            "ignored_gates": list(gates.ignored),
            "versions": versions,
            "machine": {
                "host": platform.node(),
                "system": platform.platform(),
                "cores": os.cpu_count(),
                "gpu": plan.has_gpu(),
            },
            "started": round(began, 3),
            "seconds": round(time.monotonic() - clock, 3),
            "memory": done["memory"],
        }
        artifact.finish(step.part, step.folder, record, hashes)
        hashes.save()
    view.step(step, "ran")
    return record


def _make_room(step: plan.Step) -> None:
    """An empty folder to work in, but for what an earlier try left to go on from; what is in the way is set aside."""
    if step.folder.exists():  # damaged, or to be made again
        step.folder.rename(_free_name(step.folder))
    if step.fresh and step.part.exists():
        step.part.rename(_free_name(step.part))
    for part in step.left if step.fresh else ():  # given up, yet kept for going back to those settings
        spec = {**(artifact.begun(part) or {}), "of": None}
        (part / SPEC).write_text(json.dumps(spec, ensure_ascii=False, indent=1), encoding="utf-8")
    step.part.mkdir(parents=True, exist_ok=True)
    for path in step.part.iterdir():
        if path.name in artifact.TO_GO_ON or path.name == worker.LOG:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _free_name(folder: Path) -> Path:
    number = 1
    while (name := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return name


@contextlib.contextmanager
def _locked(step: plan.Step) -> Iterator[None]:
    """Hold the step; the kernel lets go of it however this process ends.

    Raises:
        Busy: another run, or a process that a killed one left behind, is at work on it.
    """
    held = worker.held_file(step.part)
    held.parent.mkdir(parents=True, exist_ok=True)
    with open(held.with_suffix(".runner"), "a+", encoding="utf-8") as file, open(held, "a", encoding="utf-8") as left:
        if not _lock(file, seconds=0.5):  # `status` and `gc` look at it for a moment
            file.seek(0)
            raise Busy(f"stage `{step.name}` is being run by another process ({file.read().strip()}); wait for it")
        if not _lock(left, seconds=60):  # on Linux they end by themselves, as soon as the fork server has
            raise Busy(f"stage `{step.name}` is still being run by what a killed run left behind; wait, or end it")
        fcntl.flock(left, fcntl.LOCK_UN)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield


def _lock(file: IO[str], seconds: float) -> bool:
    """Take an exclusive lock, trying for so long."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)


def _follow(step: plan.Step, view: View, stop: _Stop) -> dict[str, Any]:
    """Start the stage's process and pass on its events until it ends; the last one, `done`.

    Raises:
        Interrupted, StageFailed: as `run`.
    """
    events = _Events(step.part / _events.FILE)
    child: Child = _Launched(step) if step.stage.launch.processes > 1 else _Forked(step.part)
    asked = 0
    while child.is_alive():
        child.wait(0.1)
        for event in events.new():
            view.event(step, event)
        if stop.count > asked and _ask_to_stop(child, events, step, view, hard=stop.count > 1):
            asked = stop.count
    for event in events.new():
        view.event(step, event)
    return _result(step, child.exit_code(), events.last, asked > 0)


def _ask_to_stop(child: Child, events: "_Events", step: plan.Step, view: View, *, hard: bool) -> bool:
    """Tell the stage to stop at its next step, or end it; False while it cannot be told yet."""
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


def _result(step: plan.Step, code: int | None, last: dict[str, dict[str, Any]], asked: bool) -> dict[str, Any]:
    if code == 0 and "done" in last:
        return last["done"]
    last = json.loads(secret.mask(json.dumps(last, ensure_ascii=False)))
    log = f"its log is {step.part / worker.LOG}"
    if "interrupted" in last or (asked and "error" not in last):
        how = last.get("interrupted", {}).get("text", "stopped")
        raise Interrupted(f"stage `{step.name}` {how}; run the same command again to go on")
    if "error" in last:
        error = last["error"]
        text = error["text"] or "ended with a fault of ours:\n" + error["traceback"].rstrip()
        least = f"\n{_least(step)}" if text.startswith(worker.OUT_OF_MEMORY) and step.needs.memory else ""
        raise StageFailed(f"stage `{step.name}`: {text}{least}\n{log}")
    least = f"; {_least(step)}" if code == -signal.SIGKILL and step.needs.memory else ""
    raise StageFailed(f"stage `{step.name}` {_death(code)}{least}; {log}; run again to go on from its last checkpoint")


def _least(step: plan.Step) -> str:
    return f"it takes at least {plan.size_of(step.needs.memory)} of memory, and activations come on top"


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = {
            "SIGKILL": " (kill -9, or the system ran out of memory)",
            "SIGSEGV": " (a crash in native code)",
        }
        return f"was ended by signal {-code} {name}{hint.get(name, '')}"
    return f"ended with exit code {code} and no result"


class _Events:
    """Reads the lines that a growing events file has gained."""

    def __init__(self, path: Path) -> None:
        self.path, self.position, self.last = path, 0, {}  # type: Path, int, dict[str, dict[str, Any]]

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
            if event["kind"] != "error" or "error" not in self.last:  # the first process to fail knows the cause
                self.last[event["kind"]] = event
        return found


def _event(line: bytes) -> dict[str, Any] | None:
    """An event, or None for a line that a full disk cut off."""
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return event


class _Forked:
    """A stage forked from the warm server."""

    def __init__(self, part: Path) -> None:
        warm(part / worker.LOG)
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=worker.main, args=(str(part / SPEC),))
        self.process.start()
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float) -> None:
        self.process.join(seconds)

    def exit_code(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def warm(log: Path) -> None:
    """Start the server that children fork from, if it is not there yet; what its imports print goes to the log."""
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    multiprocessing.set_forkserver_preload(["pipeline.server", *(["pipeline.worker"] if plan.has_gpu() else PRELOAD)])
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is the runner's to handle
    try:
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, previous)
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, handle):
            os.close(descriptor)


class _Launched:
    """A stage started by accelerate's launcher in several processes of one machine."""

    def __init__(self, step: plan.Step) -> None:
        processes = step.stage.launch.processes
        # `--multi_gpu` is accelerate's word for several processes on this machine; `--cpu` would start only one.
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--main_process_port", str(_free_port())]
        command += ["-m", "pipeline.worker", str(step.part / SPEC)]
        threads = max(1, (os.cpu_count() or 1) // processes)
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads), **os.environ}
        environment[_events.LAUNCHED] = "1"
        if not plan.has_gpu():
            environment["ACCELERATE_USE_CPU"] = "true"
        with open(step.part / worker.LOG, "ab") as log:
            # A session of its own: Ctrl-C reaches the runner, which tells the first process to stop.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self.pid: int | None = None  # the launcher itself is never told; it would end its processes at once

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def exit_code(self) -> int | None:
        return self.process.returncode

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
