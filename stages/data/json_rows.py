"""The rows of a JSON file: one object a line, objects over several lines, an array, or a list in one large object.

A file is read in pieces and is never whole in memory. `JsonFile.parts` decides from the start of the file which of
these forms it has, and gives pieces with complete rows, which other processes may parse.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, TextIO

from stages.data.formats._values import is_message, listed, type_in_words
from stages.data.row import FileRow, NotAnObject, RowError
from stages.runtime.errors import StageError, nearest

_PIECE = 2**20  # characters that are read at once
_DECODED = 2**13  # characters that are decoded at once: as many may be lost before a byte that cannot be decoded
_LONGEST = 2**26  # characters of lines that are kept together because they may be one value
_GROUP = 512  # parsed rows in one part
_CUT = 16  # an error so close to the end of what was read may be due to text that follows: half of `\ud83d\ude00`
_BLANKS = re.compile(r"[ \t\n\r]*")
_OPEN, _CLOSE = (",", ":", "{", "["), (",", ":", "}", "]")  # before and after a line break within a value

_decode = json.JSONDecoder().raw_decode

ReadRow = tuple[str, FileRow | RowError]
"""Where a row is, as `path:12` or `path: row 12`, and the row, or what is wrong with it."""


class Rows(NamedTuple):
    """Some rows of a file, parsed."""

    parsed: list[ReadRow]

    def rows(self) -> Iterator[ReadRow]:
        """The rows."""
        return iter(self.parsed)


class Lines(NamedTuple):
    """Some lines of a file. No value begins before them or goes on after them."""

    shown: str
    """The path of the file."""
    first: int
    """The number of the first line in the file, from 1."""
    text: str

    def rows(self) -> Iterator[ReadRow]:
        """The rows: one a line, or objects over several lines."""
        shown, first, done = self.shown, self.first, 0
        lines = self.text.split("\n")
        for at, line in enumerate(lines):
            if at < done:
                continue
            try:
                value, end = _decode(line)
            except (ValueError, RecursionError):
                end = -1
            if end == len(line) and type(value) is dict:
                yield f"{shown}:{first + at}", value
            elif line.strip():
                found, done = _value_from(lines, at)
                for start, row in found:
                    yield f"{shown}:{first + start}", row


Part = Lines | Rows


def _value_from(lines: list[str], at: int) -> tuple[list[tuple[int, FileRow | RowError]], int]:
    """The rows from a line on that is no object: index of the first line of each row, the row, and the next line.

    Lines that may be one value are parsed together. If they are none, each is parsed alone; if none of them is an
    object, they are one bad row, because an object over thousands of lines is one mistake.
    """
    stop, last = at + 1, lines[at].rstrip()
    while stop < len(lines):
        line = lines[stop].strip()
        if line and not _goes_on(last, line):
            break
        stop, last = stop + 1, line or last
    if not any(line.strip() for line in lines[at + 1 : stop]):
        return [(at, _parsed(lines[at].rstrip()))], stop
    together = _parsed("\n".join(lines[at:stop]))
    if isinstance(together, dict):
        return [(at, together)], stop
    alone = [(number, _parsed(lines[number].rstrip())) for number in range(at, stop) if lines[number].strip()]
    if any(isinstance(row, dict) for _, row in alone):
        return alone, stop
    return [(at, together)], stop


def _goes_on(before: str, after: str) -> bool:
    """Whether a value may go on after a line break. Between two complete values there is no comma and no colon."""
    return before.endswith(_OPEN) or after.startswith(_CLOSE)


def _parsed(text: str) -> FileRow | RowError:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        return RowError(f"not valid JSON ({_why(error, f'line {line}, ' if line > 1 else '')})")
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return NotAnObject(value, "the row is a list of rows, not an object; write one row a line")
    return _as_row(value)


def _as_row(value: object) -> FileRow | RowError:
    return value if isinstance(value, dict) else NotAnObject(value, f"the row is {type_in_words(value)}, not an object")


def _why(error: Exception, line: str = "") -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def grouped(rows: Iterable[ReadRow]) -> Iterator[Rows]:
    """Rows in parts. An error comes after the part with the rows before it."""
    group: list[ReadRow] = []
    try:
        for row in rows:
            group.append(row)
            if len(group) == _GROUP:
                yield Rows(group)
                group = []
    except Exception:
        if group:
            yield Rows(group)
        raise
    if group:
        yield Rows(group)


# Forms of files


class JsonFile(NamedTuple):
    """A JSON file, and what is known of its rows."""

    shown: str
    """The path of the file, for messages."""
    opened: Callable[[], TextIO]
    """Opens the file at its start."""
    key: str | None
    """The key of the list of rows, where the file is one object; None to look for it."""
    columns: Collection[str]
    """An object with one of these keys is a row."""
    told: Callable[[str], None]
    """Is called with a note when the key was found and not given."""

    def parts(self, one_a_line: bool) -> Iterator[Part]:
        """The rows, in parts. `one_a_line`: the file is .jsonl, so a value that is no object is a bad row.

        Raises:
            StageError: the rest of the file is not valid JSON, or it is not known which list holds the rows.
        """
        with self.opened() as file:
            text = _Text(file, self.shown)
            start, key = text.next(), self.key
            if start == "{" and not text.line_is_row():
                key = self._key_of_rows()
            elif key is not None:
                raise StageError(self._no_key(key, "the file is not one object"))
            if key is not None:
                yield from grouped(self._numbered(text.under(key)))
            elif start == "{" or (one_a_line and start not in "[") or (start == "[" and text.line_is_row(one_a_line)):
                yield from text.lines()
            elif start:
                yield from grouped(self._numbered(text.array()))

    def _numbered(self, values: Iterable[Any]) -> Iterator[ReadRow]:
        for number, value in enumerate(values, 1):
            yield f"{self.shown}: row {number}", _as_row(value)

    def _key_of_rows(self) -> str | None:
        """The key of the list of rows, if the file is one object that holds such a list; None if objects are rows.

        Raises:
            StageError: there is no such key, or there are several lists and `key` names none.
        """
        names: list[str] = []
        lists: list[str] = []
        with self.opened() as file:
            text = _Text(file, self.shown)
            try:
                for name in text.fields():
                    if self.key is None and name in self.columns:
                        return None
                    names.append(name)
                    if {type(value) is dict and not is_message(value) for value in text.skipped()} == {True}:
                        lists.append(name)
                more = text.next()
            except StageError:
                if self.key is None:
                    return None  # the lines are read one by one, and what is wrong is a bad row
                raise
        if self.key is not None and (more or self.key not in names):
            raise StageError(self._no_key(self.key, "the file is not one object" if more else nearest(self.key, names)))
        if self.key is not None or more or not lists:
            return self.key
        if len(lists) > 1:
            raise StageError(
                f"`{self.shown}` holds a list of objects under each of {listed(lists)}; name the one to read, as "
                f"`rows: {lists[0]}`"
            )
        self.told(f"the rows of `{self.shown}` are the list under its key `{lists[0]}`")
        return lists[0]

    def _no_key(self, key: str, why: str) -> str:
        return f"`{self.shown}` has no key `{key}`, which `rows:` names{why if why[:1] in ';' else f'; {why}'}"


class _Pieces:
    """A text file that is read in large pieces. An error of decoding comes after the text before it."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.error: UnicodeError | None = None

    def read(self, size: int) -> str:
        """At least so many characters, unless the file ends. Raises UnicodeError."""
        pieces: list[str] = []
        while size > 0 and (piece := self._next(self.file.read, _DECODED, bool(pieces))):
            pieces.append(piece)
            size -= len(piece)
        return "".join(pieces)

    def readline(self) -> str:
        """The next line. Raises UnicodeError."""
        return self._next(self.file.readline, -1, False)

    def _next(self, read: Callable[[int], str], size: int, later: bool) -> str:
        """What `read` gives. `later` puts an error off to the next call, and gives no text now."""
        try:
            if self.error is None:
                return read(size)
        except UnicodeError as error:
            self.error = error
        if not later:
            assert self.error is not None
            raise self.error
        return ""


