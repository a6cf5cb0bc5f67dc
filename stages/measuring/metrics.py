"""Values of rows in; figures with confidence intervals, and paired comparisons of models, out.

The value of a row is a pair, numerator and denominator, and a figure is computed from Σ numerators / Σ denominators:
the mean of rows (denominator 1), or the mean of tokens or bytes over all rows. Formulas and sources are in
docs/evaluate.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Ratio = tuple[float, float]
"""Numerator and denominator."""
RESAMPLES = 2000  # of the bootstrap
LEVEL = 0.95  # of every confidence interval
NGRAM = 4  # tokens of an n-gram of `repetition`

Direction = Literal["lower", "higher", "neither"]
Kind = Literal["loss", "match", "preference", "reference", "answer"]


@dataclass(frozen=True)
class Metric:
    """A metric that this project computes itself; metrics of lm-evaluation-harness are not among them."""

    name: str
    direction: Direction
    """Which values are better."""
    kind: Kind
    """What it is computed from: losses of texts and conversations, how well answers match their questions, preference
    pairs, answers compared with references, or answers alone."""
    share: bool = False
    """The value of each row is 0 or 1."""


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "lower", "loss"),
        Metric("bits_per_byte", "lower", "loss"),
        Metric("answer_match", "higher", "match", share=True),
        Metric("answer_margin", "higher", "match"),
        Metric("preference_accuracy", "higher", "preference", share=True),
        Metric("preference_accuracy_per_token", "higher", "preference", share=True),
        Metric("preference_margin", "higher", "preference"),
        Metric("preference_margin_per_token", "higher", "preference"),
        Metric("reward_accuracy", "higher", "preference", share=True),
        Metric("reward_margin", "higher", "preference"),
        Metric("bleu-4", "higher", "reference"),
        Metric("rouge-1", "higher", "reference"),
        Metric("rouge-2", "higher", "reference"),
        Metric("rouge-l", "higher", "reference"),
        Metric("stop_rate", "higher", "answer", share=True),
        Metric("repetition", "lower", "answer"),
        Metric("answer_tokens", "neither", "answer"),
    )
}
"""Name → metric, in the order of evaluation.json."""


def metric_names(*kinds: Kind) -> tuple[str, ...]:
    """The metrics of these kinds, in the order of the table."""
    return tuple(name for name, metric in METRICS.items() if metric.kind in kinds)


def lower_is_better(metric: str) -> bool | None:
    """Whether lower values are better; None where neither direction is. Of a task's metric, higher values are."""
    known = METRICS.get(metric)
    if known is None:
        return False
    return None if known.direction == "neither" else known.direction == "lower"


@dataclass(frozen=True)
class Measured:
    """One metric of one model: a value for each row, None for a row without a value; or why there are no values."""

    rows: Sequence[Ratio | None] = ()
    why: str | None = None
    value: float | None = None
    """A figure that is not a mean of rows, as the harness computed it; it has no interval."""


Figures = dict[tuple[str, str], Measured]
"""(metric, data set) → what was measured of one model."""


def figure_of(metric: str, measured: Measured, seed: int) -> dict[str, Any]:
    """The figure of a metric.

    Returns:
        `value`, its confidence interval `ci` ([low, high], or None), `n` rows, and `why`, which is None unless `value`
        is None.
    """
    if measured.value is not None and math.isfinite(measured.value):
        return {"value": measured.value, "ci": None, "n": len(measured.rows), "why": None}
    known = [row for row in measured.rows if row is not None]
    if (why := _why(metric, measured)) is not None:
        return {"value": None, "ci": None, "n": len(known), "why": why}
    value = _figure(metric, sum(row[0] for row in known), sum(row[1] for row in known))
    sums = _resampled([known], seed)
    resampled = None if sums is None else [_figure(metric, *pair) for pair in sums.tolist()]
    return {"value": value, "ci": _interval(resampled), "n": len(known), "why": None}


def _why(metric: str, measured: Measured) -> str | None:
    """Why there is no figure; None if there is a figure."""
    known = [row for row in measured.rows if row is not None]
    if measured.why is not None or not known:
        return measured.why or "no row has a value"
    if not all(math.isfinite(part) for row in known for part in row):
        return "the model gives NaN or infinite logits"
    value = _figure(metric, sum(row[0] for row in known), sum(row[1] for row in known))
    return None if value is not None else "it is above e^700"


def compare_models(metric: str, one: Measured, other: Measured, seed: int) -> dict[str, Any]:
    """The change from `other` to `one` on the rows that have a value for both, and whether it is more than chance.

    Returns:
        `as`: `ratio` for perplexity, `difference` for other metrics. `change`, its confidence interval `ci`, the `p`
        and the name of the `test`, `n` rows. `better`: 1 if `one` is better beyond chance, 0 if `other` is, None if
        neither is. `why`: the reason if there is no comparison, or else None.
    """
    pairs = [(a, b) for a, b in zip(one.rows, other.rows, strict=False) if a is not None and b is not None]
    why = _why(metric, one) or _why(metric, other) or (None if pairs else "no row has a value for both")
    if one.value is not None or other.value is not None:
        why = "the figure is not a mean of rows"
    ratio = metric == "perplexity"
    kind = "ratio" if ratio else "difference"
    if why is not None:
        return {"as": kind, "change": None, "ci": None, "p": None, "test": None, "n": len(pairs), "better": None} | {
            "why": why
        }
    columns = [[a for a, _ in pairs], [b for _, b in pairs]]
    change = _change(ratio, metric, [float(sum(row[i] for row in rows)) for rows in columns for i in (0, 1)])
    sums = _resampled(columns, seed)
    ci = None if sums is None else _interval([_change(ratio, metric, row) for row in sums.tolist()])
    found: dict[str, Any] = {"as": kind, "change": change, "ci": ci, "p": None, "test": "paired bootstrap"}
    sure = ci is not None and not ci[0] <= (1 if ratio else 0) <= ci[1]
    if _is_share(metric, pairs):
        found |= {"p": mcnemar([(a[0] > 0, b[0] > 0) for a, b in pairs]), "test": "McNemar, exact"}
        sure = found["p"] < 1 - LEVEL
    lower = lower_is_better(metric)
    wins = change is not None and (change > (1 if ratio else 0)) != lower
    decided = sure and change is not None and lower is not None
    return {**found, "n": len(pairs), "better": int(wins) if decided else None, "why": None}


