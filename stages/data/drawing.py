"""The rows of a training stage: read, cleaned, a part held out, the rest separated from it and drawn by weights.

If every row is used, rows are streamed; otherwise they are spooled to a temporary file, so that memory does not grow
with their number. Only a cleaning step that compares rows, such as `near_duplicates`, holds a whole data set in memory.
"""

import math
import pickle
import random
import re
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
from stages.data.source import Reading, Source, rows_of
from stages.runtime.errors import StageError
from stages.runtime.processes import parallel_map

_ROWS, _CHARACTERS = 256, 500_000  # the most rows of a chunk, and the characters that complete it earlier
_IN_MEMORY = 8 * 1024 * 1024  # bytes of rows that are kept in memory instead of a file
_COMPARED = 20_000  # rows that are compared with the held-out rows at one time


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which rows a stage trains on, and which it holds out."""

    sources: Sequence[Source]
    weights: Sequence[float] = ()
    """The share of rows drawn from each source; empty when every row is used."""
    rows: int | None = None
    """The number of rows drawn by the weights; None for as many as possible without drawing a row twice."""
    eval_data: Sequence[Source] = ()
    """Data sets that are held out as a whole."""
    eval_size: float = 0
    """What to hold out of the sources: a share below 1 of the rows, of texts a share of the characters; or a number of
    rows."""
    seed: int = 42

    @property
    def by_characters(self) -> bool:
        """Whether a share of the characters is held out: a share of texts that differ in length can be any share."""
        return 0 < self.eval_size < 1 and all(source.format == "text" for source in self.sources)

    def as_json(self) -> dict[str, Any]:
        """The draw as JSON, for a hash."""
        return {
            "data": [source.model_dump(mode="json") for source in self.sources],
            "weights": list(self.weights),
            "rows": self.rows,
            "eval_data": [source.model_dump(mode="json") for source in self.eval_data],
            "eval_size": self.eval_size,
            "seed": self.seed,
            **({"held_out_by": "characters"} if self.by_characters else {}),
        }

    def too_many_held_out(self, rows: int) -> str | None:
        """The problem with holding out `eval_size` of so many rows; None when rows are left to train on."""
        if self.by_characters:
            return None  # a text is cut
        count = held_out(self.eval_size, rows)
        return None if count < rows else f"`eval_size` holds out {count} of {rows} rows; nothing is left to train on"


def held_out(eval_size: float, rows: int) -> int:
    """The number of rows to hold out of so many rows."""
    return math.ceil(eval_size * rows) if eval_size < 1 else int(eval_size)


class DrawnRow(NamedTuple):
    """A row of one of a stage's data sets."""

    data: int
    """Index of the data set among those of the stage."""
    place: str
    """Where its file has the row, as `path:12` or `path: row 12`."""
    row: Row


class Chunk(NamedTuple):
    """Consecutive rows, pickled, so that they pass to another process and into a file unchanged."""

    first: int
    """Index of the first row among all rows."""
    rows: bytes
    """The pickled list of `DrawnRow`."""
    copies: list[int]
    """How often each row is trained on."""

    def trained(self) -> Iterator[tuple[int, DrawnRow, int]]:
        """The rows that are trained on: index among all rows, row, and how often."""
        for number, (row, copies) in enumerate(zip(pickle.loads(self.rows), self.copies, strict=True), self.first):
            if copies:
                yield number, row, copies


@dataclass
class Drawn:
    """The rows of a training stage."""

    chunks: Iterator[Chunk]
    """The rows to train on, in the order of the data sets; they may be read only while this is iterated."""
    held: list[Row]
    """The held-out rows."""
    account: list[dict[str, Any]]
    """The account of each data set as JSON; complete after the last of `chunks`."""

    def held_chunks(self) -> Iterator[Chunk]:
        """The held-out rows."""
        yield from chunks(DrawnRow(0, "", row) for row in self.held)


def chunks(rows: Iterable[DrawnRow]) -> Iterator[Chunk]:
    """Rows in chunks that are large enough to pass to another process."""
    group: list[DrawnRow] = []
    first = characters = 0
    for row in rows:
        group.append(row)
        characters += sum(map(len, cleaning.texts(row.row, system=True)))
        if len(group) == _ROWS or characters > _CHARACTERS:
            yield _chunk(group, first)
            group, characters, first = [], 0, first + len(group)
    if group:
        yield _chunk(group, first)


def _chunk(rows: list[DrawnRow], first: int) -> Chunk:
    return Chunk(first, pickle.dumps(rows, pickle.HIGHEST_PROTOCOL), [1] * len(rows))


