"""BLOOM's attention for packed rows: one call of scaled_dot_product_attention for all documents of the same length.

BLOOM has no position ids, so `install` replaces the attention of a model with this one. ALiBi (Press et al. 2022, arXiv
2108.12409) adds slope · (j - i) to the score of query i and key j. transformers adds slope · j, which gives the same
softmax, but 16 bits round it coarsely when j is large. Here j - i, the distance within a document, is used.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.runtime.interfaces import refuse, require, require_parameters

if TYPE_CHECKING:
    from torch import Tensor, dtype
    from transformers import PreTrainedModel

ALIGNED = 8  # elements; CUDA's memory-efficient attention copies a bias whose rows do not start at a multiple of 8


@dataclass(frozen=True)
class Layout:
    """The documents in a batch of N = batch × length tokens, grouped by length, and the bias of attention scores."""

    groups: list[tuple[int, int]]
    """(documents, tokens of each document) of every group, the shortest documents first."""
    order: "Tensor | None"
    """(N,): the tokens in the order of the groups, as places in the flattened batch; None if no token moves."""
    back: "Tensor | None"
    """(N,): the inverse of `order`; None if no token moves."""
    bias: "Tensor"
    """(1, heads, L, L), L at least the length of the longest document: slope · (key - query), -inf for later keys."""


def layout(positions: "Tensor", slopes: "Tensor", dtype: "dtype") -> Layout:
    """The layout of a batch, from the place of each token in its document.

    Args:
        positions: (batch, length), int; a document begins at a 0 and ends before the next 0 or at the end of its row.
        slopes: (heads,), ALiBi's slopes in float32, on the device of the model.
        dtype: the dtype of queries and keys.

    Raises:
        ValueError: the positions of a document are not 0, 1, 2, …
    """
    import torch

    flat = positions.flatten().cpu()  # lengths are needed as Python numbers: waits for the device once a batch
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
    """The causal ALiBi bias of one document: (1, heads, L, L), L is `length` rounded up to a multiple of `ALIGNED`."""
    import torch

    places = torch.arange(-(-length // ALIGNED) * ALIGNED, device=slopes.device)
    distance = places - places[:, None]  # (query, key): at most 0 for the keys that the query may attend to
    bias = slopes[:, None, None] * distance
    return bias.masked_fill_(distance > 0, float("-inf")).to(dtype)[None]


def install(model: "PreTrainedModel") -> None:
    """Give a BloomForCausalLM an attention that keeps packed documents apart; weights and class stay unchanged.

    Forward passes with a cache, as in generation, use the attention of transformers.

    Raises:
        StageError: with the installed transformers, this attention would not do that.
    """
    _check_transformers(model)
    _replace_attention(model)


def _check_transformers(model: "PreTrainedModel") -> None:
    """Check the private parts of transformers that are replaced, then two documents in one row of a tiny model.

    Raises:
        StageError: a part is not as expected, or the second document attends to the first one.
    """
    import torch

    library, body = "transformers", model.transformer
    require(library, type(body), "build_alibi_tensor")
    require_parameters(library, type(body).build_alibi_tensor, "self", "attention_mask", "num_heads", "dtype")
    attention = body.h[0].self_attention
    require(library, attention, "query_key_value", "dense", "num_heads", "head_dim", "attention_dropout")
    require(library, attention, "hidden_dropout")
    require_parameters(library, type(attention).forward, "self", "hidden_states", "residual", "alibi")
    for part in (model, body):
        named = ("attention_mask", "past_key_values", "use_cache")
        require_parameters(library, type(part).forward, "self", "input_ids", named=named)
    ids, second = torch.tensor([[1, 2, 3, 4, 5]]), slice(2, None)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        config = type(model.config)(vocab_size=8, hidden_size=8, n_layer=2, n_head=2, initializer_range=1.0)
        tiny = type(model)(config).eval()
        alone = tiny(input_ids=ids[:, second]).logits
        _replace_attention(tiny)
        both = tiny(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1, 2]]), use_cache=False).logits
    if not torch.allclose(both[:, second], alone, atol=1e-4):
        refuse(library, "runs the attention of BLOOM in another way, so packed rows would attend to each other")


def _replace_attention(model: "PreTrainedModel") -> None:
    body = model.transformer
    model.forward = types.MethodType(_with_positions(type(model).forward), model)
    body.forward = types.MethodType(_with_positions(type(body).forward), body)
    body.build_alibi_tensor = types.MethodType(_layout_or_alibi, body)
    for block in body.h:
        block.self_attention.forward = types.MethodType(_attend, block.self_attention)


def _with_positions(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of BLOOM that passes positions as the attention mask, the only argument that `_layout_or_alibi` gets.

    The mask is (batch, 1, 1, length) and holds positions; transformers does not change a mask of four dimensions.
    """

    @functools.wraps(forward)  # transformers, PEFT and TRL read the signature
    def with_positions(self: Any, *args: Any, **kwargs: Any) -> Any:
        positions, mask = kwargs.pop("position_ids", None), kwargs.get("attention_mask")
        if positions is None and kwargs.get("use_cache") is False and mask is not None and mask.ndim == 2:
            positions = (mask.cumsum(-1) - 1) * mask  # each pad token is a document of its own, outside the loss
        if positions is not None and kwargs.get("past_key_values") is None:
            kwargs |= {"attention_mask": positions[:, None, None], "use_cache": False}
        return forward(self, *args, **kwargs)

    return with_positions


def _layout_or_alibi(self: Any, attention_mask: "Tensor", num_heads: int, dtype: "dtype") -> Any:
    """Replaces BloomModel.build_alibi_tensor, whose result every layer gets: a `Layout` if the mask holds positions."""
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
    """Replaces BloomAttention.forward; returns (batch, length, hidden), and None in place of the attention weights."""
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
