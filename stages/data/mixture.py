"""Data sets with weights or without, and how many rows of each are drawn."""

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.data.source import Source

Item = TypeVar("Item")


class Mixture(BaseModel):
    """Data sets that one stage reads. YAML: a name, a list of names, or weights such as `{books: 1, general: 5}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: list[Source] = Field(min_length=1)
    weights: list[float] = []
    """As many as sources; empty when none were written."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"sources": value} if isinstance(value, list) else value


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


def draw(rows: Sequence[Item], count: int, seed: int | str) -> list[Item]:
    """`count` rows in their old order, sampled without replacement, pass by pass.

    Raises:
        ValueError: there are no rows to draw from.
    """
    if count and not rows:
        raise ValueError("there are no rows to draw from")
    passes, more = divmod(count, len(rows)) if rows else (0, 0)
    chosen = set(random.Random(seed).sample(range(len(rows)), more))
    return [row for index, row in enumerate(rows) for _ in range(passes + (index in chosen))]
