"""A finished model's lineage in, its model card out: a README.md in the Hub's form, the same bytes for the same run.

No dates, no machine, no absolute paths: the card is one of the artifact's files, and its hash is in the record.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import secret
from pipeline.config.pipeline import Card
from pipeline.plan.datasets import sources_in
from stages.data.source import Source, is_on_hub
from stages.model.facts import is_hub_name
from stages.runtime.figures import count, number

if TYPE_CHECKING:
    from pipeline.plan.step import Plan, Step

FILE = "README.md"
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """A finished step and what it measured."""

    step: "Step"
    metrics: Metrics


def write(out: Path, step: "Step", metrics: Metrics, planned: "Plan", done: Sequence[Made], versions: Metrics) -> None:
    """Leave the card of `step` in `out`; `done` are the steps before it, in order."""
    chain = lineage(Made(step, metrics), done)
    (out / FILE).write_text(secret.mask(text(chain, done, planned, versions)), encoding="utf-8", newline="\n")


def lineage(last: Made, done: Sequence[Made]) -> list[Made]:
    """The steps that the model went through, the first one first."""
    by_folder = {str(made.step.folder): made for made in reversed(done)}
    chain = [last]
    while (above := by_folder.get(next(reversed(chain[0].step.inputs.model), ""))) is not None:
        chain.insert(0, above)
    return chain


def text(chain: Sequence[Made], done: Sequence[Made], planned: "Plan", versions: Metrics) -> str:
    """The whole card: metadata between two lines of dashes, then words."""
    last = chain[-1].step
    reports = [made for made in done if made.step in planned.reports]
    parts = [
        f"---\n{_metadata(chain, reports, planned)}\n---",
        f"# {planned.pipeline.name}: {last.name}",
        f"{_base(chain[0])}, after {', '.join(f'`{made.step.name}`' for made in chain)}.",
        "## Stages\n\n" + _table(("stage", "kind", "settings"), (_stage(made.step) for made in chain)),
    ]
    if rows := list(_data(chain, planned)):
        parts.append("## Data\n\n" + _table(("stage", "data", "format", "rows", "tokens"), rows))
    if rows := [row for made in chain for row in _figures(made)]:
        parts.append("## Figures\n\n" + _table(("stage", "figure", "before", "after"), rows))
    for made in reports:
        shown = [name for name in made.metrics.get("models", ()) if name in ("base", *(one.step.name for one in chain))]
        if shown:
            title = f"## Evaluation: {made.step.name}\n\n"
            parts.append(title + _table(("metric", "data", *shown), _evaluated(made.metrics, shown)))
    parts += [_template(planned), _use(last)]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "none")
    parts.append(f"## Versions\n\n{installed}.")
    return "\n\n".join(parts) + "\n"


def _metadata(chain: Sequence[Made], reports: Sequence[Made], planned: "Plan") -> str:
    """The card's metadata as YAML, as the Hub documents it."""
    from huggingface_hub import ModelCardData

    given, last = planned.pipeline.card, chain[-1].step
    known = _front_matter(chain[0])
    theirs = given if given.license else Card.model_validate({key: known.get(key) for key in _LICENSE})
    sources = [source for made in chain for source in _training_data(made.step)]
    on_hub = [source.path.partition("@")[0] for source in sources if is_on_hub(source.path)]
    trained = [made.step.use for made in chain if made.step.entry.training is not None]
    bits, base = last.entry.bits, given.base_model or _hub_name(chain[0])
    results = _results(chain, reports)
    found = {
        "license": theirs.license,
        "license_name": theirs.license_name,
        "license_link": theirs.license_link,
        "language": given.language,
        "base_model": base,
        "base_model_relation": None if base is None else "quantized" if bits else "finetune",
        "datasets": list(dict.fromkeys([*on_hub, *given.datasets])) or None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["stagewise", *trained, *(["gptq", f"{bits}-bit"] if bits else []), *given.tags])),
        "eval_results": results or None,
        "model_name": f"{planned.pipeline.name}: {last.name}" if results else None,
    }
    return str(ModelCardData(**found).to_yaml())


