"""The settings under `lora:`, checked before anything is loaded: what they target, and what they do not do."""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.model import tokens
from stages.model.facts import EMBEDDINGS, Facts
from stages.model.lora import check_foldable
from stages.runtime.errors import Problem

# Settings of LoraConfig that say more about a way to start, by the values of `init_lora_weights` that read them.
STARTS = {"eva_config": "eva", "loftq_config": "loftq", "corda_config": "corda", "lora_ga_config": "lora_ga"}


def check(lora: Mapping[str, Any], facts: Facts) -> list[Problem]:
    """Problems with LoraConfig's settings for a model."""
    if broken := _no_patterns(lora):
        return broken
    found = _check_targets(lora, facts)
    return [
        *found,
        *([] if found else _check_patterns(lora, facts)),
        *_check_start(lora),
        *_check_foldable(lora, facts),
    ]


def _check_start(lora: Mapping[str, Any]) -> list[Problem]:
    """Ways to start that need more than a setting, and settings of a way that is not taken."""
    start = lora.get("init_lora_weights")
    problems: list[Problem] = []
    if start == "eva":
        text = "`eva` needs a pass over the data, which no stage does, and would start as `true` does; remove it"
        problems.append(("lora.init_lora_weights", text))
    for name, needed in STARTS.items():
        if lora.get(name) and start != needed:
            problems.append((f"lora.{name}", f"`{name}` is read with `init_lora_weights: {needed}` only; remove it"))
    if lora.get("layers_pattern") and lora.get("layers_to_transform") is None:
        text = "`layers_pattern` is read with `layers_to_transform` only; add that, or remove it"
        problems.append(("lora.layers_pattern", text))
    return problems


def _check_patterns(lora: Mapping[str, Any], facts: Facts) -> list[Problem]:
    """Patterns for a rank or an alpha of their own that match no layer with an adapter."""
    modules = facts.linear_modules()
    trained = [module for module in modules if is_targeted(module, lora)]
    problems: list[Problem] = []
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = lora.get(name) or {}
        used = {_pattern_of(module, patterns) for module in trained}
        for pattern in patterns if trained else ():
            if pattern in used:
                continue
            if any(_pattern_of(module, [pattern]) for module in trained):
                clause = "an earlier pattern matches its layers first, so it has no effect; put it first, or remove it"
            elif any(_pattern_of(module, [pattern]) for module in modules):
                clause = "its layers get no adapter; add them to `target_modules`, or remove it"
            else:
                kinds = ", ".join(f"`{kind}`" for kind in sorted({module.rsplit(".", 1)[-1] for module in trained}))
                clause = f"it matches no linear layer of {facts.source}; there is {kinds}"
            problems.append((f"lora.{name}", f"`{pattern}`: {clause}"))
    return problems


def rank_of(module: str, lora: Mapping[str, Any]) -> int:
    """The rank of the adapter on a module."""
    ranks: Mapping[str, int] = lora.get("rank_pattern") or {}
    pattern = _pattern_of(module, ranks)
    return ranks[pattern] if pattern is not None else int(lora.get("r", 8))


