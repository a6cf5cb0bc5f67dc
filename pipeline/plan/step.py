"""A step and a plan, and what can be asked of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pipeline.config.checker import in_order
from pipeline.config.pipeline import Pipeline, StageEntry
from pipeline.errors import ConfigError, StageFailed
from pipeline.plan.fingerprint import installed_versions
from pipeline.saves import artifact
from pipeline.saves.content import Hashes
from stages.model.device import has_gpu
from stages.model.facts import Needs

State = Literal["done", "resume", "run", "refused"]


NO_NEEDS = Needs(0, 0)


@dataclass(frozen=True)
class Step:
    """A stage placed in a plan."""

    stage: StageEntry
    config: BaseModel
    """With its model as folders: the base, then the adapters on it."""
    folder: Path
    link: Path
    fingerprint: str
    recipe: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, str]
    """Path → sha256 of what it reads besides other stages' folders."""
    state: State
    why: str
    fresh: bool = False
    """Asked to start over, whatever there is to go on from."""
    left: tuple[Path, ...] = ()
    """Unfinished work of the same stage with other settings, which `fresh` gives up."""
    inexact: str | None = None
    """Why a stop may change its result; None: it ends bit for bit the same."""
    needs: Needs = NO_NEEDS
    """Memory and disk that it takes at least."""
    data: tuple[Path, ...] = ()
    """Folders of the steps whose rows it reads."""

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def part(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.part")

    @property
    def produces(self) -> list[str]:
        """The model after this step, as folders; none when it leaves something else."""
        if not self.stage.leaves_model:
            return []
        before = getattr(self.config, "model", [])
        return [*before, str(self.folder)] if self.stage.leaves_adapter else [str(self.folder)]


@dataclass
class Plan:
    """The steps in order; `notes` are things a reader should know, `problems` what must be mended first."""

    pipeline: Pipeline
    saves: Path
    hashes: Hashes
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    ignore_gates: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a gate says to a finished step: a sentence with its place, the figure, the bound and the evidence."""

    passed: bool
    text: str


def gate_verdicts(step: Step, plan: Plan) -> list[Verdict]:
    """What the gates of a finished step say. They are judged anew by every run: a bound is no part of a recipe."""
    judge = getattr(step.stage.module, "verdicts", None)
    found = judge(step.stage.config, step.folder) if judge is not None else []
    places = (plan.pipeline.document.value_place(("stages", step.name, "gates", n)) for n in range(len(found)))
    return [Verdict(one.passed, f"{place}: {one.text}") for one, place in zip(found, places, strict=False)]


def begin(step: Step, plan: Plan) -> dict[str, Any]:
    """What the unfinished folder of a step says of itself: enough to run it, and to see later what has changed."""
    return {
        "of": plan.pipeline.name,
        "stage": step.name,
        "use": step.stage.use,
        "config": step.config.model_dump(mode="json"),
        "fingerprint": step.fingerprint,
        "recipe": dict(step.recipe),
        "versions": installed_versions(step.stage.use),
        "stands_on": stands_on(step),
        "gpu": has_gpu(),
    }


def stands_on(step: Step) -> list[str]:
    """Names of the folders in `saves` that it reads: what it starts from, rows, and other models."""
    others = [getattr(step.config, setting) for setting in other_models(step.stage)]
    folders = [Path(folder).resolve() for folder in (*model_folders(step.config), *step.data, *others)]
    return sorted({folder.name for folder in folders if folder.parent == step.folder.parent.resolve()})


def check_unchanged(step: Step, hashes: Hashes, *, read: bool = False) -> None:
    """What it reads must be what the plan hashed: hours may lie between, and the record speaks of that.

    `read` reads every byte again, since a disk can rot without a change of times.

    Raises:
        StageFailed: a file has changed or is gone.
    """
    there = [Path(path) for path in step.files if Path(path).is_file()]
    found = dict(zip(map(str, there), hashes.of(there, read=read), strict=True))
    for path, digest in step.files.items():
        if found.get(str(Path(path))) != digest:
            raise StageFailed(f"stage `{step.name}`: `{path}` changed while the run was going on; run again")
    for folder in [*map(Path, model_folders(step.config)), *step.data]:
        if folder.parent != step.folder.parent:
            continue
        record = artifact.read(folder)
        damage = artifact.damage(folder, record, hashes, thorough=read) if record else "its record is gone"
        if damage is not None:
            how = "which it starts from" if str(folder) in getattr(step.config, "model", []) else "which it compares"
            how = "whose rows it reads" if folder in step.data else how
            raise StageFailed(
                f"stage `{step.name}`: `{folder}`, {how}, is damaged ({damage}); "
                "nothing was read from it; run again to make it anew"
            )


def model_folders(config: BaseModel) -> list[str]:
    """The folders of the model that it starts from, and of those that it compares."""
    compared = getattr(config, "compare", None)
    named = compared.values() if isinstance(compared, dict) else ()
    return list(dict.fromkeys([*getattr(config, "model", []), *(folder for folders in named for folder in folders)]))


def other_models(stage: StageEntry) -> dict[str, str]:
    """Setting → folder or Hub name, for those that the module calls `MODELS`."""
    named = {setting: getattr(stage.config, setting) for setting in getattr(stage.module, "MODELS", ())}
    return {setting: model for setting, model in named.items() if model is not None}


def check_plan(plan: Plan) -> None:
    """Stop when anything must be mended first.

    Raises:
        ConfigError: with every problem of every stage.
    """
    if plan.problems:
        raise ConfigError(in_order(plan.problems))


def refuse_plan(plan: Plan) -> None:
    """Stop when unfinished work would be left behind without a word.

    Raises:
        ConfigError: with every stage that this holds for, and the ways out.
    """
    refused = [step for step in plan.steps if step.state == "refused"]
    if refused:
        raise ConfigError(f"{plan.pipeline.path}: stage `{step.name}` {step.why}" for step in refused)
