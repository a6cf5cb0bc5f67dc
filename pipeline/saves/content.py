"""What was found in data files, kept from run to run, with a digest of each row."""

import contextlib
import hashlib
import json
import marshal
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from stages import data
from stages.chat.shapes import Shapes
from stages.data.json_rows import Part
from stages.data.row import Row
from stages.data.source import READER_VERSION, Reading, Source
from stages.runtime.errors import StageError
from stages.runtime.hashes import HASHES, write_cache
from stages.runtime.processes import parallel_map, usable_cores

ROWS = ".rows"
ESTIMATES = ".estimates"
"""The folder in `saves` for what estimates have computed."""
PROCESSES = 8  # the most that read data for a plan; more would wait for the one that reads the file
FEW = 4  # parts of a file, of a megabyte each, that are not worth another process


def clear_torn(saves: Path) -> None:
    """Delete half-written cache files of killed processes. A process that is writing one now ignores the failure."""
    caches = (folder.glob("*.[0-9]*") for folder in (saves / ROWS, saves / ESTIMATES))
    for path in (*saves.glob(f"{HASHES}.*"), *chain.from_iterable(caches)):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Inspection:
    """The findings of the first reading of a data set."""

    rows: int
    """Rows read, bad rows included."""
    bad: int
    first: list[str]
    """The first bad rows, one line each. They are skipped while `problems` is empty."""
    problems: list[str]
    """What stops the run, one line each."""
    shapes: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    """The shapes of its conversations, as `Shapes.as_json` gives them."""
    unread: list[str] = field(default_factory=list)
    """The columns and the keys of messages that nothing reads, one clause for each of the two."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the plan should know of the files, one sentence each."""


class Inspections:
    """The findings about data files, cached by the content of the files: a file that can be read is parsed once.

    For each row 8 bytes of BLAKE2b are kept, so that the rows that changed in a changed file can be counted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, source: Source, digest: str, file_types: str = "") -> Inspection:
        """The findings about the files of a source, cached unless a file could not be read to its end.

        `digest`: the hash of the files' content; `file_types`: as `stages.data.source.file_types` gives it.
        """
        settings = source.model_dump(mode="json", exclude={"path", "clean", "others"})
        file = self.folder / _key({**settings, **({"kind": file_types} if file_types else {}), "sha256": digest})
        about = file.with_name(f"{file.name}-about.json")
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(about.read_text(encoding="utf-8"))
            says = known["first"] or known["problems"] or known["unread"] or known["notes"]
            same_words = known.pop("words") == _words() or not says
            if (known.pop("path") == source.path or not (says or known["shapes"])) and same_words:
                return Inspection(**known)
        reading, digests, shapes, whole = _inspected(source)
        found = (reading.read, reading.bad, reading.first_bad, reading.problems)
        inspection = Inspection(*found, shapes.as_json(), reading.unread, reading.notes)
        if whole and write_cache(file, digests):
            kept = {"path": source.path, "words": _words(), **asdict(inspection)}
            write_cache(about, json.dumps(kept, ensure_ascii=False).encode())
        return inspection

    def difference(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        """The number of rows that differ between two contents, such as ` (2 rows)`; empty when it is not known.

        A content is the settings of a source and the `sha256` of its files.
        """
        import numpy as np

        before, after = self._digests(old), self._digests(new)
        if before is None or after is None:
            return ""
        (one, ones), (other, others) = (np.unique(digests, return_counts=True) for digests in (before, after))
        _, at, other_at = np.intersect1d(one, other, assume_unique=True, return_indices=True)
        same = int(np.minimum(ones[at], others[other_at]).sum())
        removed, added = len(before) - same, len(after) - same
        if removed == added:
            return f" ({_rows(added)})" if added else " (the same rows, written or ordered differently)"
        parts = [f"{_rows(count)} {word}" for count, word in ((added, "added"), (removed, "removed")) if count]
        return f" ({', '.join(parts)})"

    def _digests(self, content: Mapping[str, Any]) -> "array[int] | None":
        read = {key: value for key, value in content.items() if key not in ("clean", "compared_with")}
        try:
            return array("Q", (self.folder / _key(read)).read_bytes())
        except (OSError, ValueError):
            return None


def _inspected(source: Source) -> tuple[Reading, bytes, Shapes, bool]:
    """Read every row, in several processes: the reading, the digests and shapes of the good rows in their order, and
    whether all files could be read to their end.
    """
    whole, digests, shapes = Reading(source), bytearray(), Shapes()
    stopped: list[str] = []

    def parts() -> Iterator[Part]:
        try:
            yield from whole.parts()
        except StageError as error:
            stopped.append(str(error))

    def look(part: Part) -> tuple[Reading, bytes, Shapes]:
        reading, digests, shapes = Reading(source), bytearray(), Shapes()
        for place, row in reading.good(part.rows()):
            digests += _digest(row)
            shapes.add(place, row)
        return reading, bytes(digests), shapes

    for reading, more_digests, more_shapes in parallel_map(look, parts(), min(usable_cores(), PROCESSES), FEW):
        whole.add(reading)
        digests += more_digests
        shapes.merge(more_shapes)
    whole.end(stopped[0] if stopped else None)
    return whole, bytes(digests), shapes, not stopped


@cache
def _words() -> str:
    """A hash of the code that reads data: another version has other words for what it finds in the same rows."""
    folder = Path(data.__file__ or "").parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()[:16]


def _rows(rows: int) -> str:
    return f"{rows:,} row{'s' if rows != 1 else ''}"


def _key(content: Mapping[str, Any]) -> str:
    text = json.dumps({**content, "reader": READER_VERSION}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(row: Row) -> bytes:
    # The oldest form of `marshal` depends on the values alone, in every version of Python, and takes a third of the
    # time of JSON.
    return hashlib.blake2b(marshal.dumps(row, 0), digest_size=8).digest()
