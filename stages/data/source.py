"""Data files in, normalised rows out: what a data set is, how it is read, and what is wrong with it."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from stages.data import cleaning, formats, hub
from stages.data.cleaning_steps import Steps
from stages.data.files import KINDS, SOLID, PlacedOrBad, find_files, kind_of, near_name, read_file
from stages.data.formats._turns import ROLES, Words
from stages.data.formats._values import MEDIA_COLUMNS, listed
from stages.data.row import Placed, Row, RowError
from stages.runtime.errors import StageError, nearest

NotFetched = hub.NotFetched
is_on_hub = hub.is_name
Format = Literal["text", "alpaca", "prompt_completion", "messages", "sharegpt", "preference", "labelled"]
ROWS_FILE = "rows.jsonl"  # where a stage that leaves rows leaves them
READER_VERSION = 2  # of what rows become; raise it when the same file would give other rows

_PLACEHOLDER = re.compile(r"\{\{ *([^\W\d]\w*) *\}\}")
_MANY = 10  # a placeholder in one of so many rows is no accident
_LATER: Mapping[str, Any] = {
    "roles": {},
    "message_keys": {},
    "fill": None,
    "subset": None,
    "split": None,
    "clean": [],
    "others": {},
    "max_dropped": 0.01,
}  # see `Source._only_given`


class Source(BaseModel):
    """One data set and how to read it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A file, a folder, a pattern such as `books/*.txt`, or a data set on the Hub as `org/name@commit`."""
    format: Format
    """What a row looks like."""
    columns: dict[str, str] = {}
    """Our column name to the file's, such as `{instruction: ask, output: answer}`."""
    encoding: str | None = None
    """Named when it is neither UTF-8 nor clearly detected."""
    max_samples: int | None = Field(None, gt=0)
    """Only the first so many rows."""
    roles: dict[str, str] = {}
    """Our role to the file's, such as `{user: prompter, assistant: bot}`; the usual words are known."""
    message_keys: dict[str, str] = {}
    """What messages call their `role` and `content`, such as `{role: speaker, content: words}`."""
    fill: dict[str, str] | None = None
    """What takes the place of `{{name}}` in every text, as `{name: 小医}`; `{}` leaves all as they are."""
    subset: str | None = None
    """Of a data set on the Hub."""
    split: str | None = None
    """Of a data set on the Hub; `train` unless said otherwise."""
    clean: Steps = []
    """Cleaning steps, such as `[html, {length: {min: 5}}, near_duplicates]`."""
    others: dict[str, "Source"] = {}
    """The declared data that `clean`'s contamination step names; filled in by the pipeline."""
    max_dropped: float = Field(0.01, ge=0, le=1)
    """The share of rows that may be bad, or too long to train a token of; more stops the run."""

    @model_serializer(mode="wrap")
    def _only_given(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Settings that came later are left out where they are not used: records made before still compare equal."""
        return {key: value for key, value in serialize(self).items() if key not in _LATER or value != _LATER[key]}

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            " ".encode(value or "utf-8")
        except LookupError:
            raise ValueError(f"there is no encoding `{value}`; try `gb18030`, `big5` or `utf-16`") from None
        return value

    @model_validator(mode="after")
    def _known_words(self) -> "Source":
        form = formats.module(self.format)
        _known("columns", self.columns, (*form.NEEDED, *form.OPTIONAL))
        taken = {theirs: ours for ours, theirs in self.columns.items()}
        if lost := [name for name in form.NEEDED if name in taken and name not in self.columns]:
            raise ValueError(
                f"`columns` gives the file's `{lost[0]}` to `{taken[lost[0]]}`, and then nothing is left for "
                f"`{lost[0]}`; map it too"
            )
        _known("roles", self.roles, ROLES)
        _known("message_keys", self.message_keys, ("role", "content"))
        theirs = list(self.roles.values())
        if double := [role for role in theirs if theirs.count(role) > 1]:
            raise ValueError(f"`roles` gives `{double[0]}` twice; a role of the file is one of ours")
        if (self.subset or self.split) and not hub.NAME.match(self.path):
            raise ValueError("`subset` and `split` are for a data set on the Hub, `org/name@commit`; name a file here")
        return self

    @property
    def words(self) -> Words:
        return Words({theirs: ours for ours, theirs in self.roles.items()}, self.message_keys)


def _known(setting: str, mapping: Mapping[str, str], known: tuple[str, ...]) -> None:
    for name in mapping:
        if name in MEDIA_COLUMNS:
            raise ValueError(f"`{setting}` maps `{name}`, and images, video and audio are not supported; only text is")
        if name not in known:
            there = nearest(name, known)
            raise ValueError(f"`{setting}` maps our names to the file's, and we have no `{name}`{there}")


@dataclass
class Account:
    """Every row of a data set: those read are those kept and those bad."""

    read: int = 0
    bad: int = 0
    problems: list[str] = field(default_factory=list)
    """What stops the run: more bad rows than may be dropped, or why no more could be read; one line each."""
    first: list[str] = field(default_factory=list)
    """The first bad rows, one line each."""


def data_files(source: Source, *, download: bool = False) -> list[Path]:
    """The files that a source names, sorted; `download` allows to fetch them from the Hub.

    Raises:
        NotFetched: they are on the Hub, and `download` is off.
        StageError: there is none.
    """
    if hub.is_name(source.path):
        return hub.locate(source.path, source.subset, source.split or "train", download=download)
    try:
        return find_files(source.path)
    except StageError as error:
        is_file = Path(source.path).suffix in KINDS or not str(error).endswith("does not exist")
        if is_file or not hub.UNPINNED.match(source.path):
            raise
        pin = f"for a data set on the Hub pin its commit (40 hex digits), as `{source.path.split('@')[0]}@COMMIT`"
        raise StageError(f"{error}; {pin}") from None


def kinds_of(found: list[Path]) -> str:
    """How files are read where their content does not tell: their kinds, but for JSON's two, which read alike."""
    kinds = dict.fromkeys(kind_of(file) for file in found)
    return ",".join(kind for kind in kinds if kind not in (".json", ".jsonl"))


def has_tools(row: Row) -> bool:
    """Does a normalised row declare tools, call one, or hold what one gave back?"""
    said = (turn for key in ("messages", "prompt", "chosen", "rejected", "completion") for turn in row.get(key, ()))
    return "tools" in row or any("tool_calls" in turn or turn["role"] == "tool" for turn in said)


def rows(source: Source, name: str = "") -> Iterator[tuple[str, Row]]:
    """Each row as the file has it, columns renamed, and its place: `path:12`, or `path: row 12`.

    `name` stands for the path in the places. Raises StageError for what cannot be read.
    """
    for place, row in _read(source, name):
        if isinstance(row, RowError):
            raise StageError(f"{place}: {row}")
        yield place, _renamed(row, source.columns)


def rows_of(source: Source) -> list[Row]:
    """Every row in the one shape of its format: `text`; `messages`; `prompt`, `chosen` and `rejected`; or `prompt`,
    `completion` and `label`. Conversations have `tools` too, where the row declares any.

    Raises StageError that names the first bad row.
    """
    return [row for _, row in load(source)[0]]


def load(source: Source) -> tuple[list[Placed], cleaning.Account]:
    """The rows with their places, less the bad ones and those that `clean` drops, and the account of all.

    Raises:
        StageError: as `kept`.
    """
    done = cleaning.Account()
    return list(kept_rows(source, done)), done


def kept_rows(source: Source, done: cleaning.Account, early: int | None = None) -> Iterator[Placed]:
    """What `load` gives, row by row; `done` is the whole account once the last is out.

    No more than a row is held in memory, unless `clean` compares rows.

    Raises:
        StageError: more rows are bad than `max_dropped` allows; names the first. It comes after the last row, and with
            `early` after that many, too.
    """
    read = Account()

    def good() -> Iterator[Placed]:
        for placed in _normalised(source, 3, read):
            yield placed
            if early and read.read >= early and read.bad > source.max_dropped * read.read:
                raise StageError(f"{read.bad:,} of the first {read.read:,} rows are bad: {'; '.join(read.first)}")
        if read.problems:
            raise StageError("; ".join(read.problems))

    others = {name: rows_of(other) for name, other in source.others.items()}
    yield from cleaning.kept(source.clean, good(), done, others)
    done.read = read.read
    if read.bad:
        done.dropped = {"bad": cleaning.Dropped(read.bad, read.first), **done.dropped}


def problems(source: Source, limit: int = 3, keep: Callable[[Row], None] = lambda _: None) -> tuple[int, list[str]]:
    """How many rows were read, bad ones too, and the first `limit` problems, one line each; good rows go to `keep`."""
    done = inspect_rows(source, limit, keep)
    return done.read, done.problems


def inspect_rows(source: Source, limit: int = 3, keep: Callable[[Row], None] = lambda _: None) -> Account:
    """Read the files once and hand each normalised row to `keep`."""
    done = Account()
    for _, row in _normalised(source, limit, done):
        keep(row)
    return done


def _normalised(source: Source, limit: int, done: Account) -> Iterator[Placed]:
    """The good rows; `done` is the account once the last is out."""
    found = done.first
    seen: dict[str, None] = {}  # the file's columns, in their order
    left: Counter[str] = Counter()  # rows that hold a placeholder
    filled: set[str] = set()
    stopped: list[str] = []
    normal = _normaliser(source, filled)
    try:
        for place, row in _read(source, ""):
            done.read += 1
            try:
                if isinstance(row, RowError):
                    raise row
                if not seen.keys() >= row.keys():
                    seen.update(dict.fromkeys(row))
                made = normal(row)
                if source.fill is None:
                    left.update(_placeholders(made))
            except (RowError, RecursionError) as bad:
                done.bad += 1
                if len(found) < limit:
                    found.append(f"{place}: {bad if isinstance(bad, RowError) else 'the row is nested too deeply'}")
                continue
            yield place, made
    except StageError as error:
        stopped = [str(error)]
    if not done.read and not stopped:
        stopped = [f"`{source.path}` holds no rows"]
    if done.bad > len(found):
        more = done.bad - len(found)
        found[-1] += f" — and {more:,} more bad row{'s' if more > 1 else ''}"
    unfilled = [] if stopped else _unfilled(source, left, filled, done)
    allowed = done.bad <= source.max_dropped * done.read
    done.problems = _absent(source, list(seen))[:limit] or ([] if allowed else found) + stopped + unfilled


def _read(source: Source, name: str) -> Iterator[PlacedOrBad]:
    """The rows of all files, one after the other."""
    there = data_files(source)
    if source.format != "text" and (plain := [file for file in there if kind_of(file) == ".txt"]):
        raise StageError(
            f"`{plain[0]}` is plain text, which has no {source.format} rows; use `format: text`"
            + ("" if len(there) == 1 else ", or a pattern that leaves it out")
        )
    if len(there) == 1:
        shown = {there[0]: name or str(there[0])}
    else:
        shown = {file: f"{name}/{file.name}" if name else str(file) for file in there}
    chained = (placed for file in there for placed in read_file(file, source.encoding, shown[file]))
    yield from islice(chained, source.max_samples)


def _normaliser(source: Source, filled: set[str]) -> Callable[[Row], Row]:
    """What puts a row in our one shape for its format; RowError when it cannot be."""
    form, words, columns, fill = formats.module(source.format), source.words, source.columns, source.fill
    needed = [columns.get(name, name) for name in form.NEEDED]
    hint = f"{source.format} rows need " + " and ".join(f"`{name}`" for name in form.NEEDED)

    def normal(row: Row) -> Row:
        for name in needed:
            if name not in row:
                raise RowError(f"the row has no `{name}`; {hint} (map other names with `columns:`)")
        renamed = _renamed(row, columns) if columns else row
        if fill:
            named = {name: renamed[name] for name in (*form.NEEDED, *form.OPTIONAL) if name in renamed}
            renamed = renamed | _filled(named, fill, filled)
        made: Row = form.normal(renamed, words)
        return made

    return normal


# Placeholders


def _filled(value: Any, fill: Mapping[str, str], used: set[str]) -> Any:
    """The value with every `{{name}}` in its texts replaced."""
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda found: _word(found[1], fill, used), value) if "{{" in value else value
    if isinstance(value, list):
        return [_filled(entry, fill, used) for entry in value]
    return {key: _filled(entry, fill, used) for key, entry in value.items()} if isinstance(value, dict) else value


