"""Rows packed end to end that never see each other: which models can, BLOOM's own attention for it, and the account.

Llama and Qwen keep packed rows apart by their position ids: transformers builds a block-diagonal mask from them. BLOOM
has no position ids; `install` gives a model its attention over torch's scaled_dot_product_attention instead, one call
for all documents of the same length. ALiBi (Press et al. 2022, arXiv 2108.12409) adds slope · (j - i) to the score of
query i and key j. transformers adds slope · j, which the softmax cannot tell apart, but which 16 bits round coarsely
when j is large; here it is the distance within a document.
"""

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import StageError
from stages import _model

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, dtype
    from transformers import PreTrainedModel

# tests/test_train_packing.py proves it of each of these, and of no other.
EXACT = ("bloom", "llama", "qwen2", "qwen3")
# Rotary embeddings that are stretched to the longest row of a batch, so that a row depends on its neighbours.
STRETCHED = ("dynamic", "longrope")
ALIGNED = 8  # elements; CUDA's memory-efficient attention copies a bias whose rows do not start at a multiple of it


def check(trainer: Mapping[str, Any], facts: _model.Facts, *, packing: bool, wraps: bool) -> list[_model.Problem]:
    """What would let packed rows read each other; `packing` is the stage's default.

    `wraps`: this stage may run rows into one another when `packing_strategy: wrapped` asks for it.
    """
    packs = trainer.get("packing", packing)
    wrapped = packs and trainer.get("packing_strategy") == "wrapped"
    problems: list[_model.Problem] = []
    if wrapped and not wraps:
        text = "`wrapped` lets rows read each other; leave it out, then rows packed together stay apart"
        problems.append(("trainer.packing_strategy", text))
    if trainer.get("eval_packing") and not packs:
        text = "without `packing` the held-out rows would read each other; remove it"
        problems.append(("trainer.eval_packing", text))
    for setting, asked in (("packing", packs and not wrapped), ("padding_free", trainer.get("padding_free"))):
        trouble = inexact(facts.config) if asked and facts.config else None
        if trouble is not None:
            wrap = ", or `packing_strategy: wrapped`, which lets them" if wraps and setting == "packing" else ""
            problems.append((f"trainer.{setting}", f"{trouble}; set `{setting}: false`{wrap}"))
    return problems


def inexact(config: Mapping[str, Any]) -> str | None:
    """Why rows packed for the model of this config.json would not be as if alone; None when they are."""
    model_type = config.get("model_type", "")
    if model_type not in EXACT:
        proven = ", ".join(f"`{name}`" for name in EXACT)
        return f"nothing proves that `{model_type}` keeps rows packed together from reading each other, as {proven} do"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in STRETCHED:
        return (
            f"`{kind}` position embeddings follow the longest row of a batch, so rows packed together change each other"
        )
    return None


def prepare(model: "PreTrainedModel", args: Any) -> None:
    """Make a loaded model ready to train with these SFTConfig arguments, packed or not.

    Raises:
        StageError: they pack, and this model cannot keep rows apart. `check` says so earlier where it can.
    """
    apart = args.packing and args.packing_strategy != "wrapped"
    trouble = inexact(model.config.to_dict()) if apart or args.padding_free else None
    if trouble is not None:
        raise StageError(f"{trouble}; set `packing: false`")
    if model.config.model_type == "bloom":
        install(model)


def pack(rows: "Dataset", args: Any, file: Path) -> dict[str, float]:
    """Pack rows as these SFTConfig arguments ask for, into an Arrow file, and account for it.

    `padding` is the share of the packed rows' room, rows × `max_length`, that holds no token.

    Raises:
        RuntimeError: a token was lost.
    """
    from trl import pack_dataset

    if args.shuffle_dataset:
        rows = rows.shuffle(seed=args.seed, keep_in_memory=True)
    settings = {"cache_file_name": str(file), "load_from_cache_file": False}
    packed = pack_dataset(rows, args.max_length, args.packing_strategy, settings)
    before, after = _tokens(rows), _tokens(packed)
    if before != after:
        raise RuntimeError(f"packing made {after} tokens of {before}")
    padding = 1 - after / (len(packed) * args.max_length)
    return {"packed": len(rows), "packed_into": len(packed), "padding": padding}


def _tokens(rows: "Dataset") -> int:
    from pyarrow import compute

    return sum(compute.sum(compute.list_value_length(chunk)).as_py() for chunk in rows.data["input_ids"].chunks)


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
