"""What a GPU does differently from the CPU in a training step, for steps that are computed without memory.

PyTorch for CPUs cannot make tensors of a GPU, not even without memory. So the step runs as on a CPU, with the kernels
that CUDA would take: flash attention or memory-efficient attention, TRL's head in Triton, variable-length attention
for packed rows, and the operations that autocast computes in float32 on CUDA alone. They give tensors of the same
shapes, and keep and take what the kernels of PyTorch 2.13 do.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from stages.model import attention

KERNELS = 2 * 2**25
"""Bytes that cuBLAS takes for itself: 32 MiB (Hopper) in each of two threads, forward and backward."""
ROUNDED = 128  # tokens: flash attention rounds lengths up in its backward pass
# Operations that autocast computes in float32 on CUDA and not on the CPU.
IN_FLOAT32 = ("layer_norm", "group_norm", "softmax", "log_softmax", "softplus")


@contextlib.contextmanager
def like_gpu(count: Callable[[float], None]) -> Iterator[None]:
    """Compute as a GPU would; `count` gets the floating-point operations of attention."""
    import torch
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    functional, attend = torch.nn.functional, _attention(count)

    def varlen(flat: Any, documents: Any, scaling: float | None) -> Any:
        lengths = documents.bounds.diff().tolist()
        query, key, value = (part.transpose(0, 1)[None] for part in flat)
        return attend(query, key, value, scale=scaling, lengths=lengths)[0].transpose(0, 1)

    nothing = _Nothing()
    slow = [(place, name) for place in (functional, torch) for name in IN_FLOAT32 if hasattr(place, name)]
    with contextlib.ExitStack() as stack:
        for place, name, value in (
            *((place, name, _in_float32(getattr(place, name))) for place, name in slow),
            (functional, "scaled_dot_product_attention", attend),
            (utils, "_use_triton", lambda device: True),
            (chunked_logprob, "_use_triton", lambda device: True),
            (chunked_logprob, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b))),
            (chunked_logprob, "_forward_kernel", nothing),
            (chunked_logprob, "_backward_kernel", nothing),
            (chunked_logprob, "_addmm_fp32", nothing),
            (attention, "_takes_varlen", _takes_varlen),
            (attention, "_varlen", varlen),
        ):
            stack.enter_context(_replaced(place, name, value))
        yield


class _Nothing:
    """Takes the place of kernels that write into tensors they are given."""

    def __getitem__(self, grid: Any) -> "_Nothing":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


@contextlib.contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    known, real = hasattr(place, name), getattr(place, name, None)
    setattr(place, name, value)
    try:
        yield
    finally:
        if known:
            setattr(place, name, real)
        else:
            delattr(place, name)


def _in_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that computes in float32 under autocast."""
    import torch

    def full(value: Any) -> Any:
        half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value

    @functools.wraps(operation)
    def computed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return operation(*args, **kwargs)
        return operation(*map(full, args), **{name: full(value) for name, value in kwargs.items()})

    return computed


def _takes_varlen(query: Any, key: Any, value: Any) -> bool:
    size = query.shape[2]
    return bool(_computed_in(query).itemsize == 2 and size % 8 == 0 and size <= 256)


def _computed_in(tensor: Any) -> Any:
    import torch

    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype


def _attention(count: Callable[[float], None]) -> Callable[..., Any]:
    """A function that takes the place of scaled_dot_product_attention.

    It keeps for the backward pass what flash attention and memory-efficient attention keep: inputs, output, the
    logarithm of the sum of each row in float32, and a mask as a bias in the dtype of the query.
    """
    import torch

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, bias: Any, flops: float) -> Any:
            batch, heads, length, _ = query.shape
            out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
            sums = query.new_empty((batch, heads, length), dtype=torch.float32)
            ctx.save_for_backward(query, key, value, bias, out, sums)
            ctx.flops = flops
            count(flops)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            query, key, value, *_ = ctx.saved_tensors
            batch, heads, length, size = query.shape
            rounded = -(-length // ROUNDED) * ROUNDED
            found = [torch.empty_like(part) for part in (query, key, value)]
            held = [query.new_empty((batch, heads, rounded, -(-size // 32) * 32), dtype=torch.float32)]
            held.append(query.new_empty((batch, heads, rounded), dtype=torch.float32))
            if key.shape[1] != heads:  # gradients of keys and values for each query head, then summed
                held += [part.new_empty((batch, heads, *part.shape[2:])) for part in (key, value)]
            count(2.5 * ctx.flops)
            return *found, None, None

    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, lengths: Any = None, **settings: Any
    ) -> Any:
        dtype = _computed_in(query)
        query, key, value = (part.to(dtype) for part in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = query.new_empty(attn_mask.shape)
        elif attn_mask is not None:
            attn_mask = attn_mask.to(dtype)
        batch, heads, length, size = query.shape
        pairs = sum(one * one for one in lengths) if lengths else length * key.shape[2]
        return Attention.apply(query, key, value, attn_mask, 4.0 * batch * heads * pairs * size)

    return attend
