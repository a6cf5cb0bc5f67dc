"""Rehearsals: before a stage runs, those below it check their settings and prepare their rows in a warm process.

So a setting that a library refuses, or rows that lose their answers, stop the run before hours are spent.
"""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

from pipeline.errors import Busy
from pipeline.plan.step import Plan, Step, begin
from pipeline.run.process import Forked, Stop, View, follow
from pipeline.saves import artifact
from pipeline.saves.locks import locked


class Rehearsals:
    """The rehearsals of a run; each stage is rehearsed once, as soon as its tokenizer and its rows exist."""

    def __init__(self, planned: Plan, view: View, stop: Stop) -> None:
        self.planned, self.view, self.stop = planned, view, stop
        self.done: set[str] = set()

    def below(self, step: Step) -> None:
        """Rehearse the stages below a step that is about to run.

        Raises:
            StageFailed: a stage cannot work with its settings or rows.
            Interrupted: a signal came.
        """
        below = self.planned.steps[self.planned.steps.index(step) + 1 :]
        for other in below:
            if other.state == "done" or other.stage.rehearse is None or other.name in self.done:
                continue
            tokenizer = self.planned.tokenizer_folder(other)
            if tokenizer is not None and all(Path(file).is_file() for file in other.inputs.rows.values()):
                with contextlib.suppress(Busy), locked(other.part, other.name):  # another run is at work on it
                    text = f"checks its settings and prepares its rows, before `{step.name}` starts"
                    self.view.event(other, {"kind": "note", "text": text})
                    self._rehearse(other, tokenizer)
                    self.done.add(other.name)

    def _rehearse(self, step: Step, tokenizer: Path) -> None:
        out = step.folder.with_name(f"{step.folder.name}.rehearsal")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        known = replace(step, inputs=replace(step.inputs, model=[str(tokenizer)]))
        spec = json.dumps(begin(known, self.planned), ensure_ascii=False)
        (out / artifact.SPEC).write_text(spec, encoding="utf-8")
        follow(step, _Warnings(self.view), self.stop, out, lambda: Forked(out, "rehearse"))
        shutil.rmtree(out)


class _Warnings:
    """Passes on only what a reader must know before the stage runs; the stage itself reports all of it again."""

    def __init__(self, view: View) -> None:
        self.view = view

    def step(self, step: Step, state: str) -> None:
        self.view.step(step, state)

    def event(self, step: Step, event: dict[str, object]) -> None:
        if event["kind"] == "note" and event.get("warning"):
            self.view.event(step, event)
