"""The methods of `select`: rows and their scores in, the rows to keep and why the others are dropped out.

Formulas and sources are in docs/select.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from stages.data.row import Row
from stages.measuring import points as geometry
from stages.measuring import scores as scoring
from stages.measuring.scores import answer_losses, embeddings, own_answers, rewards, with_answer
from stages.model.inputs import Inputs

VARIANCE = 0.95  # of the embeddings, which the principal components of `car` keep


class Settings(scoring.Settings, Protocol):
    """The settings of a stage that are read here."""

    @property
    def method(self) -> str: ...
    @property
    def keep(self) -> float | None: ...
    @property
    def above(self) -> float | None: ...
    @property
    def below(self) -> float | None: ...
    @property
    def per_cluster(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass
class Choice:
    """What a method chose: the scores of all rows, and which rows are dropped."""

    count: int
    """The number of rows."""
    measure: str | None = None
    """The name of the score that rows are ranked by; None if they are not."""
    scores: dict[str, list[Any]] = field(default_factory=dict)
    """Name of a score → its value for each row."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures of the method itself, for the record."""
    reasons: list[str | None] = field(init=False)
    """Why each row is dropped; None for a row that is kept."""

    def __post_init__(self) -> None:
        self.reasons = [None] * self.count

    def drop(self, indices: Sequence[int], reason: str) -> None:
        """Drop rows for one reason."""
        for index in indices:
            self.reasons[index] = reason

    def remaining(self) -> list[int]:
        """The indices of the rows that are not dropped."""
        return [index for index, reason in enumerate(self.reasons) if reason is None]

    def drop_for(self, reasons: Mapping[int, str]) -> None:
        """Drop rows, each for its own reason."""
        for index, reason in reasons.items():
            self.reasons[index] = reason

    def drop_unscored(self) -> None:
        """Drop the rows whose `measure` is NaN or infinite."""
        scores = self.scores[self.measure or ""]
        self.drop([index for index in self.remaining() if not math.isfinite(scores[index])], "without a score")

    def keep_highest(self, scores: Sequence[float], keep: float | None) -> None:
        """Of the remaining rows, drop all but those with the highest scores; None drops nothing."""
        if keep is not None:
            remaining = self.remaining()
            kept = set(highest(scores, remaining, rows_to_keep(keep, len(remaining))))
            self.drop([index for index in remaining if index not in kept], "not among the best")


def rows_to_keep(keep: float, rows: int) -> int:
    """How many of so many rows `keep` means: a share below 1 is rounded down, and at least one row is kept."""
    return min(rows, max(1, math.floor(Fraction(str(keep)) * rows)) if keep < 1 else int(keep))


def highest(scores: Sequence[float], indices: Sequence[int], count: int) -> list[int]:
    """The `count` of these indices with the highest scores; of equal scores the first index."""
    return sorted(indices, key=lambda index: (-scores[index], index))[:count]


