"""A plan and what its finished stages left in, one HTML page out that needs nothing else: no network, no other file."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import secret
from pipeline.plan.step import Plan, Step, gate_verdicts
from pipeline.saves import artifact
from pipeline.views import charts, progress
from stages import Report
from stages.measuring.table import read_answers, read_table
from stages.runtime.events import read_events

TEMPLATE = "report.html.jinja"
SHOWN_ANSWERS = 20  # the rest is in answers.jsonl
STATES = {"done": "done", "resume": "unfinished, goes on", "run": "not run yet", "refused": "unfinished, refused"}


def page(planned: Plan, assignments: Sequence[str] = ()) -> str:
    """The page of a plan: its stages, whether run or not, and everything that the finished ones tell."""
    steps = [_Told(planned, step).as_dict() for step in planned.steps]
    records = [step["record"] for step in steps if step["record"]]
    config = planned.pipeline.path.read_text(encoding="utf-8")
    return _environment().get_template(TEMPLATE).render(
        name=planned.pipeline.name,
        path=str(planned.pipeline.path),
        config=config,
        assignments=list(assignments),
        notes=planned.notes,
        steps=steps,
        done=sum(step["state"] == "done" for step in steps),
        seconds=sum(record["seconds"] for record in records if "seconds" in record),
        versions=_versions(records),
        machines=sorted({_machine(record["machine"]) for record in records if "machine" in record}),
    )  # fmt: skip


def write_curves(planned: Plan, folder: Path) -> list[Path]:
    """`<stage>/loss.png` and `<stage>/metrics.csv` for each stage that logged a loss; the files."""
    written = []
    for step in planned.steps:
        rows = charts.history(step.folder if step.state == "done" else step.part)
        losses = charts.curves(rows).get("loss")
        if losses:
            below = folder / step.name
            below.mkdir(parents=True, exist_ok=True)
            (below / "loss.png").write_bytes(charts.png("loss", losses))
            (below / "metrics.csv").write_text(charts.table(rows), encoding="utf-8")
            written += [below / "loss.png", below / "metrics.csv"]
    return written


def _environment() -> Environment:
    def finalize(value: Any) -> Any:
        return secret.mask(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "count": lambda value: f"{value:,}", "duration": progress.duration}
    environment.filters |= {"percent": lambda value: f"{value:.1%}", "bytes": artifact.size_of}
    return environment


class _Told:
    """What one step has to tell."""

    def __init__(self, planned: Plan, step: Step) -> None:
        self.planned, self.step = planned, step
        self.record = artifact.read(step.folder) if step.state == "done" else None
        self.folder = step.folder if self.record is not None else step.part

    def as_dict(self) -> dict[str, Any]:
        step, record = self.step, self.record or {}
        rows = charts.history(self.folder)
        drawn = charts.curves(rows)
        speeds = [row[charts.SPEED] for row in rows if charts.SPEED in row]
        metrics = record.get("metrics", {})
        told = [event["kind"] for event in read_events(self.folder)]
        return {
            "name": step.name,
            "use": step.use,
            "state": step.state,
            "said": STATES[step.state],
            "why": step.why,
            "record": record,
            "started": _time(record["started"]) if "started" in record else None,
            "starts": told.count("start"),
            "key": step.stage.headline(metrics) if metrics else None,
            "folder": step.folder.name,
            "fingerprint": step.fingerprint,
            "inputs": dict(step.identities),
            "shared": self._shared(),
            "memory": step.needs.memory,
            "speed": sorted(speeds)[len(speeds) // 2] if speeds else None,
            "account": metrics if isinstance(metrics.get("data"), list) and metrics["data"] else None,
            "figures": [(name, value) for name, value in flat(metrics).items() if not name.startswith("data[")],
            "curves": [
                Markup(charts.svg(title, series, f"{step.name}-{title.replace(' ', '-')}"))
                for title, series in drawn.items()
            ],
            "evaluation": self._evaluation(),
            "quality": self._quality(metrics),
            "gates": [{"passed": verdict.passed, "text": verdict.text} for verdict in gate_verdicts(step, self.planned)]
            if self.record is not None
            else [],
        }

    def _shared(self) -> list[str]:
        """Other configs that stand on the same folder."""
        links = self.planned.saves.glob(f"*/{self.step.name}")
        own = self.planned.pipeline.name
        same = [link for link in links if link.is_symlink() and link.resolve() == self.step.folder.resolve()]
        return sorted(link.parent.name for link in same if link.parent.name != own)

    def _quality(self, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """What quantization cost, and what rounding would have cost."""
        if "quantized" not in metrics:
            return None
        named = ((f"{self.step.name}, GPTQ", metrics["quantized"]), ("rounded", metrics["rounded"]))
        errors = {
            name: list(enumerate(one["layer_errors"], 1)) for name, one in named if one.get("layer_errors") is not None
        }
        return {
            "before": metrics["perplexity_before"],
            "models": [(name, {**one, **_change(one)}) for name, one in named],
            "chart": Markup(charts.svg("error of each layer's output", errors, f"{self.step.name}-layers", "layer")),
            "rows": metrics["perplexity_rows"],
            "tokens": metrics["perplexity_tokens"],
            "fallback": metrics["fallback"],
        }

    def _evaluation(self) -> dict[str, Any] | None:
        if self.record is None or not isinstance(self.step.stage.leaves, Report):
            return None
        found = read_table(self.folder)
        answers = read_answers(self.folder)
        return {
            "models": found["models"],
            "rows": _rows(found),
            "answers": [_asked(one, found["models"]) for one in answers[:SHOWN_ANSWERS]],
            "asked": len(answers),
            "level": found["bootstrap"]["level"],
        }


def _change(one: Mapping[str, Any]) -> dict[str, str | None]:
    """A ratio and its interval as percentages more or less."""
    if one.get("ratio") is None:
        return {"change": "–", "ci": None}
    ends = [f"{end - 1:+.1%}" for end in one["ratio_ci"] or ()]
    return {"change": f"{one['ratio'] - 1:+.1%}", "ci": " to ".join(ends) or None}


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric and data set: a cell a model, the best marked, and what is beyond chance."""
    models = found["models"]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in found["figures"]:
        row = rows.setdefault((one["metric"], one["data"]), {**one, "cells": {}})
        row["cells"][one["model"]] = {**one, "best": False, "beyond": ""}
    for row in rows.values():
        for model in models:
            row["cells"].setdefault(model, {"value": None, "ci": None, "why": "not measured", "best": False})
        values = [cell["value"] for cell in row["cells"].values() if cell["value"] is not None]
        if row["lower_is_better"] is not None and len(set(values)) > 1:
            best = min(values) if row["lower_is_better"] else max(values)
            for cell in row["cells"].values():
                cell["best"] = cell["value"] == best
    before = dict(zip(models[1:], models, strict=False))
    for one in found["comparisons"]:
        if one["better"] is not None and before.get(one["model"]) == one["versus"]:
            word = "better" if one["better"] == one["model"] else "worse"
            rows[one["metric"], one["data"]]["cells"][one["model"]]["beyond"] = f"{word} than {one['versus']}"
    return [{**row, "cells": [row["cells"][model] for model in models]} for row in rows.values()]


