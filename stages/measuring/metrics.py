"""Values of rows in; figures with confidence intervals, and paired comparisons of models, out.

A row's value is a pair, numerator and denominator, and a figure is made of Σ numerators / Σ denominators: the mean of
rows (denominator 1), or the mean of tokens or bytes over all rows. Formulas and sources are in docs/evaluate.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Ratio = tuple[float, float]
RESAMPLES = 2000  # of the bootstrap
LEVEL = 0.95  # of every confidence interval
AT_ONCE = 2**20  # indices in memory at once
NGRAM = 4  # of the repetition

LOWER = ("perplexity", "bits_per_byte", "repetition")  # less is better
NEITHER = ("answer_tokens",)
SHARES = (
    "answer_match",
    "preference_accuracy",
    "preference_accuracy_per_token",
    "reward_accuracy",
    "stop_rate",
)  # rows say 0 or 1
LOSS_METRICS = ("perplexity", "bits_per_byte")
MATCH_METRICS = ("answer_match", "answer_margin")
CHAT_METRICS = (*LOSS_METRICS, *MATCH_METRICS)  # of conversations
PREFERENCE_METRICS = (
    *("preference_accuracy", "preference_accuracy_per_token", "preference_margin", "preference_margin_per_token"),
    *("reward_accuracy", "reward_margin"),
)
REFERENCE_METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
ANSWER_METRICS = (*REFERENCE_METRICS, "stop_rate", "repetition", "answer_tokens")


@dataclass(frozen=True)
class Measured:
    """One metric of one model: a value for each row, None where it has none; or why there are no values."""

    rows: Sequence[Ratio | None] = ()
    why: str | None = None
    value: float | None = None
    """A figure that is no mean of rows, made elsewhere; it has no interval."""


Figures = dict[tuple[str, str], Measured]
"""What was measured of one model, by metric and data set."""


def figure_of(metric: str, measured: Measured, seed: int) -> dict[str, Any]:
    """`value`, `ci` and `n`; or a `value` of None and `why`."""
    if measured.value is not None and math.isfinite(measured.value):
        return {"value": measured.value, "ci": None, "n": len(measured.rows), "why": None}
    known = [row for row in measured.rows if row is not None]
    if (why := _why(metric, measured)) is not None:
        return {"value": None, "ci": None, "n": len(known), "why": why}
    value = _figure(metric, sum(row[0] for row in known), sum(row[1] for row in known))
    sums = _resampled([known], seed)
    drawn = None if sums is None else [_figure(metric, *pair) for pair in sums.tolist()]
    return {"value": value, "ci": _interval(drawn), "n": len(known), "why": None}


def _why(metric: str, measured: Measured) -> str | None:
    """Why there is no figure."""
    known = [row for row in measured.rows if row is not None]
    if measured.why is not None or not known:
        return measured.why or "no row has a value"
    if not all(math.isfinite(part) for row in known for part in row):
        return "the model gives NaN or infinite logits"
    value = _figure(metric, sum(row[0] for row in known), sum(row[1] for row in known))
    return None if value is not None else "it is above e^700"


def compare_models(metric: str, one: Measured, other: Measured, seed: int) -> dict[str, Any]:
    """The change from `other` to `one` on the rows that both have, and whether it is more than chance.

    `change` is the ratio for perplexity, else the difference; `better` is 1 or 0 for these two, or None.
    """
    pairs = [(a, b) for a, b in zip(one.rows, other.rows, strict=False) if a is not None and b is not None]
    why = _why(metric, one) or _why(metric, other) or (None if pairs else "no row has a value for both")
    if one.value is not None or other.value is not None:
        why = "the figure is no mean of rows"
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
    wins = change is not None and (change > (1 if ratio else 0)) != (metric in LOWER)
    decided = sure and change is not None and metric not in NEITHER
    return {**found, "n": len(pairs), "better": int(wins) if decided else None, "why": None}


def _is_share(metric: str, pairs: Sequence[tuple[Ratio, Ratio]]) -> bool:
    """A metric of ours whose rows are 0 or 1, or a task's whose rows all are, such as `acc`."""
    ours = (*LOWER, *NEITHER, *CHAT_METRICS, *PREFERENCE_METRICS, *ANSWER_METRICS)
    return metric in SHARES or (metric not in ours and all(row in ((0, 1), (1, 1)) for pair in pairs for row in pair))


