"""A config file, read and typed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pipeline.config.document import Document
from stages import Model, Rows, Stage, find
from stages.data.source import Source
from stages.model.references import Role
from stages.training.settings import Training
from stages.training.sharing import Offload, Sharing, Strategy

TENSORBOARD = "tensorboard"  # a folder beside the links of the stages


class Launch(BaseModel):
    """How the processes of a training stage are started, and how they share its work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(default=1, ge=1)
    """On each machine: one for each GPU, or on the CPU as many as are asked for."""
    machines: int = Field(default=1, ge=1)
    """Machines that train together; the same command runs on each of them."""
    strategy: Strategy = "ddp"
    """Which part of the training each process holds: `ddp` all of it, `zero2` a part of gradients and optimizer,
    `zero3` and `fsdp2` also a part of the weights."""
    offload: Offload | None = None
    """What waits in main memory instead of GPU memory: `optimizer`, or `parameters` and the optimizer with them."""
    rank: int | Literal["env"] = "env"
    """Which of the machines this is, from 0; `env` reads it from the environment that the cluster sets."""
    rendezvous: str = "env"
    """HOST:PORT of machine 0, where the machines meet; `env` reads both from MASTER_ADDR and MASTER_PORT."""
    timeout: str = "10m"
    """How long machines wait for each other at the start: seconds, minutes or hours, such as `90s`, `10m`, `1h`."""

    @field_validator("offload")
    @classmethod
    def _has_parts(cls, value: Offload | None, info: ValidationInfo) -> Offload | None:
        strategy = info.data.get("strategy")
        if value is not None and strategy == "ddp":
            raise ValueError(f"`offload: {value}` needs another strategy than `ddp`; set `strategy: zero2`")
        if value == "parameters" and strategy == "zero2":
            raise ValueError("`zero2` can offload the optimizer alone; write `offload: optimizer` or `strategy: zero3`")
        if value == "optimizer" and strategy == "fsdp2":
            raise ValueError("`fsdp2` offloads weights and optimizer together; write `offload: parameters`")
        return value

    @field_validator("rank", mode="before")
    @classmethod
    def _one_of_the_machines(cls, value: Any, info: ValidationInfo) -> Any:
        machines = _several(info, "rank")
        if value == "env" or (type(value) is int and 0 <= value < machines):
            return value
        text = f"`rank` is `{value}`; with {machines} machines it is `env` or a number from 0 to {machines - 1}"
        raise ValueError(text)

    @field_validator("rendezvous")
    @classmethod
    def _host_and_port(cls, value: str, info: ValidationInfo) -> str:
        _several(info, "rendezvous")
        host, _, port = value.rpartition(":")
        if value != "env" and (not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16):
            text = f"`rendezvous` is `{value}`; it wants HOST:PORT of machine 0, such as `10.0.0.1:29500`, or `env`"
            raise ValueError(text)
        return value

    @field_validator("timeout", mode="before")
    @classmethod
    def _duration(cls, value: Any, info: ValidationInfo) -> Any:
        _several(info, "timeout")
        if re.fullmatch(r"[1-9][0-9]{0,5}[smh]", str(value)) is None:
            raise ValueError(f"`timeout` is `{value}`; it wants a number of seconds, minutes or hours, such as `10m`")
        return value

    @model_validator(mode="after")
    def _complete(self) -> "Launch":
        if self.world == 1 and self.strategy != "ddp" and self.offload is None:
            text = f"`{self.strategy}` divides the training between processes, and there is one"
            raise ValueError(f"{text}; set `processes: 2` or more, or add `offload`")
        return self

    @property
    def world(self) -> int:
        """The processes of all machines."""
        return self.machines * self.processes

    @property
    def sharing(self) -> Sharing:
        return Sharing(processes=self.world, strategy=self.strategy, offload=self.offload)

    @property
    def seconds(self) -> int:
        """`timeout` in seconds."""
        return int(self.timeout[:-1]) * {"s": 1, "m": 60, "h": 3600}[self.timeout[-1]]


def _several(info: ValidationInfo, setting: str) -> int:
    """The number of machines, for a setting that only several machines have.

    Raises:
        ValueError: there is one machine.
    """
    machines = int(info.data.get("machines", 1))
    if machines == 1:
        raise ValueError(f"`{setting}` is for several machines; set `machines`, or remove `{setting}`")
    return machines


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