def _word(name: str, fill: Mapping[str, str], used: set[str]) -> str:
    if name not in fill:
        raise RowError(f"`{{{{{name}}}}}` is left, which `fill:` does not name{nearest(name, fill)}")
    used.add(name)
    return fill[name]


def _placeholders(value: dict[str, Any] | list[Any]) -> set[str]:
    """The names that stand in double braces somewhere in a row."""
    found: set[str] = set()
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, (dict, list)):
            found |= _placeholders(entry)
        elif isinstance(entry, str) and "{{" in entry:
            found.update(_PLACEHOLDER.findall(entry))
    return found


def _unfilled(source: Source, left: Counter[str], filled: set[str], done: Account) -> list[str]:
    """A placeholder in many rows is meant to be filled; so is one that `fill` names."""
    many = sorted((name for name in left if left[name] * _MANY >= done.read), key=lambda name: (-left[name], name))
    if many:
        words = ", ".join(f"{name}: …" for name in many[:3])
        return [
            f"`{source.path}`: {left[many[0]]:,} of {done.read:,} rows hold `{{{{{many[0]}}}}}`, which a model would "
            f"learn to say; fill it in with `fill: {{{words}}}`, or keep it with `fill: {{}}`"
        ]
    unused = [name for name in source.fill or {} if name not in filled]
    if unused and not source.max_samples and not done.bad:
        there = near_name(unused[0], filled)
        return [f"`{source.path}`: no row holds `{{{{{unused[0]}}}}}`, which `fill:` gives{there}"]
    return []


# Columns


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    moved = {*columns, *columns.values()}
    kept = {name: value for name, value in row.items() if name not in moved}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _absent(source: Source, seen: list[str]) -> list[str]:
    """A problem for each column that no row at all has; nothing when no row could be read."""
    wanted = dict.fromkeys(formats.module(source.format).NEEDED)
    if not source.max_samples or source.path.lower().removesuffix(".gz").endswith(SOLID):
        wanted |= dict.fromkeys(source.columns)  # in JSON a rare column may come after the first rows
    missing = [name for name in wanted if source.columns.get(name, name) not in seen]
    return [_no_column(source, name, seen) for name in missing] if seen else []


def _no_column(source: Source, name: str, seen: list[str]) -> str:
    theirs = source.columns.get(name, name)
    short = [column for column in seen if len(column) < 60 and column.isprintable()]
    there = near_name(theirs, short) or f"; the file has {listed(seen)}"
    if name in source.columns:
        return f"`{source.path}`: no column `{theirs}`, which `columns:` gives for `{name}`{there}"
    there += " Map" if there.endswith("?") else "; map"
    return f"`{source.path}`: no column `{name}`{there} it with `columns: {{{name}: …}}`"