def mcnemar(pairs: Sequence[tuple[bool, bool]]) -> float:
    """The two-sided exact p of McNemar's test: of the rows on which two models differ, how many each gets right.

    min(1, 2 · P(X ≤ min(b, c))), X ~ Binomial(b + c, ½).
    """
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    term, total = 1, 1
    for k in range(1, min(first, second) + 1):
        term = term * (first + second - k + 1) // k
        total += term
    return min(1.0, float(2 * total / 2 ** (first + second)))


def _figure(metric: str, numerator: float, denominator: float) -> float | None:
    """The figure of summed rows; None where it is too large to be a number."""
    mean = numerator / denominator
    if metric == "perplexity":
        return math.exp(mean) if mean < 700 else None
    return mean / math.log(2) if metric == "bits_per_byte" else mean


def _change(ratio: bool, metric: str, sums: Sequence[float]) -> float | None:
    if ratio:
        mean = sums[0] / sums[1] - sums[2] / sums[3]
        return math.exp(mean) if mean < 700 else None
    one, other = _figure(metric, *sums[:2]), _figure(metric, *sums[2:])
    return None if one is None or other is None else one - other


def _interval(drawn: Sequence[float | None] | None) -> list[float] | None:
    """The percentile interval of a bootstrap."""
    import numpy as np

    if drawn is None or None in drawn:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.array(drawn), [tail, 1 - tail])
    return [float(low), float(high)]


def _resampled(columns: Sequence[Sequence[Ratio]], seed: int) -> "NDArray[np.float64] | None":
    """Sums of numerators and denominators over rows drawn with replacement, the same rows in every column.

    None for a single row. (Efron and Tibshirani 1993; paired, as Koehn 2004.)
    """
    import numpy as np

    values = np.concatenate([np.array(column, dtype=np.float64) for column in columns], axis=1)
    count = len(values)
    if count < 2:
        return None
    random = np.random.default_rng(seed)
    step = max(1, AT_ONCE // count)
    parts: list[NDArray[np.float64]] = [
        values[random.integers(0, count, (min(step, RESAMPLES - start), count))].sum(axis=1)
        for start in range(0, RESAMPLES, step)
    ]
    return np.concatenate(parts)


# Answers


def score_answer(answer: str, ids: Sequence[int], *, reference: str | None, stopped: bool) -> dict[str, float | None]:
    """Every metric of one answer; None where it has none. `ids` are its tokens without the one that ended it."""
    found: dict[str, float | None] = dict.fromkeys(REFERENCE_METRICS)
    if reference is not None:
        found |= {"bleu-4": bleu(answer, reference), **rouge(answer, reference)}
    return found | {"stop_rate": float(stopped), "repetition": repetition(ids), "answer_tokens": float(len(ids))}


def bleu(answer: str, reference: str) -> float:
    """BLEU-4 over characters with smoothing method 3, times 100, as LLaMA-Factory's predict_with_generate has it."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method3
    return round(float(sentence_bleu([list(reference)], list(answer), smoothing_function=smoothing)) * 100, 4)


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F1 of ROUGE-1, -2 and -L over jieba's words, times 100, as LLaMA-Factory's predict_with_generate has it."""
    import jieba
    from rouge_chinese import Rouge

    said, wanted = " ".join(jieba.cut(answer)), " ".join(jieba.cut(reference))
    if not said.split() or not wanted.split():
        return dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
    scores: Mapping[str, Mapping[str, float]] = Rouge().get_scores(said, wanted)[0]
    return {name: round(score["f"] * 100, 4) for name, score in scores.items()}


def repetition(ids: Sequence[int]) -> float | None:
    """seq-rep-4 (Welleck et al., arXiv 1908.04319): 1 − |distinct 4-grams| / |4-grams|; None below four tokens."""
    grams = [tuple(ids[start : start + NGRAM]) for start in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def lower_is_better(metric: str) -> bool | None:
    """Which way is better; None where neither is."""
    return None if metric in NEITHER else metric in LOWER
