"""Rows packed end to end that never attend to each other: which models keep them apart, and the token counts.

Llama and Qwen keep packed rows apart by their position ids: transformers builds a block-diagonal mask from them. BLOOM
has none, and gets its own attention (`stages/model/bloom.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model import attention, bloom
from stages.model.facts import Facts
from stages.runtime.errors import Problem, StageError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


# Architectures for which tests/training/test_packing.py proves that packed rows do not attend to each other.
EXACT = ("bloom", "llama", "qwen2", "qwen3")
# Kinds of rotary embeddings that depend on the longest row of a batch.
STRETCHED = ("dynamic", "longrope")


def check(trainer: Mapping[str, Any], facts: Facts, *, packing: bool, wraps: bool) -> list[Problem]:
    """Settings under which packed rows would attend to each other.

    `packing` is the default of the stage; with `wraps` the stage allows `packing_strategy: wrapped`, where rows do
    attend to each other.
    """
    packs = trainer.get("packing", packing)
    wrapped = packs and trainer.get("packing_strategy") == "wrapped"
    problems: list[Problem] = []
    if wrapped and not wraps:
        text = "`wrapped` lets rows attend to each other; remove it, and packed rows stay apart"
        problems.append(("trainer.packing_strategy", text))
    if trainer.get("eval_packing") and not packs:
        text = "without `packing` the held-out rows would attend to each other; remove it"
        problems.append(("trainer.eval_packing", text))
    for setting, asked in (("packing", packs and not wrapped), ("padding_free", trainer.get("padding_free"))):
        trouble = inexact(facts.config) if asked and facts.config else None
        if trouble is not None:
            wrap = ", or `packing_strategy: wrapped`, which lets them" if wraps and setting == "packing" else ""
            problems.append((f"trainer.{setting}", f"{trouble}; set `{setting}: false`{wrap}"))
    return problems


def inexact(config: Mapping[str, Any]) -> str | None:
    """Why packed rows would attend to each other in the model of this config.json; None if they do not."""
    model_type = config.get("model_type", "")
    if model_type not in EXACT:
        proven = ", ".join(f"`{name}`" for name in EXACT)
        text = f"packing is not verified for `{model_type}`: packed rows might attend to each other"
        return f"{text} (it is verified for {proven})"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in STRETCHED:
        return (
            f"`{kind}` position embeddings depend on the longest row of a batch, so packed rows would change each other"
        )
    return None


def prepare(model: "PreTrainedModel", args: Any) -> None:
    """Prepare a loaded model for training with these SFTConfig arguments, packed or not.

    Raises:
        StageError: the arguments ask for packing, and this model cannot keep rows apart.
    """
    apart = args.packing and args.packing_strategy != "wrapped"
    trouble = inexact(model.config.to_dict()) if apart or args.padding_free else None
    if trouble is not None:
        raise StageError(f"{trouble}; set `packing: false`")
    if model.config.model_type == "bloom":
        bloom.install(model)
    elif apart or args.padding_free:
        attention.install(model)


def pack(rows: "Dataset", args: Any, file: Path) -> dict[str, float]:
    """Pack rows into an Arrow file as these SFTConfig arguments ask, and report rows before and after, and padding.

    `padding` is the share of rows × `max_length` positions without a token.

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
