"""What a plan says of a stage before it runs: its batch, its work, its memory on one device, its disk and its time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["fits", "tight", "does not fit"]
TIGHT = 0.9
"""The share of the memory of a device above which an estimate is tight."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a stage computes."""

    name: str
    """In words, such as `a GPU of 24.0 GB`."""
    memory: int | None
    """Bytes; None where nothing is known."""
    gpu: bool
    here: bool = True
    """Whether it is this machine's, so that the speed of finished stages holds for it."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How the rows of a training stage are batched."""

    rows: int
    """Rows of one forward pass on one device; packed rows where the stage packs."""
    accumulation: int
    processes: int
    """Of all machines."""
    on_machine: int
    """Processes of one machine, which share its main memory."""
    row_tokens: int
    """Tokens of the longest row of a batch, which the memory is estimated for."""
    longest_seen: bool
    """Whether there is a row of that length; or else `max_length` allows it."""
    packed: bool = False
    """Whether the stage packs its rows."""
    documents: tuple[int, ...] = ()
    """Lengths of the documents in a packed row, where attention keeps them apart; otherwise empty."""

    @property
    def of_step(self) -> int:
        """Rows of an optimizer step, of all devices; packed rows where the stage packs."""
        return self.rows * self.accumulation * self.processes


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a training stage reads."""

    rows: int
    """Rows of an epoch, without those that are held out."""
    tokens: int
    """Tokens of an epoch, padding not counted."""
    steps_of_epoch: int
    """Optimizer steps of an epoch."""
    steps: int
    """Optimizer steps in all."""
    counted: bool
    """Whether a finished stage has counted rows and tokens; or else they follow from the first rows."""
    guessed: bool
    """Whether tokens follow from bytes, as there is no tokenizer yet."""
    fixed: bool
    """Whether the settings say the number of steps."""
    padded_tokens: float
    """Mean tokens of a row of a batch, with padding; of a packed row all its tokens."""

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimizer step, of all devices, padding not counted."""
        return self.tokens / max(1, self.steps_of_epoch)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Settings that make a stage fit."""

    settings: Mapping[str, Any]
    """Path below the stage, such as `trainer.gradient_checkpointing` → value."""
    memory: int
    """Bytes of the device's memory with them."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast one device computes."""

    rate: float
    """Floating-point operations a second."""
    source: str
    """Where the rate is from, as a clause."""
    at_most: bool = False
    """Whether a stage is sure to compute more slowly."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What a plan knows of a stage before it runs; None or 0 stands for what is not known."""

    device: Device
    memory: Mapping[str, int] | None = None
    """Cause → bytes on one device at the peak, of a stage that trains."""
    least: int = 0
    """Bytes of memory that a stage which does not train takes at least."""
    disk: int = 0
    """Bytes of its folder at one time, at least: checkpoints and the result."""
    parameters: int = 0
    trainable: int = 0
    reached: tuple[int, int] | None = None
    """How many linear modules LoRA reaches, and of how many; None without LoRA."""
    batches: Batches | None = None
    work: Work | None = None
    flops: float | None = None
    """Floating-point operations of the whole training on one device."""
    seconds: float | None = None
    speed: Speed | None = None
    last: float | None = None
    """Seconds that the stage took when it ran last."""
    changes: Sequence[Change] = ()
    """What makes it fit, the cheapest first."""
    why: str | None = None
    """Why the memory of a stage that trains is not known."""

    @property
    def total(self) -> int:
        """Bytes of the memory of the device at the peak; at least that of a stage that does not train.

        Without a GPU, all processes of a stage share the main memory.
        """
        if self.memory is None:
            return self.least
        sharing = 1 if self.device.gpu or self.batches is None else self.batches.on_machine
        return sum(self.memory.values()) * sharing

    @property
    def verdict(self) -> Verdict | None:
        """Whether the memory suffices; None where that is not known, as of a lower bound that is small enough."""
        if self.device.memory is None or (self.memory is None and not self.device.here):
            return None  # where a stage that does not train computes on another machine is not known
        if self.total > self.device.memory:
            return "does not fit"
        if self.memory is None:
            return None
        return "tight" if self.total > TIGHT * self.device.memory else "fits"
