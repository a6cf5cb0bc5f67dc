"""The peak memory of a training stage on one device, by cause, without loading weights.

The model is built from its config.json without memory for its weights. Run it in a process of its own: it loads torch.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stages.training.settings import TrainingConfig
from stages.training.sharing import Sharing


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
class Batch:
    """What one forward pass reads on one device."""

    rows: int
    """Sequences; of a preference pair or of a packed row one."""
    tokens: int
    """Tokens of a row with its padding, or of a packed row."""
    documents: tuple[int, ...] = ()
    """Lengths of the documents in a packed row; empty for rows that are padded."""
    labelled: float = 1.0
    """The share of the tokens that are in the loss."""


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
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.training import loop

    shape = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape)
        if config.lora is not None:
            from peft import get_peft_model

            model = get_peft_model(model, loop.adapter(config))
    parameters = sum(weight.numel() for weight in model.parameters())
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    memory = Memory(
        weights=parameters * (2 if gpu and config.lora is not None else 4),
        gradients=4 * trainable,
        optimizer=8 * trainable,
        activations=0,
        logits=0,
        reference=0,
        workspace=0,
    )
    tokens = batch.rows * batch.tokens
    return Estimate(memory=memory, parameters=parameters, trainable=trainable, flops=6.0 * parameters * tokens)
