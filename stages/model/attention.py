"""Attention of packed rows for models that ask transformers' attention interface: each document costs what it is long.

TRL packs a batch into one row of N tokens. transformers keeps its documents apart with a mask of N × N, so that
scaled_dot_product_attention pays for N tokens at once. Here the tokens are grouped by document and each group of
documents of about the same length is one call, causal and without a mask. On CUDA in 16 bits the batch is one call of
torch's variable-length flash attention (`torch.nn.attention.varlen`), where that gives the same numbers.

`install` registers the attention under a name of its own (`AttentionInterface` of transformers) and computes the places
of the documents once a batch, in a hook before the model's layers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.runtime.interfaces import refuse, require_parameters

if TYPE_CHECKING:
    from torch import Tensor, dtype
    from transformers import PreTrainedModel

NAME = "documents"  # among transformers' attention implementations
ALIGNED = 8  # tokens; documents are grouped by their length, rounded up to a multiple of it


@dataclass(frozen=True)
class Documents:
    """The documents in a batch of N = batch × length tokens, grouped by length.

    A group is an array of (documents, places, …). A document of one token has one place, any other a multiple of
    `ALIGNED` places. The places behind a document's last token repeat its first one; causal attention does not let the
    document see them, and `join` drops them.
    """

    groups: list[tuple[int, int]]
    """(documents, places of each) of every group, the shortest documents first."""
    order: "Tensor | None"
    """(sum of documents × places,): the token at each place, as an index into the batch; None if that is 0 to N - 1."""
    back: "Tensor | None"
    """(N,): the place of each token, so that order[back] is 0 to N - 1; None if `order` is."""
    bounds: "Tensor"
    """(documents + 1,), int32: where each document begins in the flattened batch, and N."""
    longest: int
    """Tokens of the longest document."""

    def split(self, tokens: "Tensor") -> "list[Tensor]":
        """(N, …) → one (documents, places, …) for each group."""
        placed = tokens if self.order is None else tokens.index_select(0, self.order)
        parts = placed.split([documents * places for documents, places in self.groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]

    def join(self, groups: "list[Tensor]") -> "Tensor":
        """The inverse of `split`: (documents, places, …) of each group → (N, …)."""
        import torch

        placed = torch.cat([group.flatten(0, 1) for group in groups])
        return placed if self.back is None else placed.index_select(0, self.back)


def documents(positions: "Tensor") -> Documents:
    """The documents in a batch, from the place of each token in its document.

    Args:
        positions: (batch, length), int; a document begins at a 0 and ends before the next 0 or at the end of its row.

    Raises:
        ValueError: the positions of a document are not 0, 1, 2, …
    """
    import torch

    flat = positions.flatten().cpu()  # lengths are needed as Python numbers: waits for the device once a batch
    begins = torch.cat([torch.tensor([0]), (flat.diff() != 1).nonzero().flatten() + 1])
    if flat[begins].any():
        raise ValueError("positions of packed rows must count up from 0 in each document")
    bounds = torch.cat([begins, torch.tensor([len(flat)])])
    lengths = bounds.diff()
    places = torch.where(lengths == 1, 1, (lengths + ALIGNED - 1) // ALIGNED * ALIGNED)
    by_places = places.argsort(stable=True)
    document = by_places.repeat_interleave(places[by_places])  # of each place
    within = torch.arange(len(document)) - (places[by_places].cumsum(0) - places[by_places]).repeat_interleave(
        places[by_places]
    )
    real = within < lengths[document]
    order = begins[document] + within.where(real, 0)
    sizes, counts = places[by_places].unique_consecutive(return_counts=True)
    moved = len(order) != len(flat) or bool((order.diff() != 1).any())
    return Documents(
        groups=list(zip(counts.tolist(), sizes.tolist(), strict=True)),
        order=order.to(positions.device) if moved else None,
        back=real.nonzero().flatten()[order[real].argsort()].to(positions.device) if moved else None,
        bounds=bounds.to(positions.device, torch.int32),
        longest=int(lengths.max()),
    )


def install(model: "PreTrainedModel") -> bool:
    """Let a model's attention take packed documents one by one; whether it was done.

    It is not done for a model that is loaded with another attention than the default, as `flash_attention_2`, which
    has its own way. Weights, class and config.json stay unchanged. Forward passes with an attention mask or a cache, as
    in generation, use transformers' own scaled_dot_product_attention.

    Raises:
        StageError: with the installed transformers, packed documents would attend to each other.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return False
    library, attention = "transformers", AttentionInterface()["sdpa"]
    first = ("module", "query", "key", "value", "attention_mask")
    require_parameters(library, attention, *first, named=("dropout", "scaling", "is_causal"))
    require_parameters(library, sdpa_mask, named=("attention_mask", "mask_function"))
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask_later)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8, "head_dim": 4}
    refuse_mixing(model, _use, hidden_size=8, num_hidden_layers=2, **sizes)
    _use(model)
    return True


def _use(model: "PreTrainedModel") -> None:
    model.set_attn_implementation(NAME)
    model.base_model.register_forward_pre_hook(_find_documents, with_kwargs=True)


def refuse_mixing(model: "PreTrainedModel", install: "Callable[[PreTrainedModel], None]", **sizes: int) -> None:
    """Run two documents in one row of a tiny model of the same kind, with the attention that `install` gives it.

    Raises:
        StageError: the second document attends to the first one.
    """
    import torch

    ids, second = torch.tensor([[1, 2, 3, 4, 5]]), slice(2, None)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        config = type(model.config)(vocab_size=8, initializer_range=1.0, **sizes)
        tiny = type(model)(config).eval()
        alone = tiny(input_ids=ids[:, second]).logits
        install(tiny)
        both = tiny(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1, 2]]), use_cache=False).logits
    if not torch.allclose(both[:, second], alone, atol=1e-4):
        trouble = "in another way, so packed rows would attend to each other"
        refuse("transformers", f"runs the attention of `{config.model_type}` {trouble}")


