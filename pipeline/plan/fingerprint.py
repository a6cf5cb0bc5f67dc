"""What a step computes from: the versions of what computes, and the settings that change no result."""

import json
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets")
COMPUTES = {
    "quantize": ["gptqmodel"],
    "select": ["numpy"],
    "evaluate": ["numpy", "gptqmodel", "jieba", "rouge-chinese", "nltk", "lm_eval"],
}
# Settings that change what is logged or kept, never the weights.
NO_RESULT = frozenset(
    {
        *("logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name", "log_level"),
        *("project", "trackio_space_id", "save_steps", "save_strategy", "save_total_limit"),
        *("dataloader_num_workers", "dataloader_prefetch_factor", "dataset_num_proc"),
        "include_num_input_tokens_seen",
    }
)

CHOOSE_BEST = frozenset({"save_steps", "save_strategy"})


def installed_versions(use: str) -> dict[str, str]:
    """Everything installed that computes, and our own stage's version."""
    from pipeline.config.pipeline import module

    libraries = (*LIBRARIES, *COMPUTES.get(use, []))
    found = {f"stage {use}": str(module(use).VERSION), "python": ".".join(platform.python_version_tuple()[:2])}
    return found | {library: _version(library) for library in libraries}


@cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def canonical(value: Any) -> bytes:
    """The same bytes for the same value, whatever the order of its keys.

    Raises:
        TypeError: a value has no exact JSON form.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=True, separators=(",", ":")).encode()
