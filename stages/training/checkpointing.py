"""Gradient checkpointing (Chen et al., arXiv 1604.06174), left out where what the layers keep surely fits.

TRL has it on by default. It computes the forward pass of each layer twice and gives the same weights, bit for bit, so
that a stage that does not need it trains about a quarter faster without.
"""

from collections.abc import Mapping
from typing import Any

from stages.model.device import device_memory
from stages.runtime.figures import size_of

SHARE = 8
"""Checkpointing is left out if the layers keep at most one in so many of the bytes of the device."""
CHOSEN = (
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading"),
)
"""Settings with which the user has chosen."""


def room(
    trainer: Mapping[str, Any], model: Mapping[str, Any], sequences: int, length: int | None, memory: int | None = None
) -> tuple[int, int] | None:
    """Bytes that the layers keep at most, and bytes of the device, where a stage needs no checkpointing.

    None where it may need it, or where the user has chosen.

    Args:
        trainer: the settings under `trainer:`.
        model: the content of the model's config.json.
        sequences: that the model reads at once.
        length: tokens of a sequence at most; None for no limit.
        memory: bytes of the device; of this machine's device by default.
    """
    there = memory or device_memory()
    if length is None or there is None or any(name in trainer for name in CHOSEN):
        return None
    kept = kept_by_layers(model, sequences * length, length)
    return (kept, there) if 0 < kept * SHARE <= there else None


def note(kept: int, memory: int) -> str:
    """The sentence that says why there is none."""
    return f"gradient checkpointing is off: the layers keep {size_of(kept)} at most, of {size_of(memory)} of memory"


def kept_by_layers(model: Mapping[str, Any], tokens: int, length: int) -> int:
    """An upper bound of the bytes that all layers keep for the backward pass, with LoRA on each, in float32.

    A layer of width h, with f neurons in its feed-forward part, keeps at most 24 h + 8 f numbers a token; with dropout
    and the casts of LoRA half as much again. Attention that is computed as a whole keeps 4 numbers a token, head and
    token of its row. Each expert that a token is sent to counts as a feed-forward part. 0 if the shape is not known.

    Args:
        model: the content of the model's config.json.
        tokens: of one forward pass, padding included.
        length: of a row, in tokens.
    """
    config = {**model, **(model.get("text_config") or {})}
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    wide = _first(config, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    experts = max(1, _first(config, "num_experts_per_tok", "num_experts_per_token"))
    beside = _first(config, "shared_expert_intermediate_size")
    numbers = 1.5 * (24 * hidden + 8 * (experts * wide + beside)) + 4 * heads * length
    return int(4 * numbers * layers * tokens)


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), 0)
