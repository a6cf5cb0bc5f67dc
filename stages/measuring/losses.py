"""Figures of one model that follow from losses: perplexity, answer match, and preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.chat import encoding
from stages.chat.labels import IGNORED, encode_chat
from stages.data.row import Row
from stages.measuring.metrics import MATCH_METRICS, Measured
from stages.model import inference
from stages.model.generation import Engine
from stages.runtime.errors import StageError

Ids = list[int]
Texts = list[tuple[Ids, Ids]]
"""Token ids and labels of each text."""
Margins = list[float | None]
"""log π of the chosen answer less that of the rejected one, by row; None where a row has none."""


@dataclass(frozen=True)
class Subject:
    """A loaded model that is measured."""

    name: str
    engine: Engine
    max_length: int
    """Tokens of a row, at most."""
    batch_tokens: int
    """Tokens in memory at once, padding included."""
    seed: int

    @property
    def limit(self) -> int:
        """Tokens of a row that are measured: `max_length`, or the positions of the model if it has fewer."""
        return min(self.max_length, inference.positions(self.engine.model))

    def losses(self, texts: Texts) -> list[float]:
        """The loss of each text: the sum over its labelled tokens, in nats."""
        return inference.losses(self.engine.model, texts, self.batch_tokens)

    def check_chat(self) -> None:
        """
        Raises:
            StageError: the model has no chat template.
        """
        if not self.engine.tokenizer.chat_template:
            raise StageError(f"`{self.name}` has no chat template; set `template:` at the top")


def perplexity(at: Subject, rows: Sequence[Row]) -> dict[str, Measured]:
    """Negative log-likelihood by row, over its tokens in the loss and over the UTF-8 bytes of their text."""
    texts: Texts = []
    owners: list[int] = []
    size = [0] * len(rows)
    for index, row in enumerate(rows):
        pieces, size[index] = _text(at, row["text"]) if "text" in row else _conversation(at, row)
        texts += pieces
        owners += [index] * len(pieces)
    total, count = [0.0] * len(rows), [0] * len(rows)
    for index, (_, labels), loss in zip(owners, texts, at.losses(texts), strict=True):
        total[index] += loss
        count[index] += sum(label != IGNORED for label in labels[1:])
    by_token = [(loss, float(tokens)) if tokens else None for loss, tokens in zip(total, count, strict=True)]
    by_byte = [
        (loss, float(size)) if size and tokens else None for loss, size, tokens in zip(total, size, count, strict=True)
    ]
    why = "no row has a token in the loss within `max_length`"
    return {
        metric: Measured(values, None if any(values) else why)
        for metric, values in (("perplexity", by_token), ("bits_per_byte", by_byte))
    }


def _text(at: Subject, text: str) -> tuple[Texts, int]:
    """A text in pieces, each after the token that starts a text, so that every token of it is predicted."""
    tokenizer = at.engine.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: Ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [ids[start : start + at.limit - 1] for start in range(0, len(ids), at.limit - 1)]
    return [([first, *piece], [IGNORED, *piece]) for piece in pieces], len(text.encode())


def _conversation(at: Subject, row: Row) -> tuple[Texts, int]:
    """A conversation with the labels that training has, and the bytes of the words among them."""
    at.check_chat()
    ids, labels = encode_chat(at.engine.encoder, row["messages"], row.get("tools"))
    ids, labels = ids[: at.limit], labels[: at.limit]
    runs: list[Ids] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    words = at.engine.tokenizer.batch_decode(runs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [(ids, labels)], sum(len(said.encode()) for said in words)


def answer_match(at: Subject, rows: Sequence[Row]) -> dict[str, Measured]:
    """Is a row's last answer likelier after its own question than after that of the next row, and by how much?"""
    if len(rows) < 2:
        why = Measured(why="one row has no other question to compare with")
        return dict.fromkeys(MATCH_METRICS, why)
    asked = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    swapped = [{**row, "prompt": asked[place - len(rows) + 1]["prompt"]} for place, row in enumerate(asked)]
    texts: Texts = []
    counts = []
    for (own,), (other,) in zip(_completions(at, asked), _completions(at, swapped), strict=True):
        both = [own, other]
        counts.append(min(sum(label != IGNORED for label in labels) for _, labels in both))
        texts += [_with_labels(*one, counts[-1]) for one in both]  # a long question leaves less of the answer
    losses = at.losses(texts)
    margins = [losses[2 * n + 1] - losses[2 * n] if count else None for n, count in enumerate(counts)]
    per_token = [None if one is None else (one, float(count)) for one, count in zip(margins, counts, strict=True)]
    return {"answer_match": _shares(margins), "answer_margin": Measured(per_token)}


def _with_labels(ids: Ids, labels: Ids, count: int) -> tuple[Ids, Ids]:
    """The row up to its label number `count`."""
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    end = places[count - 1] + 1 if count else 1
    return ids[:end], labels[:end]


def preference(at: Subject, rows: Sequence[Row], reference: Margins | None) -> tuple[dict[str, Measured], Margins]:
    """Accuracy and margins of pairs: log π of the chosen answer less that of the rejected one, in nats.

    Rewards are measured against `reference`, the margins of the first model; None for that model itself.

    Returns:
        The figures, and the margins of this model, one for each row.
    """
    at.check_chat()
    texts = [side for pair in _completions(at, rows) for side in pair]
    found = [-loss for loss in at.losses(texts)]
    counts = [sum(label != IGNORED for label in labels) for _, labels in texts]
    whole: list[tuple[float, float] | None] = []
    means: list[tuple[float, float] | None] = []
    for place in range(0, len(texts), 2):
        both, tokens = (found[place], found[place + 1]), (counts[place], counts[place + 1])
        whole.append(both if all(tokens) else None)
        means.append((both[0] / tokens[0], both[1] / tokens[1]) if all(tokens) else None)
    margins = [None if pair is None else pair[0] - pair[1] for pair in whole]
    base = reference if reference is not None else margins
    rewards = [None if own is None else own - (other or 0.0) for own, other in zip(margins, base, strict=True)]
    per_token = [None if pair is None else pair[0] - pair[1] for pair in means]
    values = {
        "preference_accuracy": _shares(margins),
        "preference_accuracy_per_token": _shares(per_token),
        "preference_margin": _values(margins),
        "preference_margin_per_token": _values(per_token),
        "reward_accuracy": _shares(rewards),
        "reward_margin": _values(rewards),
    }
    if reference is None:
        itself = Measured(why="it is the model that rewards are measured against")
        values |= {"reward_accuracy": itself, "reward_margin": itself}
    return values, margins


def _values(values: Sequence[float | None]) -> Measured:
    return Measured([None if value is None else (value, 1.0) for value in values])


def _shares(margins: Sequence[float | None]) -> Measured:
    return _values([margin if margin is None or margin != margin else float(margin > 0) for margin in margins])


def _completions(at: Subject, rows: Sequence[Row]) -> list[Texts]:
    """Prompt and answer of each row, or of both its answers, with labels for the answer and its end of turn alone."""
    return [
        [(one.ids[: at.limit], one.labels[: at.limit]) for one in row]
        for row in encoding.encode(at.engine.encoder, rows)
    ]
