"""Cleaning: named steps and rows in, the rows that are kept and an account of all rows out.

The steps on single rows run first, in the order given, again and again until none changes the row. Then the steps that
compare rows run, in the order given. So text that one step uncovers is cleaned by the other steps too, and cleaning
clean rows changes nothing. Rows keep their order, and the first of several duplicates is kept.

The texts of a row are its text or the contents of its messages, without system prompts, which are often the same in
every row.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from stages.data import near_duplicates
from stages.data.cleaning_steps import (
    Contamination,
    Language,
    Length,
    NearDuplicates,
    PersonalData,
    Plain,
    RepeatedLines,
    Step,
)
from stages.data.row import Message, PlacedRow, Row, message_texts
from stages.runtime.errors import StageError, nearest

SHOWN = 3  # rows shown for each reason
_WITHOUT_TEXT = ("tools", "label")  # columns of a normalised row that are neither text nor messages


# The account


@dataclass
class Dropped:
    """The rows that were dropped for one reason."""

    rows: int = 0
    first: list[str] = field(default_factory=list)
    """The places of the first three rows, each with the row or text that it duplicates, where it does."""


@dataclass
class Account:
    """What became of the rows of a data set: the rows read are those kept and those dropped."""

    read: int = 0
    kept: int = 0
    changed: int = 0
    """Kept rows that cleaning changed."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """Reason → the rows that were dropped for it."""
    personal_data: dict[str, int] = field(default_factory=dict)
    """How many `email`, `id_card` and `mobile` were masked or counted, before rows were compared with each other."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of the files: which list holds the rows, and what nothing reads."""

    def drop(self, reason: str, place: str) -> None:
        """Count a dropped row."""
        entry = self.dropped.setdefault(reason, Dropped())
        entry.rows += 1
        if len(entry.first) < SHOWN:
            entry.first.append(place)


# Cleaning


class Cleaning:
    """The rows that every step keeps, in their order and with their places, and the account of all rows.

    Iterate once, then ask for `account`, which is complete after the last row. Rows are normalised rows and are not
    changed in place. One row is in memory at a time, unless a step compares rows: then all rows are.
    """

    def __init__(
        self, steps: Sequence[Step], rows: Iterable[PlacedRow], others: Mapping[str, Iterable[Row]] | None = None
    ) -> None:
        """`others`: name → rows of the data sets that `contamination` names."""
        self.steps, self.rows, self.others = steps, rows, others or {}
        self.account = Account()

    def __iter__(self) -> Iterator[PlacedRow]:
        """The kept rows. Raises StageError when `contamination` names a data set that is not among `others`."""
        cleaned = self._cleaned()
        for step in self.steps:
            if compares(step):
                cleaned = self._compared(step, cleaned)
        for placed, is_changed in cleaned:
            self.account.kept += 1
            self.account.changed += is_changed
            yield placed

    def _cleaned(self) -> Iterator[tuple[PlacedRow, bool]]:
        """The rows after the steps on single rows, and whether these changed the row."""
        counts = any(isinstance(step, PersonalData) and step.action == "count" for step in self.steps)
        for place, row in self.rows:
            self.account.read += 1
            cleaned, reason, personal_data = _cleaned_row(row, self.steps) if self.steps else (row, "", Counter[str]())
            if reason:
                self.account.drop(reason, place)
                continue
            if counts:
                personal_data += _personal_data(cleaned)
            for name, count in personal_data.items():
                self.account.personal_data[name] = self.account.personal_data.get(name, 0) + count
            yield (place, cleaned), cleaned != row

    def _compared(self, step: Step, rows: Iterable[tuple[PlacedRow, bool]]) -> Iterator[tuple[PlacedRow, bool]]:
        """The rows that are left after a step that compares rows."""
        entries = list(rows)
        drops = _drops([placed for placed, _ in entries], step, self.others)
        for reason, place in drops.values():
            self.account.drop(reason, place)
        yield from (entry for number, entry in enumerate(entries) if number not in drops)


def compares(step: Step) -> bool:
    """Whether a step compares rows with each other or with another data set."""
    return step.step in ("exact_duplicates", "near_duplicates", "contamination")


class Collision(NamedTuple):
    """A held-out row and a training row that are near duplicates."""

    held_out: int
    """Index among the held-out rows."""
    training: int
    """Index among the training rows."""
    similarity: float


def overlap(held_out: Sequence[Row], training: Sequence[Row], similarity: float = 0.8) -> list[Collision]:
    """Every pair of a held-out and a training row that are near duplicates, as the step `near_duplicates` compares."""
    held, trained = ([_comparable(row) for row in rows] for rows in (held_out, training))
    return [Collision(*pair) for pair in near_duplicates.collisions(held, trained, similarity)]


# Steps on one row


def _cleaned_row(row: Row, steps: Sequence[Step]) -> tuple[Row, str, Counter[str]]:
    """The row after all steps on single rows, the reason to drop it (or ""), and the counts of masked personal data.

    Every edit shortens the row or replaces characters by characters that no step replaces, so this ends.
    """
    from stages.data import cleaning_text  # its patterns take long to compile, and every command imports this module

    masker = cleaning_text.Masker()
    while True:
        before = row
        for step in steps:
            row, reason = _after_step(row, step, masker)
            if reason:
                return row, reason, masker.counts
        if row == before:
            return row, "", masker.counts


def _personal_data(row: Row) -> Counter[str]:
    """The counts of the personal data in a row."""
    from stages.data import cleaning_text  # as in `_cleaned_row`

    masker = cleaning_text.Masker()
    for text in texts(row, system=True):
        masker(text)
    return masker.counts