def _is_share(metric: str, pairs: Sequence[tuple[Ratio, Ratio]]) -> bool:
    """Whether every row is 0 or 1; of a task's metric, such as `acc`, that shows in the rows alone."""
    known = METRICS.get(metric)
    return known.share if known is not None else all(row in ((0, 1), (1, 1)) for pair in pairs for row in pair)


def mcnemar(pairs: Sequence[tuple[bool, bool]]) -> float:
    """The two-sided exact p of McNemar's test (McNemar 1947), from whether each of two models gets a row right.

    p = min(1, 2 · P(X ≤ min(b, c))), X ~ Binomial(b + c, ½), where b rows are right for the first model alone, and c
    rows for the second alone.
    """
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    term, total = 1, 1
    for k in range(1, min(first, second) + 1):
        term = term * (first + second - k + 1) // k
        total += term
    return min(1.0, float(2 * total / 2 ** (first + second)))


def _figure(metric: str, numerator: float, denominator: float) -> float | None:
    """The figure from sums over rows; None if it is above e^700."""
    mean = numerator / denominator
    if metric == "perplexity":
        return math.exp(mean) if mean < 700 else None
    return mean / math.log(2) if metric == "bits_per_byte" else mean


def _change(ratio: bool, metric: str, sums: Sequence[float]) -> float | None:
    """The change between two figures, given numerator and denominator of each."""
    if ratio:
        mean = sums[0] / sums[1] - sums[2] / sums[3]
        return math.exp(mean) if mean < 700 else None
    one, other = _figure(metric, *sums[:2]), _figure(metric, *sums[2:])
    return None if one is None or other is None else one - other


def _interval(resampled: Sequence[float | None] | None) -> list[float] | None:
    """The percentile interval of a bootstrap; None if a resample has no figure."""
    import numpy as np

    if resampled is None or None in resampled:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.array(resampled), [tail, 1 - tail])
    return [float(low), float(high)]


def _resampled(columns: Sequence[Sequence[Ratio]], seed: int) -> "NDArray[np.float64] | None":
    """Sums of numerators and denominators over rows that are drawn with replacement, the same rows in every column.

    The bootstrap of Efron and Tibshirani (1993), paired as in Koehn (2004). The random numbers are those of
    `numpy.random.default_rng(seed)`: `n` row indices for each of the `n`-row resamples, one resample after the other.

    Returns:
        Resamples × (2 · columns); None for a single row.
    """
    import numpy as np

    values = np.concatenate([np.array(column, dtype=np.float64) for column in columns], axis=1).T.copy()
    count = values.shape[1]
    if count < 2:
        return None
    random = np.random.default_rng(seed)
    sums = np.empty((RESAMPLES, len(values)))
    block = max(1, 4096 // count)  # resamples at a time: of few rows, one at a time takes ten times longer
    for start in range(0, RESAMPLES, block):
        found = sums[start : start + block]
        drawn = random.integers(0, count, (len(found), count), dtype=np.uint32)
        drawn += np.arange(0, drawn.size, count, dtype=np.uint32)[:, None]  # each resample counts in places of its own
        # Counting how often each row was drawn is ten times faster than looking up the values of the drawn rows.
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        found[:] = (values[:, None] * counts).sum(axis=2).T
    return sums


# Answers


def score_answer(answer: str, ids: Sequence[int], *, reference: str | None, stopped: bool) -> dict[str, float | None]:
    """Metric → its value for one answer, None if it has none; `ids` are the answer's tokens without the stop token."""
    found: dict[str, float | None] = dict.fromkeys(metric_names("reference"))
    if reference is not None:
        found |= {"bleu-4": bleu(answer, reference), **rouge(answer, reference)}
    return found | {"stop_rate": float(stopped), "repetition": repetition(ids), "answer_tokens": float(len(ids))}


def bleu(answer: str, reference: str) -> float:
    """BLEU-4 over characters with smoothing method 3 (Chen and Cherry 2014), times 100.

    The same as LLaMA-Factory's predict_with_generate.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method3
    return round(float(sentence_bleu([list(reference)], list(answer), smoothing_function=smoothing)) * 100, 4)


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F1 of ROUGE-1, -2 and -L over jieba's words, times 100; 0 for an empty text.

    The same as LLaMA-Factory's predict_with_generate.
    """
    import jieba
    from rouge_chinese import Rouge

    words, reference_words = " ".join(jieba.cut(answer)), " ".join(jieba.cut(reference))
    if not words.split() or not reference_words.split():
        return dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
    scores: Mapping[str, Mapping[str, float]] = Rouge().get_scores(words, reference_words)[0]
    return {name: round(score["f"] * 100, 4) for name, score in scores.items()}


def repetition(ids: Sequence[int]) -> float | None:
    """seq-rep-4 (Welleck et al., arXiv 1908.04319): 1 − |distinct 4-grams| / |4-grams|; None below four tokens."""
    grams = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
