"""A plan in, what its data comes to out: the account of a data set in each stage, and rows as the model sees them."""

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.plan.step import Plan, Step
from stages.chat import encoding
from stages.chat.encoder import Encoder
from stages.data import cleaning, drawing
from stages.data.row import Row
from stages.data.source import Source, kept_rows
from stages.runtime.errors import nearest
from stages.runtime.processes import parallel_map, usable_cores
from stages.training import preparation
from stages.training.sequences import lengths, sequences
from stages.training.settings import Training


@dataclass(frozen=True)
class Seen:
    """A data set as a stage reads it."""

    data: str
    stage: str
    account: cleaning.Account
    tokens: encoding.Tokens | None
    """None while the stage's tokenizer has not been made."""
    samples: list[list[tuple[str, bool]]]
    """The text of the first sequences in stretches, each with whether it is in the loss."""


def look(plan: Plan, name: str | None, rows: int) -> Iterator[Seen]:
    """Each data set, or the one named, in each training stage that reads it, with its first `rows` rows.

    Raises:
        ConfigError: there is no such data set, or no stage trains on it.
    """
    if name is not None and name not in plan.pipeline.data:
        raise ConfigError([f"there is no data `{name}`{nearest(name, plan.pipeline.data)}"])
    names = [name] if name is not None else list(plan.pipeline.data)
    pairs = [(data, step) for data in names for step in plan.steps if _reads(step, plan.pipeline.data[data])]
    if not pairs:
        raise ConfigError([f"no stage trains on `{name}`" if name else "no stage trains on data"])
    for data, step in pairs:
        training = step.entry.training
        assert training is not None  # `_reads` says so
        yield _seen(data, plan.pipeline.data[data], step, training, _with_tokenizer(plan, step), rows)


def _reads(step: Step, source: Source) -> bool:
    training = step.entry.training
    return training is not None and source in (*training.draw.sources, *training.draw.eval_data)


def _with_tokenizer(plan: Plan, step: Step) -> Path | None:
    """The nearest folder before a step that holds the tokenizer, which goes unchanged from stage to stage."""
    above = plan.steps[: plan.steps.index(step) + 1]
    folders = [Path(folder) for one in above for folder in one.inputs.model]
    return next((folder for folder in reversed(folders) if (folder / "tokenizer.json").is_file()), None)


def _seen(data: str, source: Source, step: Step, training: Training, folder: Path | None, rows: int) -> Seen:
    account = cleaning.Account()
    chunks = drawing.chunks(drawing.DrawnRow(0, *placed) for placed in kept_rows(source, account))
    if folder is None:
        deque(chunks, maxlen=0)
        return Seen(data, step.name, account, None, [])
    tokenizer = _tokenizer(step, folder)
    make = sequences(tokenizer, training.max_length, training.cut, 1)

    def count(chunk: drawing.Chunk) -> tuple[encoding.Tokens, list[int], list[Row]]:
        made, (tokens,) = make(chunk)
        first = [placed.row for _, placed, _ in chunk.trained()][:rows]
        return tokens, lengths(made) if made else [], first

    whole, sizes, first = encoding.Tokens(), array("L"), list[Row]()
    for tokens, more, begun in parallel_map(count, chunks, usable_cores(), preparation.FEW):
        whole.add(tokens)
        sizes.extend(more)
        first += begun[: rows - len(first)]
    whole.padding = encoding.padding(sizes, training.batch)
    shown = [encoding.pieces(tokenizer, one) for row in encoding.encode(Encoder(tokenizer), first) for one in row]
    return Seen(data, step.name, account, whole, shown)


def _tokenizer(step: Step, folder: Path) -> Any:
    from stages.chat.template import install_template
    from stages.model.folder import load_tokenizer

    tokenizer = load_tokenizer([str(folder)])
    install_template(tokenizer, step.entry.template)
    return tokenizer
