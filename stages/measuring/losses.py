"""Metrics of one model that are computed from losses: perplexity, answer match, and preference pairs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from stages.chat import encoding
from stages.chat.labels import IGNORED, encode_chat
from stages.chat.writing import Refused
from stages.data.row import Row
from stages.data.spool import Spooled
from stages.measuring.metrics import Measured, metric_names
from stages.model import inference
from stages.model.generation import Engine
from stages.runtime.errors import StageError

Ids = list[int]
Text = tuple[Ids, Ids]
"""Token ids and labels."""
PART = 256  # rows that are in memory at once
Margins = list[float | None]
"""log π of the chosen answer less that of the rejected one, by row; None where a row has none."""


@dataclass(frozen=True)
class Subject:
    """A loaded model that is measured."""

    name: str
    engine: Engine
    max_length: int
    """Tokens of a row, at most; longer rows are cut."""
    batch_tokens: int
    """Tokens in memory at once, padding included."""
    seed: int
    scratch: Path | None = None
    """The folder for temporary files: tokens of all rows are on the disk. None: that of the system."""

    @property
    def limit(self) -> int:
        """Tokens of a row that are measured: `max_length`, or the positions of the model if it has fewer."""
        return min(self.max_length, inference.positions(self.engine.model))

    def losses(self, texts: Sequence[Text]) -> list[float]:
        """The loss of each text: the sum over its labelled tokens, in nats."""
        return inference.losses(self.engine.model, texts, self.batch_tokens)

    def check_chat(self) -> None:
        """
        Raises:
            StageError: the model has no chat template.
        """
        if not self.engine.tokenizer.chat_template:
            raise StageError(f"`{self.name}` has no chat template; set `template:` at the top")


def perplexity(subject: Subject, rows: Sequence[Row]) -> dict[str, Measured]:
    """Metric → for each row its negative log-likelihood in nats, over its tokens in the loss or their UTF-8 bytes."""
    owners: list[int] = []
    size, total, count = [0] * len(rows), [0.0] * len(rows), [0] * len(rows)
    why = "no row has a token in the loss within `max_length`"
    with Spooled[Text](folder=subject.scratch) as texts:
        for index, row in enumerate(rows):
            try:
                pieces, size[index] = _text(subject, row["text"]) if "text" in row else _conversation(subject, row)
            except Refused as error:  # a bad row, which no model of this template could be trained on
                pieces, why = [], str(error)
            for ids, labels in pieces:
                texts.append((ids, labels))
                owners.append(index)
                count[index] += sum(label != IGNORED for label in labels[1:])
        for index, loss in zip(owners, subject.losses(texts), strict=True):
            total[index] += loss
    by_token = [(loss, float(tokens)) if tokens else None for loss, tokens in zip(total, count, strict=True)]
    by_byte = [
        (loss, float(size)) if size and tokens else None for loss, size, tokens in zip(total, size, count, strict=True)
    ]
    return {
        metric: Measured(values, None if any(values) else why)
        for metric, values in (("perplexity", by_token), ("bits_per_byte", by_byte))
    }


def _text(subject: Subject, text: str) -> tuple[list[Text], int]:
    """A text in pieces, and its bytes. Each piece is after the start-of-text token, so all its tokens are predicted."""
    tokenizer = subject.engine.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: Ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [ids[start : start + subject.limit - 1] for start in range(0, len(ids), subject.limit - 1)]
    return [([first, *piece], [IGNORED, *piece]) for piece in pieces], len(text.encode())


def _conversation(subject: Subject, row: Row) -> tuple[list[Text], int]:
    """A conversation with the labels of training, and the bytes of the text whose tokens are labels."""
    subject.check_chat()
    ids, labels = encode_chat(subject.engine.encoder, row["messages"], row.get("tools"))
    ids, labels = ids[: subject.limit], labels[: subject.limit]
    runs: list[Ids] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    words = subject.engine.tokenizer.batch_decode(runs, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [(ids, labels)], sum(len(text.encode()) for text in words)


def answer_match(subject: Subject, rows: Sequence[Row]) -> dict[str, Measured]:
    """Whether a row's last answer is likelier after its own question than after the next row's, and by how much.

    The tools that a row declares are part of its question. Both likelihoods are over the same tokens; a margin is in
    nats.
    """
    if len(rows) < 2:
        why = Measured(why="one row has no other question to compare with")
        return dict.fromkeys(metric_names("match"), why)
    own = (_answer_after(row, row) for row in rows)
    swapped = (_answer_after(row, row_after) for row, row_after in zip(rows, _from_second(rows), strict=True))
    counts = []
    with Spooled[Text](folder=subject.scratch) as texts:
        for both in zip(_completions(subject, own), _completions(subject, swapped), strict=True):
            sides = [side for (side,) in both]
            counts.append(min(sum(label != IGNORED for label in labels) for _, labels in sides))
            for side in sides:
                texts.append(_with_labels(*side, counts[-1]))  # a long question leaves less of the answer
        losses = subject.losses(texts)
    margins = [losses[2 * n + 1] - losses[2 * n] if count else None for n, count in enumerate(counts)]
    per_token = [None if sums is None else (sums, float(n)) for sums, n in zip(margins, counts, strict=True)]
    return {"answer_match": _shares(margins), "answer_margin": Measured(per_token)}


def _answer_after(row: Row, asked: Row) -> Row:
    """The last answer of a row after the question of another, and that one's tools."""
    tools = {"tools": asked["tools"]} if "tools" in asked else {}
    return {"prompt": asked["messages"][:-1], "completion": row["messages"][-1:], **tools}


