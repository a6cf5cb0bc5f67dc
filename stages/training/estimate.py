"""The peak memory of a training stage on one device, by cause, without loading weights.

The model is built from its config.json without memory for its weights. Run it in a process of its own: it loads torch.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from stages.training.footprint import footprint
from stages.training.settings import TrainingConfig
from stages.training.sharing import Sharing
from stages.training.weightless_trainer import Batch

__all__ = ["Batch", "Estimate", "Memory", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak, by cause."""

    weights: int
    """Of the model that is trained, adapters included."""
    gradients: int
    optimizer: int
    """What the optimizer keeps from step to step."""
    activations: int
    """What the forward pass keeps for the backward pass, without `logits`."""
    logits: int
    """What the head of the loss holds."""
    reference: int
    """Weights of the frozen reference model."""
    workspace: int
    """Temporary tensors, such as copies of weights in another dtype."""

    @property
    def total(self) -> int:
        """The sum of all causes."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a step of a training stage takes on one device."""

    memory: Memory
    parameters: int
    """Of the whole model, adapters included."""
    trainable: int
    flops: float
    """Of one forward and one backward pass of the batch, with what is computed again under gradient checkpointing."""


def estimate(kind: str, config: TrainingConfig, folder: Path, batch: Batch, sharing: Sharing, *, gpu: bool) -> Estimate:
    """The peak memory and the work of one training step.

    Args:
        kind: the TRL config of the stage, as `SFTConfig`.
        config: the settings of the stage.
        folder: the model folder; its config.json is enough. Adapters on it are folded in, so they take no memory.
        batch: what one forward pass reads.
        sharing: the processes.
        gpu: whether the stage runs on a GPU, which computes in bfloat16.

    Raises:
        StageError: the settings are refused, as they would be in the stage.
    """
    found = footprint(kind, config, folder, batch, sharing, gpu=gpu)
    return Estimate(
        memory=Memory(**found.peak), parameters=found.parameters, trainable=found.trainable, flops=found.flops
    )
