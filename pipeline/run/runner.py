"""A plan in, finished folders out. The runner makes, renames and removes folders; it never imports torch.

Each stage runs in a child forked from a server that has imported torch, transformers, trl and peft once, so a
crash cannot take the runner with it, memory comes back, and the imports are paid once a run. With several
processes a stage goes through accelerate's launcher instead. On several machines, one leads and the others follow it.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import secret
from pipeline.errors import Busy, GateClosed
from pipeline.plan.estimate import estimated_and_measured
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.step import Plan, Step, begin, check_unchanged, gate_verdicts, overrides
from pipeline.run import card
from pipeline.run.following import follow_leader
from pipeline.run.launch import Launched
from pipeline.run.leading import Group, Shown, gathered
from pipeline.run.machines import here
from pipeline.run.process import Child, Forked, Stop, View, follow
from pipeline.run.rehearsal import Rehearsals
from pipeline.saves import artifact
from pipeline.saves import content as content_module
from pipeline.saves.artifact import SPEC
from pipeline.saves.links import claim, link, note_run
from pipeline.saves.locks import locked, reading, unread
from stages.model.device import has_gpu
from stages.runtime import aside
from stages.runtime.events import EVENTS_FILE, earlier_attempts
from stages.training.sharing import Sharing

GATES = "gates.json"  # the verdicts of the last run of a config


def run(planned: Plan, view: View) -> list[dict[str, Any]]:
    """Run every step that is not done, in order; returns the records of all steps.

    Raises:
        StageFailed: a stage ended without a result, or the machines did not meet.
        Interrupted: a signal came, or a machine was lost; running again goes on.
        Busy: another run is at work on the same stage.
        GateClosed: a gate failed, and the plan does not ignore gates.
        ConfigError: machines plan different things, or the environment does not say which machine this is.
    """
    trained = (step.entry.training for step in planned.steps)
    aside.choose(name for training in trained if training is not None for name in training.packages)
    place = here(planned)
    with _signals() as stop:
        if place is not None and place.rank > 0:
            return follow_leader(place, planned, view, stop)
        with gathered(place, planned, view, stop) as group:
            return _run_steps(planned, view if group is None else Shown(view, group), stop, group)


def _run_steps(planned: Plan, view: View, stop: Stop, group: Group | None) -> list[dict[str, Any]]:
    """Run every step; `group` has the other machines, if there are any."""
    records: list[dict[str, Any]] = []
    gates = _Gates(planned)
    content_module.clear_torn(planned.saves)
    links = planned.saves / planned.pipeline.name
    claim(links, planned.pipeline.path)
    note_run(links, [name for step in planned.steps for name in (step.folder.name, step.part.name)])
    for step in planned.steps:
        if step.state == "done":  # linked before the first stage starts, so that `gc` knows that they are needed
            link(step.folder, step.link)
    with gates.written():
        rehearsals = Rehearsals(planned, view, stop)
        for step in planned.steps:
            record = artifact.read(step.folder)
            if record is not None and step.state == "done":
                _tidy(step)
                view.step(step, "done")
            else:
                there = zip(planned.steps, records, strict=False)
                before = [card.FinishedStep(above, known.get("metrics", {})) for above, known in there]
                rehearsals.below(step)
                record = _run_step(step, planned, view, stop, gates, before, group)
            link(step.folder, step.link)
            records.append(record)
            gates.judge(step)
    return records


class _Gates:
    """The verdicts of the gates of this run, kept in `gates.json` beside the links."""

    def __init__(self, planned: Plan) -> None:
        self.planned, self.verdicts = planned, []  # type: Plan, list[dict[str, Any]]
        self.ignored: list[str] = []

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Write the verdicts when the run ends, however it ends; a finished run that runs again writes nothing.

        A run that judged no gate removes the verdicts of the run before it.
        """
        try:
            yield
        finally:
            file = self.planned.saves / self.planned.pipeline.name / GATES
            content = {"ignored": self.planned.ignore_gates, "gates": self.verdicts}
            text = json.dumps(content, ensure_ascii=False, indent=1).encode()
            if not self.verdicts:
                file.unlink(missing_ok=True)
            elif not file.is_file() or file.read_bytes() != text:  # a kill may have cut it
                file.write_bytes(text)

    def judge(self, step: Step) -> None:
        """Judge a finished step.

        Raises:
            GateClosed: a gate failed, and gates are not ignored.
        """
        verdicts = gate_verdicts(step, self.planned)
        if not verdicts:
            return
        failed = [verdict.text for verdict in verdicts if not verdict.passed]
        self.verdicts += [
            {"stage": step.name, "folder": step.folder.name, "passed": verdict.passed, "text": verdict.text}
            for verdict in verdicts
        ]
        if self.planned.ignore_gates:
            self.ignored += failed
        elif failed:
            raise GateClosed(
                "\n".join([f"gate failed: `{step.name}`; nothing after it was run:", *failed])
                + f"\nall figures are in {step.link}; change what made them worse, or the gate, or go on all the same "
                "with `--ignore-gates`"
            )


