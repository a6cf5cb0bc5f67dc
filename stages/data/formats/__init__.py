"""The formats of rows: one module per format, found by its name. Modules that start with an underscore are shared.

A format's module has `NEEDED` and `OPTIONAL`, the columns it reads, and `normalise(row, form)`, which returns the
normalised row or raises RowError. It may have `ALSO`, other usual names of a needed column, and `LIST`, the needed
column that a row holds which is a list and not an object.
"""

import importlib
from collections.abc import Collection, Mapping
from types import ModuleType

from stages.data.formats._values import is_message
from stages.data.row import FileRow, NotAnObject, RowError


def module(name: str) -> ModuleType:
    """The module of a format. Raises ModuleNotFoundError when there is none of that name."""
    return importlib.import_module(f"stages.data.formats.{name}")


def other_names(form: ModuleType) -> Mapping[str, tuple[str, ...]]:
    """Needed column → its other usual names."""
    return getattr(form, "ALSO", {})


def list_column(form: ModuleType) -> str | None:
    """The needed column that a row holds which is a list; None where a row must be an object."""
    return getattr(form, "LIST", None)


def of_columns(columns: Collection[str]) -> str | None:
    """The format whose needed columns are all among the columns of a file; None where there is none."""
    names = ("preference", "messages", "sharegpt", "alpaca", "prompt_completion", "text")
    return next((name for name in names if {*module(name).NEEDED} <= {*columns}), None)


def as_object(form: ModuleType, row: NotAnObject, columns: Mapping[str, str]) -> FileRow:
    """A row that is a list as an object with that list in one column; `columns` is our column name → the file's.

    Raises:
        RowError: the format reads no such row.
    """
    column, value = list_column(form), row.value
    if column is not None and value and isinstance(value, list):
        return {columns.get(column, column): value}
    if value and isinstance(value, list) and all(map(is_message, value)):
        raise RowError("the row is a list of messages, which `format: messages` reads")
    raise row
