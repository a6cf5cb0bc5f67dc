"""The state of optimizers of bitsandbytes, in bytes: it cannot be computed without memory, as that of others can."""

import math
import re
from typing import Any

MOMENTS = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1}  # numbers that are kept for each weight
BLOCK = 256  # numbers in 8 bits that share a scale
SMALL = 4096  # weights with fewer elements have their state in 32 bits
PAGED = 100_000  # elements from which on a paged state can leave the GPU
TABLE = 4 * 256  # bytes of the table of the 256 values of a number in 8 bits
_NAMES = re.compile(
    r"(paged_)?(adamw|ademamix|lion|rmsprop)(_bnb)?_(8|32)bit|rmsprop_bnb|adamw_bnb_8bit|adamw_8bit", re.ASCII
)


def is_of_bitsandbytes(optim: str) -> bool:
    """Whether a value of `optim` names an optimizer of bitsandbytes."""
    return _NAMES.fullmatch(optim) is not None


def state(optim: str, model: Any) -> int:
    """Bytes that an optimizer of bitsandbytes keeps on the device for the trained weights of a model.

    transformers keeps the state of embeddings in 32 bits. The state of a paged optimizer leaves the GPU when memory is
    short, and is not counted.
    """
    import torch

    moments = next(count for name, count in MOMENTS.items() if name in optim)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    found = 0
    for weight in model.parameters():
        size = weight.numel()
        if not weight.requires_grad or (optim.startswith("paged") and size >= PAGED):
            continue
        if "8bit" not in optim or size < SMALL or id(weight) in embeddings:
            found += 4 * moments * size
        else:
            found += moments * (size + 4 * math.ceil(size / BLOCK)) + TABLE * min(moments, 2)
    return found
