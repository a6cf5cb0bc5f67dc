"""Rows on the disk, any of which can be read again, so that memory does not grow with their number."""

import pickle
import tempfile
from array import array
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from stages.data.row import Row

_IN_MEMORY = 8 * 1024 * 1024  # bytes of rows that are kept in memory instead of a file


class SpooledRows(AbstractContextManager["SpooledRows"]):
    """Rows in a temporary file, which is gone when the context ends. Memory: 8 bytes a row."""

    def __init__(self, rows: Iterable[Row], folder: Path | None = None) -> None:
        """`folder` gets the temporary file; None: that of the system."""
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=None if folder is None else str(folder))  # noqa: SIM115 - closed by `__exit__`
        self._ends = array("Q")
        end = 0
        for row in rows:
            end += self._file.write(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
            self._ends.append(end)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Row:
        start = self._ends[index - 1] if index else 0
        self._file.seek(start)
        row: Row = pickle.loads(self._file.read(self._ends[index] - start))
        return row

    def __exit__(self, *error: object) -> None:
        self._file.close()
