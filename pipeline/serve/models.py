"""A config or a folder and the name of a stage in, the folders of the model to load out."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.plan.step import Plan, Step
from pipeline.saves import artifact
from pipeline.saves.locks import reading
from stages.runtime.errors import StageError, nearest

if TYPE_CHECKING:
    from stages.model.generation import Engine

BASE = "base"
"""The name of the model that the first stage of a chain starts from."""


@dataclass(frozen=True)
class Served:
    """A model that can be loaded."""

    name: str
    """The name of its stage, or `base`, or of its folder."""
    folders: tuple[str, ...]
    """The base, then its adapters in order."""
    template: str | None = None
    """The text of the chat template for a model that has none of its own."""

    def identity(self) -> list[Any]:
        """What identifies its answers: the fingerprints of stages; sizes and times of other files; the template."""
        return [*(_identity(Path(folder)) for folder in self.folders), *([self.template] if self.template else [])]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the folders, so that `gc` and `--fresh` leave them in place."""
        with reading(Path(folder) for folder in self.folders):
            yield


def _identity(folder: Path) -> Any:
    record = artifact.read(folder)
    if record is not None:
        return record["fingerprint"]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), *([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files)]


def of_plan(plan: Plan, stage: str | None) -> Served:
    """The model after a stage; `base` is the one that the first stage starts from, None the last finished one.

    Raises:
        ConfigError: there is no such stage, it leaves no model, or it is not finished.
    """
    steps = [step for step in plan.steps if step.entry.leaves_model]
    if not steps:
        raise ConfigError([f"{plan.pipeline.path}: no stage leaves a model"])
    if stage == BASE and BASE not in (step.name for step in plan.steps):
        return _base(plan, steps)
    if stage is None:
        finished = [step for step in steps if step.state == "done"]
        return _after(finished[-1] if finished else steps[-1], plan)
    step = next((step for step in plan.steps if step.name == stage), None)
    if step is None:
        names = [BASE, *(step.name for step in steps)]
        raise ConfigError([f"--stage {stage}: there is no such stage{nearest(stage, names)}"])
    if step not in steps:
        choice = ", ".join(f"`{step.name}`" for step in steps)
        raise ConfigError([f"--stage {stage}: this stage leaves no model that answers; choose one of {choice}"])
    return _after(step, plan)


def _base(plan: Plan, steps: list[Step]) -> Served:
    first = steps[0]
    if first.entry.start is None:  # a stage has made it
        return Served(BASE, _after(first, plan).folders, _template(plan))
    return Served(BASE, tuple(first.inputs.model), _template(plan))


def _template(plan: Plan) -> str | None:
    return next((step.entry.template for step in plan.steps if step.entry.template is not None), None)


def _after(step: Step, plan: Plan) -> Served:
    if step.state != "done":
        raise ConfigError(
            [
                f"{plan.pipeline.path}: stage `{step.name}` is not finished ({step.why}); "
                f"`pipeline run {plan.pipeline.path} --until {step.name}` makes its model"
            ]
        )
    return Served(step.name, tuple(step.produces), _template(plan))


def of_folder(folder: Path) -> Served:
    """The model in a stage's folder, with the models below it where it is an adapter, or in any folder of a model.

    Raises:
        ConfigError: the folder holds no model, or a model below it is gone.
    """
    real = folder.resolve()
    if (real / "adapter_config.json").is_file():
        below = _below(real)
        missing = [path for path in below if not Path(path).is_dir()]
        if missing:
            raise ConfigError([f"`{folder}` is an adapter on `{missing[0]}`, which is not there; put it back"])
        return Served(_name(folder), (*below, str(real)))
    if not (real / "config.json").is_file():
        raise ConfigError([f"`{folder}` holds no model (it has no config.json); name a YAML file or a stage's folder"])
    return Served(_name(folder), (str(real),))


def _name(folder: Path) -> str:
    """`sft` for saves/tiny/sft, which is a link to saves/sft-0123456789ab."""
    return folder.name or folder.resolve().name


def _below(folder: Path) -> list[str]:
    """The model that an adapter is trained on: from the record of its stage, or from PEFT's config."""
    record = artifact.read(folder)
    if record is not None and record.get("model"):
        beside = [(path, folder.parent / Path(path).name) for path in record["model"][:-1]]
        return [str(moved) if moved.is_dir() else path for path, moved in beside]
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path") or "")
    if not Path(base).is_dir():
        raise ConfigError([f"`{folder}` is a LoRA adapter on `{base}`, which is not a folder; merge it first"])
    return [base]


def load(served: Served) -> "Engine":
    """Load the model with its tokenizer.

    Raises:
        StageError: the folder lacks weights, an adapter does not fit, or there is no chat template.
    """
    from transformers.utils import logging

    from stages.model.folder import refuse_missing
    from stages.model.generation import load_engine

    logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # GPTQModel prints a page of its own
        engine = load_engine(list(served.folders))
    refuse_missing(served.folders[0], engine.missing)
    if not engine.tokenizer.chat_template and served.template is not None:
        from stages.chat.template import install_template

        install_template(engine.tokenizer, served.template)
    if not engine.tokenizer.chat_template:
        raise StageError(
            f"the model `{served.name}` has no chat template, so it cannot answer a conversation; "
            "set `template:` at the top of the config"
        )
    return engine


@contextlib.contextmanager
def loaded(served: Sequence[Served]) -> "Iterator[dict[str, Engine]]":
    """The models by their names, in their order; their folders are held meanwhile. Raises as `load`."""
    with contextlib.ExitStack() as used:
        for model in served:
            used.enter_context(model.in_use())
        yield {model.name: load(model) for model in served}