def _tidy(step: Step) -> None:
    """Delete the working files that a run left in a finished folder when it was killed at the very end."""
    if any((step.folder / name).exists() for name in artifact.TO_GO_ON):
        with contextlib.suppress(Busy), locked(step.part, step.name):  # a run that still holds it deletes it itself
            artifact.clear_leftovers(step.folder)


@contextlib.contextmanager
def _signals() -> Iterator[Stop]:
    """Count SIGINT, SIGTERM and SIGHUP instead of ending the runner; a signal that is ignored (nohup) stays so."""
    stop = Stop()

    def handler(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        stop.count += 1

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if previous[number] is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _leave_terminal() -> None:
    """Send output to nowhere: writing to a terminal that was closed is an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _run_step(
    step: Step,
    planned: Plan,
    view: View,
    stop: Stop,
    gates: _Gates,
    before: Sequence[card.FinishedStep],
    group: Group | None,
) -> dict[str, Any]:
    """Run one step under its lock until its folder is finished and has its final name."""
    began, clock = time.time(), time.monotonic()
    hashes = planned.hashes
    with locked(step.part, step.name), reading(step.reads()):
        record = artifact.read(step.folder)
        if record is not None and not step.fresh and artifact.damage(step.folder, record, hashes) is None:
            view.step(step, "done")  # another run finished it while this one worked on earlier steps
            return record
        check_unchanged(step, hashes, read=True)
        _make_room(step)
        before_this = earlier_attempts(step.part)
        spec = step.part / f"{SPEC}.new"
        spec.write_text(json.dumps(begin(step, planned), ensure_ascii=False, indent=1), encoding="utf-8")
        spec.replace(step.part / SPEC)
        view.step(step, "running")
        if group is not None and step.entry.launch.machines > 1:
            done = group.run(step, view, stop)
        else:
            done = follow(step, view, stop, step.part, lambda: _child(step))
        check_unchanged(step, hashes)
        versions = installed_versions(step.use)
        if step.stage.card:
            card.write(step.part, step, done["metrics"], planned, before, versions)
        secret.forbid(step.part, step.name)
        record = _record(step, done, versions, gates.ignored) | {"set": overrides(step, planned)}
        record |= {
            "started": round(before_this.began or began, 3),
            "seconds": round(before_this.seconds + time.monotonic() - clock, 3),
            "attempts": before_this.count + 1,
            "memory": before_this.most_memory(done["memory"]),
            **estimated_and_measured(step, planned.estimates.get(step.name), done["metrics"]),
        }
        artifact.finish(step.part, step.folder, record, hashes)
        hashes.save()
    view.step(step, "ran")
    return record


def _child(step: Step) -> Child:
    """The process of a stage, or the launcher of several."""
    launch = step.entry.launch
    return Launched(launch, step.part) if launch.sharing != Sharing() else Forked(step.part)


def _record(step: Step, done: dict[str, Any], versions: dict[str, str], ignored: Sequence[str]) -> dict[str, Any]:
    """What `record.json` says of a step besides times and files."""
    return {
        "stage": step.name,
        "use": step.use,
        "fingerprint": step.fingerprint,
        "recipe": dict(step.recipe),
        "inputs": dict(step.identities),
        "model": step.produces,
        "stands_on": step.stands_on(),
        "metrics": done["metrics"],
        "inexact_after_a_stop": step.inexact,
        "ignored_gates": list(ignored),
        "versions": versions,
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "gpu": has_gpu(),
        },
    }


def _make_room(step: Step) -> None:
    """Prepare the working folder: keep what an earlier try left to resume from, set aside what is in the way."""
    if step.folder.exists():  # damaged, or to be rebuilt
        with unread(step.folder, step.name):
            step.folder.rename(_free_name(step.folder))
    if step.fresh and step.part.exists():
        step.part.rename(_free_name(step.part))
    for part in step.left if step.fresh else ():  # given up, but kept in case the settings come back
        spec = {**(artifact.begun(part) or {}), "of": None}
        (part / SPEC).write_text(json.dumps(spec, ensure_ascii=False, indent=1), encoding="utf-8")
    step.part.mkdir(parents=True, exist_ok=True)
    for path in step.part.iterdir():
        if path.name in (*artifact.TO_GO_ON, artifact.LOG, EVENTS_FILE):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _free_name(folder: Path) -> Path:
    number = 1
    while (name := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return name
