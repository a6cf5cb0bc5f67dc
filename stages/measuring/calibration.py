"""Rows to calibrate quantization with, and rows to measure it on."""

import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from stages.chat.rendering import render
from stages.data.mixture import Mixture
from stages.data.row import Row
from stages.data.source import Source, rows_of
from stages.model.folder import load_tokenizer
from stages.runtime.errors import StageError

MEASURED = 64  # rows for perplexity
LEAST = 8  # rows for perplexity, and for calibration, when the data is short

Ids = list[int]


class Calibration(BaseModel):
    """Which rows the rounding errors are measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Mixture
    """Names of declared data, of each as many rows; with weights, such as `{consult: 3, general: 1}`, these shares."""
    samples: int = Field(default=256, gt=0)
    max_length: int = Field(default=512, gt=1)
    """Longer rows are cut."""


def calibration_rows(wanted: Calibration, read: Callable[[Source], Source], folder: Path, seed: int) -> list[Ids]:
    """As many different rows as are wanted, each at most `max_length` token ids, in the seed's order.

    Every data set has its share of any first part of them; one that is too short is used up and the others fill in.
    """
    tokenizer = load_tokenizer([str(folder)])
    seen: set[tuple[int, ...]] = set()
    queues = []
    for number, source in enumerate(wanted.data.sources):
        rows = rows_of(read(source))
        random.Random(f"{seed}:{number}").shuffle(rows)
        queues.append(_different(rows, tokenizer, folder, wanted.max_length, seen))
    weights = [Fraction(weight) for weight in wanted.data.weights or [1] * len(queues)]
    taken = [0] * len(queues)
    found: list[Ids] = []
    left = set(range(len(queues)))
    while left and len(found) < MEASURED + wanted.samples:
        number = min(left, key=lambda one: ((taken[one] + 1) / weights[one], one))  # who is furthest behind
        row = next(queues[number], None)
        if row is None:
            left.remove(number)
        else:
            taken[number] += 1
            found.append(row)
    return found


def _different(
    rows: Sequence[Row], tokenizer: Any, folder: Path, length: int, seen: set[tuple[int, ...]]
) -> Iterator[Ids]:
    """Rows as token ids; none twice, and none of a single token."""
    for row in rows:
        ids = tokenizer(_text(row, tokenizer, folder), add_special_tokens="text" in row)["input_ids"][:length]
        if len(ids) > 1 and tuple(ids) not in seen:
            seen.add(tuple(ids))
            yield list(ids)


def _text(row: Row, tokenizer: Any, folder: Path) -> str:
    """A row as the model was trained on it; the template writes its own special tokens."""
    if "text" in row:
        return str(row["text"])
    if tokenizer.chat_template is None:
        raise StageError(
            f"the calibration data holds conversations, and `{folder}` has no chat template; calibrate with "
            "data of `format: text`, or set `template:` at the top"
        )
    said = row["messages"] if "messages" in row else row["prompt"] + row["chosen" if "chosen" in row else "completion"]
    return render(tokenizer, said, tools=row.get("tools"))


def split(rows: list[Ids], samples: int, seed: int) -> tuple[list[Ids], list[Ids]]:
    """Rows for perplexity and rows for calibration, none in both; every data set is in both as far as it goes.

    Raises:
        StageError: too few rows.
    """
    least = min(LEAST, samples)
    if len(rows) < least + LEAST:
        raise StageError(
            f"the calibration data has {len(rows)} different rows, and {least + LEAST} are the least: "
            f"{least} to calibrate with and {LEAST} to measure perplexity on; add data"
        )
    measured = set(random.Random(seed).sample(range(len(rows)), min(MEASURED, max(LEAST, len(rows) - samples))))
    calibration = [row for number, row in enumerate(rows) if number not in measured]
    return [rows[number] for number in sorted(measured)], calibration[:samples]
