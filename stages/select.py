"""Selection of training rows: data and the models that score it in, the rows worth training on out.

The result is a data set that later stages name as `$select`; the model passes through unchanged, so the stage below
starts from the model above. Methods (stages/measuring/choosing.py) and their sources are in docs/select.md:

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
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages import Metrics, Rows, Stage
from stages.data.row import Row
from stages.data.source import CONVERSATIONS, ROWS_FILE, Format, Reading, Source
from stages.data.spool import Spooled
from stages.measuring.choosing import choose
from stages.model.facts import Facts, check_template, is_hub_name
from stages.model.inputs import Inputs
from stages.model.references import ModelRef, OtherModel, ScorerRef
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit

Method = Literal["ifd", "quality", "k_center", "necessity", "car"]
# The settings that each method needs, and those that it takes besides; `quality` and `necessity` also need a limit or
# `keep`.
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
SHAPES: Mapping[str, tuple[str, ...]] = {
    "messages": CONVERSATIONS,
    "text": ("text",),
    "preference": ("preference",),
}
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Config(BaseModel):
    """Settings of `select`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelRef
    """The model that scores; the stage below starts from the model above all the same."""
    data: list[Source] = Field(min_length=1)
    """Names of data, all conversations, all texts or all preference pairs."""
    method: Method
    keep: float | None = Field(default=None, gt=0)
    """The best rows: a share below 1 of the rows that are not dropped before, or a number of rows."""
    above: float | None = None
    """`quality`: rows that score more than this are kept; the α of MoDS."""
    below: float | None = None
    """`necessity`: rows whose own answer scores less than this are kept; the β of MoDS."""
    scorer: ScorerRef | None = None
    """A model for sequence classification with one label, such as a reward model."""
    embedder: OtherModel | None = None
    """A model whose hidden states are the embeddings of rows. Default: the model that the stage starts from."""
    per_cluster: int = Field(default=1, ge=0)
    """`car`: rows that are kept of each cluster."""
    max_new_tokens: int = Field(default=512, gt=0)
    """`necessity`: tokens of the longest answer."""
    max_length: int = Field(default=2048, gt=1)
    """Tokens of a row. `ifd` and `necessity` drop longer rows; scorers and embedders read their start."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Tokens in memory at once, padding included."""
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
    """The format of the rows that the stage leaves."""
    first = config.data[0].format
    return first if first in ("text", "preference") else "messages"


def reads_model(config: Config) -> bool:
    """Whether the stage reads the model that it starts from."""
    return config.method in ("ifd", "necessity") or (config.method != "quality" and config.embedder is None)


def renders(config: Config) -> bool:
    """Whether the stage writes rows with the chat template of the model that it starts from."""
    return config.method in ("ifd", "necessity")


