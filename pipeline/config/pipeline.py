"""A config file, read and typed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config.document import Document
from stages import Model, Rows, Stage, find
from stages.data.source import Source
from stages.model.references import Role
from stages.training.settings import Training

TENSORBOARD = "tensorboard"  # a folder beside the links of the stages


class Launch(BaseModel):
    """How the processes of a training stage are started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(default=1, ge=1)
    """On one machine, data-parallel: one for each GPU, or on the CPU as many as are asked for."""


class Card(BaseModel):
    """What the model card says that only its author knows; never part of a fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    license: str | None = None
    """Its identifier on the Hub, such as `apache-2.0`; that of the base model unless given."""
    license_name: str | None = None
    """With `license: other`."""
    license_link: str | None = None
    base_model: str | None = None
    """Its name on the Hub, where `model` is a folder."""
    language: str | list[str] | None = None
    datasets: list[str] = []
    """Names on the Hub, besides those that `data` names itself."""
    tags: list[str] = []


@dataclass(frozen=True)
class StageEntry:
    """A stage as the config has it. Models and rows are references: a folder, a Hub name, or `$stage`.

    A base with adapters on it is one reference; `chain_of` takes it apart.
    """

    name: str
    use: str
    """The kind of stage."""
    config: BaseModel
    start: str | None
    """The model that it starts from; None for a stage that starts from none."""
    launch: Launch
    compared: Mapping[str, str] = field(default_factory=dict)
    """Name → reference of each model that it compares."""

    @property
    def stage(self) -> Stage[Any]:
        """The contract of its kind."""
        return find(self.use)

    @property
    def leaves_model(self) -> bool:
        return isinstance(self.stage.leaves, Model)

    @property
    def makes_model(self) -> bool:
        """Whether it leaves a model that starts from no other model."""
        return self.leaves_model and self.stage.setting(Role.START) is None

    @property
    def leaves_rows(self) -> bool:
        return isinstance(self.stage.leaves, Rows)

    @property
    def leaves_adapter(self) -> bool:
        """Whether the model that it leaves is an adapter on the one that it starts from."""
        leaves = self.stage.leaves
        return isinstance(leaves, Model) and leaves.adapter(self.config)

    @property
    def bits(self) -> int | None:
        """Bits of a weight of a quantized model."""
        leaves = self.stage.leaves
        return leaves.bits(self.config) if isinstance(leaves, Model) else None

    @property
    def reads_model(self) -> bool:
        """Whether it reads the model that it starts from."""
        return self.start is not None and self.stage.reads_model(self.config)

    @property
    def template(self) -> str | None:
        """The text of the chat template that it installs; None when the model keeps its own."""
        return vars(self.config).get("template")

    @property
    def training(self) -> Training | None:
        """What it trains on; None for a stage that does not train."""
        return self.stage.trains(self.config) if self.stage.trains is not None else None

    @property
    def others(self) -> dict[str, str]:
        """Setting → reference of each other model that it reads."""
        named = [path[0] for path, role in self.stage.roles.items() if role in (Role.SCORER, Role.OTHER)]
        values = {setting: getattr(self.config, setting) for setting in named}
        return {setting: value for setting, value in values.items() if value is not None}


@dataclass(frozen=True)
class Pipeline:
    """A config file, read and typed."""

    path: Path
    document: Document
    data: Mapping[str, Source]
    stages: Sequence[StageEntry]
    question: str | None
    card: Card

    @property
    def name(self) -> str:
        return folder_name(self.path)


def folder_name(config: Path) -> str:
    """The folder in `saves/` that holds a config's links; never one that has a meaning of its own there."""
    name = re.sub(r"[^\w.-]+", "_", config.stem)
    return f"_{name}" if name.startswith(".") or re.search("-[0-9a-f]{12}", name) else name
