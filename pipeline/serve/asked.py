"""The questions of `predict`: rows of a file or of a declared data set in, and kept on disk until they are asked.

Memory holds the place of each row; the rows themselves are lines of JSON in a file without a name.
"""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from stages.data.files import HowToRead, find_files, parts
from stages.data.guess import guess
from stages.data.questions import CONVERSATIONS, QUESTIONS, Question, as_question
from stages.data.row import RowError
from stages.data.source import Reading, Source
from stages.runtime.errors import StageError


@dataclass(frozen=True)
class Row:
    """A row of the input."""

    number: int
    place: str
    """As `questions.csv:12`."""
    question: Question | None
    error: str = ""
    """Why the row holds no question."""


def as_bytes(value: object, **how: Any) -> bytes:
    """A value as JSON in UTF-8. Half a character, as in the name of a file or of a column, is written as `\\ud83d`."""
    return json.dumps(value, ensure_ascii=False, **how).encode(errors="backslashreplace")


class Rows:
    """Rows by their index, on disk. The file goes with the object, or with the process."""

    def __init__(self, rows: Iterator[Row], folder: Path | None) -> None:
        """Take every row. `folder` holds the file; by default the folder for temporary files."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as this object
        self._starts = array("q")
        self._hash = hashlib.sha256(b"[[")
        self.questions = 0
        for row in rows:
            self._add(row)

    def _add(self, row: Row) -> None:
        self._starts.append(self._file.tell())
        self._file.write(as_bytes(asdict(row), default=str) + b"\n")
        question = asdict(row.question) if row.question else row.error
        separator = b", " if len(self._starts) > 1 else b""
        self._hash.update(separator + as_bytes(question, sort_keys=True, default=str))
        self.questions += row.question is not None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        self._file.seek(self._starts[index])  # an IndexError ends a loop over the rows
        found = json.loads(self._file.readline())
        question = found.pop("question")
        return Row(**found, question=Question(**question) if question else None)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def key(self, *others: Any) -> str:
        """The sha256 of all questions and of other values, which identifies the work."""
        found = self._hash.copy()
        values = [as_bytes(other, sort_keys=True, default=str) for other in others]
        found.update(b"], " + b", ".join(values) + b"]")
        return found.hexdigest()


def read_questions(source: str, declared: Source | None, column: str | None, folder: Path | None = None) -> Rows:
    """The questions of a file, or of a data set that the config declares.

    Raises:
        ConfigError: the file cannot be read, or no row of it holds a question.
    """
    try:
        rows = Rows(_declared(declared) if declared is not None else _of_files(source, column), folder)
    except StageError as error:
        raise ConfigError([f"--input {source}: {error}"]) from None
    if not len(rows):
        raise ConfigError([f"--input {source}: holds no rows"])
    if not rows.questions:
        hint = "" if column else f"; name the column with the question with `--column {_guessed(source) or 'NAME'}`"
        raise ConfigError([f"{rows[0].place}: {rows[0].error}{hint}"])
    return rows


def _guessed(path: str) -> str | None:
    """The column of a file that `init` would take for the question; None where it knows none."""
    try:
        columns = guess(path).source.columns
    except StageError:
        return None
    return next((columns[ours] for ours in (*CONVERSATIONS, *QUESTIONS) if ours in columns), None)


def _declared(source: Source) -> Iterator[Row]:
    """Rows of a data set of the config. Raises StageError when too many of them are bad."""
    for number, (place, row) in enumerate(Reading(source).kept(), 1):
        yield _read(number, place, row, None)


def _of_files(path: str, column: str | None) -> Iterator[Row]:
    number = 0
    for file in find_files(path):
        for place, row in (row for part in parts(file, HowToRead(), told=lambda note: None) for row in part.rows()):
            number += 1
            if isinstance(row, RowError):
                yield Row(number, place, None, str(row))
            else:
                yield _read(number, place, row, column)


def _read(number: int, place: str, row: dict[str, Any], column: str | None) -> Row:
    try:
        if column is not None and column not in row:
            raise RowError(f"the row has no `{column}`")
        given = row if column is None else {**row, "prompt": row[column], "messages": None, "conversations": None}
        return Row(number, place, as_question(given))
    except (RowError, RecursionError) as error:
        return Row(number, place, None, str(error) or "the row is nested too deeply")
