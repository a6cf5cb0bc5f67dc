"""A plan in, its data sets out as each training stage reads them: counts, and samples as the model sees them."""

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.plan.step import Plan, Step
from stages.chat import encoding
from stages.chat.encoder import Encoder
from stages.chat.labels import Encoded
from stages.chat.writing import Refused
from stages.data import cleaning, drawing
from stages.data.row import Row
from stages.data.source import Reading, Source
from stages.runtime.errors import nearest
from stages.runtime.processes import parallel_map, usable_cores
from stages.training import preparation
from stages.training.sequences import lengths, sequences
from stages.training.settings import Training


@dataclass(frozen=True)
class Sample:
    """A sequence as the model sees it."""

    parts: list[tuple[str, bool]]
    """Parts of its text; True: the part is in the loss."""
    rest: str = ""
    """What becomes of the tokens after `max_length`."""
    label: str = ""
    """`chosen` or `rejected` in a pair, `good` or `bad` of a labelled answer; empty for other rows."""


@dataclass(frozen=True)
class DataView:
    """A data set as a stage reads it."""

    data: str
    stage: str
    account: cleaning.Account
    tokens: encoding.Tokens | None
    """None while the model with the stage's tokenizer does not exist yet."""
    samples: list[Sample]
    """The first sequences."""
    warning: str | None = None
    """Many rows lose their end."""


def inspect_data(plan: Plan, name: str | None, rows: int) -> Iterator[DataView]:
    """Each data set, or only `name`, as each training stage reads it, with its first `rows` rows as samples.

    Raises:
        ConfigError: there is no data set `name`, or no stage trains on it.
    """
    if name is not None and name not in plan.pipeline.data:
        raise ConfigError([f"there is no data `{name}`{nearest(name, plan.pipeline.data)}"])
    names = [name] if name is not None else list(plan.pipeline.data)
    pairs = [(data, step) for data in names for step in plan.steps if _trains_on(step, plan.pipeline.data[data])]
    if not pairs:
        raise ConfigError([f"no stage trains on `{name}`" if name else "no stage trains on data"])
    for data, step in pairs:
        training = step.entry.training
        assert training is not None  # `_trains_on` has checked it
        yield _data_view(data, plan.pipeline.data[data], step, training, plan.tokenizer_folder(step), rows)


def _trains_on(step: Step, source: Source) -> bool:
    """Whether a stage trains on a data set, or holds it out."""
    training = step.entry.training
    return training is not None and source in (*training.draw.sources, *training.draw.eval_data)


def _data_view(data: str, source: Source, step: Step, training: Training, folder: Path | None, rows: int) -> DataView:
    reading = Reading(source)
    chunks = drawing.chunks(drawing.DrawnRow(0, *placed) for placed in reading.kept())
    if folder is None:
        deque(chunks, maxlen=0)  # reads every row, for the account
        return DataView(data, step.name, reading.account, None, [])
    tokenizer = _tokenizer(step, folder)
    encode = sequences(tokenizer, training.max_length, training.cut, 1, whole=training.whole)

    def count(chunk: drawing.Chunk) -> tuple[encoding.Tokens, list[int], list[Row]]:
        encoded, (tokens,) = encode(chunk)
        first = [placed.row for _, placed, _ in chunk.trained()][:rows]
        return tokens, lengths(encoded) if encoded else [], first

    total, sizes, first = encoding.Tokens(), array("L"), list[Row]()
    for tokens, chunk_sizes, chunk_rows in parallel_map(count, chunks, usable_cores(), preparation.FEW):
        total.add(tokens)
        sizes.extend(chunk_sizes)
        first += chunk_rows[: rows - len(first)]
    total.padding = encoding.padding(sizes, training.batch)
    encoded = encoding.encode(Encoder(tokenizer), first, whole=training.whole)
    samples = [
        replace(_sample(tokenizer, sequence, training), label=label)
        for row, sequences_of_row in zip(first, encoded, strict=True)
        if not isinstance(sequences_of_row, Refused)
        for label, sequence in zip(_labels(row), sequences_of_row, strict=True)
    ]
    warning = None
    if not training.cut:
        warning = preparation.many_cut(total.truncated, total.rows + total.untrained, training.max_length)
    return DataView(data, step.name, reading.account, total, samples, warning)


def _labels(row: Row) -> tuple[str, ...]:
    """What each sequence of a row is called: as `Sample.label`."""
    if "chosen" in row:
        return "chosen", "rejected"
    return ("good" if row["label"] else "bad",) if "label" in row else ("",)


def _sample(tokenizer: Any, sequence: Encoded, training: Training) -> Sample:
    """A sequence up to `max_length`."""
    limit = training.max_length or len(sequence.ids)
    more = len(sequence.ids) - limit
    if more <= 0:
        return Sample(encoding.pieces(tokenizer, sequence))
    trained = [(begin, min(end, limit)) for begin, end in sequence.trained if begin < limit]
    if training.whole:
        rest = "; the pair is dropped"
    else:
        rest = " go into further sequences" if training.cut else " are cut off"
    parts = encoding.pieces(tokenizer, Encoded(sequence.ids[:limit], trained))
    return Sample(parts, f"{more:,} more tokens than `max_length` {limit:,}{rest}")


def _tokenizer(step: Step, folder: Path) -> Any:
    from stages.chat.template import install_template
    from stages.model.folder import load_tokenizer

    tokenizer = load_tokenizer([str(folder)])
    install_template(tokenizer, step.entry.template)
    return tokenizer
