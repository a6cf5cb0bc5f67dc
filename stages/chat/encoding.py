"""Rows as the model sees them, and what they come to: tokens, the share of them in the loss, padding."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from stages.chat.labels import Encoded, encode_chats, token_ids
from stages.chat.rendering import render
from stages.data.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SHOWN = 3  # places named of dropped rows


def encode(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> list[list[Encoded]]:
    """Normalised rows of one shape as tokens: one sequence of a text or conversation, two of a pair (chosen,
    rejected)."""
    if not rows:
        return []
    if "text" in rows[0]:
        texts = token_ids(tokenizer, [row["text"] for row in rows], special=True)
        ended = [[*ids, tokenizer.eos_token_id] for ids in texts]
        return [[Encoded(ids, [(0, len(ids))])] for ids in ended]
    if "messages" in rows[0]:
        talks = [(row["messages"], row.get("tools")) for row in rows]
        return [[encoded] for encoded in encode_chats(tokenizer, talks)]
    answers = ("chosen", "rejected") if "chosen" in rows[0] else ("completion",)
    prompts = [render(tokenizer, row["prompt"], prompt=True, tools=row.get("tools")) for row in rows]
    starts = [len(ids) for ids in token_ids(tokenizer, prompts)]
    talks = [(row["prompt"] + row[answer], row.get("tools")) for row in rows for answer in answers]
    encoded = encode_chats(tokenizer, talks)
    each = len(answers)
    return [
        [_answered(one, start) for one in encoded[number * each : (number + 1) * each]]
        for number, start in enumerate(starts)
    ]


def _answered(whole: Encoded, start: int) -> Encoded:
    """A prompt of `start` tokens and its answer, all of which is in the loss up to its end of turn.

    Answers of earlier turns are given, and what a template writes after the end of turn is not the model's to say.
    """
    _, end = whole.trained[-1]
    return Encoded(whole.ids[:end], [(start, end)])


@dataclass
class Tokens:
    """What encoded rows come to at a stage's `max_length`."""

    rows: int = 0
    """Those that have a token in the loss, each as often as it is drawn."""
    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    """Tokens in the loss."""
    longest: int = 0
    """Tokens of the longest sequence, before anything is cut off."""
    truncated: int = 0
    untrained: int = 0
    """Rows without a token in the loss; they are dropped."""
    first: list[str] = field(default_factory=list)
    """Where the first of those are."""
    padding: float = 0.0
    """Share of pad tokens when sequences are batched in their order."""

    def count(self, row: Sequence[Encoded], max_length: int | None, *, cut: bool, place: str, copies: int) -> bool:
        """Count a row; False when it would train no token. `cut`: what is too long is cut into pieces, none lost; else
        it keeps its start."""
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
        """Add the figures of the rows that follow."""
        for name in ("rows", "sequences", "tokens", "trained", "truncated", "untrained"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.first = [*self.first, *other.first][:_SHOWN]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def padding(lengths: Sequence[int], batch: int) -> float:
    """The share of pad tokens when sequences of these lengths are batched in their order."""
    import numpy as np

    starts = np.arange(0, len(lengths), batch)
    if not len(starts):
        return 0.0
    longest, sizes = np.maximum.reduceat(lengths, starts), np.diff([*starts, len(lengths)])
    return 1 - sum(lengths) / int((longest * sizes).sum())


def pieces(tokenizer: "PreTrainedTokenizerBase", encoded: Encoded) -> list[tuple[str, bool]]:
    """The text of a sequence in stretches, each with whether it is in the loss."""
    ids, trained = encoded
    edges = [0, *(edge for stretch in trained for edge in stretch), len(ids)]
    stretches = [(ids[begin:end], bool(number % 2)) for number, (begin, end) in enumerate(pairwise(edges))]
    return [(str(tokenizer.decode(stretch)), in_loss) for stretch, in_loss in stretches if stretch]
