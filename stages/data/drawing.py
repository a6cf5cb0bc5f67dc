"""The rows of a training stage: read, cleaned, a part held out, the rest kept apart from it and drawn by weights.

Where all are taken, they go on as they are read; else they wait in a file, so that memory does not grow with their
number. What compares the rows of a data set with each other, as `near_duplicates` does, needs all of them at once.
"""

import math
import pickle
import random
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

from stages.data import cleaning, mixture
from stages.data.row import Row
from stages.data.source import Source, kept_rows, rows_of
from stages.runtime.errors import StageError
from stages.runtime.processes import parallel_map

_ROWS, _CHARACTERS = 256, 500_000  # the most of a chunk
_IN_MEMORY = 8 * 1024 * 1024  # bytes of rows that need no file
_COMPARED = 20_000  # rows that are compared with the held-out ones at one time


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which rows a stage trains on, and which it holds out."""

    sources: Sequence[Source]
    weights: Sequence[float] = ()
    """The share of rows drawn from each source; empty when all rows are taken."""
    rows: int | None = None
    """How many rows are drawn by the weights; None for as many as repeat none."""
    eval_data: Sequence[Source] = ()
    """Data sets that are held out whole."""
    eval_size: float = 0
    """Rows of the sources that are held out: a share below 1, or a number of rows."""
    seed: int = 42

    def as_json(self) -> dict[str, Any]:
        """The draw as JSON, for a hash."""
        return {
            "data": [source.model_dump(mode="json") for source in self.sources],
            "weights": list(self.weights),
            "rows": self.rows,
            "eval_data": [source.model_dump(mode="json") for source in self.eval_data],
            "eval_size": self.eval_size,
            "seed": self.seed,
        }

    def too_many_held_out(self, rows: int) -> str | None:
        """What is wrong with holding out so much of so many rows; None when rows are left to train on."""
        count = held_out(self.eval_size, rows)
        return None if count < rows else f"`eval_size` holds out {count} of {rows} rows; nothing is left to train on"


def held_out(eval_size: float, rows: int) -> int:
    """How many of so many rows are held out."""
    return math.ceil(eval_size * rows) if eval_size < 1 else int(eval_size)


class DrawnRow(NamedTuple):
    """A normalised row, the number of its data set among those of the stage, and its place."""

    data: int
    place: str
    row: Row


class Chunk(NamedTuple):
    """Rows one after the other."""

    first: int
    """The number of the first among all rows."""
    rows: bytes
    """The pickled rows, as `DrawnRow`."""
    copies: list[int]
    """How often each is trained on."""

    def trained(self) -> Iterator[tuple[int, DrawnRow, int]]:
        """The rows that are trained on: their number, the row, and how often."""
        for number, (row, copies) in enumerate(zip(pickle.loads(self.rows), self.copies, strict=True), self.first):
            if copies:
                yield number, row, copies


@dataclass
class Drawn:
    """What a training stage reads: rows to train on, rows held out, and the account of every data set."""

    chunks: Iterator[Chunk]
    """The rows to train on, in the order of the data sets; they may still have to be read."""
    held: list[Row]
    account: list[dict[str, Any]]
    """Whole once the last chunk is out."""

    def held_chunks(self) -> Iterator[Chunk]:
        """The rows that are held out."""
        yield from chunks(DrawnRow(0, "", row) for row in self.held)


def chunks(rows: Iterable[DrawnRow]) -> Iterator[Chunk]:
    """Rows in chunks of a size that is worth handing to another process."""
    waiting: list[DrawnRow] = []
    first = characters = 0
    for row in rows:
        waiting.append(row)
        characters += sum(map(len, cleaning.texts(row.row, system=True)))
        if len(waiting) == _ROWS or characters > _CHARACTERS:
            yield _chunk(waiting, first)
            waiting, characters, first = [], 0, first + len(waiting)
    if waiting:
        yield _chunk(waiting, first)


def _chunk(rows: list[DrawnRow], first: int) -> Chunk:
    return Chunk(first, pickle.dumps(rows, pickle.HIGHEST_PROTOCOL), [1] * len(rows))


class _Spool:
    """Rows in a file without a name, in chunks, and how often each is trained on."""

    def __init__(self, file: IO[bytes], rows: Iterable[DrawnRow]) -> None:
        self.file = file
        self.sizes = [(len(chunk.copies), file.write(chunk.rows)) for chunk in chunks(rows)]
        self.rows = sum(rows for rows, _ in self.sizes)
        self.copies = array("L", [1]) * self.rows

    def __iter__(self) -> Iterator[Chunk]:
        first = start = 0
        for rows, size in self.sizes:
            self.file.seek(start)
            yield Chunk(first, self.file.read(size), self.copies[first : first + rows].tolist())
            first, start = first + rows, start + size


@contextmanager
def drawn(draw: Draw, folder: Path, processes: int = 1) -> Iterator[Drawn]:
    """Rows to train on, drawn by the weights, and rows held out: a part of `data`, and all of `eval_data`.

    Rows that are near duplicates of a held-out one are not trained on, or it would measure what was learnt by heart.

    Raises:
        StageError: more rows are bad than a data set allows, or nothing would be left to train on; it may come with
            the last chunk.
    """
    account: list[dict[str, Any]] = []
    rows = _read(draw, account)
    if not (draw.weights or draw.eval_size or draw.eval_data):
        yield Drawn(chunks(rows), [], account)
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder)) as file:
        spool = _Spool(file, rows)
        ends = list(accumulate((entry["kept"] for entry in account), initial=0))
        parts = [slice(*ends) for ends in pairwise(ends)]
        held = _keep_apart(draw, spool, account, parts, processes)
        if draw.weights:
            _weigh(draw, spool, account, parts)
        yield Drawn(iter(spool), held, account)


def _read(draw: Draw, account: list[dict[str, Any]]) -> Iterator[DrawnRow]:
    """The rows of all data sets; each one's account comes after its last row."""
    for number, source in enumerate(draw.sources):
        done = cleaning.Account()
        for placed in kept_rows(source, done):
            yield DrawnRow(number, *placed)
        account.append(_entry(source, done))
    if not any(entry["kept"] for entry in account):
        raise StageError(f"no row is left to train on: {'; '.join(map(summary, account))}")