class _Text:
    """The text of a JSON file, of which a piece is in memory, and a position in it."""

    def __init__(self, file: TextIO, shown: str) -> None:
        self.file, self.shown = _Pieces(file), shown
        self.text, self.at = self.file.read(_PIECE), 0
        self.line, self.column = 1, 0
        """The number of the line in which `text` begins, and the characters of that line before it."""

    def more(self) -> bool:
        """Drop what is before the position, and read another piece; False at the end of the file."""
        passed = self.text[: self.at]
        self.column = len(passed) - passed.rfind("\n") - 1 if "\n" in passed else self.column + len(passed)
        self.line += passed.count("\n")
        rest = self.text[self.at :]
        piece = self.file.read(max(_PIECE, len(rest)))
        self.text, self.at = rest + piece, 0
        return bool(piece)

    def next(self) -> str:
        """The next character that is not blank, at which the position is then; empty at the end of the file."""
        while True:
            blanks = _BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The value at the position, which moves behind it. Raises StageError."""
        self.next()
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                invalid = self.invalid(_reason(error), getattr(error, "pos", self.at))
                if not self._may_be_cut(error) or not self.more():
                    raise invalid from None
                continue
            if end < len(self.text) or isinstance(value, (dict, list, str)) or not self.more():
                self.at = end
                return value

    def _may_be_cut(self, error: Exception) -> bool:
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _CUT

    def invalid(self, why: str, at: int) -> StageError:
        """The error at an index of `text`."""
        line = self.line + self.text.count("\n", 0, at)
        begin = self.text.rfind("\n", 0, at) + 1
        column = at - begin + 1 + (0 if begin else self.column)
        where = "" if why.startswith(("nested", "a number")) else f" at column {column}"
        return StageError(f"{self.shown}:{line}: not valid JSON ({why}{where})")

    def take(self, wanted: str) -> str:
        """Move past the next character, which must be one of `wanted`. Raises StageError."""
        found = self.next()
        if not found or found not in wanted:
            raise self.invalid(f"Expecting '{wanted[0]}' delimiter", self.at)
        self.at += 1
        return found

    def elements(self) -> Iterator[Any]:
        """The values of the array at the position, which moves behind it. Raises StageError."""
        self.take("[")
        if self.next() == "]":
            self.at += 1
            return
        yield self.value()
        while self.take(",]") == ",":
            yield self.value()

    def fields(self) -> Iterator[str]:
        """The keys of the object at the position. The caller moves behind the value of each. Raises StageError."""
        self.take("{")
        if self.next() == "}":
            self.at += 1
            return
        while True:
            if self.next() != '"':
                raise self.invalid("Expecting property name enclosed in double quotes", self.at)
            name = str(self.value())
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return

    def skipped(self) -> Iterator[Any]:
        """Move behind a value; the elements if it is an array, or else the value, wrapped in a list."""
        if self.next() == "[":
            yield from self.elements()
        else:
            yield [self.value()]

    def under(self, key: str) -> Iterator[Any]:
        """The elements of the list under a key of the object at the position. Raises StageError."""
        for name in self.fields():
            if name == key and self.next() != "[":
                found = type_in_words(self.value())
                raise StageError(f"`{self.shown}` holds {found} under `{key}`, which `rows:` names; name a list")
            for value in self.skipped():
                if name == key:
                    yield value

    def array(self) -> Iterator[Any]:
        """The elements of the array that is the whole file. Raises StageError."""
        if self.next() != "[":
            raise StageError(f"`{self.shown}` holds {type_in_words(self.value())}, not an array of objects")
        yield from self.elements()
        if self.next():
            raise self.invalid("Extra data", self.at)

    def line_is_row(self, alone: bool = False) -> bool:
        """Whether the line at the position is a whole value, and others follow or (`alone`) it is a conversation."""
        end = self.text.find("\n", self.at) % (len(self.text) + 1)
        try:
            value, stop = _decode(self.text, self.at)
        except (ValueError, RecursionError):
            return False
        is_talk = alone and bool(value) and all(isinstance(entry, str) or is_message(entry) for entry in value)
        return stop <= end and not self.text[stop:end].strip() and (is_talk or bool(self.text[end:].strip()))

    def lines(self) -> Iterator[Lines]:
        """All lines from that of the position on, in parts."""
        begin = self.text.rfind("\n", 0, self.at) + 1
        first, text = self.line + self.text.count("\n", 0, begin), self.text[begin:]
        while text:
            more, following = [text], ""
            try:
                more.append(self.file.readline())
                last, size = "".join(more)[-_CUT:].rstrip(), len(text)
                while (following := self.file.readline()) and size < _LONGEST:
                    line = following.strip()
                    if line and not _goes_on(last, line):
                        break
                    more.append(following)
                    last, size = line or last, size + len(following)
            except UnicodeError:
                text = "".join(more)
                yield Lines(self.shown, first, text[: text.rfind("\n") + 1])
                raise
            text = "".join(more)
            yield Lines(self.shown, first, text)
            first += text.count("\n")
            text = following and following + self.file.read(_PIECE)


def _reason(error: Exception) -> str:
    return error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else _why(error)
