"""The state of optimizers that cannot be computed without memory, in bytes: those of bitsandbytes and of torchao."""

import math
from dataclasses import dataclass
from typing import Any

LIKE_ITSELF = ("adamw_torch", "adamw_torch_fused", "adafactor", "ademamix", "sgd", "adagrad", "rmsprop")
"""Values of `optim` whose optimizer can be computed without memory."""
BOUND = "adamw_torch"
"""What takes the place of optimizers of other packages: none of them keeps more than AdamW in 32 bits."""
STATELESS = "sgd"
MOMENTS = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1}  # numbers that are kept for each weight
SMALL = 4096  # weights with fewer elements have their state in 32 bits
PAGED = 100_000  # elements from which on a paged state can leave the GPU
TABLE = 4 * 256  # bytes of the table of the 256 values of a number in 8 bits, of bitsandbytes


@dataclass(frozen=True)
class _Kind:
    moments: int
    bits: int
    block: int
    """Numbers that share a scale of four bytes."""
    table: int
    """Bytes of the tables for one weight."""
    embeddings: bool
    """Whether the state of embeddings has fewer bits too."""


def _kind(optim: str) -> _Kind | None:
    """How an optimizer of bitsandbytes or torchao keeps its state; None for any other."""
    name = optim.removeprefix("paged_").replace("_bnb", "")
    if optim in ("adamw_torch_4bit", "adamw_torch_8bit"):
        bits = 4 if optim.endswith("4bit") else 8
        return _Kind(2, bits, 128 if bits == 4 else 256, 0, embeddings=True)
    family, _, bits_ = name.partition("_")
    if family not in MOMENTS or (bits_ not in ("8bit", "32bit") and optim != "rmsprop_bnb"):
        return None
    moments = MOMENTS[family]
    return _Kind(moments, 8 if bits_ == "8bit" else 32, 256, TABLE * min(moments, 2), embeddings=False)


def stand_in(optim: str) -> str:
    """The optimizer that a step without memory runs with; `state` adds what it lacks."""
    if _kind(optim) is not None:
        return STATELESS
    return optim if optim in LIKE_ITSELF else BOUND


def state(optim: str, model: Any) -> int:
    """Bytes on the device that the stand-in does not keep, and the optimizer does for the trained weights of a model.

    transformers lets bitsandbytes keep the state of embeddings in 32 bits. The state of a paged optimizer leaves the
    GPU when memory is short, and is not counted.
    """
    import torch

    kind = _kind(optim)
    if kind is None:
        return 0
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    found = 0
    for weight in model.parameters():
        size = weight.numel()
        if not weight.requires_grad or (optim.startswith("paged") and size >= PAGED):
            continue
        whole = kind.bits == 32 or size < SMALL or (id(weight) in embeddings and not kind.embeddings)
        if whole:
            found += 4 * kind.moments * size
        else:
            found += kind.moments * (size * kind.bits // 8 + 4 * math.ceil(size / kind.block)) + kind.table
    return found