def _keep_apart(
    draw: Draw, spool: _Spool, account: list[dict[str, Any]], parts: list[slice], processes: int
) -> list[Row]:
    """The rows that are held out; neither they nor what is too much like them is trained on."""
    numbers = _hold_out(draw, spool.rows)
    held = [row.row for chunk in spool for number, row, _ in chunk.trained() if number in numbers] if numbers else []
    for source in draw.eval_data:
        held += rows_of(source)
    for number in numbers:
        spool.copies[number] = 0
    alike = _like_held_out(spool, held, processes)
    if len(alike) == spool.rows - len(numbers):
        raise StageError("every row to train on is a near duplicate of a held-out one; hold out other rows")
    for number in alike:
        spool.copies[number] = 0
    for entry, part in zip(account, parts, strict=True):
        entry["trained_rows"] = sum(spool.copies[part])
        entry["like_held_out"] = sum(part.start <= number < part.stop for number in alike)
        entry["held_out"] = entry["kept"] - entry["trained_rows"] - entry["like_held_out"]
    return held


def _hold_out(draw: Draw, rows: int) -> set[int]:
    """The numbers of the rows that are held out.

    Raises:
        StageError: nothing would be left to train on.
    """
    if (text := draw.too_many_held_out(rows)) is not None:
        raise StageError(text)
    return set(random.Random(draw.seed).sample(range(rows), held_out(draw.eval_size, rows)))


def _like_held_out(spool: _Spool, held: list[Row], processes: int) -> set[int]:
    """The numbers of the rows to train on that are near duplicates of a held-out one."""
    if not held:
        return set()

    def alike(chunks: list[Chunk]) -> set[int]:
        rows = [(number, placed.row) for chunk in chunks for number, placed, _ in chunk.trained()]
        found = cleaning.overlap(held, [row for _, row in rows])
        return {rows[pair.training][0] for pair in found}

    # The held-out rows are looked at once more with each group.
    groups = _grouped(iter(spool), max(_COMPARED, 4 * len(held)))
    return set().union(*parallel_map(alike, groups, processes, 1))


def _grouped(chunks: Iterator[Chunk], rows: int) -> Iterator[list[Chunk]]:
    group: list[Chunk] = []
    for chunk in chunks:
        group.append(chunk)
        if chunk.first + len(chunk.copies) - group[0].first >= rows:
            yield group
            group = []
    if group:
        yield group


def _entry(source: Source, done: cleaning.Account) -> dict[str, Any]:
    found = {"path": source.path, "read": done.read, "kept": done.kept, "changed": done.changed}
    dropped = {reason: {"rows": entry.rows, "first": entry.first} for reason, entry in done.dropped.items()}
    drawn = {"trained_rows": done.kept, "like_held_out": 0, "held_out": 0}
    return {**found, "dropped": dropped, "personal_data": done.personal_data, **drawn}


def _weigh(draw: Draw, spool: _Spool, account: list[dict[str, Any]], parts: list[slice]) -> None:
    """Draw from each data set the share that its weight gives it."""
    there = [[number for number in range(part.start, part.stop) if spool.copies[number]] for part in parts]
    counts = mixture.counts([len(numbers) for numbers in there], draw.weights, draw.rows)
    empty = [entry["path"] for entry, numbers in zip(account, there, strict=True) if not numbers]
    if empty or not sum(counts):
        path = (empty or [account[0]["path"]])[0]
        raise StageError(f"`{path}` has no row left to draw; leave it out of the mixture")
    spool.copies = array("L", [0]) * spool.rows
    for number, (entry, numbers, count) in enumerate(zip(account, there, counts, strict=True)):
        entry["trained_rows"] = count
        for row in mixture.draw(numbers, count, f"{draw.seed}:{number}"):
            spool.copies[row] += 1


def summary(entry: Mapping[str, Any]) -> str:
    """One line about a data set, for people."""
    words = [f"{entry['path']}: {entry['read']:,} rows read, {entry['trained_rows']:,} to train on"]
    words += [f"{lost['rows']:,} dropped ({reason})" for reason, lost in entry["dropped"].items()]
    words += [f"{entry['held_out']:,} held out"] if entry["held_out"] else []
    words += [f"{entry['like_held_out']:,} too much like a held-out one"] if entry["like_held_out"] else []
    words += [f"{count:,} {kind} found" for kind, count in entry["personal_data"].items()]
    return ", ".join(words)
