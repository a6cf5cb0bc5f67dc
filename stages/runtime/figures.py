"""Figures and settings as text for people."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One line of a model card: a figure before and after the stage, as text."""

    name: str
    before: str
    after: str


def number(value: float | None) -> str:
    """A number with four significant digits; a dash for None."""
    return "–" if value is None else f"{value:.4g}"


def count(value: int | None) -> str:
    """A number with thousands separators; a dash for None."""
    return "–" if value is None else f"{value:,}"


def size_of(count: float) -> str:
    """A size in bytes as text, such as `12.3 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def word(value: Any) -> str:
    """A setting as in YAML, but a list without brackets."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
