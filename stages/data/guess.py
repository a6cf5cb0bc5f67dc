"""Data files in, how to read them out: the format of their rows, the columns that need a name, the encoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from stages.data import formats
from stages.data.encodings import detected
from stages.data.files import BINARY, HowToRead, file_type, find_files, parts
from stages.data.formats._values import listed
from stages.data.row import FileRow, RowError
from stages.data.source import Format, Reading, Source
from stages.runtime.errors import StageError

SAMPLE = 200
"""Rows of a file that are looked at."""
_QUESTIONS = ("instruction", "question", "query", "ask", "problem", "title", "问题", "提问", "患者", "input", "prompt")
_ANSWERS = ("output", "answer", "response", "reply", "completion", "target", "回答", "答案", "医生", "解答")
_TEXTS = ("text", "content", "body", "passage", "document", "正文", "内容", "文本")
_GOOD = ("chosen", "good", "positive", "accepted")
_BAD = ("rejected", "bad", "negative", "refused")
_FORMATS: tuple[Format, ...] = (*("labelled", "messages", "sharegpt", "alpaca", "prompt_completion", "text"),)


@dataclass(frozen=True)
class Guess:
    """How a data set is read."""

    source: Source
    encoding: str | None
    """The encoding that was detected; None for a file that is not text."""
    rows: int
    """Rows that were looked at."""
    bad: Sequence[str]
    """What is wrong with the first bad ones of them."""


def guess(path: str) -> Guess:
    """How to read the files that a path names; tried on the first rows.

    Raises:
        StageError: there is no file, or its rows have no form that is read; the message names the columns.
    """
    file = find_files(path)[0]
    encoding = detected(file) if file_type(file) not in BINARY else None
    found = _rows(file)
    columns = list(dict.fromkeys(name for row in found if not isinstance(row, RowError) for name in row))
    if not columns:
        raise StageError(f"`{path}`: no row can be read; {found[0] if found else 'the file is empty'}")
    form, mapped = _form(path, columns)
    source = Source(path=path, format=form, columns=mapped, max_samples=SAMPLE, max_dropped=1.0, fill={})
    reading = Reading(source)
    good = sum(1 for _ in reading.rows())
    if not good:
        raise StageError(f"`{path}`: read as `{form}`, no row is good: {'; '.join(reading.first_bad[:2])}")
    return Guess(source, encoding, reading.read, reading.first_bad)


def _rows(file: Path) -> list[FileRow | RowError]:
    read = (row for part in parts(file, HowToRead(), told=lambda note: None) for _, row in part.rows())
    return list(islice(read, SAMPLE))


def _form(path: str, columns: list[str]) -> tuple[Format, dict[str, str]]:
    """The format whose columns are all there, by their own names or by other usual ones; and ours → the file's.

    Raises:
        StageError: no format fits.
    """
    lower = {name.strip().lower(): name for name in columns}
    good, bad, question = (
        next((lower[name] for name in names if name in lower), None) for names in (_GOOD, _BAD, _QUESTIONS)
    )
    if good and bad:
        has_prompt = any(name in columns for name in ("prompt", "instruction", "conversations"))
        asked = {"prompt": question} if question and not has_prompt else {}
        return "preference", _renamed({"chosen": good, "rejected": bad, **asked})
    for form in _FORMATS:
        if all(name in columns for name in formats.module(form).NEEDED) and _is_whole(form, columns):
            return form, {}
    answer = next((lower[name] for name in _ANSWERS if name in lower and lower[name] != question), None)
    if question and answer:
        return "alpaca", _renamed({"instruction": question, "output": answer})
    text = next((lower[name] for name in _TEXTS if name in lower), None) or (columns[0] if len(columns) == 1 else None)
    if text:
        return "text", {} if text == "text" else {"text": text}
    raise StageError(
        f"`{path}`: no format fits its columns {listed(columns)}; "
        "write it into the config with `format:` and `columns:`"
    )


def _renamed(names: dict[str, str]) -> dict[str, str]:
    """The columns that the file calls otherwise."""
    return {ours: theirs for ours, theirs in names.items() if ours != theirs}


def _is_whole(form: Format, columns: Sequence[str]) -> bool:
    """Whether a format that needs few columns is really meant: a label alone may be anything."""
    return form != "labelled" or any(name in columns for name in ("completion", "messages", "output", "conversations"))
