"""Rows as the model sees them, and their counts: tokens, tokens in the loss, padding."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from stages.chat.encoder import Encoder
from stages.chat.labels import Encoded, encode_chats
from stages.chat.rendering import render
from stages.data.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SHOWN = 3  # places of dropped rows that are named


def encode(encoder: Encoder, rows: Sequence[Row], *, whole: bool = False) -> list[list[Encoded]]:
    """The sequences of each row; all rows are normalised and have the same columns.

    A pair has two sequences, chosen and rejected, each after the prompt; every other row has one. With `whole` those of
    a pair are conversations as a reward model reads them: to the last token that the template writes, at which the
    score is read, so that this token alone is in the loss.

    Raises:
        StageError: as `encode_chats`.
    """
    if not rows:
        return []
    if "text" in rows[0]:
        texts = encoder.token_ids([row["text"] for row in rows], special=True)
        ended = [[*ids, encoder.tokenizer.eos_token_id] for ids in texts]
        return [[Encoded(ids, [(0, len(ids))])] for ids in ended]
    if "messages" in rows[0]:
        talks = [(row["messages"], row.get("tools")) for row in rows]
        return [[encoded] for encoded in encode_chats(encoder, talks)]
    answers = ("chosen", "rejected") if "chosen" in rows[0] else ("completion",)
    talks = [(row["prompt"] + row[answer], row.get("tools")) for row in rows for answer in answers]
    encoded, size = encode_chats(encoder, talks), len(answers)
    if whole:
        scored = [Encoded(ids, [(len(ids) - 1, len(ids))]) for ids, _ in encoded]
        return [scored[start : start + size] for start in range(0, len(scored), size)]
    prompts = [render(encoder.tokenizer, row["prompt"], prompt=True, tools=row.get("tools")) for row in rows]
    starts = [len(ids) for ids in encoder.token_ids(prompts)]
    return [
        [_answer_only(talk, start) for talk in encoded[number * size : (number + 1) * size]]
        for number, start in enumerate(starts)
    ]


def _answer_only(whole: Encoded, start: int) -> Encoded:
    """The conversation up to its last end of turn, in the loss from token `start` on, which is after the prompt.

    The prompt, with answers of earlier turns, is not in the loss; text that a template writes after the end of turn is
    cut off.
    """
    _, end = whole.trained[-1]
    return Encoded(whole.ids[:end], [(start, end)])


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
    padding: float = 0.0
    """Share of pad tokens when sequences are batched in their order."""

    def count(self, row: Sequence[Encoded], max_length: int | None, *, cut: bool, place: str, copies: int) -> bool:
        """Count the copies of a row; False if they are dropped, as a sequence has no token in the loss.

        `cut`: a sequence longer than `max_length` is cut into pieces, and no token is lost; or else it keeps its start.
        """
        lengths = [len(ids) for ids, _ in row]
        self.longest = max(self.longest, *lengths)
        room = self.longest if cut or max_length is None else max_length
        kept = [min(length, room) for length in lengths]
        trained = [sum(max(0, min(end, room) - begin) for begin, end in found) for _, found in row]
        if not all(trained):
            self.untrained += copies
            self.first += [place][: _SHOWN - len(self.first)]
            return False
        self.rows += copies
        self.sequences += copies * sum(-(-length // (max_length or length)) for length in kept)
        self.tokens += copies * sum(kept)
        self.trained += copies * sum(trained)
        self.truncated += copies * (kept != lengths)
        return True

    def add(self, other: "Tokens") -> None:
        """Add the counts of the rows that follow."""
        for name in ("rows", "sequences", "tokens", "trained", "truncated", "untrained"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.first = [*self.first, *other.first][:_SHOWN]

    def clear(self) -> None:
        """Count from 0 again."""
        vars(self).update(vars(Tokens()))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
