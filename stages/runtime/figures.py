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


def word(value: Any) -> str:
    """A setting as in YAML, but a list without brackets."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