def _pattern_of(module: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that is PEFT's name for a module: of its whole name, or of the end after a dot."""
    return next((pattern for pattern in patterns if is_named(module, rf"(.*\.)?({pattern})")), None)


def _check_targets(lora: Mapping[str, Any], facts: Facts) -> list[Problem]:
    targets, modules = lora.get("target_modules", "all-linear"), facts.linear_modules()
    if facts.experts > 1 and (unfoldable := _check_experts(targets, modules)):
        return unfoldable
    if not modules or targets in ("all-linear", None):
        return []
    kinds = sorted({name.rsplit(".", 1)[-1] for name in modules} - {"lm_head"})
    there = "it has " + ", ".join(f"`{kind}`" for kind in kinds)
    if targets == "all":
        return [("lora.target_modules", "`all` is no pattern of PEFT; write `all-linear`, or leave it out")]
    if isinstance(targets, str):
        if any(is_named(name, targets) for name in modules):
            return []
        return [("lora.target_modules", f"`{targets}` matches no linear layer of {facts.source}; {there}")]
    return [
        ("lora.target_modules", f"`{target}` matches no linear layer of {facts.source}; {there}")
        for target in targets
        if not any(is_named(name, [target]) for name in modules)
    ]


def _check_experts(targets: str | Sequence[str] | None, modules: Sequence[str]) -> list[Problem]:
    """PEFT trains the experts, which transformers keep in one 3-D tensor, as `target_parameters`: see `FOLDED`."""
    ends = {name: name.rsplit(".", 1)[-1] for name in modules}
    routed = {end for name, end in ends.items() if ".experts." in name} | {"gate", "router"}
    others = sorted({*ends.values()} - routed - {"lm_head"})
    whole = targets in ("all-linear", None)
    reached = routed if whole else {end for name, end in ends.items() if is_named(name, targets or [])} & routed
    if not reached:
        return []
    clause = "an adapter on experts or their router cannot be folded into the base"
    advice = f"write `target_modules: [{', '.join(others)}]`, or remove `lora` to train all weights"
    return [("lora.target_modules" if not whole else "lora", f"{clause}; {advice}")]


def _no_patterns(lora: Mapping[str, Any]) -> list[Problem]:
    """Strings that PEFT would read as regular expressions and that are not valid ones."""
    texts = [(name, lora[name]) for name in ("target_modules", "exclude_modules") if isinstance(lora.get(name), str)]
    texts += [(name, text) for name in ("rank_pattern", "alpha_pattern") for text in lora.get(name) or {}]
    problems: list[Problem] = []
    for name, text in texts:
        try:
            re.compile(str(text))
        except re.error as error:
            way = "text is read as one, so mend it or give a list of names" if "modules" in name else "mend it"
            problems.append((f"lora.{name}", f"`{text}` is no regular expression ({error}); {way}"))
    return problems


def is_named(module: str, targets: str | Sequence[str]) -> bool:
    """PEFT's own rule: a string is a pattern for the whole name, a list holds names or their ends."""
    if isinstance(targets, str):
        with contextlib.suppress(re.error):  # `_check_targets` reports it
            return re.fullmatch(targets, module) is not None
        return False
    return any(module == target or module.endswith(f".{target}") for target in targets)


def is_targeted(module: str, lora: Mapping[str, Any]) -> bool:
    """Whether LoRA trains a linear layer, by PEFT's own rules."""
    targets, layers = lora.get("target_modules", "all-linear"), lora.get("layers_to_transform")
    if targets is None or is_named(module, lora.get("exclude_modules") or []):
        return False
    if targets == "all-linear":
        return not module.endswith("lm_head")
    if layers is not None and not isinstance(targets, str):
        index = re.match(r".*\.[^.]*\.(\d+)\.", module)
        if index is None or int(index[1]) not in (layers if isinstance(layers, list) else [layers]):
            return False
    return is_named(module, targets)


def _check_foldable(lora: Mapping[str, Any], facts: Facts) -> list[Problem]:
    advice = "later stages could not fold the adapter into its base; remove it"
    problems = [(f"lora.{name}", text) for name, text in check_foldable(lora)]
    tied = facts.weights and not {"lm_head.weight", "embed_out.weight"} & facts.weights.keys()
    tied = tied and not lora.get("ensure_weight_tying")  # with it, PEFT trains both as one
    for name in lora.get("modules_to_save") or [] if tied else []:
        if name in ("lm_head", *EMBEDDINGS):
            clause = f"input and output embeddings of {facts.source} are one weight, and `{name}` would train a copy"
            problems.append(("lora.modules_to_save", f"{clause}; {advice}"))
    problems += _check_token_rows(lora, facts, tied=bool(tied))
    targets, excluded = lora.get("target_modules") or [], lora.get("exclude_modules") or []
    for name in facts.weights if tied and targets != "all-linear" else ():
        module = name.removesuffix(".weight")
        if is_named(module, EMBEDDINGS) and is_named(module, targets) and not is_named(module, excluded):
            clause = f"input and output embeddings of {facts.source} are one weight, and an adapter on `{module}`"
            problems.append(("lora.target_modules", f"{clause} would change both when it is folded; leave it out"))
    return problems


def _check_token_rows(lora: Mapping[str, Any], facts: Facts, *, tied: bool) -> list[Problem]:
    """Rows of embeddings to train: they are there, and PEFT computes the output embedding as the model does."""
    setting, given = "lora.trainable_token_indices", lora.get("trainable_token_indices") or []
    named: Mapping[str, Any] = given if isinstance(given, dict) else {"": given}
    limit = tokens.rows(facts)
    for row in (row for ids in named.values() for row in ids):
        if limit is not None and not 0 <= row < limit:
            text = f"the embedding of {facts.source} has {limit:,} rows, and {row:,} is not the number of one"
            return [(setting, f"{text}; write ids from 0 to {limit - 1:,}")]
    inputs = next((ids for name, ids in named.items() if is_named(name, EMBEDDINGS)), None)
    for name, ids in named.items() if tied and isinstance(given, dict) else ():
        if ids != inputs:
            clause = f"input and output embeddings of {facts.source} are one weight, and `{name}` has ids of its own"
            return [(setting, f"{clause}; write one list of ids")]
    biased = any(tokens.last_module(weight) in tokens.HEADS for weight in facts.weights if weight.endswith(".bias"))
    if given and biased and (tied or any(is_named(name, tokens.HEADS) for name in named)):
        way = "remove it" if tied else "name the input embedding alone"
        return [(setting, f"PEFT leaves out the bias of the output embedding of {facts.source} with it; {way}")]
    return []