def choose(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """Score the rows and choose by `config.method`; progress is reported in `out`."""
    return _METHODS[config.method](config, inputs, rows, out)


def _ifd(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """Rows with an IFD of at most 1, and of them those with the highest; above 1 the question does not help."""
    choice = Choice(len(rows), "ifd")
    given, alone, unscored = answer_losses(config, inputs, rows, out)
    choice.scores = {"ifd": ifd(given, alone), "loss_given_question": given, "loss_alone": alone}
    scores = choice.scores["ifd"]
    choice.drop_for(unscored)
    choice.drop_unscored()
    choice.drop([index for index in choice.remaining() if scores[index] > 1], "with an IFD above 1")
    choice.keep_highest(scores, config.keep)
    return choice


def ifd(given: Sequence[float | None], alone: Sequence[float | None]) -> list[float]:
    """IFD(Q, A) = mean CE(A | Q) / mean CE(A) of each row (Li et al., arXiv 2308.12032); NaN if it is not defined."""
    pairs = zip(given, alone, strict=True)
    return [loss / base if loss is not None and base else math.nan for loss, base in pairs]


def _quality(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """Rows with a reward above `above`, and of them those with the highest (MoDS, arXiv 2311.15653, step 1)."""
    choice = Choice(len(rows), "quality")
    scores, choice.metrics["cut"] = rewards(config, inputs, rows, out)
    choice.scores = {"quality": scores}
    choice.drop_unscored()
    if config.above is not None:
        low = [index for index in choice.remaining() if not scores[index] > config.above]
        choice.drop(low, f"with a score of {config.above:g} or less")
    choice.keep_highest(scores, config.keep)
    return choice


def _necessity(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """Rows whose question the model answers with a reward below `below`, and of them the lowest (MoDS, step 3)."""
    choice = Choice(len(rows), "necessity")
    answers, unscored = own_answers(config, inputs, rows, out)
    answered = [index for index, answer in enumerate(answers) if answer is not None]
    own = (with_answer(rows[index], answers[index] or "") for index in answered)
    found, choice.metrics["cut"] = rewards(config, inputs, own, out)
    scores = [math.nan] * len(rows)
    for index, score in zip(answered, found, strict=True):
        scores[index] = score
    choice.scores = {"necessity": scores, "answer": answers}
    choice.drop_for(unscored)
    choice.drop_unscored()
    if config.below is not None:
        good = [index for index in choice.remaining() if not scores[index] < config.below]
        choice.drop(good, f"answered with a score of {config.below:g} or more")
    choice.keep_highest([-score for score in scores], config.keep)
    return choice


def _k_center(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """Rows whose questions cover all questions: each next row is the farthest from those chosen (MoDS, step 2)."""
    choice = Choice(len(rows))
    points, choice.metrics["cut"] = embeddings(config, inputs, rows, out, answer=False)
    wanted = rows_to_keep(config.keep or 1, len(rows))
    chosen, distances = geometry.k_center(points, wanted, config.seed)
    order = {index: (place, distance) for place, (index, distance) in enumerate(zip(chosen, distances, strict=True), 1)}
    choice.scores = {
        "place": [order[index][0] if index in order else None for index in range(len(rows))],
        "distance": [order[index][1] if index in order else None for index in range(len(rows))],
    }
    reason = "covered by the rows chosen" if len(chosen) == wanted else "at the same point as a row chosen"
    choice.drop([index for index in range(len(rows)) if index not in order], reason)
    choice.metrics["radius"] = geometry.radius(points, chosen)
    return choice


def _car(config: Settings, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """The `keep` rows with the highest rewards, and the `per_cluster` highest of each of ⌊√(n/2)⌋ clusters.

    Ge et al., arXiv 2402.18191.
    """
    choice = Choice(len(rows), "quality")
    scores, choice.metrics["cut"] = rewards(config, inputs, rows, out)
    points, _ = embeddings(config, inputs, rows, out, answer=True)
    reduced = geometry.principal(points, VARIANCE)
    clusters = geometry.k_means(reduced, max(1, math.isqrt(len(rows) // 2)), config.seed)
    choice.scores = {"quality": scores, "cluster": clusters}
    choice.metrics |= {"dimensions": reduced.shape[1], "clusters": len(set(clusters))}
    choice.drop_unscored()
    remaining = choice.remaining()
    best = rows_to_keep(config.keep or 1, len(remaining))
    kept = set(best_and_spread(scores, clusters, remaining, best, config.per_cluster))
    dropped = [index for index in remaining if index not in kept]
    choice.drop(dropped, "among the best neither of all nor of its cluster")
    return choice


def best_and_spread(
    scores: Sequence[float], clusters: Sequence[int], indices: Sequence[int], best: int, per_cluster: int
) -> list[int]:
    """The `best` indices with the highest scores and the `per_cluster` highest of each cluster, in ascending order."""
    members: dict[int, list[int]] = {}
    for index in indices:
        members.setdefault(clusters[index], []).append(index)
    spread = [index for cluster in members.values() for index in highest(scores, cluster, per_cluster)]
    return sorted({*highest(scores, indices, best), *spread})


_METHODS: Mapping[str, Callable[[Settings, Inputs, Sequence[Row], Path], Choice]] = {
    "ifd": _ifd,
    "quality": _quality,
    "k_center": _k_center,
    "necessity": _necessity,
    "car": _car,
}
