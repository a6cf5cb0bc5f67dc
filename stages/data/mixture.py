"""Rows of several data sets in declared shares: how many of each, and which."""

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    pass


Row = TypeVar("Row")


def counts(available: Sequence[int], weights: Sequence[float], total: int | None) -> list[int]:
    """How many rows of each data set are drawn, by largest remainder, so that they sum up to `total` exactly.

    Without `total` it is the largest number for which no row is needed twice: the data set that is scarcest for its
    weight is used whole, and the others are cut down to their shares.
    """
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    if total is None:
        total = math.floor(min(rows * whole / weight for rows, weight in zip(available, exact, strict=True)))
    shares = [total * weight / whole for weight in exact]
    found = [math.floor(share) for share in shares]
    rest = sorted(range(len(shares)), key=lambda index: (found[index] - shares[index], index))
    for index in rest[: total - sum(found)]:
        found[index] += 1
    return found


def draw(rows: Sequence[Row], count: int, seed: int | str) -> list[Row]:
    """`count` rows in their old order; no row is drawn once more before every other has been drawn as often.

    Raises:
        ValueError: there are no rows to draw from.
    """
    if count and not rows:
        raise ValueError("there are no rows to draw from")
    passes, more = divmod(count, len(rows)) if rows else (0, 0)
    chosen = set(random.Random(seed).sample(range(len(rows)), more))
    return [row for index, row in enumerate(rows) for _ in range(passes + (index in chosen))]


def held_out(eval_size: float, rows: int) -> int:
    """How many of so many rows are held out."""
    return math.ceil(eval_size * rows) if eval_size < 1 else int(eval_size)


def too_many_held_out(eval_size: float, rows: int) -> str | None:
    """What is wrong with holding out so much of so many rows."""
    count = held_out(eval_size, rows)
    return None if count < rows else f"`eval_size` holds out {count} of {rows} rows; nothing is left to train on"
