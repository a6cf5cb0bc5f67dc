"""Rows as the model sees them, and their counts: tokens, tokens in the loss, padding."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from stages.chat.encoder import Encoder
from stages.chat.labels import Encoded, encode_chats
from stages.chat.writing import Refused
from stages.data.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHOWN = 3  # places of dropped rows that are named, and reasons


Sequences = list[Encoded] | Refused
"""The sequences of a row: two of a pair, one of any other; or why the template cannot be used for the row."""


def encode(encoder: Encoder, rows: Sequence[Row], *, whole: bool = False) -> list[Sequences]:
    """The sequences of each row; all rows are normalised and have the same columns.

    A pair has two sequences, chosen and rejected, each after the prompt; every other row has one. With `whole` those of
    a pair are conversations as a reward model reads them: to the last token that the template writes, at which the
    score is read, so that this token alone is in the loss.
    """
    if not rows:
        return []
    if "text" in rows[0]:
        texts = encoder.token_ids([row["text"] for row in rows], special=True)
        ended = [[*ids, encoder.tokenizer.eos_token_id] for ids in texts]
        return [[Encoded(ids, [(0, len(ids))])] for ids in ended]
    if "messages" in rows[0]:
        talks = [(row["messages"], row.get("tools")) for row in rows]
        return [found if isinstance(found, Refused) else [found] for found in encode_chats(encoder, talks)]
    answers = ("chosen", "rejected") if "chosen" in rows[0] else ("completion",)
    talks = [(row["prompt"] + row[answer], row.get("tools")) for row in rows for answer in answers]
    encoded, size = encode_chats(encoder, talks, last_only=True), len(answers)
    return [_of_answers(encoded[start : start + size], whole) for start in range(0, len(encoded), size)]


def _of_answers(found: Sequence[Encoded | Refused], whole: bool) -> Sequences:
    """The sequences of a row's answers. Text that a template writes after the end of an answer's turn is cut off."""
    made: list[Encoded] = []
    for one in found:
        if isinstance(one, Refused):
            return one
        ids, trained = one
        if not whole:
            ids = ids[: trained[-1][1]]
        made.append(Encoded(ids, [(len(ids) - 1, len(ids))] if whole else trained))
    return made


@dataclass
class Tokens:
    """Counts of encoded rows at a stage's `max_length`."""

    rows: int = 0
    """Rows that have a token in the loss; a row that is drawn twice counts twice."""
    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    """Tokens in the loss."""
    longest: int = 0
    """Tokens of the longest sequence before it is cut."""
    truncated: int = 0
    """Rows with a sequence that lost its end."""
    untrained: int = 0
    """Rows that are dropped: one of their sequences has no token in the loss."""
    first: list[str] = field(default_factory=list)
    """Places of the first rows that are dropped."""
    refused: int = 0
    """Rows that are dropped: the template cannot be used for them."""
    why: dict[str, list[str]] = field(default_factory=dict)
    """The first reasons for that, and for each of them the places of the first rows."""
    padding: float = 0.0
    """Share of pad tokens when sequences are batched in their order."""

    def count(
        self, row: Sequences, max_length: int | None, *, cut: bool, place: str, copies: int
    ) -> TypeGuard[list[Encoded]]:
        """Count the copies of a row; False if they are dropped: refused, or a sequence has no token in the loss.

        `cut`: a sequence longer than `max_length` is cut into pieces, and no token is lost; or else it keeps its start.
        """
        if isinstance(row, Refused):
            self.refused += copies
            self._add_why({str(row): [place]})
            return False
        lengths = [len(ids) for ids, _ in row]
        self.longest = max(self.longest, *lengths)
        room = self.longest if cut or max_length is None else max_length
        kept = [min(length, room) for length in lengths]
        trained = [sum(max(0, min(end, room) - begin) for begin, end in found) for _, found in row]
        if not all(trained):
            self.untrained += copies
            self.first += [place][: SHOWN - len(self.first)]
            return False
        self.rows += copies
        self.sequences += copies * sum(-(-length // (max_length or length)) for length in kept)
        self.tokens += copies * sum(kept)
        self.trained += copies * sum(trained)
        self.truncated += copies * (kept != lengths)
        return True

    def add(self, other: "Tokens") -> None:
        """Add the counts of the rows that follow."""
        for name in ("rows", "sequences", "tokens", "trained", "truncated", "untrained", "refused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.first = [*self.first, *other.first][:SHOWN]
        self._add_why(other.why)

    def _add_why(self, why: Mapping[str, list[str]]) -> None:
        for reason, places in why.items():
            if reason in self.why or len(self.why) < SHOWN:
                self.why[reason] = [*self.why.get(reason, []), *places][:SHOWN]

    def clear(self) -> None:
        """Count from 0 again."""
        vars(self).update(vars(Tokens()))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def refused_rows(count: int, rows: int, allowed: float, why: Mapping[str, Sequence[str]], *, data: str = "") -> str:
    """What becomes of rows that the template cannot be used for: of `rows`, a share `allowed` may be dropped.

    Args:
        why: reasons, and the places that each of them holds for.
        data: the name of the data set, or empty for all data of a stage.
    """
    text = f"the chat template cannot be used for {count:,} of {rows:,} rows" + (f" of data `{data}`" if data else "")
    found = reasons(why)
    if not too_many(count, rows, allowed):
        return f"{text}, which are dropped: {found}"
    way = "" if "`template:" in found else "; choose another `template:`"
    limit = f"which is more than `max_dropped` {allowed:g} of them" if count > allowed * rows else "so none is left"
    return f"{text}, {limit}: {found}{way}"


def too_many(count: int, rows: int, allowed: float) -> bool:
    """Whether so many of the rows may not be dropped: more than the share `allowed`, or all of them."""
    return count > allowed * rows or 0 < count == rows


def reasons(why: Mapping[str, Sequence[str]]) -> str:
    """Reasons and the places that each of them holds for, as one clause."""
    return "; ".join(f"{', '.join(places)}: {reason}" for reason, places in why.items())


def padding(lengths: Sequence[int], batch: int) -> float:
    """The share of pad tokens when sequences of these lengths are batched in their order, `batch` at a time."""
    import numpy as np

    starts = np.arange(0, len(lengths), batch)
    if not len(starts):
        return 0.0
    longest, sizes = np.maximum.reduceat(lengths, starts), np.diff([*starts, len(lengths)])
    return 1 - sum(lengths) / int((longest * sizes).sum())


def pieces(tokenizer: "PreTrainedTokenizerBase", encoded: Encoded) -> list[tuple[str, bool]]:
    """The text of a sequence in stretches; True: the stretch is in the loss."""
    ids, trained = encoded
    edges = [0, *(edge for stretch in trained for edge in stretch), len(ids)]
    stretches = [(ids[begin:end], bool(number % 2)) for number, (begin, end) in enumerate(pairwise(edges))]
    return [(str(tokenizer.decode(stretch)), in_loss) for stretch, in_loss in stretches if stretch]
