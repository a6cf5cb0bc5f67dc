"""The rows of a training stage: read, cleaned, a part held out, the rest kept apart from it and drawn by weights.

They wait in a file, so that memory does not grow with their number. What compares the rows of a data set with each
other, as `near_duplicates` does, still needs all of them at once.
"""

import pickle
import random
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.errors import StageError
from stages import _clean, _mix, _processes, _rows, _trainer

_ROWS, _CHARACTERS = 256, 500_000  # the most of a chunk
_IN_MEMORY = 8 * 1024 * 1024  # bytes of rows that need no file
_COMPARED = 20_000  # rows that are compared with the held-out ones at one time


class Placed(NamedTuple):
    """A normalised row, which of the stage's data sets it is of, and where it stands."""

    data: int
    place: str
    row: _rows.Row


class Chunk(NamedTuple):
    """Rows one after the other."""

    first: int
    """The number of the first among all rows."""
    rows: bytes
    """The pickled rows, as `Placed`."""
    copies: list[int]
    """How often each is trained on."""

    def trained(self) -> Iterator[tuple[int, Placed, int]]:
        """The rows that are trained on: their number, the row, and how often."""
        for number, (row, copies) in enumerate(zip(pickle.loads(self.rows), self.copies, strict=True), self.first):
            if copies:
                yield number, row, copies


@dataclass
class Drawn:
    """What a training stage reads: rows to train on, rows held out, and the account of every data set."""

    spool: "_Spool"
    copies: "array[int]"
    """How often each row of the spool is trained on: not at all when it is held out or too much like a held-out one."""
    held: list[_rows.Row]
    account: list[dict[str, Any]]

    def chunks(self) -> Iterator[Chunk]:
        """The rows to train on, in the order of the data sets."""
        first = 0
        for size, rows in self.spool:
            yield Chunk(first, rows, self.copies[first : first + size].tolist())
            first += size

    def held_chunks(self) -> Iterator[Chunk]:
        """The rows that are held out."""
        yield from chunks(Placed(0, "", row) for row in self.held)

    def train(self) -> Iterator[_rows.Row]:
        """The rows to train on, each as often as it is drawn."""
        for chunk in self.chunks():
            for _, placed, copies in chunk.trained():
                yield from [placed.row] * copies


def chunks(rows: Iterable[Placed], first: int = 0) -> Iterator[Chunk]:
    """Rows in chunks of a size that is worth handing to another process; `first` is the number of the first."""
    waiting: list[Placed] = []
    characters = 0
    for row in rows:
        waiting.append(row)
        characters += sum(map(len, _clean.texts(row.row, system=True)))
        if len(waiting) == _ROWS or characters > _CHARACTERS:
            yield _chunk(waiting, first)
            waiting, characters, first = [], 0, first + len(waiting)
    if waiting:
        yield _chunk(waiting, first)


def _chunk(rows: list[Placed], first: int) -> Chunk:
    return Chunk(first, pickle.dumps(rows, pickle.HIGHEST_PROTOCOL), [1] * len(rows))