def _asked(one: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """A prompt with the answers of the first and the last model, and those between."""
    said = {model: _said(one["answers"].get(model)) for model in models}
    ends = list(dict.fromkeys((models[0], models[-1])))
    return {
        "data": one["data"],
        "row": one["row"],
        "prompt": one["prompt"],
        "reference": one["reference"],
        "ends": [(model, said[model]) for model in ends],
        "between": [(model, text) for model, text in said.items() if model not in ends],
    }


def _said(answer: Mapping[str, Any] | None) -> str:
    if answer is None:
        return "(not asked)"
    if answer["answer"] is None:
        return f"({answer.get('why')})"
    return (answer["answer"] or "(nothing)") + ("" if answer.get("stopped") else " …")


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested values by their dotted names; an empty list or mapping stays itself."""
    if isinstance(value, Mapping) and value:
        parts = [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, Mapping | list) for inner in value):
        parts = [(f"{name}[{number}]", inner) for number, inner in enumerate(value)]
    else:
        return {name: value}
    return {key: inner for part in parts for key, inner in flat(part[1], part[0]).items()}


def _versions(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each library with its version, or with all that were used."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in record.get("versions", {}).items():
            found.setdefault(name, {})[str(version)] = None
    return [(name, ", ".join(versions)) for name, versions in sorted(found.items())]


def _machine(machine: Mapping[str, Any]) -> str:
    gpu = machine.get("gpu")
    return f"{machine['system']}, {machine['cores']} cores, {'no GPU' if not gpu else 'with a GPU'}"


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
