"""Rows to calibrate quantization with, and rows to measure its perplexity on."""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stages.chat.rendering import render
from stages.chat.writing import Refused
from stages.data.mixture import Mixture
from stages.data.row import Row
from stages.data.source import Reading, Source
from stages.data.spool import Spooled
from stages.model.folder import load_tokenizer
from stages.runtime.errors import StageError

MEASURED = 64  # rows for perplexity
LEAST = 8  # rows for perplexity, and for calibration, if the data is short

Ids = list[int]


class Calibration(BaseModel):
    """The rows on which GPTQ keeps the errors of rounding small."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Mixture
    """Names of declared data, an equal share of each; or shares such as `{consult: 3, general: 1}`."""
    samples: int = Field(default=256, gt=0)
    max_length: int = Field(default=512, gt=1)
    """Tokens of a row; longer rows are cut."""


def calibration_rows(
    wanted: Calibration, read: Callable[[Source], Source], folder: Path, seed: int, scratch: Path | None = None
) -> list[Ids]:
    """Different rows as token ids, each cut to `max_length`: `samples` to calibrate with and `MEASURED` to measure on.

    They are drawn with `seed`, in such an order that every first part holds the share of each data set. A data set that
    is too short is used up, and the others fill in; fewer rows are returned if all are used up. Rows are kept on the
    disk, in `scratch`, until they are drawn.
    """
    tokenizer = load_tokenizer([str(folder)])
    seen: set[tuple[int, ...]] = set()
    queues = []
    with ExitStack() as stack:
        for number, source in enumerate(wanted.data.sources):
            rows = stack.enter_context(Spooled((row for _, row in Reading(read(source)).kept()), scratch))
            shuffled = _shuffled(rows, f"{seed}:{number}")
            queues.append(_different(shuffled, tokenizer, folder, wanted.max_length, seen))
        return _drawn(wanted, queues)


def _shuffled(rows: Spooled[Row], seed: str) -> Iterator[Row]:
    order = array("L", range(len(rows)))
    random.Random(seed).shuffle(order)
    return (rows[index] for index in order)


def _drawn(wanted: Calibration, queues: Sequence[Iterator[Ids]]) -> list[Ids]:
    """Rows from the queues by their weights, as many as are wanted, or all."""
    weights = [Fraction(weight) for weight in wanted.data.weights or [1] * len(queues)]
    taken = [0] * len(queues)
    found: list[Ids] = []
    left = set(range(len(queues)))
    while left and len(found) < MEASURED + wanted.samples:
        number = min(left, key=lambda queue: ((taken[queue] + 1) / weights[queue], queue))  # the furthest behind
        row = next(queues[number], None)
        if row is None:
            left.remove(number)
        else:
            taken[number] += 1
            found.append(row)
    return found


def _different(
    rows: Iterable[Row], tokenizer: Any, folder: Path, length: int, seen: set[tuple[int, ...]]
) -> Iterator[Ids]:
    """Rows as token ids, without repeated rows, rows of a single token, and rows that the template cannot render."""
    for row in rows:
        try:
            text = _text(row, tokenizer, folder)
        except Refused:  # a bad row, which the plan has counted
            continue
        ids = tokenizer(text, add_special_tokens="text" in row)["input_ids"][:length]
        if len(ids) > 1 and tuple(ids) not in seen:
            seen.add(tuple(ids))
            yield list(ids)


def _text(row: Row, tokenizer: Any, folder: Path) -> str:
    """The text of a row as the model was trained on it; a chat template writes the special tokens itself."""
    if "text" in row:
        return str(row["text"])
    if tokenizer.chat_template is None:
        raise StageError(
            f"the calibration data holds conversations, and `{folder}` has no chat template; calibrate with "
            "data of `format: text`, or set `template:` at the top"
        )
    if "messages" in row:
        messages = row["messages"]
    else:
        messages = row["prompt"] + row["chosen" if "chosen" in row else "completion"]
    return render(tokenizer, messages, tools=row.get("tools"))


def too_few(rows: int, samples: int) -> str | None:
    """The problem with so many different rows, of which `samples` are to calibrate with; None for enough rows."""
    least = min(LEAST, samples)
    if rows >= least + LEAST:
        return None
    needed = f"at least {least + LEAST} are needed: {least} to calibrate with and {LEAST} to measure perplexity on"
    return f"the calibration data has {rows} different rows, and {needed}; add data"


def split(rows: list[Ids], samples: int, seed: int) -> tuple[list[Ids], list[Ids]]:
    """Rows to measure perplexity on, drawn with `seed`, and `samples` rows to calibrate with; no row is in both.

    Raises:
        StageError: there are too few rows.
    """
    if (text := too_few(len(rows), samples)) is not None:
        raise StageError(text)
    measured = set(random.Random(seed).sample(range(len(rows)), min(MEASURED, max(LEAST, len(rows) - samples))))
    calibration = [row for number, row in enumerate(rows) if number not in measured]
    return [rows[number] for number in sorted(measured)], calibration[:samples]
