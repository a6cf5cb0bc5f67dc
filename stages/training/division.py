"""What one of several devices holds of a training stage, as shares of what one device alone would hold.

DDP holds everything everywhere. ZeRO (Rajbhandari et al., arXiv 1910.02054) divides the optimizer and the gradients
(stage 2) and also the weights (stage 3); FSDP2 divides what stage 3 does. Weights that are divided are gathered while
they are used. On a GPU these engines compute with weights in bfloat16 and keep what is trained in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.training.bitsandbytes_ops import numbers
from stages.training.sharing import Sharing

FULL = 4  # bytes of a number in float32
LIVE = 10**9  # weights that ZeRO-3 keeps gathered for the next use: `stage3_max_live_parameters`


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a model, in numbers and not in bytes."""

    trainable: int
    frozen: int
    held: int
    """Bytes of all weights."""
    layer: int
    """Weights of the largest layer."""
    apart: int
    """Weights outside of layers: embeddings and norms."""
    largest: int
    """The largest weight that is trained."""
    width: int
    """Hidden size."""
    size: int
    """Bytes of a weight that an engine of ZeRO or FSDP2 computes with."""

    @classmethod
    def of(cls, model: Any, half: bool) -> "Weights":
        """Those of a model; `half`: it computes in 16 bits."""
        import torch

        weights = list(model.parameters())
        stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = max(([_count(layer) for layer in stack] for stack in stacks), key=sum, default=[])
        trained = [numbers(weight) for weight in weights if weight.requires_grad]
        return cls(
            trainable=sum(trained),
            frozen=sum(map(numbers, weights)) - sum(trained),
            held=sum(weight.numel() * weight.element_size() for weight in weights),
            layer=max(layers, default=0),
            apart=sum(map(numbers, weights)) - sum(layers),
            largest=max(trained, default=0),
            width=int(model.config.get_text_config().hidden_size),
            size=2 if half else FULL,
        )


@dataclass(frozen=True, kw_only=True)
class Division:
    """What one device holds."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """Cause → the share of what one device alone would hold; 1 for other causes."""
    more: Mapping[str, int] = field(default_factory=dict)
    """Cause → bytes that the engine holds all the time."""
    step: int = 0
    """Bytes that the engine takes while the optimizer steps."""


def divide(weights: Weights, sharing: Sharing) -> Division:
    """How a stage is divided between devices.

    The shares of gradients and optimizer are of those of weights of `weights.size`.
    """
    processes, strategy = sharing.processes, sharing.strategy
    if strategy == "ddp":  # it copies gradients to buckets before it sends them
        return Division(more={"workspace": FULL * weights.trainable} if processes > 1 else {})
    if strategy == "fsdp2":
        return _fsdp2(weights, sharing)
    full = FULL / weights.size
    shares = {"gradients": 1 / processes, "optimizer": full / processes}
    optimizer = FULL * weights.trainable // processes  # the trained weights in float32
    workspace = weights.size * (weights.largest + weights.width**2)  # a gradient that is whole, and a bucket
    step = FULL * weights.trainable // processes  # gradients in float32
    if strategy == "zero3":
        shares |= {"weights": 1 / processes, "reference": 1 / processes}
        workspace += weights.size * min(LIVE, weights.trainable + weights.frozen)
    if sharing.offload is not None:
        shares |= {"gradients": 0.0, "optimizer": 0.0}
        optimizer = step = 0
    if sharing.offload == "parameters":
        shares["weights"] = 0.0
    return Division(shares=shares, more={"optimizer": optimizer, "workspace": workspace}, step=step)


def _fsdp2(weights: Weights, sharing: Sharing) -> Division:
    """Two layers are gathered at a time, the second ahead of its use; what is outside of layers stays gathered."""
    processes, full = sharing.processes, FULL / weights.size
    upcast = (FULL - weights.size) * weights.trainable / max(1, weights.held)
    shares = {
        "weights": (1 + upcast) / processes,
        "reference": 1 / processes,
        "gradients": full / processes,
        "optimizer": full / processes,
    }
    trained = weights.trainable / max(1, weights.trainable + weights.frozen)
    gathered = weights.apart + 2 * weights.layer
    workspace = weights.size * (gathered + round(trained * gathered))  # weights, and gradients before they are divided
    if sharing.offload is not None:
        shares |= dict.fromkeys(("weights", "gradients", "optimizer"), 0.0)
    return Division(shares=shares, more={"workspace": workspace})


def _count(module: Any) -> int:
    return sum(map(numbers, module.parameters()))
