"""What `saves` holds of a step, and so whether it will run, and why."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.pipeline import StageEntry
from pipeline.errors import NewerRecord
from pipeline.plan.datasets import DataSets, sources_in
from pipeline.plan.step import Plan, State
from pipeline.saves import artifact
from pipeline.saves.locks import held
from stages.model.device import has_gpu
from stages.training.checkpoint import reached_step
from stages.training.sharing import Sharing

UNSET: Mapping[str, Any] = {"launch": {**asdict(Sharing()), "machines": 1}}
"""A value of a recipe that is left out there while it is not used → what it is then."""
NEW = "has not run yet"
"""Why a stage runs that has left nothing in `saves`."""


class History:
    """Compares what a step computes from with what was finished or begun before."""

    def __init__(self, plan: Plan, data: DataSets) -> None:
        self.plan, self.data = plan, data

    def state(
        self, entry: StageEntry, folder: Path, link: Path, content: Mapping[str, Any], left: list[Path], *, fresh: bool
    ) -> tuple[State, str]:
        """Whether a step will run, and why. `content` has its recipe and versions, `left` is as `left` gives it."""
        try:
            record = artifact.read(folder)
            previous = artifact.read(link.resolve()) if link.is_symlink() else None
        except NewerRecord as error:
            self.plan.problems.append(str(error))
            return "done", "was made by a later version"
        damage = artifact.damage(folder, record, self.plan.hashes) if record is not None else None
        if record is not None and damage is None and not fresh:
            return "done", "nothing it depends on has changed"
        part = folder.with_name(f"{folder.name}.part")
        step = reached_step(part / "checkpoints")
        if (holder := held(part)) is not None:
            return "run" if step is None else "resume", f"is being run by another process ({holder})"
        if step is not None and not fresh:
            return "resume", f"goes on at step {step}" + _elsewhere(folder)
        if left and not fresh:
            return "refused", self._refusal(entry, left[-1], content)
        if fresh and (record is not None or step is not None or left):
            return "run", "`--fresh` starts it over"
        if folder.exists():
            return "run", f"its folder is damaged ({damage or 'no record of it can be read'}); it is rebuilt"
        if previous is None:
            return "run", self._without_record(folder, link)
        return "run", "because " + self._changes(entry, previous, content)

    def _without_record(self, folder: Path, link: Path) -> str:
        """Why a stage runs of which no finished folder is left."""
        if (artifact.begun(folder.with_name(f"{folder.name}.part")) or {}).get("fingerprint"):
            return "did not finish, and left no checkpoint to go on from"
        if link.is_symlink() and not link.exists():
            gone = self.plan.saves / link.resolve().name
            return (
                f"its folder `{gone}` is gone" if gone == folder else f"the folder of its last run, `{gone}`, is gone"
            )
        return NEW

    def left(self, entry: StageEntry, folder: Path) -> list[Path]:
        """Unfinished work of this stage of this config with other settings, the one that got farthest last."""
        found = []
        for part in folder.parent.glob(f"{entry.use}-*.part"):
            spec = artifact.begun(part) or {}
            step = reached_step(part / "checkpoints")
            ours = (spec.get("of"), spec.get("stage")) == (self.plan.pipeline.name, entry.name)
            if ours and step is not None and part.name != f"{folder.name}.part":
                found.append((int(step.split()[0]), part))
        return [part for _, part in sorted(found)]

    def _refusal(self, entry: StageEntry, part: Path, content: Mapping[str, Any]) -> str:
        begun = artifact.begun(part) or {}
        changes = self._changes(entry, begun, content)
        if begun.get("recipe", {}).get("launch") != content["recipe"].get("launch"):
            changes += ", and the last bits of the result depend on `launch`"
        return (
            f"was stopped at step {reached_step(part / 'checkpoints')}, and now {changes}. Undo that to go on from "
            f"there, or start over with `--fresh {entry.name}`"
        )

    def _changes(self, entry: StageEntry, old: Mapping[str, Any], content: Mapping[str, Any]) -> str:
        """What has changed since a record or an unfinished beginning; the stage above, when nothing of its own has."""
        found = list(self._differences(entry, {key: old.get(key) for key in ("recipe", "versions")}, content, ""))
        if found:
            return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
        sources = [model[1:] for model in (entry.start or "", *entry.compared.values(), *entry.others.values())]
        above = next((step for step in self.plan.steps if step.name in sources and step.state != "done"), None)
        return f"`{above.name}` above it will run" if above else "the model it starts from changed"

    def _differences(self, entry: StageEntry, old: Any, new: Any, path: str) -> Iterator[str]:
        """Clauses that name each value which changed, such as `trainer.learning_rate` 5e-05 → 2e-05 (x.yaml:31)."""
        if isinstance(new, dict) and isinstance(old, dict) and "sha256" in new and old.keys() == new.keys():
            yield from self._data_differences(entry, old, new, path)
        elif isinstance(old, dict) and isinstance(new, dict):
            for key in [key for key in {**old, **new} if key not in ("use", "inputs")]:
                below = key if path in ("", "recipe", "versions") else f"{path}.{key}"
                before, after = (values.get(key, UNSET.get(key)) for values in (old, new))
                yield from self._differences(entry, before, after, below)
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            for before, after in zip(old, new, strict=True):
                yield from self._differences(entry, before, after, path)
        elif old != new and len(str(old)) + len(str(new)) > 60:
            yield f"`{path}` changed{self._place_of(entry, path)}"
        elif old != new:
            yield f"`{path}` {_word(old)} → {_word(new)}{self._place_of(entry, path)}"

    def _data_differences(self, entry: StageEntry, old: Any, new: Any, path: str) -> Iterator[str]:
        """The data file that changed, by its name today and the rows that changed; then how it is read."""
        if old["sha256"] != new["sha256"]:
            sources = sources_in(entry.config)
            files = (source.path for source in sources if self.data.content(source.model_dump(mode="json")) == new)
            yield f"`{next(files)}` changed{self.data.inspections.difference(old, {**old, 'sha256': new['sha256']})}"
        for key in old:
            if key != "sha256":
                yield from self._differences(entry, old[key], new[key], f"{path}.{key}")

    def _place_of(self, entry: StageEntry, path: str) -> str:
        """The place of a setting, as ` (x.yaml:31)`."""
        document, words = self.plan.pipeline.document, tuple(path.split("."))
        keys = [key for key in (("stages", entry.name, *words), words) if key in document.keys]
        return f" ({':'.join(document.keys[keys[0]].split(':')[:2])})" if keys else ""


def _elsewhere(folder: Path) -> str:
    """A warning when the unfinished work was begun on another kind of machine."""
    spec = artifact.begun(folder.with_name(f"{folder.name}.part")) or {}
    if spec.get("gpu", has_gpu()) == has_gpu():
        return ""
    return f"; begun {'with' if spec['gpu'] else 'without'} a GPU, so the weights will not be bit for bit the same"


def _word(value: Any) -> str:
    if value is None:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
