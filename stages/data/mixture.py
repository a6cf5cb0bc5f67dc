"""Data sets with or without weights, and the number of rows drawn from each."""

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
    """One weight per source; empty where none are written."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"sources": value} if isinstance(value, list) else value


def counts(available: Sequence[int], weights: Sequence[float], total: int | None) -> list[int]:
    """The number of rows drawn from each data set, by largest remainder, so that they sum up to `total` exactly.

    Without `total` it is the largest number for which no row is drawn twice: the data set with the fewest rows for its
    weight is used whole, and from the others come as many as their weights allow.
    """
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    if total is None:
        total = math.floor(min(rows * whole / weight for rows, weight in zip(available, exact, strict=True)))
    shares = [total * weight / whole for weight in exact]
    drawn = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: (drawn[index] - shares[index], index))
    for index in by_remainder[: total - sum(drawn)]:
        drawn[index] += 1
    return drawn


def draw(rows: Sequence[Item], count: int, seed: int | str) -> list[Item]:
    """`count` rows in their original order, sampled without replacement, pass by pass.

    Raises:
        ValueError: there are no rows to draw from.
    """
    if count and not rows:
        raise ValueError("there are no rows to draw from")
    passes, more = divmod(count, len(rows)) if rows else (0, 0)
    chosen = set(random.Random(seed).sample(range(len(rows)), more))
    return [row for index, row in enumerate(rows) for _ in range(passes + (index in chosen))]
