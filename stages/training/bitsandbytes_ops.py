"""What the layers of bitsandbytes (`stages/model/quantized.py`) do in one operation, for the memory estimate.

Their operations give whole results: a weight that is dequantized for a product, and its result in 32 bits, come and go
inside of one operation, where tensors are not seen one by one.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

LIBRARY = "bitsandbytes"


def held_inside(operation: Any, args: Sequence[Any]) -> int:
    """Bytes of the largest temporary tensor inside of an operation; 0 for operations of other libraries."""
    if operation.namespace != LIBRARY:
        return 0
    name = operation._opname
    if name == "gemm_4bit":  # the weight in the dtype of the inputs
        return math.prod(args[2]) * args[0].element_size()
    if name == "int8_mixed_scaled_mm":  # the result in int32
        return 4 * len(args[1]) * len(args[2])
    return 0


def flops(operation: Any, args: Sequence[Any]) -> float:
    """Floating-point operations of an operation; 0 for operations of other libraries."""
    if operation.namespace != LIBRARY:
        return 0
    if operation._opname == "gemm_4bit":
        return 2.0 * args[0].numel() * args[2][0]
    if operation._opname == "int8_mixed_scaled_mm":
        return 2.0 * args[1].numel() * len(args[2])
    return 0


def without_outliers(operation: Any, args: Sequence[Any]) -> Any:
    """The results of an operation that depend on numbers, for inputs without large ones; None for other operations."""
    if operation.namespace != LIBRARY:
        return None
    if operation._opname == "int8_vectorwise_quant" and len(args) > 1 and args[1]:
        return *operation(args[0])[:2], args[0].new_empty(0)
    if operation._opname == "int8_mixed_scaled_mm":
        return args[0].new_empty((*args[0].shape[:-1], len(args[2]))), args[0].new_empty((len(args[0]), 0))
    return None


@contextlib.contextmanager
def plain_weights() -> Iterator[None]:
    """Let layers of bitsandbytes that are made have plain parameters: its own cannot hold a fake tensor."""
    import bitsandbytes
    import torch

    def plain(data: Any, requires_grad: bool = False, **attributes: Any) -> Any:
        weight = torch.nn.Parameter(data, requires_grad=False)
        for name, value in attributes.items():
            setattr(weight, name, value)
        return weight

    places = [
        (place, name) for place in (bitsandbytes.nn, bitsandbytes.nn.modules) for name in ("Params4bit", "Int8Params")
    ]
    real = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, plain)
    try:
        yield
    finally:
        for (place, name), value in zip(places, real, strict=True):
            setattr(place, name, value)
