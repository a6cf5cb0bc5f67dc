"""The formats of rows: one module per format, found by its name. Modules that start with an underscore are shared.

A format's module has `NEEDED` and `OPTIONAL`, the columns it reads, and `normalise(row, form)`, which returns the
normalised row or raises RowError. It may have `ALSO`, another usual name of a needed column, and `LIST`, the needed
column that a row holds which is a list and not an object.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType


def module(name: str) -> ModuleType:
    """The module of a format. Raises ModuleNotFoundError when there is none of that name."""
    return importlib.import_module(f"stages.data.formats.{name}")


def other_names(form: ModuleType) -> Mapping[str, str]:
    """Needed column → its other usual name."""
    return getattr(form, "ALSO", {})


def list_column(form: ModuleType) -> str | None:
    """The needed column that a row holds which is a list; None where a row must be an object."""
    return getattr(form, "LIST", None)