def _after_step(row: Row, step: Step, mask: Callable[[str], str]) -> tuple[Row, str]:
    """The row after one step, and the reason to drop it (or ""). Steps that compare rows do nothing here."""
    from stages.data import cleaning_text  # as in `_cleaned_row`

    reason = ""
    match step:
        case Plain(step=("whitespace" | "html" | "width") as name):
            row, reason = _edited(row, cleaning_text.EDITS[name], name)
        case PersonalData(action="mask"):
            row, reason = _edited(row, mask, step.step)
        case Length():
            length = sum(map(len, texts(row)))
            if step.min is not None and length < step.min:
                reason = f"shorter than {step.min} characters"
            elif step.max is not None and length > step.max:
                reason = f"longer than {step.max} characters"
        case Language():
            reason = "" if cleaning_text.is_in("\n".join(texts(row)), step.name, step.share) else f"not {step.name}"
        case RepeatedLines():
            worst = max(map(cleaning_text.repeated_share, texts(row)), default=0)
            reason = f"more than {step.share:g} of a text in repeated lines" if worst > step.share else ""
    return row, reason


def texts(row: Row, system: bool = False) -> list[str]:
    """The texts of a row, in order; with `system` its system prompts too."""
    contents: list[str] = []
    for name, value in row.items():
        if name in _WITHOUT_TEXT:
            continue
        if isinstance(value, str):
            contents.append(value)
        else:
            messages = (message for message in value if system or message["role"] != "system")
            contents += [text for message in messages for text in message_texts(message)]
    return contents


def _edited(row: Row, edit: Callable[[str], str], name: str) -> tuple[Row, str]:
    """The row with every text edited, and the reason to drop it (or "").

    A row stays normalised: it is dropped when a text becomes empty or the two answers of a pair become the same. A
    system prompt that becomes empty is removed.
    """
    new: Row = {}
    for key, value in row.items():
        if key in _WITHOUT_TEXT:
            new[key] = value
            continue
        if isinstance(value, str):
            new[key] = _trimmed(value, edit)
            continue
        messages = [{**message, **_edited_texts(message, edit)} for message in value]
        new[key] = [message for message in messages if message["content"] or message["role"] != "system"]
        if not new[key] or any(not message["content"].strip() and "tool_calls" not in message for message in new[key]):
            return new, f"empty after `{name}`"
    if any(isinstance(value, str) and not value.strip() for value in new.values()):
        return new, f"empty after `{name}`"
    if "chosen" in new and new["chosen"] == new["rejected"]:
        return new, f"`chosen` and `rejected` the same after `{name}`"
    return new, ""


def _edited_texts(message: Message, edit: Callable[[str], str]) -> dict[str, str]:
    """The content of a message, and its thought if it has one, both edited."""
    keys = [key for key in ("content", "reasoning_content") if key in message]
    return {key: _trimmed(message[key], edit) for key in keys}


def _trimmed(text: str, edit: Callable[[str], str]) -> str:
    """The edited text without blanks around it; a text that the edit does not change keeps them."""
    edited = edit(text)
    return text if edited == text else edited.strip()


# Steps that compare rows

_Drops = dict[int, tuple[str, str]]  # index of a row → the reason to drop it, and its place with what it duplicates


def _drops(rows: list[PlacedRow], step: Step, others: Mapping[str, Iterable[Row]]) -> _Drops:
    """The rows that a step drops because it compares rows; a step on single rows drops none here."""
    match step:
        case Plain(step="exact_duplicates"):
            return _exact(rows)
        case NearDuplicates():
            repeats = near_duplicates.repeats([_comparable(row) for _, row in rows], step.similarity)
            return {
                number: ("near duplicate", f"{rows[number][0]}, {similarity:.2f} like {rows[other][0]}")
                for number, (other, similarity) in repeats.items()
            }
        case Contamination():
            return _contaminated(rows, step, others)
        case _:
            return {}


def _exact(rows: list[PlacedRow]) -> _Drops:
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
    """A digest of the whole row, roles included, that does not depend on width and on the kind and number of blanks."""
    key = blake2b(digest_size=16)
    for name, value in row.items():
        if name in _WITHOUT_TEXT:
            key.update(f"{name} {json.dumps(value, sort_keys=True)}".encode())
            continue
        messages = [{"role": "", "content": value}] if isinstance(value, str) else value
        for message in messages:
            for text in message_texts(message):
                plain = " ".join(unicodedata.normalize("NFKC", text).split())
                key.update(f"{name} {message['role']} {len(plain)} {plain}".encode("utf-8", "surrogatepass"))
            if rest := {part: message[part] for part in ("tool_calls", "weight") if part in message}:
                key.update(json.dumps(rest, sort_keys=True).encode())
    return key.digest()


def _comparable(row: Row) -> str:
    """The texts of a row as near duplicates are compared: NFKC, lower case, without blanks."""
    return "\n".join("".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts(row))


def _contaminated(rows: list[PlacedRow], step: Contamination, others: Mapping[str, Iterable[Row]]) -> _Drops:
    drops: _Drops = {}
    letters = [_letters(row) for _, row in rows]
    for name in step.against:
        if name not in others:
            hint = nearest(name, others) or "; there is no other"
            raise StageError(f"`contamination` is against `{name}`, and no other data set is called that{hint}")
        held_out = [text for row in others[name] if (text := _letters(row))]
        for number, common in near_duplicates.common(letters, held_out, step.ngram).items():
            drops.setdefault(number, (f"in `{name}`", f"{rows[number][0]}: {common}"))
    return dict(sorted(drops.items()))


def _letters(row: Row) -> str:
    """The letters and digits of a row as one text: an exam may split question and answer in another way."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", "".join(texts(row))).casefold())
