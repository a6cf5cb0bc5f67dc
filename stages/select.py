"""Selection of training rows: data and what judges it in, the rows worth training on out.

The result is a data set that later stages name as `$select`; the model passes through unchanged, so the stage below
starts from the model above. Methods and their sources are in docs/select.md:

- `ifd`        difficulty of an answer given its question (Li et al., arXiv 2308.12032)
- `quality`    a reward model's score of a row (MoDS, Du et al., 2311.15653, step 1)
- `k_center`   rows that lie far from one another (MoDS, step 2; Sener and Savarese, 1708.00489)
- `necessity`  rows that the model itself answers badly (MoDS, step 3)
- `car`        the best rows, and the best of each cluster (CaR, Ge et al., 2402.18191)
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages import Metrics, Rows, Stage
from stages.data.row import Row
from stages.data.source import ROWS_FILE, Format, Source, rows_of
from stages.measuring import points as points_module
from stages.measuring.scores import answer_losses, embeddings, own_answers, rewards, with_answer
from stages.model.facts import Facts, check_template, is_hub_name
from stages.model.inputs import Inputs
from stages.model.references import ModelRef, OtherModel, ScorerRef
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit

Method = Literal["ifd", "quality", "k_center", "necessity", "car"]
# What each method needs and what else it takes; `quality` and `necessity` also need a limit or `keep`.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "ifd": ("keep",),
    "quality": ("scorer",),
    "k_center": ("keep",),
    "necessity": ("scorer",),
    "car": ("scorer", "keep"),
}
TAKES: Mapping[str, tuple[str, ...]] = {
    "ifd": (),
    "quality": ("above", "keep"),
    "k_center": ("embedder",),
    "necessity": ("below", "keep", "max_new_tokens"),
    "car": ("embedder", "per_cluster"),
}
TALKS = ("alpaca", "prompt_completion", "messages", "sharegpt")
SHAPES: Mapping[str, tuple[str, ...]] = {"messages": TALKS, "text": ("text",), "preference": ("preference",)}
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Config(BaseModel):
    """Settings of `select`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelRef
    """What scores; the stage below starts from the model above all the same."""
    data: list[Source] = Field(min_length=1)
    """Names of data, all conversations, all texts or all preference pairs."""
    method: Method
    keep: float | None = Field(default=None, gt=0)
    """The best rows: a share below 1 of those that are left to choose from, or a number of rows."""
    above: float | None = None
    """`quality`: rows that score more than this are kept; the α of MoDS."""
    below: float | None = None
    """`necessity`: rows whose own answer scores less than this are kept; the β of MoDS."""
    scorer: ScorerRef | None = None
    """A model for sequence classification with one label, such as a reward model."""
    embedder: OtherModel | None = None
    """A model whose hidden states are the rows' places; the stage's own unless given."""
    per_cluster: int = Field(default=1, ge=0)
    """`car`: rows of each cluster."""
    max_new_tokens: int = Field(default=512, gt=0)
    """`necessity`: the longest answer."""
    max_length: int = Field(default=2048, gt=1)
    """Tokens of a row. `ifd` and `necessity` drop longer ones, scorers and embedders read their start."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Tokens in memory at once, padding too."""
    template: str | None = None
    seed: int = Field(default=42, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _fits_the_method(self) -> "Config":
        for name in NEEDS[self.method]:
            if getattr(self, name) is None:
                raise ValueError(f"`{self.method}` needs `{name}`{_EXAMPLES.get(name, '')}")
        for name in ("keep", "above", "below", "scorer", "embedder", "per_cluster", "max_new_tokens"):
            takers = [method for method in NEEDS if name in NEEDS[method] + TAKES[method]]
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and self.method not in takers:
                named = ", ".join(f"`{method}`" for method in takers)
                raise ValueError(f"`{self.method}` does not use `{name}`, which is for {named}; remove it")
        limit = {"quality": "above", "necessity": "below"}.get(self.method)
        if limit is not None and getattr(self, limit) is None and self.keep is None:
            raise ValueError(f"`{self.method}` needs `{limit}`, a limit for the score such as 0.0, or `keep`")
        if self.keep is not None and self.keep >= 1 and self.keep != int(self.keep):
            raise ValueError(f"`keep` {self.keep} is neither a share below 1 nor a whole number of rows")
        return self


_EXAMPLES = {"keep": ", such as 0.1 or 1000", "scorer": ", the folder of a model that scores rows"}


def format_of_rows(config: Config) -> Format:
    """The format of the rows that it leaves."""
    first = config.data[0].format
    return first if first in ("text", "preference") else "messages"


def reads_model(config: Config) -> bool:
    """Does it ask the model that it stands on?"""
    return config.method in ("ifd", "necessity") or (config.method != "quality" and config.embedder is None)


def check(config: Config) -> list[Problem]:
    """What the settings alone show."""
    problems = _check_data(config)
    for setting in ("scorer", "embedder"):
        problems += _check_other(setting, getattr(config, setting))
    return problems


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Whether the model can score."""
    problems: list[Problem] = []
    if "quantization_config" in facts.config:
        problems.append(("model", f"{facts.source} is quantized; score with the model before"))
    if config.method in ("ifd", "necessity"):
        problems += check_template(config.template, facts)
    return problems


def _check_data(config: Config) -> list[Problem]:
    shape = format_of_rows(config)
    problems: list[Problem] = []
    for source in config.data:
        if config.method in ("ifd", "necessity") and source.format not in TALKS:
            wanted = ", ".join(f"`{name}`" for name in TALKS)
            problems.append(("data", f"`{source.path}` has format `{source.format}`; `{config.method}` reads {wanted}"))
        elif source.format == "labelled":
            problems.append(("data", f"`{source.path}` has format `labelled`, of which nothing can be selected yet"))
        elif source.format not in SHAPES[shape]:
            first = config.data[0]
            text = f"`{source.path}` has format `{source.format}` and `{first.path}` `{first.format}`"
            problems.append(("data", f"{text}, which do not go into one file; use two stages"))
    return problems


def _check_other(setting: str, model: str | None) -> list[Problem]:
    """A scorer must have learnt to score: transformers would make up a head that is not there."""
    if model is None or model.startswith("$"):
        return []
    if is_hub_name(model) and not re.search("@[0-9a-f]{40}$", model):
        name = model.partition("@")[0]
        return [(setting, f"`{model}` is no folder here; for one on the Hub pin its commit, as `{name}@COMMIT`")]
    folder = Path(model)
    if setting != "scorer" or not (folder / "config.json").is_file():
        return []
    try:
        written = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return []  # told already, where the folder was looked at
    kinds = written.get("architectures") or ["no architecture"]
    if not kinds[0].endswith("ForSequenceClassification"):
        text = f"`{model}` is {kinds[0]}, and a scorer is a model for sequence classification"
        return [(setting, f"{text}; choose a reward model")]
    labels = len(written.get("id2label") or {0: "", 1: ""})
    if labels != 1:
        return [(setting, f"`{model}` has {labels} labels, and a scorer has one; choose a reward model")]
    return []


def headline(metrics: Mapping[str, Any]) -> str:
    """The stage's key figure for people."""
    share = f"{metrics['kept']:,} of {metrics['rows']:,} rows kept"
    found = metrics.get("score_of_kept")
    return f"{share}, {metrics['measure']} {found['0%']:.4g} to {found['100%']:.4g}" if found else share


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Score every row, choose, and leave rows and scores in `out`."""
    import torch

    sources = [inputs.read(source) for source in config.data]
    rows = [(source.path, number, row) for source in sources for number, row in enumerate(rows_of(source), 1)]
    judged = [row for _, _, row in rows]
    try:
        choice = _METHODS[config.method](config, inputs, judged, out)
    except torch.OutOfMemoryError:
        raise StageError(f"out of memory; halve `batch_tokens`, which is {config.batch_tokens}") from None
    kept = [why is None for why in choice.why]
    if not any(kept):
        raise StageError(f"no row of {len(rows)} is kept: {_counted(choice.why)}; loosen the limit or add data")
    with open(out / ROWS_FILE, "w", encoding="utf-8") as file:
        file.writelines(_line(row) for row, good in zip(judged, kept, strict=True) if good)
    with open(out / "scores.jsonl", "w", encoding="utf-8") as file:
        for index, (path, number, _) in enumerate(rows):
            found = {name: _plain(values[index]) for name, values in choice.scores.items()}
            file.write(_line({"data": path, "row": number, **found, "kept": kept[index], "why": choice.why[index]}))
    metrics: dict[str, Any] = {
        "method": config.method,
        "rows": len(rows),
        "kept": sum(kept),
        "dropped": dict(Counter(why for why in choice.why if why is not None)),
        **choice.metrics,
    }
    if choice.measure is not None:
        scores = choice.scores[choice.measure]
        metrics["measure"] = choice.measure
        metrics["score"] = _quantiles(scores)
        metrics["score_of_kept"] = _quantiles([score for score, good in zip(scores, kept, strict=True) if good])
    left_out = _counted(choice.why)
    emit(out, "note", text=f"{sum(kept):,} of {len(rows):,} rows kept" + (f"; {left_out}" if left_out else ""))
    return metrics


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _counted(why: Sequence[str | None]) -> str:
    counts = Counter(reason for reason in why if reason is not None)
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def _quantiles(scores: Sequence[float]) -> dict[str, float]:
    import numpy as np

    known = [score for score in scores if math.isfinite(score)]
    return {f"{share:.0%}": float(np.quantile(known, share)) for share in QUANTILES} if known else {}


# Choosing


class Choice:
    """What a method chose: scores by name, and for each row why it is dropped, None when it is kept."""

    def __init__(self, count: int, measure: str | None = None) -> None:
        self.scores: dict[str, list[Any]] = {}
        self.why: list[str | None] = [None] * count
        self.measure = measure
        self.metrics: dict[str, Any] = {}

    def drop(self, indices: Sequence[int], reason: str) -> None:
        for index in indices:
            self.why[index] = reason

    def left(self) -> list[int]:
        """The rows that nothing was said against yet."""
        return [index for index, why in enumerate(self.why) if why is None]

    def drop_unscored(self) -> None:
        """Rows that could not be scored; `measure` is NaN or infinite there."""
        scores = self.scores[self.measure or ""]
        self.drop([index for index in self.left() if not math.isfinite(scores[index])], "without a score")


def number(keep: float, rows: int) -> int:
    """How many rows `keep` means: of a share the whole rows in it, and one at the least."""
    return min(rows, max(1, math.floor(Fraction(str(keep)) * rows)) if keep < 1 else int(keep))


def top(scores: Sequence[float], indices: Sequence[int], count: int) -> list[int]:
    """The `count` of these rows with the highest scores; of equal ones the first."""
    return sorted(indices, key=lambda index: (-scores[index], index))[:count]


def _keep_top(choice: Choice, scores: Sequence[float], keep: float | None) -> None:
    """Drop all that is left but the best."""
    if keep is not None:
        left = choice.left()
        chosen = set(top(scores, left, number(keep, len(left))))
        choice.drop([index for index in left if index not in chosen], "not among the best")


# Methods: each takes the rows and hands back its choice


def _ifd(config: Config, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """IFD = mean CE(A|Q) / mean CE(A); above 1 the question does not help, and of the rest the hardest are kept."""
    choice = Choice(len(rows), "ifd")
    given, alone = answer_losses(config, inputs, rows, out)
    choice.scores = {"ifd": ifd(given, alone), "loss_given_question": given, "loss_alone": alone}
    scores = choice.scores["ifd"]
    choice.drop([index for index, loss in enumerate(given) if loss is None], "longer than `max_length`")
    choice.drop_unscored()
    choice.drop([index for index in choice.left() if scores[index] > 1], "with an IFD above 1")
    _keep_top(choice, scores, config.keep)
    return choice


def ifd(given: Sequence[float | None], alone: Sequence[float | None]) -> list[float]:
    """mean CE(A|Q) / mean CE(A), row by row; NaN where there is none."""
    pairs = zip(given, alone, strict=True)
    return [one / other if one is not None and other else math.nan for one, other in pairs]


def _quality(config: Config, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """Rows whose question and answer a reward model gives more than `above`, and of these the best."""
    choice = Choice(len(rows), "quality")
    scores, choice.metrics["cut"] = rewards(config, inputs, rows, out)
    choice.scores = {"quality": scores}
    choice.drop_unscored()
    if config.above is not None:
        low = [index for index in choice.left() if not scores[index] > config.above]
        choice.drop(low, f"with a score of {config.above:g} or less")
    _keep_top(choice, scores, config.keep)
    return choice


def _necessity(config: Config, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """Rows to whose question the model's own answer scores less than `below`, and of these the worst."""
    choice = Choice(len(rows), "necessity")
    answers = own_answers(config, inputs, rows, out)
    asked = [index for index, answer in enumerate(answers) if answer is not None]
    own = [with_answer(rows[index], answers[index] or "") for index in asked]
    found, choice.metrics["cut"] = rewards(config, inputs, own, out)
    scores = [math.nan] * len(rows)
    for index, score in zip(asked, found, strict=True):
        scores[index] = score
    choice.scores = {"necessity": scores, "answer": answers}
    choice.drop([index for index, answer in enumerate(answers) if answer is None], "longer than `max_length`")
    choice.drop_unscored()
    if config.below is not None:
        good = [index for index in choice.left() if not scores[index] < config.below]
        choice.drop(good, f"answered with a score of {config.below:g} or more")
    _keep_top(choice, [-score for score in scores], config.keep)
    return choice


def _k_center(config: Config, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """Rows whose questions cover all questions: each next one is the farthest from those chosen."""
    choice = Choice(len(rows))
    points, choice.metrics["cut"] = embeddings(config, inputs, rows, out, answer=False)
    wanted = number(config.keep or 1, len(rows))
    chosen, distances = points_module.k_center(points, wanted, config.seed)
    order = {index: (place, distance) for place, (index, distance) in enumerate(zip(chosen, distances, strict=True), 1)}
    choice.scores = {
        "place": [order[index][0] if index in order else None for index in range(len(rows))],
        "distance": [order[index][1] if index in order else None for index in range(len(rows))],
    }
    why = "covered by the rows chosen" if len(chosen) == wanted else "at the same point as a row chosen"
    choice.drop([index for index in range(len(rows)) if index not in order], why)
    choice.metrics["radius"] = points_module.radius(points, chosen)
    return choice


def _car(config: Config, inputs: Inputs, rows: Sequence[Row], out: Path) -> Choice:
    """The `keep` best rows, and the `per_cluster` best of each of ⌊√(n/2)⌋ clusters."""
    choice = Choice(len(rows), "quality")
    scores, choice.metrics["cut"] = rewards(config, inputs, rows, out)
    points, _ = embeddings(config, inputs, rows, out, answer=True)
    reduced = points_module.principal(points, 0.95)
    clusters = points_module.k_means(reduced, max(1, math.isqrt(len(rows) // 2)), config.seed)
    choice.scores = {"quality": scores, "cluster": clusters}
    choice.metrics |= {"dimensions": reduced.shape[1], "clusters": len(set(clusters))}
    choice.drop_unscored()
    left = choice.left()
    chosen = set(best_and_spread(scores, clusters, left, number(config.keep or 1, len(left)), config.per_cluster))
    choice.drop([index for index in left if index not in chosen], "among the best neither of all nor of its cluster")
    return choice


def best_and_spread(
    scores: Sequence[float], clusters: Sequence[int], indices: Sequence[int], best: int, per_cluster: int
) -> list[int]:
    """The `best` rows by score ∪ the `per_cluster` best of each cluster, in their old order."""
    members: dict[int, list[int]] = {}
    for index in indices:
        members.setdefault(clusters[index], []).append(index)
    spread = [index for group in members.values() for index in top(scores, group, per_cluster)]
    return sorted({*top(scores, indices, best), *spread})


_METHODS = {"ifd": _ifd, "quality": _quality, "k_center": _k_center, "necessity": _necessity, "car": _car}


STAGE = Stage(
    version=1,
    config=Config,
    run=run,
    headline=headline,
    leaves=Rows(format=format_of_rows),
    check=check,
    check_model=check_model,
    reads_model=reads_model,
    libraries=("numpy",),
)
