"""The formats of rows: one module per format, found by its name. Modules that start with an underscore are shared.

A format's module has `NEEDED` and `OPTIONAL`, the columns it reads, and `normalise(row, names)`, which returns the
normalised row or raises RowError.
"""

import importlib
from types import ModuleType


def module(name: str) -> ModuleType:
    """The module of a format. Raises ModuleNotFoundError when there is none of that name."""
    return importlib.import_module(f"stages.data.formats.{name}")
