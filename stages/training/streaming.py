"""Rows of a stage tokenized while training reads them, and not kept: for data that does not fit on the disk twice.

The order depends on the seed alone, so a run that was stopped reads the rows before the stop again and then goes on.
"""

import random
from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any

from stages.chat import encoding
from stages.chat.encoder import Encoder
from stages.data import cleaning
from stages.data.drawing import Draw
from stages.data.row import PlacedRow
from stages.data.source import Reading, Source, rows_of
from stages.runtime.errors import StageError
from stages.runtime.interfaces import require
from stages.training import preparation
from stages.training.sequences import examples
from stages.training.settings import TrainingConfig

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase


BUFFER = 10_000  # sequences among which the next is drawn
_CHUNK = 256  # rows that are tokenized together
_CHECKED = 1_000  # rows after which too many bad ones stop the run


def check(config: TrainingConfig) -> list[tuple[str, str]]:
    """Settings that do not work with streaming."""
    problems: list[tuple[str, str]] = []
    if not int(config.trainer.get("max_steps") or 0) > 0:
        problems.append(("trainer.max_steps", "a stream has no known length; set `max_steps`"))
    if config.eval_size:
        text = "rows of a stream cannot be held out before they are read; name others with `eval_data`"
        problems.append(("eval_size", text))
    if config.rows:
        problems.append(("rows", "a stream has no number of rows; remove it, `max_steps` ends the stage"))
    for step in dict.fromkeys(
        step.step for source in config.data.sources for step in source.clean if cleaning.compares(step)
    ):
        text = f"`{step}` compares all rows, which a stream never has together; take it out of `clean`"
        problems.append(("streaming", text))
    if config.trainer.get("train_sampling_strategy", "random") != "random":
        problems.append(("trainer.train_sampling_strategy", "rows of a stream come in their own order; remove it"))
    return problems


def rows(
    draw: Draw, tokenizer: "PreTrainedTokenizerBase", args: Any, total: encoding.Tokens, cut: bool
) -> "IterableDataset":
    """The rows for an SFTTrainer with these arguments; `total` counts the rows that were read.

    Raises (while it is read):
        StageError: more rows are bad, or have nothing to train, than the data sets allow, or no row is left.
    """
    from datasets import IterableDataset, iterable_dataset
    from trl import pack_dataset

    require("datasets", iterable_dataset, "ExamplesIterable")

    held = [row for source in draw.eval_data for row in rows_of(source)]
    encoder = Encoder(tokenizer)
    limit = None if args.packing and args.packing_strategy == "wrapped" else args.max_length

    def generate() -> Iterator[dict[str, list[int]]]:
        placed = _mixed(draw) if draw.weights else chain.from_iterable(map(_read, draw.sources))
        read = similar = 0
        while chunk := list(islice(placed, max(_CHUNK, len(held)))):
            alike = {pair.training for pair in cleaning.overlap(held, [row for _, row in chunk])} if held else set()
            read, similar = read + len(chunk), similar + len(alike)
            chunk = [row for number, row in enumerate(chunk) if number not in alike]
            made = encoding.encode(encoder, [row for _, row in chunk])
            for (place, row), encoded in zip(chunk, made, strict=True):
                if total.count(encoded, limit, cut=cut, place=place, copies=1):
                    for example in examples(row, encoded, limit, cut):
                        yield {name: list(values) for name, values in example.items() if not isinstance(values, bool)}
            if read >= _CHECKED:
                _check(draw, total, read, similar, args.max_length)
        _check(draw, total, read, similar, args.max_length)

    # `IterableDataset.from_generator` would pickle the closure to name a cache, and a stream has no cache.
    stream = IterableDataset(iterable_dataset.ExamplesIterable(lambda: enumerate(generate()), {}))
    stream = stream.shuffle(seed=args.seed, buffer_size=BUFFER)
    return pack_dataset(stream, args.max_length, args.packing_strategy) if args.packing else stream


def _check(draw: Draw, total: encoding.Tokens, read: int, similar: int, max_length: int | None) -> None:
    """Check what became of the rows of one pass: `read` of them, of which `similar` are like held-out rows.

    Raises:
        StageError: none can be trained on, or more have nothing to train than the data sets allow.
    """
    if not (total.rows or total.refused):  # TRL would fail without a reason, or wait forever
        raise StageError(
            f"no row is left to train on: of the {read:,} rows that `clean` keeps, {similar:,} are near duplicates of "
            f"held-out rows, and {total.untrained:,} lose their answer at `max_length` {max_length}"
        )
    preparation.check_dropped(draw, total, max_length)


def _read(source: Source) -> Iterator[PlacedRow]:
    return Reading(source).kept(check_after=_CHECKED)


def _mixed(draw: Draw) -> Iterator[PlacedRow]:
    """Rows drawn by the weights, without end: a data set that is used up starts again."""
    chance = random.Random(draw.seed)
    streams = [chain.from_iterable(map(_some, repeat(source))) for source in draw.sources]
    while True:
        yield next(chance.choices(streams, draw.weights)[0])


def _some(source: Source) -> Iterator[PlacedRow]:
    """The rows of a data set, which would be read forever if there were none.

    Raises:
        StageError: `clean` keeps none.
    """
    rows = _read(source)
    first = next(rows, None)
    if first is None:
        raise StageError(f"`{source.path}` has no row left to draw; remove it from the mixture")
    yield first
    yield from rows
