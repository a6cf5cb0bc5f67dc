"""The table of an evaluation: figures of every model, and paired comparisons, in `evaluation.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.measuring.metrics import (
    LEVEL,
    RESAMPLES,
    Figures,
    Measured,
    compare_models,
    figure_of,
    lower_is_better,
)

SCHEMA = 1
TABLE = "evaluation.json"
ANSWERS = "answers.jsonl"


def read_table(folder: Path) -> dict[str, Any]:
    """The content of `evaluation.json` in the folder of a finished evaluation; docs/evaluate.md describes it."""
    return dict(json.loads((folder / TABLE).read_text(encoding="utf-8")))


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Each prompt of a finished evaluation with the answers of the models; empty if there are none.

    Lines end at `\\n` alone, since a line may contain U+2028 and similar characters.
    """
    try:
        lines = (folder / ANSWERS).read_text(encoding="utf-8").split("\n")
    except OSError:
        return []
    return [json.loads(line) for line in lines if line]


def figures_and_comparisons(found: Mapping[str, Figures], seed: int) -> dict[str, Any]:
    """Every figure of every model, and the comparison of each model with the model before it and with the first.

    `found`: model → its figures, the models in their order.

    Returns:
        The keys `bootstrap`, `figures` and `comparisons` of `evaluation.json`.
    """
    models = list(found)
    measured = list(dict.fromkeys(key for figures in found.values() for key in figures))
    absent = Measured(why="the harness gives none")
    by_key = {key: {model: found[model].get(key, absent) for model in models} for key in measured}
    figures = [
        {"metric": metric, "data": name, "model": model, "lower_is_better": lower_is_better(metric)}
        | figure_of(metric, by_model[model], seed)
        for (metric, name), by_model in by_key.items()
        for model in models
    ]
    pairs = dict.fromkeys(pair for place in range(1, len(models)) for pair in ((place, place - 1), (place, 0)))
    comparisons = []
    for (metric, name), by_model in by_key.items():
        for one, other in pairs:
            model, versus = models[one], models[other]
            result = compare_models(metric, by_model[model], by_model[versus], seed)
            winner = {1: model, 0: versus}.get(result["better"]) if result["better"] is not None else None
            comparisons.append(
                {"metric": metric, "data": name, "model": model, "versus": versus} | result | {"better": winner}
            )
    return {
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL},
        "figures": figures,
        "comparisons": comparisons,
    }


def values_only(table: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Metric → data → model → value."""
    values: dict[str, dict[str, dict[str, float | None]]] = {}
    for figure in table["figures"]:
        values.setdefault(figure["metric"], {}).setdefault(figure["data"], {})[figure["model"]] = figure["value"]
    return values
