"""Rows that lose their end at `max_length`: what a plan finds in the first rows of each data set."""

import math
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from pipeline.plan.datasets import DataSets
from stages.chat.trial import Trial
from stages.data.row import Messages, Row
from stages.data.source import Reading, Source
from stages.model.facts import Facts
from stages.training.preparation import MANY_CUT
from stages.training.settings import Training

SAMPLE = 200
"""Rows of a data set that are looked at."""
TEXT = 20_000
"""Characters of a row that are tokenized; a token rarely has more than a few."""
BYTES = 3
"""Bytes of UTF-8 that are taken for a token of a tokenizer that does not exist yet."""


def cut_rows(
    training: Training, template: str | None, facts: Facts, folder: Path | None, data: DataSets
) -> Iterator[str]:
    """A sentence for each data set of which more than 5 % of the first rows are longer than `max_length`.

    Nothing is known without a tokenizer or a template, or of rows that a stage
    leaves.
    """
    file = (folder / "tokenizer.json").resolve() if folder is not None else None
    if training.max_length is None or training.cut or template is None or file is None or not file.is_file():
        return
    if _tokenizer(file) is None:
        return
    trial = Trial(template, facts.tokenizer, facts.has_token)
    for source in training.draw.sources:
        sizes = [max(size) for row in _first(source) if (size := row_tokens(trial, file, row)) is not None]
        longer = sum(size > training.max_length for size in sizes)
        if sizes and longer > MANY_CUT * len(sizes):
            what = (
                "are dropped" if training.whole else "lose their end, so the model would not learn to stop after them"
            )
            yield (
                f"{longer} of the first {len(sizes)} rows of `{data.names(source)[0]}` are longer than `max_length` "
                f"{training.max_length} and {what}; raise `max_length`"
            )


def _first(source: Source) -> list[Row]:
    reading = Reading(source)
    return [row for _, row in islice(reading.rows(), SAMPLE)] if Path(source.path).exists() else []


def row_tokens(trial: Trial | None, file: Path | None, row: Row) -> list[int] | None:
    """The tokens of the sequences of a row: of a pair one for each answer; None for a row that cannot be written.

    Without a `file` of a tokenizer, a token is taken for `BYTES` bytes. Of a text that is longer than `TEXT` characters
    the start is tokenized.
    """
    try:
        texts = [row["text"]] if "text" in row else _written(trial, row)
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError):
        return None  # `plan` reports such rows elsewhere
    if not texts:
        return None
    if file is None or _tokenizer(file) is None:
        return [1 + len(text.encode("utf-8", "surrogatepass")) // BYTES for text in texts]
    encodings = _tokenizer(file).encode_batch([text[:TEXT] for text in texts], add_special_tokens=False)
    sizes = [len(ids) * max(1, len(text) / TEXT) for ids, text in zip(encodings, texts, strict=True)]
    return [math.ceil(size) + ("text" in row) for size in sizes]  # a text ends with the end of sequence


def _written(trial: Trial | None, row: Row) -> list[str]:
    """The conversations of a row as the template writes them; none without a template."""
    return [trial.render(messages, row.get("tools")) for messages in _conversations(row)] if trial is not None else []


def _conversations(row: Row) -> list[Messages]:
    if "messages" in row:
        return [row["messages"]]
    answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    return [[*row.get("prompt", []), *answer] for answer in answers]


@cache
def _tokenizer(file: Path) -> Any:
    """The tokenizer in a file; None if it cannot be read, which the stage that loads it reports."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # the library raises nothing narrower
        return None