def _find_documents(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook that adds the documents of a packed batch, which transformers passes on to the attention."""
    packed = kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None
    if packed and kwargs.get("past_key_values") is None:
        kwargs["documents"] = documents(kwargs["position_ids"])
    return args, kwargs


def _mask_later(*args: Any, **kwargs: Any) -> "Callable[[], Tensor | None]":
    """transformers' mask for scaled_dot_product_attention, made when a layer first asks for it.

    A packed batch never asks: its mask would have N × N elements.
    """
    from transformers.masking_utils import sdpa_mask

    return functools.cache(functools.partial(sdpa_mask, *args, **kwargs))


def _attend(
    module: Any,
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    attention_mask: "Callable[[], Tensor | None] | Tensor | None",
    documents: Documents | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> "tuple[Tensor, None]":
    """The attention that transformers calls.

    Args:
        module: the attention layer.
        query: (batch, heads, length, head_dim); `key` and `value` may have fewer heads.
        key: as `query`.
        value: as `query`.
        attention_mask: what `_mask_later` made, or a mask of four dimensions that the caller of the model gave.
        documents: the documents of the batch; None if it is not packed.
        sliding_window: how many tokens a query attends to, its own included; None for all.
        dropout: the probability with which a weight of the attention is dropped.
        scaling: the factor of the scores.

    Returns:
        (batch, length, heads, head_dim), and None in place of the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attend: Any = sdpa_attention_forward
    settings = {"dropout": dropout, "scaling": scaling}
    if documents is None:
        mask = attention_mask() if callable(attention_mask) else attention_mask
        return attend(module, query, key, value, mask, **settings, **kwargs)[0], None
    batch = query.shape[0], query.shape[2]
    flat = tuple(part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))  # (N, heads, head_dim) each
    window = sliding_window if sliding_window is not None and sliding_window < documents.longest else None
    if _takes_varlen(*flat) and not dropout and window is None:
        return _varlen(flat, documents, scaling).unflatten(0, batch), None
    contexts = []
    for parts in zip(*map(documents.split, flat), strict=True):
        mask = None if window is None else _band(parts[0].shape[1], window, query.device)
        group = [part.transpose(1, 2) for part in parts]
        contexts.append(attend(module, *group, mask, is_causal=True, **settings)[0])
    return documents.join(contexts).unflatten(0, batch), None


@functools.lru_cache(maxsize=64)  # the layers of a model ask for the same few
def _band(places: int, window: int, device: Any) -> "Tensor":
    """The mask of a sliding window: (places, places), true where a query attends to a key."""
    import torch

    ones = torch.ones(places, places, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


# CUDA


def _takes_varlen(query: "Tensor", key: "Tensor", value: "Tensor") -> bool:
    """Whether torch's variable-length attention takes these, each (N, heads, head_dim), and gives the right numbers."""
    if query.device.type != "cuda":
        return False
    return _varlen_is_right(query.device, _computed_in(query), query.shape[1], key.shape[1], query.shape[2])


def _computed_in(query: "Tensor") -> "dtype":
    import torch

    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _varlen(flat: "tuple[Tensor, ...]", documents: Documents, scaling: float | None) -> "Tensor":
    """Causal attention within each document, in one call; `flat` is query, key and value, each (N, heads, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part.to(_computed_in(flat[0])) for part in flat)
    bounds, longest = documents.bounds, documents.longest
    attended: Tensor = varlen_attn(
        *(query, key, value, bounds, bounds, longest, longest),
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended


@functools.cache
def _varlen_is_right(device: Any, dtype: "dtype", heads: int, key_heads: int, head_dim: int) -> bool:
    """Whether variable-length attention gives the outputs and gradients of one document at a time on this device.

    It takes 16-bit numbers on CUDA and fails with a RuntimeError on what it does not take. The allowed difference is
    that of 16-bit rounding: 2⁻⁶ for bfloat16 with numbers up to about 4.
    """
    import torch

    if dtype not in (torch.float16, torch.bfloat16):
        return False
    lengths = (1, 70, 130)
    apart = documents(torch.cat([torch.arange(length) for length in lengths]).to(device)[None])
    draw = torch.Generator(device).manual_seed(0)
    shapes = [(sum(lengths), count, head_dim) for count in (heads, key_heads, key_heads)]
    with torch.inference_mode(mode=False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        whole = [torch.randn(shape, generator=draw, device=device).to(dtype).requires_grad_() for shape in shapes]
        try:
            found = _varlen(tuple(whole), apart, None)
            gradients = torch.autograd.grad(found.float().square().sum(), whole)
        except (ImportError, RuntimeError, NotImplementedError, ValueError):
            return False
        expected = torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(part.transpose(0, 1)[None] for part in parts), is_causal=True, enable_gqa=heads != key_heads
                )[0].transpose(0, 1)
                for parts in zip(*(part.split(lengths) for part in whole), strict=True)
            ]
        )
        due = torch.autograd.grad(expected.float().square().sum(), whole)
    pairs = zip((found, *gradients), (expected, *due), strict=True)
    return all(torch.allclose(left.float(), right.float(), atol=2**-5, rtol=2**-5) for left, right in pairs)
