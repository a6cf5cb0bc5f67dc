"""Cleaning: a list of named steps in the YAML, rows in; the kept rows and an account out.

First the steps that look at one row run in the order given, again and again until none changes the row; then those that
compare rows, in the order given. So what an earlier step uncovers for a later one, or the other way round, is not left,
and cleaning what was cleaned changes nothing. Rows keep their order, and the first of several alike stays.

What a row says is the text of all its messages but system prompts: those are often the same in every row.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline import errors
from stages import _near_duplicates

Row = dict[str, Any]
Placed = tuple[str, Row]

_SHOWN = 3  # places named for each reason
_NOT_SAID = ("tools", "label")  # what a row has besides texts and conversations


# Settings

_LANGUAGES = Literal["zh", "en"]
_ACTIONS = Literal["mask", "count"]


class Plain(BaseModel):
    """A step without settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["whitespace", "html", "width", "exact_duplicates"]
    """`whitespace`: every blank a plain one, none double or at a line's end, at most one empty line; no invisible
    characters. Indentation and fenced code stay.

    `html`: HTML's own tags, comments, scripts and entities; `<` in `P<0.05` stays, so does what is between backticks.

    `width`: full-width letters, digits and signs as ASCII; Chinese punctuation, `²` and `㎎` stay.

    `exact_duplicates`: rows that are the same as an earlier one, system prompt and all, but for width and blanks."""


class Length(BaseModel):
    """Keep rows that say neither too little nor too much, in characters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["length"]
    min: int | None = Field(None, ge=1)
    max: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Length":
        if self.min is None and self.max is None:
            raise ValueError("`length` needs `min`, `max` or both, in characters")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"`min` is {self.min}, more than `max`, {self.max}; no row is both")
        return self


class Language(BaseModel):
    """Keep rows in one language, told by its script alone: there is no model, and `en` is any Latin script.

    Counted are Han characters, kana, Hangul syllables, and words of other scripts, so that `阿莫西林（amoxicillin）` is
    four to one. `share` of them must be Han, or Latin words. Chinese with kana for more than a tenth of its Han
    characters is Japanese. A row with nothing to count stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["language"]
    name: _LANGUAGES
    share: float = Field(0.5, gt=0, le=1)


class RepeatedLines(BaseModel):
    """Keep rows no text of which repeats its own lines too much, as scraped pages and runaway answers do.

    `share` of a text's characters may be in lines that it had before, and 0.2 is what Gopher allows (Rae et al., 2021,
    table A1); lines with fewer than five letters or digits, such as brackets and table rules, do not count. No line is
    taken out, because songs and rows of examples repeat theirs, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["repeated_lines"]
    share: float = Field(0.2, ge=0, lt=1)


class NearDuplicates(BaseModel):
    """Drop rows that say nearly what an earlier kept row says: Jaccard similarity over character 5-grams.

    Compared without blanks, width and case. Two rows that differ in a dose alone may well be near duplicates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["near_duplicates"]
    similarity: float = Field(0.8, ge=0.3, le=1)


class PersonalData(BaseModel):
    """Mask or only count e-mail addresses, Chinese identity card numbers (18 characters, checksum) and mobile numbers.

    Names, addresses, landlines and accounts of messengers are not found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["personal_data"]
    action: _ACTIONS = "mask"


class Contamination(BaseModel):
    """Drop rows that share `ngram` characters in a row with a row of another data set, such as an exam.

    Compared are letters and digits alone (NFKC, lower case), question and answer as one text. What both sides have
    around every question counts too, so keep prompts such as `请回答下面的单选题` out of one of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["contamination"]
    against: list[str] = Field(min_length=1)
    ngram: int = Field(13, ge=5)


Step = Plain | Length | Language | RepeatedLines | NearDuplicates | PersonalData | Contamination

_KINDS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("whitespace", "html", "width", "exact_duplicates"), Plain),
    "length": Length,
    "language": Language,
    "repeated_lines": RepeatedLines,
    "near_duplicates": NearDuplicates,
    "personal_data": PersonalData,
    "contamination": Contamination,
}
# The setting that `{language: zh}` means, and what it may be.
_SHORT = {"language": ("name", get_args(_LANGUAGES)), "personal_data": ("action", get_args(_ACTIONS))}
_BARE = {"length": "{min: 5, max: 4000}", "language": "zh", "contamination": "{against: [exam]}"}  # none has a default