class _Spool:
    """Rows in a temporary file, in chunks, and how often each row is trained on."""

    def __init__(self, file: IO[bytes], rows: Iterable[DrawnRow]) -> None:
        self.file = file
        self.characters = array("L")
        """Of each row, in `text`."""
        self.cut: dict[int, Row] = {}
        """Rows of which only a part is trained on."""
        self.sizes = [(len(chunk.copies), file.write(chunk.rows)) for chunk in chunks(self._measured(rows))]
        self.rows = sum(rows for rows, _ in self.sizes)
        self.copies = array("L", [1]) * self.rows

    def __iter__(self) -> Iterator[Chunk]:
        first = start = 0
        for rows, size in self.sizes:
            self.file.seek(start)
            yield self._with_cut(Chunk(first, self.file.read(size), self.copies[first : first + rows].tolist()))
            first, start = first + rows, start + size

    def _measured(self, rows: Iterable[DrawnRow]) -> Iterator[DrawnRow]:
        for row in rows:
            self.characters.append(len(row.row.get("text", "")))
            yield row

    def _with_cut(self, chunk: Chunk) -> Chunk:
        numbers = [number for number in self.cut if 0 <= number - chunk.first < len(chunk.copies)]
        if not numbers:
            return chunk
        rows = pickle.loads(chunk.rows)
        for number in numbers:
            rows[number - chunk.first] = rows[number - chunk.first]._replace(row=self.cut[number])
        return chunk._replace(rows=pickle.dumps(rows, pickle.HIGHEST_PROTOCOL))


@contextmanager
def drawn(draw: Draw, folder: Path, processes: int = 1) -> Iterator[Drawn]:
    """Rows to train on, drawn by the weights, and held-out rows: a part of the sources, and all of `eval_data`.

    Near duplicates of a held-out row are not trained on: its loss would measure what the model knows by heart.

    `folder` gets the temporary file; `processes` compare rows.

    Raises:
        StageError: more rows are bad than a data set allows, or no row would be left to train on; perhaps only after
            the last chunk.
    """
    rows = _SourceRows(draw.sources)
    if not (draw.weights or draw.eval_size or draw.eval_data):
        yield Drawn(chunks(rows), [], rows.account)
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder)) as file:
        spool = _Spool(file, rows)
        ends = list(accumulate((entry["kept"] for entry in rows.account), initial=0))
        parts = [slice(*ends) for ends in pairwise(ends)]
        held = _hold_out(draw, spool, rows.account, parts, processes)
        if draw.weights:
            _weigh(draw, spool, rows.account, parts)
        yield Drawn(iter(spool), held, rows.account)


