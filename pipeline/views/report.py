"""A plan and the folders of its stages in, one HTML page out that needs neither the network nor another file."""

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
SHOWN_ANSWERS = 20  # prompts; answers.jsonl has the others
STATES = {"done": "done", "resume": "unfinished, resumes", "run": "not run yet", "refused": "unfinished, refused"}


def render(planned: Plan, assignments: Sequence[str] = ()) -> str:
    """The page of a plan as HTML: all stages, and what each finished or unfinished one has recorded.

    `assignments` are the `--set` options, shown above the config.
    """
    steps = [_StageReport(planned, step).as_dict() for step in planned.steps]
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
    """Write `<stage>/loss.png` and `<stage>/metrics.csv` in `folder` for each stage that logged a loss.

    Returns the files that were written.
    """
    written = []
    for step in planned.steps:
        rows = charts.history(step.folder if step.state == "done" else step.part)
        losses = charts.curves(rows).get("loss")
        if losses:
            picture, table = folder / step.name / "loss.png", folder / step.name / "metrics.csv"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(charts.png("loss", losses))
            table.write_text(charts.as_csv(rows), encoding="utf-8")
            written += [picture, table]
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


class _StageReport:
    """What the page shows of one step."""

    def __init__(self, planned: Plan, step: Step) -> None:
        self.planned, self.step = planned, step
        self.record = artifact.read(step.folder) if step.state == "done" else None
        self.folder = step.folder if self.record is not None else step.part

    def as_dict(self) -> dict[str, Any]:
        step, record = self.step, self.record or {}
        rows = charts.history(self.folder)
        speeds = [row[charts.SPEED] for row in rows if charts.SPEED in row]
        metrics = record.get("metrics", {})
        events = [event["kind"] for event in read_events(self.folder)]
        return {
            "name": step.name,
            "use": step.use,
            "state": step.state,
            "state_text": STATES[step.state],
            "why": step.why,
            "record": record,
            "started": _time(record["started"]) if "started" in record else None,
            "starts": events.count("start"),
            "key_figure": step.stage.headline(metrics) if metrics else None,
            "folder": step.folder.name,
            "fingerprint": step.fingerprint,
            "inputs": dict(step.identities),
            "shared_with": self._other_configs(),
            "memory": step.needs.memory,
            "speed": sorted(speeds)[len(speeds) // 2] if speeds else None,
            "data_summary": metrics if isinstance(metrics.get("data"), list) and metrics["data"] else None,
            "figures": [(name, value) for name, value in flatten(metrics).items() if not name.startswith("data[")],
            "curves": [
                Markup(charts.svg(title, series, f"{step.name}-{title.replace(' ', '-')}"))
                for title, series in charts.curves(rows).items()
            ],
            "evaluation": self._evaluation(),
            "quality": self._quality(metrics),
            "gates": [{"passed": verdict.passed, "text": verdict.text} for verdict in gate_verdicts(step, self.planned)]
            if self.record is not None
            else [],
        }

    def _other_configs(self) -> list[str]:
        """Other configs that use the same folder."""
        links = self.planned.saves.glob(f"*/{self.step.name}")
        own = self.planned.pipeline.name
        same = [link for link in links if link.is_symlink() and link.resolve() == self.step.folder.resolve()]
        return sorted(link.parent.name for link in same if link.parent.name != own)

    def _quality(self, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """What quantization cost, beside the cost of rounding to nearest; None for other stages."""
        if "quantized" not in metrics:
            return None
        models = ((f"{self.step.name}, GPTQ", metrics["quantized"]), ("rounded", metrics["rounded"]))
        errors = {
            name: list(enumerate(model["layer_errors"], 1))
            for name, model in models
            if model.get("layer_errors") is not None
        }
        return {
            "before": metrics["perplexity_before"],
            "models": [(name, {**model, **_change(model)}) for name, model in models],
            "chart": Markup(charts.svg("error of each layer's output", errors, f"{self.step.name}-layers", "layer")),
            "rows": metrics["perplexity_rows"],
            "tokens": metrics["perplexity_tokens"],
            "fallback": metrics["fallback"],
        }

    def _evaluation(self) -> dict[str, Any] | None:
        """The figures and the answers of a finished evaluation; None for other stages."""
        if self.record is None or not isinstance(self.step.stage.leaves, Report):
            return None
        table = read_table(self.folder)
        answers = read_answers(self.folder)
        return {
            "models": table["models"],
            "rows": _metric_rows(table),
            "prompts": [_prompt_card(entry, table["models"]) for entry in answers[:SHOWN_ANSWERS]],
            "prompt_count": len(answers),
            "level": table["bootstrap"]["level"],
        }


def _change(quality: Mapping[str, Any]) -> dict[str, str | None]:
    """A perplexity ratio and its confidence interval as relative changes, such as +5.0%."""
    if quality.get("ratio") is None:
        return {"change": "–", "ci": None}
    ends = [f"{end - 1:+.1%}" for end in quality["ratio_ci"] or ()]
    return {"change": f"{quality['ratio'] - 1:+.1%}", "ci": " to ".join(ends) or None}


def _metric_rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric and data set, with a cell for each model.

    The best cell is marked, and each cell that is significantly better or worse than the model before it.
    """
    models = table["models"]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for figure in table["figures"]:
        row = rows.setdefault((figure["metric"], figure["data"]), {**figure, "cells": {}})
        row["cells"][figure["model"]] = {**figure, "best": False, "verdict": ""}
    for row in rows.values():
        for model in models:
            row["cells"].setdefault(model, {"value": None, "ci": None, "why": "not measured", "best": False})
        values = [cell["value"] for cell in row["cells"].values() if cell["value"] is not None]
        if row["lower_is_better"] is not None and len(set(values)) > 1:
            best = min(values) if row["lower_is_better"] else max(values)
            for cell in row["cells"].values():
                cell["best"] = cell["value"] == best
    before = dict(zip(models[1:], models, strict=False))
    for comparison in table["comparisons"]:
        model, versus = comparison["model"], comparison["versus"]
        if comparison["better"] is not None and before.get(model) == versus:
            word = "better" if comparison["better"] == model else "worse"
            rows[comparison["metric"], comparison["data"]]["cells"][model]["verdict"] = f"{word} than {versus}"
    return [{**row, "cells": [row["cells"][model] for model in models]} for row in rows.values()]


def _prompt_card(entry: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """A prompt with the answers of the first and the last model, and those of the models between them."""
    texts = {model: _answer_text(entry["answers"].get(model)) for model in models}
    ends = list(dict.fromkeys((models[0], models[-1])))
    return {
        "data": entry["data"],
        "row": entry["row"],
        "messages": entry["prompt"],
        "reference": entry["reference"],
        "first_and_last": [(model, texts[model]) for model in ends],
        "between": [(model, text) for model, text in texts.items() if model not in ends],
    }


def _answer_text(answer: Mapping[str, Any] | None) -> str:
    """An answer as the page shows it; `…` ends one that did not stop by itself."""
    if answer is None:
        return "(not asked)"
    if answer["answer"] is None:
        return f"({answer.get('why')})"
    return (answer["answer"] or "(nothing)") + ("" if answer.get("stopped") else " …")


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name → value for nested mappings and lists; an empty mapping or list stays a value."""
    if isinstance(value, Mapping) and value:
        parts = [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, Mapping | list) for inner in value):
        parts = [(f"{name}[{number}]", inner) for number, inner in enumerate(value)]
    else:
        return {name: value}
    return {key: inner for part in parts for key, inner in flatten(part[1], part[0]).items()}


def _versions(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each library with the versions that the stages ran with."""
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in record.get("versions", {}).items():
            versions.setdefault(name, {})[str(version)] = None
    return [(name, ", ".join(used)) for name, used in sorted(versions.items())]


def _machine(machine: Mapping[str, Any]) -> str:
    gpu = machine.get("gpu")
    return f"{machine['system']}, {machine['cores']} cores, {'no GPU' if not gpu else 'with a GPU'}"


def _figure(value: Any) -> str:
    """A value for people: four significant digits, thousands separators, yes and no."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
