"""The contract of a stage: everything that the pipeline may ask of one, at one place.

A stage is one file in this folder: a docstring line (what comes in, what goes out), a frozen pydantic `Config` that
forbids unknown keys, its functions, and last `STAGE = Stage(…)`, which lists what it answers. A misspelt or missing
hook is a TypeError that names it when the file is imported. The YAML key is the name of the file; there is no registry.

`config` is what was written in the YAML; `Inputs` is what it became: folders of models and files of rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:  # the rooms are imported when a stage is: `pipeline --help` needs none of them
    from pydantic import BaseModel

    from stages.data.source import Format
    from stages.measuring.gates import Verdict
    from stages.model.facts import Facts, Needs
    from stages.model.inputs import Inputs
    from stages.model.references import Role
    from stages.runtime.errors import Problem
    from stages.runtime.figures import Figure
    from stages.training.settings import Training
    from stages.training.sharing import Strategy

C = TypeVar("C", bound="BaseModel")
Metrics = dict[str, Any]
"""What a stage measured, as JSON; it goes into the record."""


# What a stage leaves


@dataclass(frozen=True, kw_only=True)
class Model(Generic[C]):
    """A model, which the stage below starts from."""

    adapter: Callable[[C], bool] = lambda config: False
    """Whether it is a LoRA adapter on the model that the stage started from."""
    bits: Callable[[C], int | None] = lambda config: None
    """Bits of a quantized weight; None for a model that is not quantized."""
    tokenizer: bool = False
    """Whether its tokenizer differs from the tokenizer of the model that the stage starts from."""


@dataclass(frozen=True)
class Scorer:
    """A reward model, which later stages name as `$stage`. The stage below starts from the model above."""


@dataclass(frozen=True, kw_only=True)
class Rows(Generic[C]):
    """A data set, which later stages name as `$stage`. The stage below starts from the model above."""

    format: Callable[[C], Format]


@dataclass(frozen=True, kw_only=True)
class Report(Generic[C]):
    """Figures about models above. The stage below starts from the model above."""

    verdicts: Callable[[C, Path], list[Verdict]]
    """What the gates say about a finished folder: one verdict for each gate, in their order."""


# The contract


@dataclass(frozen=True)
class Parallel:
    """A stage that can run in several processes (`launch:`)."""

    strategies: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero2", "zero3")
    """How processes can share it."""
    not_divided: tuple[str, ...] = ()
    """Settings under `trainer:` that work only where each process holds the whole model."""
    least_rows: Callable[[Any], int] = lambda config: 1
    """Rows of a batch that each process needs."""


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[C]):
    """All that the pipeline may ask of a stage."""

    version: int
    """Raise it when the same settings and inputs would give another result."""
    config: type[C]
    run: Callable[[C, Inputs, Path], Metrics]
    """Do the work and leave the artifact in the folder. Raises StageError for what a user can fix."""
    headline: Callable[[Metrics], str]
    """The key figure for people, one clause."""
    leaves: Model[C] | Scorer | Rows[C] | Report[C] = field(default_factory=Model)
    check: Callable[[C], list[Problem]] = lambda config: []
    """Problems that the settings alone show before the first stage starts."""
    check_model: Callable[[C, Facts], list[Problem]] = lambda config, facts: []
    """Problems with the model that the stage starts from, or with one that it compares."""
    notes: Callable[[C, Facts], list[str]] = lambda config, facts: []
    """What the user should know of the settings and the model that the stage starts from, and what is no problem."""
    needs: Callable[[C, Facts], Needs] | None = None
    """Memory and disk in bytes that the stage takes at least, never more than it does; None when that is not known."""
    more_memory: Callable[[C], str] | None = None
    """What to set when memory runs out, as a clause; None where no setting of the stage helps."""
    facts: Callable[[C, Facts], Facts] = lambda config, facts: facts
    """What later stages can know of the model that the stage leaves."""
    reads_model: Callable[[C], bool] = lambda config: True
    """Whether it reads the model that it starts from. One that does not need not run again when that model changes."""
    renders: Callable[[C], bool] = lambda config: True
    """Whether it writes the conversations that it reads with the chat template, where it reads a model."""
    reads_files: Callable[[C], list[Path]] = lambda config: []
    """Files that it reads besides models and data."""
    rehearse: Callable[[C, Inputs, Path], None] | None = None
    """Whatever can fail before the work itself: build settings, prepare rows. It is called before earlier stages run.

    `Inputs.model` is then one folder with the tokenizer that the stage will find, and need not hold the right weights.
    """
    trains: Callable[[C], Training] | None = None
    """What a training stage trains on; None for other stages."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """A key of the config → the class of a library whose settings it takes, as `trl.trainer.sft_config:SFTConfig`."""
    libraries: tuple[str, ...] = ()
    """Packages that compute, besides those that every stage counts (torch, transformers, trl, peft, …)."""
    judges_only: tuple[str, ...] = ()
    """Settings that judge the result and do not change it; they are not in the fingerprint."""
    parallel: Parallel | None = None
    card: bool = False
    """Whether the artifact gets a model card."""
    at_top: str | None = None
    """The setting that `KIND: value` at the top of the file stands for; None for a kind that is not written there.

    Such a stage comes before the first stage that starts from a model.
    """
    describe: Callable[[C], list[str]] = lambda config: []
    """The settings that the reader of a model card asks for first."""
    figures: Callable[[Metrics], list[Figure]] = lambda metrics: []
    """What it measured, for a model card."""

    @cached_property
    def roles(self) -> dict[tuple[str, ...], Role]:
        """The settings that stand for models or data: the path of each, such as ("calibration", "data")."""
        from stages.model.references import roles

        return roles(self.config)

    def setting(self, role: Role) -> str | None:
        """The setting with a role that at most one setting has."""
        return next((path[0] for path, other in self.roles.items() if other is role), None)


@cache
def kinds() -> tuple[str, ...]:
    """The kinds of stage there are, sorted: the files in this folder."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def find(kind: str) -> Stage[Any]:
    """The stage of a kind.

    Raises:
        ModuleNotFoundError: there is no such kind.
        TypeError: the file has no `STAGE`, or that is not a `Stage`.
    """
    stage = vars(importlib.import_module(f"stages.{kind}")).get("STAGE")
    if not isinstance(stage, Stage):
        raise TypeError(f"stages/{kind}.py: its last lines must be `STAGE = Stage(…)`; see stages/__init__.py")
    return stage