def _named(written: object) -> object:
    """`html` or `{length: {min: 5}}`, as YAML has it, with the name under `step`; ValueError when it is neither."""
    if isinstance(written, BaseModel) or (isinstance(written, dict) and "step" in written):
        return written  # as a dump has it
    if isinstance(written, str):
        name, settings = written, None
    elif isinstance(written, dict) and len(written) == 1:
        name, settings = next(iter(written.items()))
    elif isinstance(written, dict) and written:
        raise ValueError(f"{_listed(written)} stand in one mapping; give each step its own, as `{{name: …}}`")
    else:
        raise ValueError("a step is a name, such as `html`, or one with settings, such as `{length: {min: 5}}`")
    if name not in _KINDS:
        raise ValueError(f"there is no cleaning step `{name}`{errors.nearest(str(name), _KINDS)}")
    if settings is None and name in _BARE:
        raise ValueError(f"`{name}` needs settings, such as `{name}: {_BARE[name]}`")
    short, choices = _SHORT.get(name, ("", ()))
    if short and settings is not None and not isinstance(settings, dict):
        settings = {short: settings}
    known = [setting for setting in _KINDS[name].model_fields if setting != "step"]
    if settings is not None and not isinstance(settings, dict):
        there = f"its settings as a mapping: {_listed(known)}" if known else "no settings"
        raise ValueError(f"`{name}` takes {there}")
    for setting in settings or {}:
        if setting not in known:
            there = errors.nearest(str(setting), known) or "; it takes none"
            raise ValueError(f"`{name}` has no setting `{setting}`{there}")
    if short and settings and short in settings and settings[short] not in choices:
        raise ValueError(f"`{name}` is `{settings[short]}`{errors.nearest(str(settings[short]), choices)}")
    return {"step": name, **(settings or {})}


def _once(steps: list[Step]) -> list[Step]:
    for name, count in Counter(step.step for step in steps).items():
        if count > 1:
            raise ValueError(f"`{name}` is there {count} times; keep one")
    return steps


def _listed(names: Iterable[object]) -> str:
    return ", ".join(f"`{name}`" for name in names)


Steps = Annotated[
    list[Annotated[Annotated[Step, Field(discriminator="step")], BeforeValidator(_named)]], AfterValidator(_once)
]
"""What `clean:` takes: `[html, {length: {min: 5}}, {language: zh}, near_duplicates]`."""


# The account


@dataclass
class Dropped:
    """The rows that one reason cost."""

    rows: int = 0
    first: list[str] = field(default_factory=list)
    """The places of the first three, and what each is like."""


