"""A step and a plan, and what can be asked of them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.pipeline import Pipeline, StageEntry
from pipeline.config.problems import in_order
from pipeline.errors import ConfigError, StageFailed
from pipeline.plan.estimate_result import StageEstimate
from pipeline.plan.fingerprint import installed_versions
from pipeline.saves import artifact
from stages import Model, Report, Stage
from stages.measuring.gates import Verdict
from stages.model.device import has_gpu
from stages.model.facts import NO_MODEL, Facts, Needs
from stages.model.inputs import Inputs
from stages.runtime.hashes import Hashes

State = Literal["done", "resume", "run", "refused"]


@dataclass(frozen=True)
class Step:
    """A stage placed in a plan."""

    entry: StageEntry
    """The stage as the config has it."""
    inputs: Inputs
    """What its references became."""
    folder: Path
    link: Path
    fingerprint: str
    recipe: Mapping[str, Any]
    identities: Mapping[str, str]
    """What identifies each model that it starts from or compares: a fingerprint, or a hash of files."""
    files: Mapping[str, str]
    """Path → sha256 of what it reads besides the folders of other stages."""
    state: State
    why: str
    fresh: bool = False
    """Asked to start over, whatever there is to go on from."""
    left: tuple[Path, ...] = ()
    """Unfinished work of the same stage with other settings, which `fresh` gives up."""
    inexact: str | None = None
    """Why resuming is not bit-exact; None if it is."""
    needs: Needs = field(default_factory=lambda: Needs(0, 0))
    """Memory and disk that it takes at least."""
    facts: Facts = NO_MODEL
    """What is known of the model that it starts from."""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def use(self) -> str:
        """The kind of stage."""
        return self.entry.use

    @property
    def stage(self) -> Stage[Any]:
        """The contract of its kind."""
        return self.entry.stage

    @property
    def part(self) -> Path:
        """The folder that it works in until it is finished."""
        return self.folder.with_name(f"{self.folder.name}.part")

    @property
    def produces(self) -> list[str]:
        """The model after this step, as folders; none when it leaves something else."""
        if not self.entry.leaves_model:
            return []
        return [*self.inputs.model, str(self.folder)] if self.entry.leaves_adapter else [str(self.folder)]

    def reads(self) -> dict[Path, str]:
        """Each folder that it reads, and in which way, for messages."""
        found = {Path(file).parent: "whose rows it reads" for file in self.inputs.rows.values()}
        found |= {Path(folder): "which it reads" for folder in self.inputs.others.values()}
        compared = (folder for folders in self.inputs.compared.values() for folder in folders)
        found |= {Path(folder): "which it compares" for folder in compared}
        return found | {Path(folder): "which it starts from" for folder in self.inputs.model}

    def stands_on(self) -> list[str]:
        """Names of the folders in `saves` that it reads."""
        folders = [folder.resolve() for folder in self.reads()]
        return sorted({folder.name for folder in folders if folder.parent == self.folder.parent.resolve()})


@dataclass
class Plan:
    """The steps in order; `notes` are things that a reader should know, `problems` what must be fixed first."""

    pipeline: Pipeline
    saves: Path
    hashes: Hashes
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    """Name of a data set → its rows."""
    ignore_gates: bool = False
    estimates: Mapping[str, StageEstimate] = field(default_factory=dict)
    """Name of a stage → what it takes; empty where nothing was estimated."""

    def tokenizer_folder(self, step: Step) -> Path | None:
        """A folder that exists and holds the tokenizer that a step will find; None if no such folder exists yet.

        A tokenizer goes unchanged from stage to stage, except through stages that leave another one.
        """
        folders = [Path(folder) for folder in step.inputs.model]
        found = next((folder for folder in reversed(folders) if (folder / "tokenizer.json").is_file()), None)
        if found is not None:
            return found
        made = next((one for one in self.steps if [one.folder] == folders[-1:]), None)
        leaves = made.stage.leaves if made is not None else None
        if made is None or (isinstance(leaves, Model) and leaves.tokenizer):
            return None
        return self.tokenizer_folder(made)

    @property
    def reports(self) -> Iterator[Step]:
        """The steps that leave figures about models."""
        return (step for step in self.steps if isinstance(step.stage.leaves, Report))


def gate_verdicts(step: Step, plan: Plan) -> list[Verdict]:
    """What the gates of a finished step say, each with its place. Every run judges anew: a bound is in no recipe."""
    leaves = step.stage.leaves
    found = leaves.verdicts(step.entry.config, step.folder) if isinstance(leaves, Report) else []
    place = plan.pipeline.document.value_place
    return [
        replace(verdict, text=f"{place(('stages', step.name, 'gates', number))}: {verdict.text}")
        for number, verdict in enumerate(found)
    ]


def begin(step: Step, plan: Plan) -> dict[str, Any]:
    """What the unfinished folder of a step says of itself: enough to run it, and to see later what has changed."""
    return {
        "of": plan.pipeline.name,
        "stage": step.name,
        "use": step.use,
        "config": step.entry.config.model_dump(mode="json"),
        "inputs": asdict(step.inputs),
        "fingerprint": step.fingerprint,
        "recipe": dict(step.recipe),
        "versions": installed_versions(step.use),
        "stands_on": step.stands_on(),
        "gpu": has_gpu(),
        "set": overrides(step, plan),
    }


def overrides(step: Step, plan: Plan) -> list[str]:
    """The paths of the `--set` options that reach a step: of its own settings, and of those at the top."""
    places = plan.pipeline.document.keys.items()
    found = [(key, place.removeprefix("--set ")) for key, place in places if place.startswith("--set ")]
    return list(dict.fromkeys(path for key, path in found if key[:1] != ("stages",) or step.name in key[1:2]))


def check_unchanged(step: Step, hashes: Hashes, *, read: bool = False) -> None:
    """What it reads must be what the plan hashed: hours may lie between, and the record speaks of that.

    `read` reads every byte that this run did not read, since a disk can rot without a change of times.

    Raises:
        StageFailed: a file has changed or is gone.
    """
    there = [Path(path) for path in step.files if Path(path).is_file()]
    found = dict(zip(map(str, there), hashes.of(there, read=read), strict=True))
    for path, known in step.files.items():
        if found.get(str(Path(path))) != known:
            raise StageFailed(f"stage `{step.name}`: `{path}` changed while the run was going on; run again")
    for folder, how in step.reads().items():
        if folder.parent != step.folder.parent:
            continue
        record = artifact.read(folder)
        damage = artifact.damage(folder, record, hashes, thorough=read) if record else "its record is gone"
        if damage is not None:
            raise StageFailed(
                f"stage `{step.name}`: `{folder}`, {how}, is damaged ({damage}); "
                "nothing was read from it; run again to rebuild it"
            )


def check_plan(plan: Plan) -> None:
    """Stop when anything must be fixed first.

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
