"""The evaluations and records of a run in, what its report says first out: what changed, for better or worse."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.plan.step import Plan, Step

FEWEST = 6
"""Rows that can decide a comparison: if all of five rows change in one direction, a sign test gives p = 0.0625."""


def is_decided(comparison: Mapping[str, Any]) -> bool:
    """Whether a paired comparison finds a difference beyond chance, on enough rows."""
    return comparison["better"] is not None and comparison["n"] >= FEWEST


def change_text(comparison: Mapping[str, Any]) -> str:
    """The paired change and its confidence interval, such as `−13.0% (−20.0% to −10.0%)`; empty without a change."""
    if comparison["change"] is None:
        return ""
    ends = [_change(comparison["as"], end) for end in comparison["ci"] or ()]
    return _change(comparison["as"], comparison["change"]) + (f" ({' to '.join(ends)})" if ends else "")


def _change(kind: str, value: float) -> str:
    if kind == "ratio" and value >= 10:
        return f"×{value:.3g}"
    text = f"{value - 1:+.1%}" if kind == "ratio" else f"{value:+.4g}"
    return text.replace("-", "−")  # a browser breaks a line after a hyphen, also in 8.3e-05


def is_same(comparison: Mapping[str, Any]) -> bool:
    """Whether both models have the same figure in every resample of the rows."""
    nothing = 1 if comparison["as"] == "ratio" else 0
    return {comparison["change"], *(comparison["ci"] or ())} == {nothing}


def verdict(comparison: Mapping[str, Any]) -> str:
    """A comparison in words, such as `better`, `worse` or `no difference beyond chance`."""
    if is_same(comparison):
        return "no difference"
    if is_decided(comparison):
        return "better" if comparison["better"] == comparison["model"] else "worse"
    return "too few rows to tell" if comparison["n"] < FEWEST else "no difference beyond chance"


def mark_best(cells: Mapping[str, dict[str, Any]], comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Set `best` in the cell of a metric whose figure is better than every other beyond chance; in no cell otherwise.

    `cells`: model → figure, all of one metric on one data set; `comparisons` are those of that metric and data set.
    Two models that were not compared differ beyond chance if their intervals do not overlap.
    """
    known = {model: cell for model, cell in cells.items() if cell["value"] is not None}
    direction = next((cell["lower_is_better"] for cell in known.values()), None)
    if direction is None or len(known) < 2:
        return
    ranked = sorted(known, key=lambda model: known[model]["value"], reverse=not direction)
    best = ranked[0]
    if all(_beats(best, other, known, comparisons) for other in ranked[1:]):
        known[best]["best"] = True


def _beats(
    best: str, other: str, cells: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]
) -> bool:
    pair = next((one for one in comparisons if {one["model"], one["versus"]} == {best, other}), None)
    if pair is not None and pair["change"] is not None:
        return is_decided(pair) and pair["better"] == best
    one, two = cells[best], cells[other]
    if min(one["n"], two["n"]) < FEWEST or not one["ci"] or not two["ci"]:
        return False
    return bool(one["ci"][1] < two["ci"][0] or two["ci"][1] < one["ci"][0])


# The first lines of the report


def first_lines(planned: Plan, tables: Sequence[Mapping[str, Any]], records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that open the report, each with a `title` and its `clauses`.

    `tables` are the evaluations in their order, of which the last one that has the models counts; `records` are the
    records of the finished stages by name.
    """
    lines = []
    quantized = [step for step in planned.steps if step.entry.bits is not None]
    names = {step.name for step in quantized}
    for table in reversed(tables):
        full = [model for model in table["models"] if model not in names]
        if len(full) > 1 and (clauses := list(_clauses(table, full[-1], full[0]))):
            lines.append({"title": f"{full[0]} → {full[-1]}", "clauses": clauses})
            break
    if not lines and (clauses := list(_trained(planned, records))):
        lines.append({"title": "training", "clauses": clauses})
    for step in quantized[-1:]:
        if clauses := list(_cost_of_bits(step, tables, records.get(step.name))):
            lines.append({"title": f"cost of {step.entry.bits} bits", "clauses": clauses})
    return lines


def _clauses(table: Mapping[str, Any], model: str, versus: str) -> Iterator[str]:
    """For each data set the first metric that has figures of both models: its figures and their paired comparison.

    Data sets with too few rows to tell are left out if there are others.
    """
    values = {(one["metric"], one["data"], one["model"]): one["value"] for one in table["figures"]}
    pairs: dict[str, Mapping[str, Any]] = {}
    for pair in table["comparisons"]:
        if (pair["model"], pair["versus"]) == (model, versus) and pair["change"] is not None:
            pairs.setdefault(pair["data"], pair)
    enough = [pair for pair in pairs.values() if pair["n"] >= FEWEST]
    for pair in enough or pairs.values():
        metric, data = pair["metric"], pair["data"]
        figures = f"{values[metric, data, versus]:.4g} → {values[metric, data, model]:.4g}"
        yield f"{metric} on {data} {figures}: {verdict(pair)}, {change_text(pair)}, n\u00a0=\u00a0{pair['n']:,}"


def _trained(planned: Plan, records: Mapping[str, Any]) -> Iterator[str]:
    """The key figures of the training stages, where no evaluation compares models."""
    for step in planned.steps:
        if step.entry.training is not None and step.name in records:
            yield f"{step.name}: {step.stage.headline(records[step.name]['metrics'])}"


def _cost_of_bits(step: Step, tables: Sequence[Mapping[str, Any]], record: Mapping[str, Any] | None) -> Iterator[str]:
    """How much smaller the quantized model is, and what that cost: on held-out data where that was evaluated."""
    metrics = record["metrics"] if record is not None else {}
    if metrics.get("bytes_after"):
        yield f"{metrics['bytes_before'] / metrics['bytes_after']:.1f} times smaller"
    start = (step.entry.start or "").removeprefix("$")
    compared = [list(_clauses(table, step.name, start)) for table in reversed(tables)]
    if found := next(filter(None, compared), None):
        yield from found
    elif metrics.get("perplexity_before"):
        before, after = metrics["perplexity_before"], metrics["perplexity_after"]
        rows = metrics["perplexity_rows"]
        yield f"perplexity on rows like those of the calibration {before:.4g} → {after:.4g}, n\u00a0=\u00a0{rows:,}"
