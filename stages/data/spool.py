"""Rows on the disk, any of which can be read again, so that memory does not grow with their size."""

import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, overload

T = TypeVar("T")

_IN_MEMORY = 8 * 1024 * 1024  # bytes that are kept in memory instead of a file


class Spooled(AbstractContextManager["Spooled[T]"], Sequence[T]):
    """Rows, or what was computed of each, in a temporary file, which is gone when the context ends.

    Memory: 8 bytes for each, and 8 MB.
    """

    def __init__(self, items: Iterable[T] = (), folder: Path | None = None) -> None:
        """`folder` gets the temporary file; None: that of the system."""
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=None if folder is None else str(folder))  # noqa: SIM115 - closed by `__exit__`
        self._ends = array("Q")
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        """Add one at the end."""
        self._file.seek(end := self._ends[-1] if self._ends else 0)
        self._ends.append(end + self._file.write(pickle.dumps(item, pickle.HIGHEST_PROTOCOL)))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> Any:
        places = range(len(self))[index]
        return [self._at(place) for place in places] if isinstance(places, range) else self._at(places)

    def _at(self, place: int) -> T:
        start = self._ends[place - 1] if place else 0
        self._file.seek(start)
        item: T = pickle.loads(self._file.read(self._ends[place] - start))
        return item

    def __exit__(self, *error: object) -> None:
        self._file.close()