@dataclass
class Account:
    """What cleaning did: `read` is `kept` and the rows under `dropped` together."""

    read: int = 0
    kept: int = 0
    changed: int = 0
    """Kept rows that are not as they were."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    personal_data: dict[str, int] = field(default_factory=dict)
    """How many `email`, `id_card` and `mobile` were masked, or counted, before rows were compared with each other."""

    def drop(self, reason: str, place: str) -> None:
        """Count one row."""
        entry = self.dropped.setdefault(reason, Dropped())
        entry.rows += 1
        if len(entry.first) < _SHOWN:
            entry.first.append(place)


class Collision(NamedTuple):
    """A held-out and a training row that are near duplicates; both are indices."""

    held_out: int
    training: int
    similarity: float


def apply(
    steps: Sequence[Step], rows: Iterable[Placed], others: Mapping[str, Iterable[Row]] | None = None
) -> tuple[list[Placed], Account]:
    """The rows that every step keeps, in their order and with their places, and the account.

    Rows are normalised ones, as `_rows.examples` has them; they are not changed in place. `others` holds the rows of
    the data sets that `contamination` names. Raises StageError when one is not there.
    """
    account = Account()
    return list(kept(steps, rows, account, others)), account


def kept(
    steps: Sequence[Step], rows: Iterable[Placed], account: Account, others: Mapping[str, Iterable[Row]] | None = None
) -> Iterator[Placed]:
    """What `apply` gives, row by row; a step that compares rows waits for all. Counts into `account`."""
    through = _each(steps, rows, account)
    for step in steps:
        if compares(step):
            through = _together(step, through, account, others or {})
    for placed, is_changed in through:
        account.kept += 1
        account.changed += is_changed
        yield placed


def compares(step: Step) -> bool:
    """Does a step look at other rows than the one at hand?"""
    return step.step in ("exact_duplicates", "near_duplicates", "contamination")


def _each(steps: Sequence[Step], rows: Iterable[Placed], account: Account) -> Iterator[tuple[Placed, bool]]:
    """The rows after the steps on single rows, and whether each was changed."""
    counts = any(isinstance(step, PersonalData) and step.action == "count" for step in steps)
    for place, row in rows:
        account.read += 1
        cleaned, reason, found = _settled(row, steps) if steps else (row, "", Counter())
        if reason:
            account.drop(reason, place)
            continue
        if counts:
            from stages import _clean_text  # as in `_stepped`

            for text in texts(cleaned, system=True):
                _clean_text.masked(text, found)
        for kind, count in found.items():
            account.personal_data[kind] = account.personal_data.get(kind, 0) + count
        yield (place, cleaned), cleaned != row


def _together(
    step: Step, rows: Iterable[tuple[Placed, bool]], account: Account, others: Mapping[str, Iterable[Row]]
) -> Iterator[tuple[Placed, bool]]:
    """The rows that a step keeps which compares them with each other."""
    there = list(rows)
    drops = _compared([placed for placed, _ in there], step, others)
    for reason, place in drops.values():
        account.drop(reason, place)
    yield from (entry for number, entry in enumerate(there) if number not in drops)


def overlap(held_out: Sequence[Row], training: Sequence[Row], similarity: float = 0.8) -> list[Collision]:
    """Every pair of a held-out and a training row that say nearly the same, as `near_duplicates` compares them.

    Drop the training rows, `{pair.training for pair in …}`, or the held-out ones.
    """
    held, trained = ([_comparable(row) for row in rows] for rows in (held_out, training))
    return [Collision(*pair) for pair in _near_duplicates.collisions(held, trained, similarity)]


# Steps on one row


def _settled(row: Row, steps: Sequence[Step]) -> tuple[Row, str, Counter[str]]:
    """The row after all steps on single rows, why it is dropped (or nothing), and the personal data in it.

    Every edit makes the row shorter or replaces characters by ones that no step replaces, so this ends.
    """
    masked: Counter[str] = Counter()
    while True:
        before = row
        for step in steps:
            row, reason = _stepped(row, step, masked)
            if reason:
                return row, reason, masked
        if row == before:
            return row, "", masked


def _stepped(row: Row, step: Step, masked: Counter[str]) -> tuple[Row, str]:
    """The row after one step, and why it is dropped (or nothing); what compares rows does nothing here."""
    from stages import _clean_text  # its patterns take a while to compile, and every command imports this module

    reason = ""
    match step:
        case Plain(step=("whitespace" | "html" | "width") as name):
            row, reason = _edited(row, _clean_text.EDITS[name], name)
        case PersonalData(action="mask"):
            row, reason = _edited(row, lambda text: _clean_text.masked(text, masked), step.step)
        case Length():
            length = sum(map(len, texts(row)))
            if step.min is not None and length < step.min:
                reason = f"shorter than {step.min} characters"
            elif step.max is not None and length > step.max:
                reason = f"longer than {step.max} characters"
        case Language():
            reason = "" if _clean_text.is_in("\n".join(texts(row)), step.name, step.share) else f"not {step.name}"
        case RepeatedLines():
            worst = max(map(_clean_text.repeated, texts(row)), default=0)
            reason = f"more than {step.share:g} of a text in repeated lines" if worst > step.share else ""
    return row, reason


def texts(row: Row, system: bool = False) -> list[str]:
    """What the row says, text by text; system prompts too if asked for."""
    found: list[str] = []
    for name, value in row.items():
        if name in _NOT_SAID:
            continue
        if isinstance(value, str):
            found.append(value)
        else:
            found += [turn["content"] for turn in value if system or turn["role"] != "system"]
    return found


def _edited(row: Row, edit: Callable[[str], str], name: str) -> tuple[Row, str]:
    """The row with every text edited, and why it cannot stay (or nothing): `_rows` promises more than its shape.

    No text is empty, and no preference has two answers that are the same. An emptied system prompt is left out.
    """
    new: Row = {}
    for key, value in row.items():
        if key in _NOT_SAID:
            new[key] = value
            continue
        if isinstance(value, str):
            new[key] = _trimmed(value, edit)
            continue
        turns = [{**turn, "content": _trimmed(turn["content"], edit)} for turn in value]
        new[key] = [turn for turn in turns if turn["content"] or turn["role"] != "system"]
        if not new[key] or any(not turn["content"].strip() and "tool_calls" not in turn for turn in new[key]):
            return new, f"empty after `{name}`"
    if any(isinstance(value, str) and not value.strip() for value in new.values()):
        return new, f"empty after `{name}`"
    if "chosen" in new and new["chosen"] == new["rejected"]:
        return new, f"`chosen` and `rejected` the same after `{name}`"
    return new, ""


def _trimmed(text: str, edit: Callable[[str], str]) -> str:
    edited = edit(text)
    return text if edited == text else edited.strip()


# Steps that compare rows

_Drops = dict[int, tuple[str, str]]  # by the row's number: why it is dropped, and its place and what it is like


def _compared(rows: list[Placed], step: Step, others: Mapping[str, Iterable[Row]]) -> _Drops:
    """What one step drops; what looks at single rows does nothing here."""
    match step:
        case Plain(step="exact_duplicates"):
            return _exact(rows)
        case NearDuplicates():
            found = _near_duplicates.repeats([_comparable(row) for _, row in rows], step.similarity)
            return {
                number: ("near duplicate", f"{rows[number][0]}, {similarity:.2f} like {rows[other][0]}")
                for number, (other, similarity) in found.items()
            }
        case Contamination():
            return _contaminated(rows, step, others)
        case _:
            return {}


def _exact(rows: list[Placed]) -> _Drops:
    drops: _Drops = {}
    first: dict[bytes, str] = {}
    for number, (place, row) in enumerate(rows):
        key = _key(row)
        if key in first:
            drops[number] = ("exact duplicate", f"{place}, as {first[key]}")
        else:
            first[key] = place
    return drops


def _key(row: Row) -> bytes:
    """The whole row, who says what, but for width and the kind and number of blanks."""
    key = blake2b(digest_size=16)
    for name, value in row.items():
        if name in _NOT_SAID:
            key.update(f"{name} {json.dumps(value, sort_keys=True)}".encode())
            continue
        turns = [{"role": "", "content": value}] if isinstance(value, str) else value
        for turn in turns:
            plain = " ".join(unicodedata.normalize("NFKC", turn["content"]).split())
            key.update(f"{name} {turn['role']} {len(plain)} {plain}".encode("utf-8", "surrogatepass"))
    return key.digest()


def _comparable(row: Row) -> str:
    return "\n".join("".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts(row))


def _contaminated(rows: list[Placed], step: Contamination, others: Mapping[str, Iterable[Row]]) -> _Drops:
    drops: _Drops = {}
    here = [_letters(row) for _, row in rows]
    for name in step.against:
        if name not in others:
            there = errors.nearest(name, others) or "; there is no other"
            raise errors.StageError(f"`contamination` is against `{name}`, and no other data set is called that{there}")
        held_out = [text for row in others[name] if (text := _letters(row))]
        for number, common in _near_duplicates.common(here, held_out, step.ngram).items():
            drops.setdefault(number, (f"in `{name}`", f"{rows[number][0]}: {common}"))
    return dict(sorted(drops.items()))


def _letters(row: Row) -> str:
    """Letters and digits alone, as one text: an exam's question and right answer may be split in another way here."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", "".join(texts(row))).casefold())
