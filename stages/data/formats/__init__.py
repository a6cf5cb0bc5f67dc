"""What a row of each format becomes: one module a format, found by its name; the underscored ones are shared.

A format's module has `NEEDED` and `OPTIONAL`, the columns it reads, and `normal(row, words)`, which hands back the
row in our one shape or raises RowError.
"""

import importlib
from pathlib import Path
from types import ModuleType


def names() -> list[str]:
    """The formats there are: every module here without an underscore."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"stages.data.formats.{name}")
