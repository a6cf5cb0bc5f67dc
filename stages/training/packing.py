"""Rows packed end to end that never attend to each other: which models keep them apart, and the token counts.

Llama and Qwen keep packed rows apart by their position ids: transformers builds a block-diagonal mask from them. BLOOM
has none, and gets its own attention (`stages/model/bloom.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model import bloom
from stages.model.facts import Facts
from stages.runtime.errors import Problem, StageError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


# tests/training/test_packing.py proves it of each of these, and of no other.
EXACT = ("bloom", "llama", "qwen2", "qwen3")
# Rotary embeddings that are stretched to the longest row of a batch, so that a row depends on its neighbours.
STRETCHED = ("dynamic", "longrope")


def check(trainer: Mapping[str, Any], facts: Facts, *, packing: bool, wraps: bool) -> list[Problem]:
    """What would let packed rows read each other; `packing` is the stage's default.

    `wraps`: this stage may run rows into one another when `packing_strategy: wrapped` asks for it.
    """
    packs = trainer.get("packing", packing)
    wrapped = packs and trainer.get("packing_strategy") == "wrapped"
    problems: list[Problem] = []
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
        bloom.install(model)


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
