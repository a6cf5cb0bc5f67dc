"""Data sets: the settings that describe one, the files that it names, and the rows that are read from them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from stages.data import cleaning, formats, hub
from stages.data.cleaning_steps import Steps
from stages.data.files import FILE_TYPES, TABLES, HowToRead, did_you_mean, file_type, find_files, parts
from stages.data.formats._message import KEYS, ROLES, MessageForm
from stages.data.formats._values import MEDIA_COLUMNS, is_blank, is_message, listed
from stages.data.json_rows import Part, ReadRow, grouped
from stages.data.placeholders import Filler, placeholders
from stages.data.row import FileRow, NotAnObject, PlacedRow, Row, RowError
from stages.runtime.errors import StageError, nearest

NotFetched = hub.NotFetched
is_on_hub = hub.is_name
Format = Literal["text", "alpaca", "prompt_completion", "messages", "sharegpt", "preference", "labelled"]
CONVERSATIONS: tuple[Format, ...] = ("alpaca", "prompt_completion", "messages", "sharegpt")
"""The formats whose rows become conversations."""
ROWS_FILE = "rows.jsonl"  # the rows in the folder of a stage that leaves rows
READER_VERSION = 4  # raise it when the same file would give other rows

_COMMON = 10  # a placeholder in at least one of ten rows is meant to be filled in
# Settings added since the first fingerprints, and their defaults. See `Source._without_unused`.
_CAME_LATER: Mapping[str, Any] = {
    "roles": {},
    "message_keys": {},
    "turns": None,
    "fill": None,
    "rows": None,
    "subset": None,
    "split": None,
    "clean": [],
    "others": {},
    "max_dropped": 0.01,
}


class Source(BaseModel):
    """One data set and how to read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A file, a folder, a pattern such as `books/*.txt`, or a data set on the Hub as `org/name@commit`."""
    format: Format
    """The format of its rows."""
    columns: dict[str, str] = {}
    """Our column name → the file's, such as `{instruction: ask, output: answer}`."""
    encoding: str | None = None
    """Needed only when the encoding is neither UTF-8 nor clearly detected."""
    max_samples: int | None = Field(None, gt=0)
    """Read only so many rows, from the start."""
    roles: dict[str, str] = {}
    """Our role → the file's, such as `{user: prompter, assistant: bot}`; the usual names need no mapping."""
    message_keys: dict[str, str] = {}
    """`role`, `content`, `reasoning_content`, `tool_calls`, `tool_call_id`, `weight` → the keys of the file's
    messages, such as `{role: speaker, content: words}`."""
    turns: Literal["merge"] | None = None
    """`merge` joins messages of one role that follow each other, and keeps an assistant's first message out of the
    loss; without it such a row is bad."""
    rows: str | None = None
    """The key of the list of rows in a JSON file that is one object; needed only when several keys hold lists."""
    fill: dict[str, str] | None = None
    """Name → the text that replaces `{{name}}` in every text, such as `{name: 小医}`; `{}` keeps all placeholders."""
    subset: str | None = None
    """Of a data set on the Hub."""
    split: str | None = None
    """Of a data set on the Hub; `train` by default."""
    clean: Steps = []
    """Cleaning steps, such as `[html, {length: {min: 5}}, near_duplicates]`."""
    others: dict[str, "Source"] = {}
    """The declared data that `clean`'s contamination step names; filled in by the pipeline."""
    max_dropped: float = Field(0.01, ge=0, le=1)
    """The share of rows that may be bad, or too long to train on any token; more stops the run."""

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The JSON without unused later settings: fingerprints of work done before they existed must not change."""
        return {
            key: value for key, value in serialize(self).items() if key not in _CAME_LATER or value != _CAME_LATER[key]
        }

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            " ".encode(value or "utf-8")
        except LookupError:
            raise ValueError(f"there is no encoding `{value}`; try `gb18030`, `big5` or `utf-16`") from None
        return value

    @model_validator(mode="after")
    def _known_names(self) -> "Source":
        form = formats.module(self.format)
        _check_names("columns", self.columns, (*form.NEEDED, *form.OPTIONAL))
        taken = {theirs: ours for ours, theirs in self.columns.items()}
        if lost := [name for name in form.NEEDED if name in taken and name not in self.columns]:
            raise ValueError(
                f"`columns` maps `{taken[lost[0]]}` to the file's `{lost[0]}`, so no column is left for `{lost[0]}`; "
                f"map `{lost[0]}` too"
            )
        _check_names("roles", self.roles, ROLES)
        _check_names("message_keys", self.message_keys, KEYS)
        theirs = list(self.roles.values())
        if double := [role for role in theirs if theirs.count(role) > 1]:
            raise ValueError(f"`roles` names `{double[0]}` twice; a role of the file can be only one of our roles")
        if (self.subset or self.split) and not hub.NAME.match(self.path):
            raise ValueError("`subset` and `split` are for a data set on the Hub, `org/name@commit`; name a file here")
        return self

    def message_form(self) -> MessageForm:
        """How the file writes messages."""
        roles = {theirs: ours for ours, theirs in self.roles.items()}
        return MessageForm(roles, self.message_keys, merge=self.turns == "merge")


def _check_names(setting: str, mapping: Mapping[str, str], known: tuple[str, ...]) -> None:
    for name in mapping:
        if name in MEDIA_COLUMNS:
            raise ValueError(f"`{setting}` maps `{name}`, and images, video and audio are not supported; only text is")
        if name not in known:
            hint = nearest(name, known)
            raise ValueError(f"`{setting}` maps our names to the file's, and `{name}` is not one of ours{hint}")


# Files


def data_files(source: Source, *, download: bool = False) -> list[Path]:
    """The files that a source names, sorted; with `download` they may be fetched from the Hub.

    Raises:
        NotFetched: the files are on the Hub, and `download` is False.
        StageError: there are no such files.
    """
    if hub.is_name(source.path):
        return hub.locate(source.path, source.subset, source.split or "train", download=download)
    place = Path(source.path)
    if hub.UNPINNED.match(source.path) and place.suffix not in FILE_TYPES and not place.parent.is_dir():
        pin = f"for a data set on the Hub pin its commit (40 hex digits), as `{source.path.split('@')[0]}@COMMIT`"
        raise StageError(f"`{source.path}` does not exist; {pin}")
    return find_files(source.path)


def file_types(files: list[Path]) -> str:
    """The types of files, such as `.csv,.txt`, without JSON's two, which are read alike.

    The same bytes give other rows as another type, so the types belong to what identifies the rows.
    """
    suffixes = dict.fromkeys(file_type(file) for file in files)
    return ",".join(suffix for suffix in suffixes if suffix not in (".json", ".jsonl"))


# Rows


class Reading:
    """One pass over the rows of a data set: iterate over `rows` or `kept` once, then ask what was read.

    Bad rows are counted and skipped. One row is in memory at a time, unless `clean` compares rows.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.read = 0
        """Rows read, bad rows included."""
        self.bad = 0
        self.first_bad: list[str] = []
        """The places and errors of the first bad rows, one line each."""
        self.problems: list[str] = []
        """What stops the run, one line each, complete after the last row: a missing column, more bad rows than
        `max_dropped` allows, a file that cannot be read to its end, placeholders."""
        self.notes: list[str] = []
        """What the reader of a plan should know of the files."""
        self.account = cleaning.Account()
        """What became of all rows, complete after the last row of `kept`."""
        self._form = source.message_form()
        self._columns: dict[str, None] = {}  # the file's columns, in their order
        self._unread: dict[str, None] = {}  # the columns that hold something and that nothing reads, in their order
        self._placeholders: Counter[str] = Counter()  # name → rows with a placeholder that is not filled in
        self._filler = Filler(source.fill or {})

    def rows(self) -> Iterator[PlacedRow]:
        """Every good row, normalised, before cleaning. Raises nothing: see `problems` afterwards."""
        stopped = None
        try:
            for part in self.parts():
                yield from self.good(part.rows())
        except StageError as error:
            stopped = str(error)
        self.end(stopped)

    def parts(self) -> Iterator[Part]:
        """The rows of all files in parts, one file after the other. Raises StageError."""
        source, files = self.source, data_files(self.source)
        if source.format != "text" and (plain := [file for file in files if file_type(file) == ".txt"]):
            raise StageError(
                f"`{plain[0]}` is plain text, which has no {source.format} rows; use `format: text`"
                + ("" if len(files) == 1 else ", or a pattern that excludes it")
            )
        needed = tuple(source.columns.get(name, name) for name in formats.module(source.format).NEEDED)
        how = HowToRead(source.encoding, source.rows, (*needed, *self._other_names()))
        found = (part for file in files for part in parts(file, how, self.notes.append))
        if source.max_samples is not None:
            rows = (row for part in found for row in part.rows())
            yield from grouped(islice(rows, source.max_samples))
        else:
            yield from found

    def good(self, rows: Iterable[ReadRow]) -> Iterator[PlacedRow]:
        """The good rows among some, normalised; the bad ones are counted."""
        normalise = self._normaliser()
        for place, row in rows:
            self.read += 1
            try:
                normalised = normalise(row)
            except (RowError, RecursionError) as error:
                self.bad += 1
                if len(self.first_bad) < cleaning.SHOWN:
                    text = error if isinstance(error, RowError) else "the row is nested too deeply"
                    self.first_bad.append(f"{place}: {text}")
                continue
            yield place, normalised

    def add(self, later: "Reading") -> None:
        """Count what another reading found in rows of the same data set that follow those of this one."""
        self.read += later.read
        self.bad += later.bad
        self.first_bad += later.first_bad[: cleaning.SHOWN - len(self.first_bad)]
        self._columns.update(later._columns)
        self._unread.update(later._unread)
        self._form.unread.update(later._form.unread)
        self._placeholders.update(later._placeholders)
        self._filler.used |= later._filler.used

    def end(self, stopped: str | None) -> None:
        """Fill in `problems` after the last row; `stopped` is why the rest of the files could not be read."""
        if not self.read and stopped is None:
            stopped = f"`{self.source.path}` holds no rows"
        if self.bad > len(self.first_bad):
            more = self.bad - len(self.first_bad)
            self.first_bad[-1] += f" — and {more:,} more bad row{'s' if more > 1 else ''}"
        bad = [*self.first_bad] if self._too_many_bad() else []
        if bad and self.source.format == "sharegpt" and formats.of_columns(self._columns) == "preference":
            bad = [f"`{self.source.path}`: its rows have `chosen` and `rejected`, which `format: preference` reads"]
        elif bad and (self.bad > len(bad) or self.source.max_dropped * self.read >= 1):
            bad[-1] += f"; {self.bad:,} of {self.read:,} rows are bad, and `max_dropped` is {self.source.max_dropped:g}"
        rest = self._unfilled() if stopped is None else [stopped]
        self.problems = self._missing_columns()[: cleaning.SHOWN] or bad + rest

    def kept(self, check_after: int | None = None) -> Iterator[PlacedRow]:
        """The good rows that `clean` keeps.

        Raises:
            StageError: after the last row, what `problems` has; with `check_after` also after that many rows, as soon
                as more rows are bad than `max_dropped` allows.
        """
        others = {name: rows_of(other) for name, other in self.source.others.items()}
        cleaned = cleaning.Cleaning(self.source.clean, self._checked(check_after), others)
        self.account = cleaned.account
        yield from cleaned
        self.account.read, self.account.notes = self.read, [*self.notes, *self.unread]
        if self.bad:
            self.account.dropped = {"bad": cleaning.Dropped(self.bad, self.first_bad), **self.account.dropped}

    def _checked(self, check_after: int | None) -> Iterator[PlacedRow]:
        for placed in self.rows():
            yield placed
            if check_after and self.read >= check_after and self._too_many_bad():
                rows = f"{self.bad:,} of the first {self.read:,} rows"
                limit = f"and `max_dropped` is {self.source.max_dropped:g}"
                raise StageError(f"{rows} are bad, {limit}: {'; '.join(self.first_bad)}")
        if self.problems:
            raise StageError("; ".join(self.problems))

    def _too_many_bad(self) -> bool:
        return self.bad > self.source.max_dropped * self.read

    def _normaliser(self) -> Callable[[FileRow | RowError], Row]:
        """The function that normalises a row of the file, or raises RowError."""
        source, form = self.source, formats.module(self.source.format)
        needed = [source.columns.get(name, name) for name in form.NEEDED]
        known = {source.columns.get(name, name) for name in (*form.NEEDED, *form.OPTIONAL)}
        others = self._other_names()
        hint = f"{source.format} rows need " + " and ".join(f"`{name}`" for name in form.NEEDED)
        usual: set[tuple[str, ...]] = set()  # the columns of rows in which all are known and no needed one is missing

        def with_columns(row: FileRow) -> FileRow:
            for theirs, ours in others.items():
                if theirs in row and ours not in row:
                    row = {ours if name == theirs else name: value for name, value in row.items()}
            self._columns.update(dict.fromkeys(row))
            for name in needed:
                if name not in row:
                    raise RowError(f"the row has no `{name}`; {hint} (map other names with `columns:`)")
            if known >= row.keys():
                usual.add(tuple(row))
            unread = row.keys() - known - self._unread.keys()
            self._unread.update(dict.fromkeys(name for name in row if name in unread and not is_blank(row[name])))
            return row

        def normalise(row: FileRow | RowError) -> Row:
            if isinstance(row, NotAnObject):
                row = formats.as_object(form, row, source.columns)
            if isinstance(row, RowError):
                raise row
            if tuple(row) not in usual:
                row = with_columns(row)
            if source.columns:
                row = _renamed(row, source.columns)
            if source.fill:
                read = {name: row[name] for name in (*form.NEEDED, *form.OPTIONAL) if name in row}
                row = row | self._filler(read)
            normalised: Row = form.normalise(row, self._form)
            if source.fill is None and (found := placeholders(normalised)):
                self._placeholders.update(found)
            return normalised

        return normalise

    def _other_names(self) -> dict[str, str]:
        """Another usual name of a needed column → the column, where the source names none."""
        others = formats.other_names(formats.module(self.source.format))
        return {other: name for name in others if name not in self.source.columns for other in others[name]}

    @property
    def unread(self) -> list[str]:
        """What nothing has read, one clause for columns and one for keys of messages; complete after the last row."""
        found = (("columns", self._unread), ("keys of messages", self._form.unread))
        more = {what: f" and {len(names) - 12} more" if len(names) > 12 else "" for what, names in found}
        return [f"{what} that nothing reads: {listed(names)}{more[what]}" for what, names in found if names]

    def _unfilled(self) -> list[str]:
        """A problem when a placeholder is in many rows, or when none has a placeholder that `fill` names."""
        path, rows = self.source.path, self._placeholders
        many = [name for name in rows if rows[name] * _COMMON >= self.read]
        if many:
            many.sort(key=lambda name: (-rows[name], name))
            example = ", ".join(f"{name}: …" for name in many[:3])
            return [
                f"`{path}`: {rows[many[0]]:,} of {self.read:,} rows hold `{{{{{many[0]}}}}}`, which a model would "
                f"learn to say; fill it in with `fill: {{{example}}}`, or keep it with `fill: {{}}`"
            ]
        unused = [name for name in self.source.fill or {} if name not in self._filler.used]
        if unused and not self.source.max_samples and not self.bad:
            hint = did_you_mean(unused[0], self._filler.used)
            return [f"`{path}`: no row holds `{{{{{unused[0]}}}}}`, which `fill:` gives{hint}"]
        return []

    def _missing_columns(self) -> list[str]:
        """A problem for each column that no row has; none when no row could be read."""
        source = self.source
        wanted = dict.fromkeys(formats.module(source.format).NEEDED)
        if not source.max_samples or file_type(Path(source.path)) in TABLES:
            wanted |= dict.fromkeys(source.columns)  # in JSON the first rows may lack a rare column
        missing = [name for name in wanted if source.columns.get(name, name) not in self._columns]
        return [_no_column(source, name, list(self._columns)) for name in missing] if self._columns else []