def _results(chain: Sequence[Made], reports: Sequence[Made]) -> list[Any]:
    """What evaluations above measured of this model, for the Hub's `model-index`.

    A merged model is the one before it, folded.
    """
    from huggingface_hub import EvalResult

    last = chain[-1].step.entry
    names = [made.step.name for made in chain[-2:]] if last.training is None and last.bits is None else [last.name]
    found = []
    for made in reports:
        for metric, by_data in made.metrics.get("figures", {}).items():
            for data, by_model in by_data.items():
                value = next((by_model[name] for name in reversed(names) if by_model.get(name) is not None), None)
                if value is not None:
                    task = {"task_type": "text-generation", "dataset_type": data, "dataset_name": data}
                    found.append(EvalResult(**task, metric_type=metric, metric_value=value))
    return found


_LICENSE = ("license", "license_name", "license_link")


def _front_matter(first: Made) -> dict[str, Any]:
    """What the base model's own card says of its license, where it has one."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    for folder in first.step.inputs.model[:1]:
        try:
            known = metadata_load(Path(folder) / FILE)
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return {key: value for key, value in (known or {}).items() if key in _LICENSE and isinstance(value, str)}
    return {}


def _hub_name(first: Made) -> str | None:
    start = first.step.entry.start
    return start.partition("@")[0] if start is not None and is_hub_name(start) else None


def _base(first: Made) -> str:
    start = first.step.entry.start
    if start is None:
        return "A model that starts from random weights"
    name, _, commit = start.partition("@")
    return f"`{name}` at commit `{commit}`" if is_hub_name(start) else f"The model `{_shown(start)}`"


def _shown(path: str) -> str:
    """A path as it is written in the config; of one that leads elsewhere the last part."""
    return Path(path).name if Path(path).is_absolute() or ".." in Path(path).parts else path


def _stage(step: "Step") -> tuple[str, str, str]:
    return step.name, step.use, ", ".join(step.stage.describe(step.entry.config))


def _training_data(step: "Step") -> Sequence[Source]:
    training = step.entry.training
    return [] if training is None else training.draw.sources


def _data(chain: Sequence[Made], planned: "Plan") -> Iterator[tuple[str, ...]]:
    """Each data set that was trained on, or calibrated with, by its name and where the config says that it is."""
    names = {source.path: name for name, source in planned.pipeline.data.items()}
    for made in chain:
        step, counted = made.step, made.metrics.get("data", [])
        if step.entry.start is None:
            continue
        for index, source in enumerate(_training_data(step) or sources_in(step.entry.config)):
            rows_of = source.path.startswith("$")
            where = f"rows of `{source.path[1:]}`" if rows_of else f"`{_shown(source.path)}`"
            name = "" if rows_of or source.path not in names else f"`{names[source.path]}`: "
            known = counted[index] if index < len(counted) else {}
            yield step.name, name + where, source.format, count(known.get("trained_rows")), count(known.get("tokens"))


def _figures(made: Made) -> Iterator[tuple[str, ...]]:
    """What a step measured itself."""
    for figure in made.step.stage.figures(dict(made.metrics)) if made.metrics else ():
        yield made.step.name, figure.name, figure.before, figure.after


def _evaluated(metrics: Metrics, shown: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The figures of an evaluation above, of the models that this one comes from."""
    for metric, by_data in metrics["figures"].items():
        for data, by_model in by_data.items():
            yield metric, data, *(number(by_model.get(name)) for name in shown)


def _template(planned: "Plan") -> str:
    written = planned.pipeline.document.data.get("template")
    whose = "the base model's own" if written is None else f"`{_shown(str(written))}`"
    return (
        f"## Template\n\nThe chat template is {whose}, unless a stage says otherwise; it travels with the tokenizer, "
        "and `apply_chat_template` renders what the model was trained on."
    )


def _use(last: "Step") -> str:
    """How to load it: plain transformers."""
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its name on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")',
        'messages = [{"role": "user", "content": "…"}]',
        'words = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}',
        "inputs = tokenizer.apply_chat_template(messages, **words).to(model.device)",
        "answer = model.generate(**inputs, max_new_tokens=256)[0, inputs['input_ids'].shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    note = ""
    if last.entry.bits is not None:
        note = (
            "\n\nThe weights are GPTQ; transformers needs `gptqmodel` and `optimum` for them, vLLM loads the folder as "
            'it is. On a CPU add `quantization_config=GPTQConfig(bits=BITS, backend="torch")`, or a kernel is compiled '
            "first."
        ).replace("BITS", str(last.entry.bits))
    return "## Use\n\n```python\n" + "\n".join(code) + "\n```" + note


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