def check(config: Config) -> list[Problem]:
    """What the settings alone show."""
    problems = _check_data(config)
    for setting in ("scorer", "embedder"):
        problems += _check_other(setting, getattr(config, setting))
    return problems


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Whether the model that the stage starts from can score."""
    problems: list[Problem] = []
    if "quantization_config" in facts.config:
        problems.append(("model", f"{facts.source} is quantized; score with the model before its quantization"))
    if renders(config):
        problems += check_template(config.template, facts)
    return problems


def _check_data(config: Config) -> list[Problem]:
    shape = format_of_rows(config)
    problems: list[Problem] = []
    for source in config.data:
        if config.method in ("ifd", "necessity") and source.format not in CONVERSATIONS:
            wanted = ", ".join(f"`{name}`" for name in CONVERSATIONS)
            problems.append(("data", f"`{source.path}` has format `{source.format}`; `{config.method}` reads {wanted}"))
        elif source.format == "labelled":
            problems.append(("data", f"`{source.path}` has format `labelled`, of which nothing can be selected yet"))
        elif source.format not in SHAPES[shape]:
            first = config.data[0]
            text = f"`{source.path}` has format `{source.format}` and `{first.path}` `{first.format}`"
            problems.append(("data", f"{text}, which do not go into one file; use two stages"))
    return problems


def _check_other(setting: str, model: str | None) -> list[Problem]:
    """A scorer must have a trained head: transformers would fill a missing head with random weights."""
    if model is None or model.startswith("$"):
        return []
    if is_hub_name(model) and not re.search("@[0-9a-f]{40}$", model):
        name = model.partition("@")[0]
        return [(setting, f"`{model}` is not a folder here; for a model on the Hub pin its commit, as `{name}@COMMIT`")]
    folder = Path(model)
    if setting != "scorer" or not (folder / "config.json").is_file():
        return []
    try:
        written = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return []  # the pipeline reports it when it looks at the folder
    kinds = written.get("architectures") or ["no architecture"]
    if not kinds[0].endswith("ForSequenceClassification"):
        text = f"`{model}` is {kinds[0]}, and a scorer is a model for sequence classification"
        return [(setting, f"{text}; choose a reward model")]
    labels = len(written.get("id2label") or {0: "", 1: ""})
    if labels != 1:
        return [(setting, f"`{model}` has {labels} labels, and a scorer has one; choose a reward model")]
    return []


def headline(metrics: Mapping[str, Any]) -> str:
    """How many rows are kept, and their lowest and highest score."""
    share = f"{metrics['kept']:,} of {metrics['rows']:,} rows kept"
    found = metrics.get("score_of_kept")
    return f"{share}, {metrics['measure']} {found['0%']:.4g} to {found['100%']:.4g}" if found else share


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Score every row, choose, and leave rows and scores in `out`."""
    with Spooled[Row](folder=out) as rows:
        places: list[tuple[str, int]] = []
        for source in map(inputs.read, config.data):
            for number, (_, row) in enumerate(Reading(source).kept(), 1):
                rows.append(row)
                places.append((source.path, number))
        return _select(config, inputs, rows, places, out)


def _select(
    config: Config, inputs: Inputs, rows: Sequence[Row], places: Sequence[tuple[str, int]], out: Path
) -> Metrics:
    """As `run`, of rows that were read; `places` are the data set and the number of each row."""
    choice = choose(config, inputs, rows, out)
    kept = [reason is None for reason in choice.reasons]
    if not any(kept):
        raise StageError(f"no row of {len(rows)} is kept: {_counted(choice.reasons)}; loosen the limit or add data")
    with open(out / ROWS_FILE, "w", encoding="utf-8") as file:
        file.writelines(_line(row) for row, good in zip(rows, kept, strict=True) if good)
    with open(out / "scores.jsonl", "w", encoding="utf-8") as file:
        for index, (path, number) in enumerate(places):
            values = {name: _finite(scores[index]) for name, scores in choice.scores.items()}
            line = {"data": path, "row": number, **values, "kept": kept[index], "why": choice.reasons[index]}
            file.write(_line(line))
    metrics: dict[str, Any] = {
        "method": config.method,
        "rows": len(rows),
        "kept": sum(kept),
        "dropped": dict(Counter(reason for reason in choice.reasons if reason is not None)),
        **choice.metrics,
    }
    if choice.measure is not None:
        scores = choice.scores[choice.measure]
        metrics["measure"] = choice.measure
        metrics["score"] = _quantiles(scores)
        metrics["score_of_kept"] = _quantiles([score for score, good in zip(scores, kept, strict=True) if good])
    dropped = _counted(choice.reasons)
    emit(out, "note", text=f"{sum(kept):,} of {len(rows):,} rows kept" + (f"; {dropped}" if dropped else ""))
    return metrics


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _counted(reasons: Sequence[str | None]) -> str:
    counts = Counter(reason for reason in reasons if reason is not None)
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def _quantiles(scores: Sequence[float]) -> dict[str, float]:
    import numpy as np

    known = [score for score in scores if math.isfinite(score)]
    return {f"{share:.0%}": float(np.quantile(known, share)) for share in QUANTILES} if known else {}


STAGE = Stage(
    version=2,
    config=Config,
    run=run,
    more_memory=lambda config: f"halve `batch_tokens`, which is {config.batch_tokens}",
    headline=headline,
    leaves=Rows(format=format_of_rows),
    check=check,
    check_model=check_model,
    reads_model=reads_model,
    renders=renders,
    libraries=("numpy",),
)