def rows_of(source: Source) -> list[Row]:
    """Every normalised row that `clean` keeps.

    Raises:
        StageError: what stops the run, such as more bad rows than `max_dropped` allows; names the first ones.
    """
    return [row for _, row in Reading(source).kept()]


def _renamed(row: FileRow, columns: Mapping[str, str]) -> FileRow:
    moved = {*columns, *columns.values()}
    kept = {name: value for name, value in row.items() if name not in moved}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _no_column(source: Source, name: str, columns: list[str]) -> str:
    """The message for a column that no row of the file has; `columns` are the columns that the file has."""
    if name == formats.list_column(formats.module(source.format)) and is_message(dict.fromkeys(columns)):
        return f"`{source.path}`: each row is one message; put those of a conversation into one row, as a list"
    theirs = source.columns.get(name, name)
    if not source.columns and (other := formats.of_columns(columns)) is not None:
        return f"`{source.path}`: no column `{name}`; its columns are those of `format: {other}`"
    short = [column for column in columns if len(column) < 60 and column.isprintable()]
    hint = did_you_mean(theirs, short) or f"; the file has {listed(columns)}"
    if name in source.columns:
        return f"`{source.path}`: no column `{theirs}`, which `columns:` gives for `{name}`{hint}"
    hint += " Map" if hint.endswith("?") else "; map"
    return f"`{source.path}`: no column `{name}`{hint} it with `columns: {{{name}: …}}`"