class _SourceRows:
    """The rows of all data sets of a stage: iterate over them once, then ask for `account`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.account: list[dict[str, Any]] = []
        """The account of each data set; added after its last row."""

    def __iter__(self) -> Iterator[DrawnRow]:
        for number, source in enumerate(self.sources):
            reading = Reading(source)
            for placed in reading.kept():
                yield DrawnRow(number, *placed)
            self.account.append(_as_json(source, reading.account))
        if not any(entry["kept"] for entry in self.account):
            raise StageError(f"no row is left to train on: {'; '.join(map(summary, self.account))}")


def _hold_out(
    draw: Draw, spool: _Spool, account: list[dict[str, Any]], parts: list[slice], processes: int
) -> list[Row]:
    """The held-out rows. Neither they nor their near duplicates remain among the rows to train on.

    `parts`: the indices of each data set's rows. Raises StageError when no row would be left to train on, or none of a
    data set to hold out.
    """
    numbers, rest = _chosen_to_hold_out(draw, spool.rows), None
    if draw.by_characters:
        numbers, rest = _texts_to_hold_out(draw, spool.characters)
    wanted = numbers if rest is None else {*numbers, rest.row}
    found = ((number, row.row) for chunk in spool for number, row, _ in chunk.trained() if number in wanted)
    held = []
    for number, row in found if wanted else ():
        if rest is not None and number == rest.row:
            spool.cut[number], row = _parted(row, rest.characters)
        held.append(row)
    for source in draw.eval_data:
        whole = rows_of(source)
        if not whole:
            raise StageError(f"`clean` keeps no row of the held-out data `{source.path}`; loosen it")
        held += whole
    for number in numbers:
        spool.copies[number] = 0
    similar = _near_duplicates_of(held, spool, processes)
    if len(similar) == spool.rows - len(numbers):
        raise StageError("every row to train on is a near duplicate of a held-out row; hold out other rows")
    for number in similar:
        spool.copies[number] = 0
    for entry, part in zip(account, parts, strict=True):
        entry["trained_rows"] = sum(spool.copies[part])
        entry["like_held_out"] = sum(part.start <= number < part.stop for number in similar)
        entry["held_out"] = entry["kept"] - entry["trained_rows"] - entry["like_held_out"]
        if in_part := sum(part.start <= number < part.stop for number in spool.cut):
            entry |= {"held_out": entry["held_out"] + in_part, "held_out_in_part": in_part}
    return held


class _Rest(NamedTuple):
    """A text of which only the end is held out."""

    row: int
    """Its index."""
    characters: int
    """How many are held out, about."""


def _texts_to_hold_out(draw: Draw, characters: Sequence[int]) -> tuple[set[int], _Rest | None]:
    """The indices of the texts to hold out, drawn at random, and the one that is cut so that their share is right.

    `characters`: of each text. Raises StageError when they are too few to cut.
    """
    left = math.ceil(draw.eval_size * sum(characters))
    if left >= sum(characters):
        raise StageError(f"`eval_size` holds out all {left} characters; nothing is left to train on")
    numbers: set[int] = set()
    for number in random.Random(draw.seed).sample(range(len(characters)), len(characters)):
        if characters[number] > left:
            return numbers, _Rest(number, left) if left else None
        numbers.add(number)
        left -= characters[number]
    return numbers, None


# Where a text is best cut: after line breaks, after the end of a sentence, after blanks.
_ENDS = (re.compile(r"\n+"), re.compile(r"[。！？!?]+|\.(?=\s)"), re.compile(r"\s+"))


def _parted(row: Row, characters: int) -> tuple[Row, Row]:
    """A text in two: its start, and its end of about so many characters. It is cut at a better place if one is near."""
    text = str(row["text"])
    place, room = len(text) - characters, characters // 10
    first, last = max(1, place - room), min(len(text), place + room)
    for pattern in _ENDS:
        ends = [match.end() for match in pattern.finditer(text, first, last) if match.end() < len(text)]
        if ends:
            place = min(ends, key=lambda end: abs(end - place))
            break
    return {**row, "text": text[:place]}, {**row, "text": text[place:]}


def _chosen_to_hold_out(draw: Draw, rows: int) -> set[int]:
    """The indices of the rows of the sources to hold out, drawn at random.

    Raises:
        StageError: no row would be left to train on.
    """
    if (text := draw.too_many_held_out(rows)) is not None:
        raise StageError(text)
    return set(random.Random(draw.seed).sample(range(rows), held_out(draw.eval_size, rows)))


def _near_duplicates_of(held: list[Row], spool: _Spool, processes: int) -> set[int]:
    """The indices of the rows to train on that are near duplicates of a held-out row."""
    if not held:
        return set()

    def similar(chunks: list[Chunk]) -> set[int]:
        rows = [(number, drawn_row.row) for chunk in chunks for number, drawn_row, _ in chunk.trained()]
        pairs = cleaning.overlap(held, [row for _, row in rows])
        return {rows[pair.training][0] for pair in pairs}

    # Each group of rows is compared with all held-out rows, which are hashed again for it: hence large groups.
    groups = _grouped(iter(spool), max(_COMPARED, 4 * len(held)))
    return set().union(*parallel_map(similar, groups, processes, 1))


def _grouped(chunks: Iterator[Chunk], rows: int) -> Iterator[list[Chunk]]:
    """Consecutive chunks in groups of at least so many rows; the last group may have fewer."""
    group: list[Chunk] = []
    for chunk in chunks:
        group.append(chunk)
        if chunk.first + len(chunk.copies) - group[0].first >= rows:
            yield group
            group = []
    if group:
        yield group


def _as_json(source: Source, account: cleaning.Account) -> dict[str, Any]:
    """The account of a data set as the record has it, before rows are held out and drawn by weights."""
    return {
        "path": source.path,
        "read": account.read,
        "kept": account.kept,
        "changed": account.changed,
        "dropped": {reason: {"rows": lost.rows, "first": lost.first} for reason, lost in account.dropped.items()},
        "personal_data": account.personal_data,
        "trained_rows": account.kept,
        "like_held_out": 0,
        "held_out": 0,
    }


def _weigh(draw: Draw, spool: _Spool, account: list[dict[str, Any]], parts: list[slice]) -> None:
    """Draw the rows to train on: from each data set the share that its weight gives it.

    Raises:
        StageError: a data set has no row left.
    """
    left = [[number for number in range(part.start, part.stop) if spool.copies[number]] for part in parts]
    counts = mixture.counts([len(numbers) for numbers in left], draw.weights, draw.rows)
    empty = [entry["path"] for entry, numbers in zip(account, left, strict=True) if not numbers]
    if empty or not sum(counts):
        path = (empty or [account[0]["path"]])[0]
        raise StageError(f"`{path}` has no row left to draw; remove it from the mixture")
    spool.copies = array("L", [0]) * spool.rows
    for number, (entry, numbers, count) in enumerate(zip(account, left, counts, strict=True)):
        entry["trained_rows"] = count
        for row in mixture.draw(numbers, count, f"{draw.seed}:{number}"):
            spool.copies[row] += 1


def summary(entry: Mapping[str, Any]) -> str:
    """The account of a data set on one line, for people."""
    words = [f"{entry['path']}: {entry['read']:,} rows read, {entry['trained_rows']:,} to train on"]
    words += [f"{lost['rows']:,} dropped ({reason})" for reason, lost in entry["dropped"].items()]
    in_part = ", one of them in part" if entry.get("held_out_in_part") else ""
    words += [f"{entry['held_out']:,} held out{in_part}"] if entry["held_out"] else []
    words += [f"{entry['like_held_out']:,} near duplicates of held-out rows"] if entry["like_held_out"] else []
    words += [f"{count:,} {name} found" for name, count in entry["personal_data"].items()]
    return ", ".join(words)
