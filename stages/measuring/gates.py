"""Gates: figures and bounds in, a verdict for each gate out. A figure that could not be computed passes no gate."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from stages.measuring.metrics import METRICS
from stages.runtime.errors import Problem, nearest

PERCENT = re.compile(r"[0-9]+(\.[0-9]+)?%\Z")
BOUNDS = ("max_increase", "max_decrease", "min", "max")
CHANGES = BOUNDS[:2]


class Gate(BaseModel):
    """A bound for a figure; if the bound does not hold, the stages after the evaluation are not run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    data: str | None = None
    """The data set, `prompts`, or the task; not needed if the metric is measured on only one of them."""
    stage: str | None = None
    """The compared model that is judged. Default: the last model."""
    versus: str | None = None
    """The compared model that `stage` is judged against. Default: the model before it."""
    max_increase: Any = None
    """How much higher than the figure of `versus` the figure may be: `6%` of that figure, or a number."""
    max_decrease: Any = None
    """How much lower than the figure of `versus` the figure may be."""
    min: float | None = None
    max: float | None = None

    @field_validator(*CHANGES)
    @classmethod
    def _a_bound(cls, value: Any, info: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if value is not None and not number and not (isinstance(value, str) and PERCENT.match(value)):
            raise ValueError(f"`{info.field_name}` is `{value}`; it wants a percentage such as `6%`, or a number")
        return value

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Gate":
        if all(getattr(self, bound) is None for bound in BOUNDS):
            raise ValueError(f"a gate needs a bound: {', '.join(f'`{bound}`' for bound in BOUNDS)}")
        if self.versus is not None and all(getattr(self, bound) is None for bound in CHANGES):
            raise ValueError("`versus` is for `max_increase` and `max_decrease`; add one of them, or remove it")
        return self


@dataclass(frozen=True)
class Verdict:
    """Whether a gate passed."""

    passed: bool
    text: str
    """A sentence with the figure, the bound and the evidence."""


def gate_problems(gates: Sequence[Gate], models: Sequence[str], measured: Mapping[str, Sequence[str]]) -> list[Problem]:
    """What is wrong with gates, before anything is measured.

    `measured`: data set → its metrics; empty for a task whose metrics are not known.
    """
    found: list[Problem] = []
    for index, gate in enumerate(gates):
        found += [(f"gates.{index}.{setting}", text) for setting, text in _problems(gate, models, measured)]
    return found


def _problems(gate: Gate, models: Sequence[str], measured: Mapping[str, Sequence[str]]) -> list[Problem]:
    for setting in ("stage", "versus"):
        name = getattr(gate, setting)
        if name is not None and name not in models:
            return [(setting, f"`{name}` is not among the models that are compared{nearest(name, models)}")]
    if gate.data is not None and gate.data not in measured:
        return [("data", f"nothing is measured on `{gate.data}`{nearest(gate.data, measured)}")]
    on = [data for data, known in measured.items() if gate.metric in known or not known]
    if not on:
        known = {*METRICS, *(metric for names in measured.values() for metric in names)}
        text = (
            f"`{gate.metric}` is not measured here" if gate.metric in known else f"there is no metric `{gate.metric}`"
        )
        return [("metric", text + nearest(gate.metric, {metric for names in measured.values() for metric in names}))]
    if gate.data is not None and gate.data not in on:
        named = " and ".join(f"`{data}`" for data in on)
        return [("metric", f"`{gate.metric}` is not measured on `{gate.data}`, but on {named}")]
    if gate.data is None and len(on) > 1:
        named = " and ".join(f"`{data}`" for data in on)
        return [("", f"`{gate.metric}` is measured on {named}; say which with `data:`")]
    if any(getattr(gate, bound) is not None for bound in CHANGES):
        if len(models) < 2:
            return [("", f"only `{models[0]}` is compared, so there is nothing to judge it against; compare more")]
        stage, versus = sides(gate, models)
        if stage == versus:
            first = gate.versus is None
            text = f"`{stage}` is the first model that is compared; name the other one with `versus:`"
            return [("stage", text) if first else ("versus", f"`{stage}` is judged against itself; name another model")]
    return []


def sides(gate: Gate, models: Sequence[str]) -> tuple[str, str]:
    """The names of the model that is judged, and of the model that it is judged against."""
    stage = gate.stage or models[-1]
    return stage, gate.versus or models[max(0, models.index(stage) - 1)]


def judge_gate(gate: Gate, table: Mapping[str, Any]) -> Verdict:
    """The verdict of a gate on the table of an evaluation (`evaluation.json`)."""
    stage, versus = sides(gate, table["models"])
    figures = {
        figure["model"]: figure
        for figure in table["figures"]
        if figure["metric"] == gate.metric and gate.data in (None, figure["data"])
    }
    judged = figures.get(stage)
    if judged is None:
        return Verdict(False, f"`{gate.metric}` of `{stage}` was not measured")
    name = f"{gate.metric} of `{stage}` on `{judged['data']}`"
    if judged["value"] is None:
        return Verdict(False, f"{name} could not be computed ({judged['why']}), so the gate cannot pass")
    value, clauses = judged["value"], [f"{name} is {shown(judged)}"]
    passed = (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
    clauses += [f"at least {gate.min:g} is wanted"] if gate.min is not None else []
    clauses += [f"at most {gate.max:g} is allowed"] if gate.max is not None else []
    if any(getattr(gate, bound) is not None for bound in CHANGES):
        other = figures.get(versus)
        if other is None or other["value"] is None:
            why = other["why"] if other else "it was not measured"
            return Verdict(False, f"{clauses[0]}, and that of `{versus}` could not be computed ({why})")
        holds, words = _change(gate, value, other)
        passed = passed and holds
        clauses.append(f"`{versus}` has {shown(other)}: {words}{_evidence(gate, table, judged, versus)}")
    return Verdict(passed, "; ".join(clauses))


def _change(gate: Gate, value: float, other: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the change from the other figure is within the bounds, and a clause with the change and the bounds."""
    holds, allowed = True, []
    change = value - other["value"]
    for bound, sign in (("max_increase", 1), ("max_decrease", -1)):
        limit = getattr(gate, bound)
        if limit is not None:
            share = isinstance(limit, str)
            most = abs(other["value"]) * float(limit[:-1]) / 100 if share else limit
            holds = holds and sign * change <= most
            allowed.append(f"at most {limit if share else f'{limit:g}'} {bound[4:]} is allowed")
    percent = f" ({change / abs(other['value']):+.2%})" if other["value"] else ""
    return holds, f"a change of {change:+.4g}{percent}, {' and '.join(allowed)}"


def _evidence(gate: Gate, table: Mapping[str, Any], judged: Mapping[str, Any], versus: str) -> str:
    """The paired comparison of the two models in parentheses; empty if the table has none."""
    wanted = {"metric": gate.metric, "data": judged["data"], "model": judged["model"], "versus": versus}
    for pair in table["comparisons"]:
        if all(pair[key] == value for key, value in wanted.items()) and pair["ci"]:
            low, high = pair["ci"]
            return f" (paired, {pair['n']} rows: {pair['as']} {pair['change']:.4g}, 95 % CI {low:.4g} to {high:.4g})"
    return ""


def shown(figure: Mapping[str, Any]) -> str:
    """A figure with four significant digits, and its confidence interval if it has one."""
    ci = figure["ci"]
    return f"{figure['value']:.4g}" + (f" (95 % CI {ci[0]:.4g} to {ci[1]:.4g})" if ci else "")
