"""LoRA adapters in folders that no stage made: what they were trained on and whether they fit, read without torch."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.model import quantized
from stages.model.facts import EMBEDDINGS, Facts, Header, is_hub_name, read_header, read_json, read_tokenizer
from stages.model.lora import PREFIX, check_foldable
from stages.model.tokens import HEADS, is_embedding, last_module
from stages.runtime.errors import StageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it into its base with the tool that made it, and name the merged folder"
# A tensor of PEFT that belongs to a module, with the dimension that is also one of the module's weight.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|lora_B\.bias|base_layer\.bias|token_adapter\.trainable_tokens_delta)$"
)
_SHARED = {
    "lora_A.weight": 1,
    "lora_B.weight": 0,
    "lora_embedding_A": 1,
    "lora_embedding_B": 0,
    "token_adapter.trainable_tokens_delta": 1,
}


def is_adapter(folder: Path, names: Collection[str] = ()) -> bool:
    """Whether a folder holds an adapter, and no whole model; `names` are files of it that are on the Hub alone."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() or name in names for name in whole)


def base_of(name: str, folder: Path) -> str:
    """The model that an adapter was trained on: a folder, or a name on the Hub with its commit.

    Raises:
        StageError: the adapter does not say so, the model cannot be found, or no base could take the adapter.
    """
    config = read_json(folder / CONFIG, "")
    _check_kind(name, config)
    base, revision = str(config.get("base_model_name_or_path") or ""), str(config.get("revision"))
    way = f"name its base first: `model: [BASE, {name}]`"
    if not base:
        raise StageError(f"`{name}` is a LoRA adapter, and does not name the model that it was trained on; {way}")
    if Path(base).is_dir():
        return base
    if not is_hub_name(base):
        raise StageError(f"`{name}` is a LoRA adapter on `{base}`, which is not on this machine; {way}")
    base = base.partition("@")[0]
    if re.fullmatch("[0-9a-f]{40}", revision):
        return f"{base}@{revision}"
    raise StageError(
        f"`{name}` is a LoRA adapter on `{base}`, and does not say on which commit of it; name its base first, with "
        f"the commit (40 hex digits): `model: [{base}@COMMIT, {name}]`"
    )


def with_adapter(base: Facts, name: str, folder: Path, headers: Mapping[str, Header] | None = None) -> Facts:
    """What is known of a model with an adapter on it; `name` is the adapter's in messages.

    `headers`: file name → header of the weights of an adapter on the Hub, of which the folder has the small files.

    Raises:
        StageError: the adapter is damaged, cannot be folded into its base, was trained on another model, or needs
            bitsandbytes.
    """
    if not is_adapter(folder, headers or ()):
        raise StageError(f"`{name}` is not a LoRA adapter; in a list of models only the first is a whole model")
    config = read_json(folder / CONFIG, "")
    if not (folder / WEIGHTS).is_file() and WEIGHTS not in (headers or ()):
        pickle = " (`adapter_model.bin` is a pickle, which can run code)" * (folder / "adapter_model.bin").is_file()
        raise StageError(f"the adapter `{name}` has no {WEIGHTS}{pickle}; save it again with PEFT's `save_pretrained`")
    _check_kind(name, config)
    quantized.read(str(folder))
    shapes, stored = read_header(folder / WEIGHTS) if headers is None else headers[WEIGHTS]
    own = {tensor.removeprefix(PREFIX): shape for tensor, shape in shapes.items()}
    if base.weights and (problem := _misfit(name, own, base)) is not None:
        raise StageError(problem)
    found = replace(base, source=f"`{name}`", adapters=base.adapters + 1, stored=base.stored + stored)
    if not (folder / "tokenizer.json").is_file():
        return found
    tokens, settings, template = read_tokenizer(folder)
    return replace(found, tokens=tokens, tokenizer=settings, template=template)


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    """
    Raises:
        StageError: an adapter with this config cannot be folded into any base.
    """
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        raise StageError(f"`{name}` is an adapter of the kind {kind}, and only LoRA can be folded into a base; {MERGE}")
    for setting, _ in check_foldable(config):
        shown = f"{setting}: {json.dumps(config[setting], ensure_ascii=False)}"
        raise StageError(f"`{name}` was trained with `{shown}`, and cannot be folded into its base; {MERGE}")


def _misfit(name: str, shapes: Mapping[str, tuple[int, ...]], base: Facts) -> str | None:
    """What is wrong with a tensor of an adapter that belongs to no weight of its base, or to one of another size."""
    tied = not any(last_module(weight) in HEADS for weight in base.weights)
    other = f"it was trained on another model; name that one first: `model: [BASE, {name}]`"
    sides = set[str]()
    for tensor, shape in shapes.items():
        part = _PART.fullmatch(tensor)
        weight, kind = (f"{part['module']}.weight", part["part"]) if part else (tensor, "whole")
        place = _place(weight, base, tied=tied)
        if place is None:
            return f"`{tensor}` of the adapter `{name}` has no place in {base.source}: {other}"
        whole = base.weights[place]
        fits = shape == whole if kind == "whole" else kind not in _SHARED or shape[_SHARED[kind]] in whole
        if not fits:
            cause = f"its base had other tokens; {MERGE}" if is_embedding(weight) and kind == "whole" else other
            sizes = f"has the size {_size(shape)}, and `{weight}` in {base.source} {_size(whole)}"
            return f"`{tensor}` of the adapter `{name}` {sizes}: {cause}"
        if tied and is_embedding(weight) and not kind.startswith("token_adapter"):
            sides.add("output" if last_module(weight) in HEADS else "input")
    if len(sides) != 1:
        return None
    clause = f"the adapter `{name}` changes the {sides.pop()} embedding alone, which is also the other one in"
    return f"{clause} {base.source}, so it cannot be folded; {MERGE}"


def _place(weight: str, base: Facts, *, tied: bool) -> str | None:
    """The name of a weight in the files of the base.

    Files that were saved without the language-model class lack the first part of the name. An output embedding may have
    another name there, and it is not in them where it is the input embedding.
    """
    found = next((name for name in (weight, weight.partition(".")[2]) if name in base.weights), None)
    if found is None and weight.endswith(".weight") and last_module(weight) in HEADS:
        return next((name for name in base.weights if last_module(name) in (EMBEDDINGS if tied else HEADS)), None)
    return found


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{side:,}" for side in shape)
