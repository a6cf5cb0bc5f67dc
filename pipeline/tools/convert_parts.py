"""What the files of `convert` share: a command of another program, a note for the user, and a stage in our words."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.settings import settings
from stages.runtime.errors import nearest

Kind = Literal["to do", "differs", "not supported", "not needed", "unknown"]
"""What a note is about: something to fill in; a result that differs; what is left out; what needs no setting here; a
word that is not an argument of the program."""


@dataclass(frozen=True)
class Note:
    """One sentence for the user about one argument, or about the whole."""

    kind: Kind
    place: str
    """`file:line` of the argument, or the file."""
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.text}"


@dataclass(frozen=True)
class Given:
    """An argument as it was given."""

    value: Any
    place: str


@dataclass(frozen=True)
class Job:
    """One command of another program, or one of its config files."""

    program: str
    """`llamafactory`, `axolotl`, `trl` or `medicalgpt`."""
    verb: str
    """What the program does, such as `train` or `export`; empty where only the arguments tell."""
    place: str
    given: Mapping[str, Given]
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: int | None = None
    """Processes on one machine; None where the command does not say."""
    folder: Path = Path()
    """The folder of the config file, which paths may start from."""


@dataclass(frozen=True)
class Noted:
    """A value with a comment at the end of its line."""

    value: Any
    comment: str


@dataclass
class Part:
    """A stage in our words; models and output folders are still named as the other program names them."""

    place: str
    kind: str
    model: str | None = None
    revision: str | None = None
    adapters: list[str] = field(default_factory=list)
    leaves: str | None = None
    """The folder that the command writes."""
    settings: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    """A built-in name or the name of a file in `files`."""
    seed: int = 42
    processes: int = 1
    launch: dict[str, Any] = field(default_factory=dict)
    """Settings of `launch` besides `processes`."""
    special: list[str] = field(default_factory=list)
    """Special tokens that the command adds to the tokenizer."""
    words: list[str] = field(default_factory=list)
    """Words that it adds."""


@dataclass
class Book:
    """What is collected over all commands."""

    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Our name → the settings of the data set."""
    files: dict[str, str] = field(default_factory=dict)
    """The name of a file beside the config → its text."""
    notes: list[Note] = field(default_factory=list)
    folder: Path = Path()
    """The folder that the config will be written into."""

    def note(self, kind: Kind, place: str, text: str) -> None:
        """Add a note, once."""
        note = Note(kind, place, text)
        if note not in self.notes:
            self.notes.append(note)

    def beside(self, name: str) -> str:
        """The path that a config in `folder` names a file beside it with: it starts from the working folder."""
        return str(self.folder / name)


ON = ("true", "yes", "on", "1")
SECRET = re.compile(
    r"(^|_)(token|key|secret|password|webhook)(_|$)"
)  # in the names of arguments whose values are never shown