def _from_second(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows from the second one on, and then the first one."""
    return (rows[(index + 1) % len(rows)] for index in range(len(rows)))


def _with_labels(ids: Ids, labels: Ids, count: int) -> Text:
    """The sequence up to its label number `count`."""
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    end = places[count - 1] + 1 if count else 1
    return ids[:end], labels[:end]


def preference(subject: Subject, rows: Sequence[Row], reference: Margins | None) -> tuple[dict[str, Measured], Margins]:
    """Accuracy and margins of preference pairs: log π(chosen | prompt) − log π(rejected | prompt), in nats.

    A reward margin is the difference to `reference`, the margins of the first model: DPO's implicit reward at β = 1
    (Rafailov et al., arXiv 2305.18290). `reference` is None for the first model itself.

    Returns:
        Metric → its values, and the margin of each row.
    """
    subject.check_chat()
    counts = []
    with Spooled[Text](folder=subject.scratch) as texts:
        for side in (side for pair in _completions(subject, rows) for side in pair):
            texts.append(side)
            counts.append(sum(label != IGNORED for label in side[1]))
        log_probs = [-loss for loss in subject.losses(texts)]
    whole: list[tuple[float, float] | None] = []
    means: list[tuple[float, float] | None] = []
    for place in range(0, len(counts), 2):
        both, tokens = (log_probs[place], log_probs[place + 1]), (counts[place], counts[place + 1])
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


def _completions(subject: Subject, rows: Iterable[Row]) -> Iterator[list[Text]]:
    """Of each row the sequences of its answers, one or two, each after the prompt; only an answer has labels.

    A bad row, which the template cannot be used for, has no labels.

    Raises:
        Refused: after the last row, the template cannot be used for any row.
    """
    left, refusal, some = iter(rows), None, False
    nothing = ([0], [IGNORED])
    while part := list(islice(left, PART)):
        for row, found in zip(part, encoding.encode(subject.engine.encoder, part), strict=True):
            if isinstance(found, Refused):
                refusal = refusal or found
                yield [nothing] * (2 if "chosen" in row else 1)
            else:
                some = True
                yield [(one.ids[: subject.limit], one.labels[: subject.limit]) for one in found]
    if refusal and not some:
        raise refusal
