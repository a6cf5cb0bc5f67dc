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
from stages.data.row import Placed, Row
from stages.runtime.errors import StageError, nearest

_SHOWN = 3  # places named for each reason
_NOT_SAID = ("tools", "label")  # what a row has besides texts and conversations


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
            from stages.data import cleaning_text  # as in `_stepped`

            for text in texts(cleaned, system=True):
                cleaning_text.masked(text, found)
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
    return [Collision(*pair) for pair in near_duplicates.collisions(held, trained, similarity)]


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
    from stages.data import cleaning_text  # its patterns take a while to compile, and every command imports this module

    reason = ""
    match step:
        case Plain(step=("whitespace" | "html" | "width") as name):
            row, reason = _edited(row, cleaning_text.EDITS[name], name)
        case PersonalData(action="mask"):
            row, reason = _edited(row, lambda text: cleaning_text.masked(text, masked), step.step)
        case Length():
            length = sum(map(len, texts(row)))
            if step.min is not None and length < step.min:
                reason = f"shorter than {step.min} characters"
            elif step.max is not None and length > step.max:
                reason = f"longer than {step.max} characters"
        case Language():
            reason = "" if cleaning_text.is_in("\n".join(texts(row)), step.name, step.share) else f"not {step.name}"
        case RepeatedLines():
            worst = max(map(cleaning_text.repeated, texts(row)), default=0)
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
            found = near_duplicates.repeats([_comparable(row) for _, row in rows], step.similarity)
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
            there = nearest(name, others) or "; there is no other"
            raise StageError(f"`contamination` is against `{name}`, and no other data set is called that{there}")
        held_out = [text for row in others[name] if (text := _letters(row))]
        for number, common in near_duplicates.common(here, held_out, step.ngram).items():
            drops.setdefault(number, (f"in `{name}`", f"{rows[number][0]}: {common}"))
    return dict(sorted(drops.items()))


def _letters(row: Row) -> str:
    """Letters and digits alone, as one text: an exam's question and right answer may be split in another way here."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", "".join(texts(row))).casefold())