class _Spool:
    """Rows in a file without a name, in chunks."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sizes: list[tuple[int, int]] = []
        self.rows = 0

    def extend(self, rows: Iterable[Placed]) -> None:
        for chunk in chunks(rows, self.rows):
            self.sizes.append((len(chunk.copies), self.file.write(chunk.rows)))
            self.rows += len(chunk.copies)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """How many rows each chunk has, and the rows."""
        start = 0
        for rows, size in self.sizes:
            self.file.seek(start)
            yield rows, self.file.read(size)
            start += size


@contextmanager
def draw(config: _trainer.TrainingConfig, folder: Path, processes: int = 1) -> Iterator[Drawn]:
    """Rows to train on, drawn by the weights, and rows held out: a part of `data`, and all of `eval_data`.

    Rows that are near duplicates of a held-out one are not trained on, or it would measure what was learnt by heart.

    Raises:
        StageError: more rows are bad than a data set allows, or nothing would be left to train on.
    """
    with tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder)) as file:
        yield _drawn(config, _Spool(file), processes)


def _drawn(config: _trainer.TrainingConfig, spool: "_Spool", processes: int) -> Drawn:
    account, parts = [], []
    for number, source in enumerate(config.data):
        done, first = _clean.Account(), spool.rows
        spool.extend(Placed(number, *placed) for placed in _rows.kept(source, done))
        account.append(_entry(source, done))
        parts.append(slice(first, spool.rows))
    if not spool.rows:
        lost = "; ".join(told(entry | {"trained_rows": 0, "held_out": 0, "like_held_out": 0}) for entry in account)
        raise StageError(f"no row is left to train on: {lost}")
    drawn = Drawn(spool, array("L", [1]) * spool.rows, [], account)
    held = hold_out(spool.rows, config.eval_size, config.seed)
    if held:
        drawn.held = [row.row for chunk in drawn.chunks() for number, row, _ in chunk.trained() if number in held]
    for source in config.eval_data:
        drawn.held += _rows.examples(source)
    for number in held:
        drawn.copies[number] = 0
    alike = _like_held_out(drawn, processes)
    if len(alike) == spool.rows - len(held):
        raise StageError("every row to train on is a near duplicate of a held-out one; hold out other rows")
    for number in alike:
        drawn.copies[number] = 0
    for entry, part in zip(account, parts, strict=True):
        entry["trained_rows"] = sum(drawn.copies[part])
        entry["like_held_out"] = sum(part.start <= number < part.stop for number in alike)
        entry["held_out"] = part.stop - part.start - entry["trained_rows"] - entry["like_held_out"]
    if config.weights:
        _weigh(config, drawn, parts)
    return drawn


def hold_out(rows: int, eval_size: float, seed: int) -> set[int]:
    """The numbers of the rows that are held out.

    Raises:
        StageError: nothing would be left to train on.
    """
    if (text := _trainer.too_many_held_out(eval_size, rows)) is not None:
        raise StageError(text)
    return set(random.Random(seed).sample(range(rows), _trainer.held_out(eval_size, rows)))


def _like_held_out(drawn: Drawn, processes: int) -> set[int]:
    """The numbers of the rows to train on that are near duplicates of a held-out one."""
    if not drawn.held:
        return set()

    def alike(chunks: list[Chunk]) -> set[int]:
        rows = [(number, placed.row) for chunk in chunks for number, placed, _ in chunk.trained()]
        found = _clean.overlap(drawn.held, [row for _, row in rows])
        return {rows[pair.training][0] for pair in found}

    # The held-out rows are looked at once more with each group.
    groups = _grouped(drawn.chunks(), max(_COMPARED, 4 * len(drawn.held)))
    return set().union(*_processes.mapped(alike, groups, processes, 1))


def _grouped(chunks: Iterator[Chunk], rows: int) -> Iterator[list[Chunk]]:
    group: list[Chunk] = []
    for chunk in chunks:
        group.append(chunk)
        if chunk.first + len(chunk.copies) - group[0].first >= rows:
            yield group
            group = []
    if group:
        yield group


def _entry(source: _rows.Source, done: _clean.Account) -> dict[str, Any]:
    found = {"path": source.path, "read": done.read, "kept": done.kept, "changed": done.changed}
    dropped = {reason: {"rows": entry.rows, "first": entry.first} for reason, entry in done.dropped.items()}
    return {**found, "dropped": dropped, "personal_data": done.personal_data}


def _weigh(config: _trainer.TrainingConfig, drawn: Drawn, parts: list[slice]) -> None:
    """Draw from each data set the share that its weight gives it."""
    there = [[number for number in range(part.start, part.stop) if drawn.copies[number]] for part in parts]
    counts = _mix.counts([len(numbers) for numbers in there], config.weights, config.rows)
    empty = [entry["path"] for entry, numbers in zip(drawn.account, there, strict=True) if not numbers]
    if empty or not sum(counts):
        path = (empty or [drawn.account[0]["path"]])[0]
        raise StageError(f"`{path}` has no row left to draw; leave it out of the mixture")
    drawn.copies = array("L", [0]) * drawn.spool.rows
    for number, (entry, numbers, count) in enumerate(zip(drawn.account, there, counts, strict=True)):
        entry["trained_rows"] = count
        for row in _mix.draw(numbers, count, f"{config.seed}:{number}"):
            drawn.copies[row] += 1


def told(entry: Mapping[str, Any]) -> str:
    """One line about a data set, for people."""
    words = [f"{entry['path']}: {entry['read']:,} rows read, {entry['trained_rows']:,} to train on"]
    words += [f"{lost['rows']:,} dropped ({reason})" for reason, lost in entry["dropped"].items()]
    words += [f"{entry['held_out']:,} held out"] if entry["held_out"] else []
    words += [f"{entry['like_held_out']:,} too much like a held-out one"] if entry["like_held_out"] else []
    words += [f"{count:,} {kind} found" for kind, count in entry["personal_data"].items()]
    return ", ".join(words)
