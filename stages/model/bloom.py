"""BLOOM's attention for packed rows: one call of scaled_dot_product_attention for documents of about the same length.

BLOOM has no position ids, so `install` replaces the attention of a model with this one. ALiBi (Press et al. 2022, arXiv
2108.12409) adds slope · (j - i) to the score of query i and key j. transformers adds slope · j, which gives the same
softmax, but 16 bits round it coarsely when j is large. Here j - i, the distance within a document, is used.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.model import attention
from stages.model.attention import ALIGNED, Documents
from stages.runtime.interfaces import require, require_parameters

if TYPE_CHECKING:
    from torch import Tensor, dtype
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """The documents in a batch, and the bias of attention scores."""

    documents: Documents
    bias: "Tensor"
    """(1, heads, L, L), L the places of the longest document: slope · (key - query), -inf for later keys."""


def layout(positions: "Tensor", slopes: "Tensor", dtype: "dtype") -> Layout:
    """The layout of a batch, from the place of each token in its document.

    Args:
        positions: (batch, length), int; a document begins at a 0 and ends before the next 0 or at the end of its row.
        slopes: (heads,), ALiBi's slopes in float32, on the device of the model.
        dtype: the dtype of queries and keys.

    Raises:
        ValueError: the positions of a document are not 0, 1, 2, …
    """
    apart = attention.documents(positions)
    return Layout(apart, alibi(slopes, apart.groups[-1][1], dtype))


def alibi(slopes: "Tensor", length: int, dtype: "dtype") -> "Tensor":
    """The causal ALiBi bias of one document: (1, heads, L, L), L is `length` rounded up to a multiple of `ALIGNED`.

    CUDA's memory-efficient attention copies a bias whose rows do not start at a multiple of 8 elements.
    """
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
    library, body = "transformers", model.transformer
    require(library, type(body), "build_alibi_tensor")
    require_parameters(library, type(body).build_alibi_tensor, "self", "attention_mask", "num_heads", "dtype")
    layer = body.h[0].self_attention
    require(library, layer, "query_key_value", "dense", "num_heads", "head_dim", "attention_dropout")
    require(library, layer, "hidden_dropout")
    require_parameters(library, type(layer).forward, "self", "hidden_states", "residual", "alibi")
    for part in (model, body):
        named = ("attention_mask", "past_key_values", "use_cache")
        require_parameters(library, type(part).forward, "self", "input_ids", named=named)
    attention.refuse_mixing(model, _replace_attention, hidden_size=8, n_layer=2, n_head=2)


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
    from torch.nn import functional

    if not isinstance(alibi, Layout):
        return type(self).forward(self, hidden_states, residual, alibi, *args, **kwargs)
    fused = self.query_key_value(hidden_states).view(-1, self.num_heads, 3, self.head_dim)
    contexts = []
    for group in alibi.documents.split(fused):
        # each (documents, heads, places, head_dim)
        query, key, value = group.permute(3, 0, 2, 1, 4)
        places = query.shape[2]
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=alibi.bias[..., :places, :places],
            dropout_p=self.attention_dropout.p if self.training else 0.0,
        )
        contexts.append(context.transpose(1, 2).flatten(2))
    context = alibi.documents.join(contexts)
    output = self.dense(context.view_as(hidden_states))
    return residual + functional.dropout(output, self.hidden_dropout, self.training), None
