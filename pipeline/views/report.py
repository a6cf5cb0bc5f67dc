"""A plan and the folders of its stages in, one HTML page out that needs neither the network nor another file."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline import secret
from pipeline.plan.step import Plan, Step, gate_verdicts
from pipeline.run.answers import stored_answers
from pipeline.saves import artifact
from pipeline.views import charts, conclusion, progress
from stages import Report
from stages.measuring.table import read_answers, read_table
from stages.model.facts import chain_of
from stages.runtime.events import read_events
from stages.runtime.figures import size_of

TEMPLATE = "report.html.jinja"
SHOWN_ANSWERS = 20  # prompts; answers.jsonl has the others
SECTIONS: dict[str, tuple[str, Callable[[Any], Any] | None]] = {
    "evaluation": ("Evaluation", lambda step: step["evaluation"]),
    "answers": ("Answers", lambda step: step["evaluation"] and step["evaluation"]["prompts"]),
    "quality": ("Quantization", lambda step: step["quality"]),
    "gates": ("Gates", lambda step: step["gates"]),
    "curves": ("Curves", lambda step: step["curves"]),
    "data": ("Data", lambda step: step["data_summary"]),
    "stages": ("Stages", None),
    "config": ("Config", None),
    "lineage": ("Lineage", None),
}
"""Anchor of a part of the page → its title, and whether a step has something to show in it; None: always shown."""
STATES = {"done": "done", "resume": "unfinished, resumes", "run": "not run yet", "refused": "unfinished, refused"}


def render(planned: Plan, assignments: Sequence[str] = ()) -> str:
    """The page of a plan as HTML: all stages, and what each finished or unfinished one has recorded.

    `assignments` are the `--set` options, shown above the config.
    """
    steps = [_StageReport(planned, step).as_dict() for step in planned.steps]
    finished = {step["name"]: step["record"] for step in steps if step["record"]}
    records = list(finished.values())
    tables = [read_table(step.folder) for step in planned.reports if step.state == "done"]
    config = planned.pipeline.path.read_text(encoding="utf-8")
    sections = [(name, title) for name, (title, key) in SECTIONS.items() if key is None or any(map(key, steps))]
    return _environment().get_template(TEMPLATE).render(
        name=planned.pipeline.name,
        path=str(planned.pipeline.path),
        config=config,
        assignments=list(assignments),
        conclusion=conclusion.first_lines(planned, tables, finished),
        warnings=list(dict.fromkeys([*planned.notes, *(text for step in steps for text in step["warnings"])])),
        asked=_one_question(planned, steps),
        sections=sections,
        parts=[name for name, _ in sections],
        fewest=conclusion.FEWEST,
        gates=[gate["passed"] for step in steps for gate in step["gates"]],
        steps=steps,
        done=sum(step["state"] == "done" for step in steps),
        seconds=sum(record["seconds"] for record in records if "seconds" in record),
        versions=_versions(records),
        machines=sorted({_machine(record["machine"]) for record in records if "machine" in record}),
    )  # fmt: skip


def _one_question(planned: Plan, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The question of the config with its answers, or else the first prompt of an evaluation; None without both."""
    if answers := stored_answers(planned):
        return {"question": planned.pipeline.question, "answers": answers}
    for step in reversed(steps):
        if step["evaluation"] and step["evaluation"]["prompts"]:
            prompt = step["evaluation"]["prompts"][0]
            return {"question": prompt["messages"][-1]["content"], "answers": dict(prompt["first_and_last"])}
    return None


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
    environment.filters |= {"breakable": lambda name: Markup("_<wbr>").join(escape(name).split("_"))}
    environment.filters |= {"percent": lambda value: f"{value:.1%}", "bytes": size_of}
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
        events = list(read_events(self.folder))
        gates = gate_verdicts(step, self.planned) if self.record is not None else []
        return {
            "name": step.name,
            "use": step.use,
            "state": step.state,
            "state_text": STATES[step.state],
            "why": step.why,
            "record": record,
            "started": _time(record["started"]) if "started" in record else None,
            "starts": sum(event["kind"] == "start" for event in events),
            "key_figure": step.stage.headline(metrics) if metrics else None,
            "folder": step.folder.name,
            "fingerprint": step.fingerprint,
            "inputs": [(self._model_name(name), identity) for name, identity in step.identities.items()],
            "shared_with": self._other_configs(),
            "memory": step.needs.memory,
            "estimate": self._estimate(record),
            "speed": sorted(speeds)[len(speeds) // 2] if speeds else None,
            "data_summary": metrics if isinstance(metrics.get("data"), list) and metrics["data"] else None,
            "figures": [(name, value) for name, value in flatten(metrics).items() if not name.startswith("data[")],
            "curves": [
                Markup(charts.svg(title, series, f"{step.name}-{title.replace(' ', '-')}"))
                for title, series in charts.curves(rows).items()
            ],
            "evaluation": self._evaluation(),
            "quality": self._quality(metrics),
            "gates": [{"passed": verdict.passed, "text": verdict.text} for verdict in gates],
            "warnings": [
                *(f"a gate of `{step.name}` failed: {verdict.text}" for verdict in gates if not verdict.passed),
                *(f"`{step.name}` ran although a gate failed: {text}" for text in record.get("ignored_gates") or ()),
                *(f"stage `{step.name}`: {event['text']}" for event in events if event.get("warning")),
            ],
        }

    def _estimate(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """The estimated bytes of memory and seconds of a training stage: of before it ran, or else of now; or None."""
        known = self.planned.estimates.get(self.step.name)
        if (kept := record.get("estimate")) is not None:
            return {"memory": kept["total"], "seconds": kept["seconds"]}
        if known is None or known.memory is None:
            return None
        return {"memory": known.total, "seconds": known.seconds}

    def _model_name(self, name: str) -> str:
        """The model behind an input of the stage: a stage above, or the folder or Hub name in the config."""
        reference = self.step.entry.start if name == "model" else self.step.entry.compared.get(name)
        return " + ".join(part.removeprefix("$") for part in chain_of(reference)) if reference else name

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

    A cell says how its model compares with the model before it. The best cell is marked if it is best beyond chance.
    The `n` of a row is the number of rows that its figures were measured on, None if the cells differ in it.
    """
    models = table["models"]
    before = dict(zip(models[1:], models, strict=False))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for figure in table["figures"]:
        row = rows.setdefault((figure["metric"], figure["data"]), {**figure, "cells": {}})
        row["cells"][figure["model"]] = {**figure, "best": False, "verdict": None}
    for (metric, data), row in rows.items():
        comparisons = [one for one in table["comparisons"] if (one["metric"], one["data"]) == (metric, data)]
        conclusion.mark_best(row["cells"], comparisons)
        for comparison in comparisons:
            if before.get(comparison["model"]) == comparison["versus"]:
                row["cells"][comparison["model"]]["verdict"] = _against(comparison)
        for model in models:
            missing = {"value": None, "ci": None, "why": "not measured", "best": False, "n": 0, "verdict": None}
            row["cells"].setdefault(model, missing)
        counts = {cell["n"] for cell in row["cells"].values() if cell["value"] is not None}
        row["n"] = counts.pop() if len(counts) == 1 else None
    return [{**row, "cells": [row["cells"][model] for model in models]} for row in rows.values()]


def _against(comparison: Mapping[str, Any]) -> dict[str, str] | None:
    """A class and words for the comparison with the model before; None if there is no comparison."""
    if comparison["change"] is None:
        return None
    change, versus = conclusion.change_text(comparison), comparison["versus"]
    if conclusion.is_decided(comparison):
        word = conclusion.verdict(comparison)
        return {"class": "good" if word == "better" else "bad", "text": f"{word} than {versus}: {change}"}
    if conclusion.is_same(comparison):
        return {"class": "soft", "text": f"= {versus}"}
    return {"class": "soft", "text": f"≈ {versus}: {change}"}


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
