"""The memory and disk that a training stage takes at least."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stages.model import quantized
from stages.model.device import has_gpu
from stages.model.facts import Facts, Needs
from stages.model.tokens import HEADS, last_module
from stages.training.adapters import is_targeted, rank_of
from stages.training.settings import TrainingConfig, saving


def training_needs(config: TrainingConfig, facts: Facts, copies: int = 1) -> Needs:
    """A lower bound, not a guarantee.

    Memory: `copies` of the whole model, and gradients and both moments of Adam for the trained weights. Disk: the
    checkpoints that are kept, the one that is being written, and the result.

    Not counted: activations and logits (often the largest part), buffers of autocast and of libraries, files besides
    the weights, moments of optimizers other than 32-bit AdamW. If the number of steps is not known, every checkpoint
    that `save_steps` asks for is counted.
    """
    if not facts.weights:
        return Needs(0, 0)
    whole = _weights(config, facts)
    trained = whole if config.lora is None else 4 * _adapter_parameters(config.lora, facts)
    optimizer = str(config.trainer.get("optim", "adamw_torch"))
    moments = 2 * trained if optimizer.startswith("adamw") and "bit" not in optimizer else 0
    adapter_weights = 0 if config.lora is None else trained
    memory = copies * whole + adapter_weights + trained + moments
    return Needs(memory, disk=_checkpoints(config.trainer) * (trained + moments) + trained, result=trained)


def facts_after_training(config: TrainingConfig, facts: Facts) -> Facts:
    """Facts about the trained model: an adapter is added, or all weights have the width that they were trained in."""
    if config.lora is not None:
        return replace(facts, adapters=facts.adapters + 1)
    return replace(facts, adapters=0, stored=facts.parameters * _width(config, facts))


def _weights(config: TrainingConfig, facts: Facts) -> int:
    """Bytes of the weights in memory, of which `quantized_base` makes those of linear layers smaller."""
    width, method = _width(config, facts), config.quantized_base
    small = {
        f"{name}.weight" for name in facts.linear_modules() if method and last_module(f"{name}.weight") not in HEADS
    }
    return sum(
        quantized.size(method, shape) if method and name in small else width * math.prod(shape)
        for name, shape in facts.weights.items()
    )


def _width(config: TrainingConfig, facts: Facts) -> int:
    """Bytes of a weight in memory, as `start` loads it; a GPU is taken to compute in bfloat16."""
    dtype = (config.trainer.get("model_init_kwargs") or {}).get("dtype")
    if dtype == "auto":
        return max(1, facts.stored // facts.parameters)
    if dtype is None:
        return 2 if config.lora is not None and has_gpu() else 4
    return {"float32": 4, "float64": 8}.get(str(dtype), 2)


def _adapter_parameters(lora: Mapping[str, Any], facts: Facts) -> int:
    """The weights A (r × in) and B (out × r) of each layer that LoRA targets, and whole copies of `modules_to_save`."""
    saved = [rf"(.*\.)?{re.escape(name)}(\..*)?" for name in lora.get("modules_to_save") or []]
    copied = {
        name: math.prod(shape)
        for name, shape in facts.weights.items()
        if any(re.fullmatch(pattern, name.rpartition(".")[0]) for pattern in saved)
    }
    count = sum(copied.values())
    for module in facts.linear_modules():
        if f"{module}.weight" not in copied and is_targeted(module, lora):
            count += rank_of(module, lora) * sum(facts.weights[f"{module}.weight"])
    return count


def _checkpoints(trainer: Mapping[str, Any]) -> int:
    """The most checkpoints on the disk at one time: those that are kept, and the one that is being written."""
    settings = {**saving(trainer), **trainer}
    strategy, step = settings["save_strategy"], settings["save_steps"]
    steps = int(trainer.get("max_steps") or 0)
    if strategy in ("no", "best"):
        return 0
    last = 1
    if strategy == "epoch" and steps <= 0:
        last = math.ceil(trainer.get("num_train_epochs", 3))
    elif strategy == "steps" and step and steps > 0:
        last = math.ceil(steps / (step if step >= 1 else math.ceil(step * steps)))
    elif strategy == "steps" and 0 < step < 1:
        last = math.ceil(1 / step)
    return min(last, int(trainer.get("save_total_limit") or 2) + 1)
