"""A config as YAML text, in the order and the style of the shipped configs, with a comment where one was noted."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from textwrap import wrap
from typing import Any

from pipeline.config.document import parse
from pipeline.tools.convert_parts import Noted

WIDTH = 119
COLUMN = 46  # where comments begin, if the line is short enough
PLAIN = re.compile(r"[\w./@$*~+][\w./@$*~+ -]*(?<! )\Z")
BLOCKS = ("trainer", "data", "stages")  # mappings that have a line for each key
ORDER = (
    *("max_length", "packing", "packing_strategy", "beta", "loss_type", "loss_weights", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16"),
    *("logging_steps", "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps"),
)
"""The order of settings under `trainer`; others follow in the order in which they were given."""


def document(root: Mapping[str, Any], head: list[str]) -> str:
    """The text of a config. `head` are the lines of the comment at its top."""
    lines = [line for text in head for line in _comment(text)]
    for key, value in root.items():
        lines += _entry(key, value, "")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return wrap(
        text, WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False, break_long_words=False
    )


def _entry(key: str, value: Any, indent: str) -> list[str]:
    """The lines of one key."""
    comment = ""
    if isinstance(value, Noted):
        value, comment = value.value, value.comment
    head = f"{indent}{scalar(key)}:"
    if isinstance(value, Mapping) and not value:  # a stage may be empty, any other setting wants a mapping
        return [_with_comment(head if indent == "  " else f"{head} {{}}", comment)]
    flat = f"{head} {_flow(value)}"
    nested = (
        key in BLOCKS or (isinstance(value, Mapping) and "trainer" in value) or _has_comment(value) or len(flat) > WIDTH
    )
    if isinstance(value, Mapping) and nested and not _is_weights(value):
        lines = [_with_comment(head, comment)]
        for inner, item in _in_order(key, value).items():
            lines += _entry(inner, item, indent + "  ")
        return lines
    if isinstance(value, list) and len(flat) > WIDTH:
        return [_with_comment(head, comment), *(f"{indent}  - {_flow(item)}" for item in value)]
    return [_with_comment(flat, comment)]


def _has_comment(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_comment, value.values()))
    return isinstance(value, Noted)


def _is_weights(value: Mapping[str, Any]) -> bool:
    """Names with weights stay on one line."""
    return bool(value) and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value.values())


def _in_order(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    if key != "trainer":
        return dict(value)
    return {name: value[name] for name in sorted(value, key=lambda name: ORDER.index(name) if name in ORDER else 99)}


def _with_comment(line: str, comment: str) -> str:
    return f"{line:<{COLUMN}}  # {comment}" if comment else line


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Noted):
        value = value.value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key)}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    """A single value, quoted where it would be read as something else."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    plain = PLAIN.match(text) and _read(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


@lru_cache(10_000)
def _read(text: str) -> Any:
    """What a config would read a word as."""
    return parse(text, "", wants_mapping=False).data


def number(value: float) -> str:
    """The shortest text of a number: `3`, `0.05`, `5e-5`."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    text = repr(value)
    if abs(value) >= 1e-3:
        return text
    short = next(f"{value:.{places}e}" for places in range(17) if float(f"{value:.{places}e}") == value)
    digits, _, exponent = short.partition("e")
    return f"{digits}e{int(exponent)}"
