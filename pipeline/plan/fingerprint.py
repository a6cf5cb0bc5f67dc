"""What a step computes from: its recipe, and the versions of what computes. Its fingerprint is their sha256."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.config.pipeline import StageEntry
from stages import find
from stages.model.references import Role
from stages.training.sharing import Sharing

LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets")
# Settings of a trainer that change what is logged or kept, never the weights.
NO_RESULT = frozenset(
    {
        *("logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name", "log_level"),
        *("project", "trackio_space_id", "save_steps", "save_strategy", "save_total_limit"),
        *("dataloader_num_workers", "dataloader_prefetch_factor", "dataset_num_proc"),
        "include_num_input_tokens_seen",
    }
)

CHOOSE_BEST = frozenset({"save_steps", "save_strategy"})
CAME_LATER: Mapping[str, Any] = {"early_stopping": None, "gptq": {}, "quantized_base": None}
"""Setting → its value while it is not used."""


def settings_of(entry: StageEntry) -> dict[str, Any]:
    """The settings that say what the stage does, as JSON; models are not among them, data sets are as they are read.

    A mixture is its sources, with its weights beside them. A setting that came later is left out while it is not used,
    so that records of before still compare equal.
    """
    named = {path[0] for path, role in entry.stage.roles.items() if role in (Role.START, Role.SCORER, Role.OTHER)}
    found = entry.config.model_dump(mode="json", exclude={*named, *entry.stage.judges_only})
    found |= dict.fromkeys(named - {entry.stage.setting(Role.START)})
    for path, role in entry.stage.roles.items():
        if role is Role.MIXTURE:
            inner = found
            for word in path[:-1]:
                inner = inner[word]
            mixture = inner[path[-1]]
            inner |= {path[-1]: mixture["sources"], "weights": mixture["weights"]}
    if entry.stage.trains is not None:
        found["trainer"] = _computing(found["trainer"])
    if (sharing := entry.launch.sharing) != Sharing():  # the order of sums depends on it
        found["launch"] = {**asdict(sharing), "machines": entry.launch.machines}
    return {key: value for key, value in found.items() if key not in CAME_LATER or value != CAME_LATER[key]}


def _computing(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trainer that its weights depend on."""
    # With the best checkpoint loaded at the end, when to save decides which one that can be.
    best = trainer.get("load_best_model_at_end")
    ignored = NO_RESULT - CHOOSE_BEST if best else NO_RESULT
    follows = best or trainer.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    if follows and "eval_steps" not in trainer:  # transformers evaluates when it logs
        ignored = ignored - {"logging_steps"}
    return {key: value for key, value in trainer.items() if key not in ignored}


def installed_versions(use: str) -> dict[str, str]:
    """Everything installed that computes, and the version of the stage itself."""
    stage = find(use)
    found = {f"stage {use}": str(stage.version), "python": ".".join(platform.python_version_tuple()[:2])}
    return found | {library: _version(library) for library in (*LIBRARIES, *stage.libraries)}


@cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def digest(value: Any) -> str:
    """The sha256 of a value's JSON, the same whatever the order of its keys.

    Raises:
        TypeError: a value has no exact JSON form.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
