"""BLOOM's attention for packed rows: one call of scaled_dot_product_attention for all documents of the same length.

BLOOM has no position ids; `install` gives a model this attention in place of its own. ALiBi (Press et al. 2022, arXiv
2108.12409) adds slope · (j - i) to the score of query i and key j. transformers adds slope · j, which the softmax
cannot tell apart, but which 16 bits round coarsely when j is large; here it is the distance within a document.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, dtype
    from transformers import PreTrainedModel

ALIGNED = 8  # elements; CUDA's memory-efficient attention copies a bias whose rows do not start at a multiple of it


@dataclass(frozen=True)
class Layout:
    """Where the documents of a batch of N = batch × length tokens lie, and the bias of their attention scores."""

    groups: list[tuple[int, int]]
    """Number of documents and tokens in each, by length."""
    order: "Tensor | None"
    """(N,): each token's place in the flattened batch, in the order of the groups; None when nothing moves."""
    back: "Tensor | None"
    """(N,): the inverse of `order`."""
    bias: "Tensor"
    """(1, heads, L, L) for L at least the longest document: slope · (key - query), -inf where the key comes later."""


def layout(positions: "Tensor", slopes: "Tensor", dtype: "dtype") -> Layout:
    """The layout of a batch from each token's place in its document.

    Args:
        positions: (batch, length), int; a document begins at each 0 and ends before the next, or with its row.
        slopes: (heads,), ALiBi's slopes in float32, on the device of the model.
        dtype: that of queries and keys.

    Raises:
        ValueError: a document does not count 0, 1, 2, …
    """
    import torch

    flat = positions.flatten().cpu()  # the lengths are needed as numbers: one wait for the device a batch
    begins = torch.cat([torch.tensor([0]), (flat.diff() != 1).nonzero().flatten() + 1])
    if flat[begins].any():
        raise ValueError("positions of packed rows must count up from 0 in each document")
    lengths = torch.cat([begins, torch.tensor([len(flat)])]).diff()
    by_length = lengths.argsort(stable=True)
    begins, lengths = begins[by_length], lengths[by_length]
    order = torch.arange(len(flat)) + (begins - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
    sizes, counts = lengths.unique_consecutive(return_counts=True)
    moved = bool((order.diff() != 1).any())
    return Layout(
        groups=list(zip(counts.tolist(), sizes.tolist(), strict=True)),
        order=order.to(slopes.device) if moved else None,
        back=order.argsort().to(slopes.device) if moved else None,
        bias=alibi(slopes, int(lengths[-1]), dtype),
    )


def alibi(slopes: "Tensor", length: int, dtype: "dtype") -> "Tensor":
    """The causal ALiBi bias of one document: (1, heads, L, L), L being `length` rounded up to `ALIGNED`."""
    import torch

    places = torch.arange(-(-length // ALIGNED) * ALIGNED, device=slopes.device)
    distance = places - places[:, None]  # (query, key): at most 0 where the key is seen
    bias = slopes[:, None, None] * distance
    return bias.masked_fill_(distance > 0, float("-inf")).to(dtype)[None]


def install(model: "PreTrainedModel") -> None:
    """Give this BloomForCausalLM an attention that keeps documents apart; its weights and its class stay as they are.

    Passes that use a cache, as generation does, go on as before.
    """
    body = model.transformer
    model.forward = types.MethodType(_with_positions(type(model).forward), model)
    body.forward = types.MethodType(_with_positions(type(body).forward), body)
    body.build_alibi_tensor = types.MethodType(_layout_or_alibi, body)
    for block in body.h:
        block.self_attention.forward = types.MethodType(_attend, block.self_attention)


def _with_positions(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A BLOOM forward that hands positions on as the attention mask, the one thing that reaches `_layout_or_alibi`.

    transformers leaves a mask of four dimensions alone; ours is (batch, 1, 1, length) and holds positions.
    """

    @functools.wraps(forward)  # transformers, PEFT and TRL read the signature
    def with_positions(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions, mask = kwargs.pop("position_ids", None), kwargs.get("attention_mask")
        if positions is None and kwargs.get("use_cache") is False and mask is not None and mask.ndim == 2:
            positions = (mask.cumsum(-1) - 1) * mask  # padding is all zeros: documents of one token, in no loss
        if positions is not None and kwargs.get("past_key_values") is None:
            kwargs |= {"attention_mask": positions[:, None, None], "use_cache": False}
        return forward(self, *args, **kwargs)

    return with_positions


def _layout_or_alibi(self: Any, attention_mask: "Tensor", num_heads: int, dtype: "dtype") -> Any:
    """In place of BloomModel.build_alibi_tensor, whose result goes to every layer: a `Layout` where positions came."""
    import torch

    plain = type(self).build_alibi_tensor
    if attention_mask.ndim == 2:
        return plain(self, attention_mask, num_heads, dtype)
    device = attention_mask.device
    slopes = plain(self, torch.ones(1, 2, dtype=torch.long, device=device), num_heads, torch.float32)[:, 0, 1]
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return layout(attention_mask[:, 0, 0], slopes, dtype)


def _attend(self: Any, hidden_states: "Tensor", residual: "Tensor", alibi: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of BloomAttention.forward: (batch, length, hidden) and None for the attention weights."""
    import torch
    from torch.nn import functional

    if not isinstance(alibi, Layout):
        return type(self).forward(self, hidden_states, residual, alibi, *args, **kwargs)
    fused = self.query_key_value(hidden_states).view(-1, self.num_heads, 3, self.head_dim)
    if alibi.order is not None:
        fused = fused.index_select(0, alibi.order)
    contexts = []
    parts = fused.split([documents * tokens for documents, tokens in alibi.groups])
    for part, (documents, tokens) in zip(parts, alibi.groups, strict=True):
        # each (documents, heads, tokens, head_dim)
        query, key, value = part.view(documents, tokens, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=alibi.bias[..., :tokens, :tokens],
            dropout_p=self.attention_dropout.p if self.training else 0.0,
        )
        contexts.append(context.transpose(1, 2).reshape(documents * tokens, -1))
    context = torch.cat(contexts)
    if alibi.back is not None:
        context = context.index_select(0, alibi.back)
    output = self.dense(context.view_as(hidden_states))
    return residual + functional.dropout(output, self.hidden_dropout, self.training), None
