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
    size: int = 0
    if name == "gemm_4bit":  # the weight in the dtype of the inputs
        size = math.prod(args[2]) * args[0].element_size()
    if name == "int8_mixed_scaled_mm":  # the result in int32
        size = 4 * len(args[1]) * len(args[2])
    return size


def flops(operation: Any, args: Sequence[Any]) -> float:
    """Floating-point operations of an operation; 0 for operations of other libraries."""
    if operation.namespace != LIBRARY:
        return 0
    if operation._opname == "gemm_4bit":
        return 2.0 * float(args[0].numel() * args[2][0])
    if operation._opname == "int8_mixed_scaled_mm":
        return 2.0 * float(args[1].numel() * len(args[2]))
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


def numbers(weight: Any) -> int:
    """How many weights a parameter holds: in NF4 two in a byte."""
    state = getattr(weight, "quant_state", None)
    return int(weight.numel() if state is None else math.prod(state.shape))


def scales(model: Any) -> list[Any]:
    """The tensors of a quantized model that are neither parameters nor buffers: scales and tables of values."""
    import torch

    held: list[Any] = []
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        states = [state, getattr(state, "state2", None), getattr(module, "state", None)]
        held += [getattr(one, name, None) for one in states for name in ("absmax", "code", "offset", "SCB")]
        held.append(getattr(getattr(module, "weight", None), "SCB", None))
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


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
