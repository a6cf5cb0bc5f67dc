"""A config file, read and typed."""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

import stages
from pipeline.config.document import Document
from stages.data.source import Source

if TYPE_CHECKING:
    pass


class Launch(BaseModel):
    """How the processes of a training stage are started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(default=1, ge=1)
    """On one machine, data-parallel: one per GPU, or on the CPU as many as asked."""


class Card(BaseModel):
    """What the card says that only its author knows; never part of a fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    license: str | None = None
    """Its identifier on the Hub, such as `apache-2.0`; the base model's unless given."""
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
    """A stage as it is written: its kind is `use`, its starting model `model` (None for one that makes its own)."""

    name: str
    use: str
    config: BaseModel
    model: str | None
    launch: Launch
    compared: Mapping[str, str] = field(default_factory=dict)
    """Of a stage that compares models: their names, and where each comes from, written as `model` is."""

    @property
    def module(self) -> ModuleType:
        return module(self.use)

    @property
    def leaves_adapter(self) -> bool:
        return getattr(self.config, "lora", None) is not None

    @property
    def leaves_data(self) -> bool:
        """Does it leave rows instead of a model? Its module then has `rows_after(config)`, their format."""
        return hasattr(self.module, "rows_after")

    @property
    def leaves_model(self) -> bool:
        return leaves_model(self.module)


def leaves_model(kind: ModuleType) -> bool:
    """Not one that leaves rows, nor one whose module says `LEAVES_MODEL = False`: what is below passes over these."""
    return not hasattr(kind, "rows_after") and getattr(kind, "LEAVES_MODEL", True)


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


def kinds() -> list[str]:
    """The kinds of stage there are: every module in `stages/` without an underscore."""
    folder = Path(stages.__path__[0])
    return sorted(path.stem for path in folder.glob("[!_]*.py"))


def module(use: str) -> ModuleType:
    return importlib.import_module(f"stages.{use}")