class Arguments:
    """The arguments of one command. Each is taken once; what is left at the end is reported."""

    def __init__(self, job: Job, book: Book, renamed: Mapping[str, str] | None = None) -> None:
        """`renamed`: names that arguments had earlier → their names today."""
        names = renamed or {}
        self.job, self.book = job, book
        self.given = {names.get(name, name): given for name, given in job.given.items()}
        self.left = dict(self.given)

    def take(self, name: str, default: Any = None) -> Any:
        """The value, or the default where it is missing or null."""
        given = self.left.pop(name, None)
        return default if given is None or given.value is None else given.value

    def text(self, name: str) -> str | None:
        """A value as text; None, and a note, where it is a list or a mapping."""
        value = self.take(name)
        return None if value is None or not self._is(name, value, str | int | float, "text") else str(value)

    def number(self, name: str, default: Any = None) -> Any:
        """A value as a number; the default, and a note, where it is none."""
        value = plain_number(self.take(name, default))
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return value if plain or value is default or self._is(name, value, (), "a number") else default

    def numbers(self, name: str) -> list[float]:
        """The numbers of a list, or of a text with commas; none, and a note, where one is no number."""
        words = self.words(name)
        try:
            return [float(word) for word in words]
        except ValueError:
            self._is(name, ",".join(words), (), "numbers with commas between them")
            return []

    def _is(self, name: str, value: Any, kinds: Any, wanted: str) -> bool:
        """Whether a value is of a kind; otherwise it is left out, and a note says so."""
        if isinstance(value, kinds):
            return True
        self.book.note("to do", self.place(name), f"`{name}` is `{shown(value)}`; it wants {wanted}")
        return False

    def flag(self, name: str, default: bool = False) -> bool:
        """A value as true or false: command lines and YAML 1.1 write it as text, too."""
        value = self.take(name, default)
        return str(value).lower() in ON if not isinstance(value, bool) else value

    def words(self, name: str) -> list[str]:
        """The items of a list, or of a text with commas."""
        value = self.take(name)
        items = value if isinstance(value, list) else [] if value is None else str(value).split(",")
        return [str(item).strip() for item in items if str(item).strip()]

    def place(self, name: str) -> str:
        """Where the argument is written, or the command."""
        given = self.given.get(name)
        return given.place if given is not None else self.job.place

    def report_rest(self, known: "Known") -> None:
        """A note for each argument that nothing has taken."""
        for name, given in self.left.items():
            kind, text = known.about(name, given.value)
            self.book.note(kind, given.place, text)


@dataclass(frozen=True)
class Known:
    """All arguments of a program, for what is said about them."""

    not_needed: Mapping[str, str]
    """Argument → why it needs no setting here."""
    not_supported: Mapping[str, str]
    """Argument → why there is no setting for it."""
    taken: frozenset[str]
    """Arguments that become settings."""
    off: Mapping[str, Any] = field(default_factory=dict)
    """Argument → its value when it does nothing, where that is neither null, false, zero nor empty."""
    passes: str = "trl.trainer.sft_config:SFTConfig"
    """The class of TRL whose settings pass through under their own names; empty for none."""

    def about(self, name: str, value: Any) -> tuple[Kind, str]:
        """The note for an argument that no setting came from."""
        if name in self.not_needed:
            return "not needed", f"`{name}`: {self.not_needed[name]}"
        if name in self.not_supported:
            if is_off(value) or value == self.off.get(name, value is None):
                return "not needed", f"`{name}`: it is off"
            given = name if SECRET.search(name) else f"{name}: {shown(value)}"
            return "not supported", f"`{given}`: {self.not_supported[name]}"
        if name in self.taken or (self.passes and name in settings(self.passes)):
            return "not needed", f"`{name}`: this stage does not use it"
        return "unknown", f"`{name}` is no argument of this program{nearest(name, self.names())}"

    def names(self) -> Iterator[str]:
        """Every argument."""
        yield from {*self.not_needed, *self.not_supported, *self.taken, *(settings(self.passes) if self.passes else ())}


def is_off(value: Any) -> bool:
    """Whether a switch or a number is off: null, false, zero, empty, or the word for it."""
    return value in (None, False, 0, "", [], {}) or str(value).lower() in ("none", "no", "false", "off")


def shown(value: Any) -> str:
    """A value as a user writes it, on one line, at most 60 characters."""
    text = "true" if value is True else " ".join(str(value).split())
    return text if len(text) <= 60 else text[:59] + "…"


def plain_number(value: Any) -> Any:
    """A text with underscores between digits as the number that YAML 1.1 reads; any other value as it is."""
    if not isinstance(value, str) or not re.fullmatch(r"[-+]?\d[\d_]*(\.[\d_]*)?", value):
        return value
    plain = value.replace("_", "")
    return float(plain) if "." in plain else int(plain)


def by_name(table: Mapping[str, str]) -> dict[str, str]:
    """Text → names separated by blanks, turned round: name → text."""
    return {name: text for text, names in table.items() for name in names.split()}
