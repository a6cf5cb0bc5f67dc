"""`quantized_base`, checked before anything is loaded: where bitsandbytes or PEFT cannot train on quantized layers."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from stages.model.facts import Facts
from stages.model.quantized import DTYPES, INSTALL, PACKAGE, Method
from stages.model.tokens import HEADS, last_module
from stages.runtime.errors import Problem

READS_WEIGHTS = ("orthogonal", "mica")  # values of `init_lora_weights` with which PEFT needs weights in floating point


def check(method: Method, lora: Mapping[str, Any] | None, trainer: Mapping[str, Any], facts: Facts) -> list[Problem]:
    """Settings and models with which no adapter can be trained on a base in `method`."""
    setting = "quantized_base"
    if lora is None:
        text = f"with `{method}` the weights of the model cannot be trained, only an adapter on them"
        return [(setting, f"{text}; add `lora: {{r: 16}}`, or remove it")]
    problems: list[Problem] = []
    if find_spec(PACKAGE) is None:
        problems.append((setting, f"`{method}` needs a package; {INSTALL}, or remove it"))
    if facts.experts > 1:
        text = f"the experts of {facts.source} are 3-D weights, which bitsandbytes leaves as they are"
        problems.append((setting, f"{text}, so it would save little; remove it"))
    dtype = (trainer.get("model_init_kwargs") or {}).get("dtype", DTYPES[0])
    if str(dtype).removeprefix("torch.") not in (*DTYPES, "auto"):
        text = f"`{dtype}`: bitsandbytes computes in float32, bfloat16 or float16; write one of these, or leave it out"
        problems.append(("trainer.model_init_kwargs.dtype", text))
    return problems + _check_lora(method, lora, facts)


def _check_lora(method: Method, lora: Mapping[str, Any], facts: Facts) -> list[Problem]:
    """Settings of LoraConfig that need weights in floating point."""
    problems: list[Problem] = []
    layers = {name for name in facts.linear_modules() if last_module(f"{name}.weight") not in HEADS}
    for name in lora.get("modules_to_save") or []:
        found = next((layer for layer in layers if re.fullmatch(rf"(.*\.)?{re.escape(name)}(\..*)?", layer)), None)
        if found is not None:
            text = f"`{name}` would train whole layers, which `quantized_base` quantizes; write it in `target_modules`"
            problems.append(("lora.modules_to_save", f"{text}, or remove it"))
    if (start := lora.get("init_lora_weights")) in READS_WEIGHTS:
        text = f"PEFT starts `{start}` from weights in floating point, and those of the base are quantized; remove it"
        problems.append(("lora.init_lora_weights", text))
    if (bias := lora.get("bias", "none")) != "none":
        text = f"`{bias}`: bitsandbytes rounds a bias to the dtype of its inputs, so small steps get lost; remove it"
        problems.append(("lora.bias", text))
    if method == "int8" and lora.get("use_dora"):
        text = "PEFT loses the scales of a layer in int8 with DoRA; write `quantized_base: nf4`, or remove it"
        problems.append(("lora.use_dora", text))
    return problems
