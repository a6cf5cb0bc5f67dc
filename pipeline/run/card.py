"""The stages that finished a model in, its model card out: a README.md in the form of the Hugging Face Hub.

The same run gives the same bytes: the card has no dates, no machine and no absolute paths. It is one of the artifact's
files, and its hash is in the record.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import secret
from pipeline.config.pipeline import Card
from pipeline.plan.datasets import sources_in
from stages.data.source import Source, is_on_hub
from stages.model.facts import chain_of, is_hub_name
from stages.runtime.figures import count, number

if TYPE_CHECKING:
    from pipeline.plan.step import Plan, Step

FILE = "README.md"
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class FinishedStep:
    """A finished step and what it measured."""

    step: "Step"
    metrics: Metrics


def write(
    out: Path, step: "Step", metrics: Metrics, planned: "Plan", done: Sequence[FinishedStep], versions: Metrics
) -> None:
    """Write the card of `step` to the folder `out`.

    `done` are the finished steps before it in their order; `versions` are the libraries that it ran with.
    """
    chain = lineage(FinishedStep(step, metrics), done)
    (out / FILE).write_text(secret.mask(render(chain, done, planned, versions)), encoding="utf-8", newline="\n")


def lineage(last: FinishedStep, done: Sequence[FinishedStep]) -> list[FinishedStep]:
    """The steps that made the model of `last`, in their order; `last` is the last one."""
    by_folder = {str(finished.step.folder): finished for finished in reversed(done)}
    chain = [last]
    while (before := by_folder.get(next(reversed(chain[0].step.inputs.model), ""))) is not None:
        chain.insert(0, before)
    return chain


def render(chain: Sequence[FinishedStep], done: Sequence[FinishedStep], planned: "Plan", versions: Metrics) -> str:
    """The whole card: metadata between two lines of dashes, then Markdown."""
    last, names = chain[-1].step, [finished.step.name for finished in chain]
    reports = [finished for finished in done if finished.step in planned.reports]
    parts = [
        f"---\n{_metadata(chain, reports, planned)}\n---",
        f"# {planned.pipeline.name}: {last.name}",
        f"{_base(chain[0])}, after {', '.join(f'`{name}`' for name in names)}.",
        "## Stages\n\n" + _table(("stage", "kind", "settings"), (_stage(finished.step) for finished in chain)),
    ]
    if rows := list(_data(chain, planned)):
        parts.append("## Data\n\n" + _table(("stage", "data", "format", "rows", "tokens"), rows))
    if rows := [row for finished in chain for row in _figures(finished)]:
        parts.append("## Figures\n\n" + _table(("stage", "figure", "before", "after"), rows))
    for finished in reports:
        shown = [name for name in finished.metrics.get("models", ()) if name in ("base", *names)]
        if shown:
            title = f"## Evaluation: {finished.step.name}\n\n"
            parts.append(title + _table(("metric", "data", *shown), _evaluation(finished.metrics, shown)))
    parts += [_template(planned), _use(last)]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "none")
    parts.append(f"## Versions\n\n{installed}.")
    return "\n\n".join(parts) + "\n"


def _metadata(chain: Sequence[FinishedStep], reports: Sequence[FinishedStep], planned: "Plan") -> str:
    """The card's metadata as YAML; https://huggingface.co/docs/hub/model-cards describes the keys."""
    from huggingface_hub import ModelCardData

    given, last = planned.pipeline.card, chain[-1].step
    licensed = given if given.license else Card.model_validate(_license_of_base(chain[0]))
    sources = [source for finished in chain for source in _training_data(finished.step)]
    on_hub = [source.path.partition("@")[0] for source in sources if is_on_hub(source.path)]
    trained = [finished.step.use for finished in chain if finished.step.entry.training is not None]
    bits, base = last.entry.bits, given.base_model or _hub_name(chain[0])
    results = _results(chain, reports)
    metadata = {
        "license": licensed.license,
        "license_name": licensed.license_name,
        "license_link": licensed.license_link,
        "language": given.language,
        "base_model": base,
        "base_model_relation": None if base is None else _relation(last),
        "datasets": list(dict.fromkeys([*on_hub, *given.datasets])) or None,
        "library_name": "peft" if last.entry.leaves_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["stagewise", *trained, *(["gptq", f"{bits}-bit"] if bits else []), *given.tags])),
        "eval_results": results or None,
        "model_name": f"{planned.pipeline.name}: {last.name}" if results else None,
    }
    # YAML may fold or quote a secret, so it is masked before.
    return str(ModelCardData(**{key: _masked(value) for key, value in metadata.items()}).to_yaml())


def _relation(last: "Step") -> str:
    """What the model is of its base, in the words of the Hub."""
    return "adapter" if last.entry.leaves_adapter else "quantized" if last.entry.bits else "finetune"


def _masked(value: Any) -> Any:
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return secret.mask(value) if isinstance(value, str) else value


def _results(chain: Sequence[FinishedStep], reports: Sequence[FinishedStep]) -> list[Any]:
    """The Hub's `model-index`: what evaluations before this step measured of its model, or of the same model unmerged.

    If two evaluations measured the same metric on the same data, the later one counts.
    """
    from huggingface_hub import EvalResult

    entry = chain[-1].step.entry
    is_merged = entry.training is None and entry.bits is None
    names = [finished.step.name for finished in chain[-2 if is_merged else -1 :]]
    values = {
        (metric, data): by_model[name]
        for finished in reports
        for metric, by_data in finished.metrics.get("figures", {}).items()
        for data, by_model in by_data.items()
        for name in names
        if by_model.get(name) is not None
    }
    task = {"task_type": "text-generation"}
    return [
        EvalResult(**task, dataset_type=data, dataset_name=data, metric_type=metric, metric_value=value)
        for (metric, data), value in values.items()
    ]


_LICENSE = ("license", "license_name", "license_link")


def _license_of_base(first: FinishedStep) -> dict[str, str]:
    """The license keys in the card of the base model; empty if it has no card, or one that cannot be read."""
    from huggingface_hub.repocard import metadata_load

    for folder in first.step.inputs.model[:1]:
        try:
            metadata = metadata_load(Path(folder) / FILE) or {}
        except Exception:  # PyYAML raises errors of many kinds, and a finished stage must not fail because of a license
            return {}
        return {key: metadata[key] for key in _LICENSE if isinstance(metadata.get(key), str)}
    return {}


def _hub_name(first: FinishedStep) -> str | None:
    start = chain_of(first.step.entry.start or "")[0]
    return start.partition("@")[0] if is_hub_name(start) else None


def _base(first: FinishedStep) -> str:
    """The base model in words."""
    start = first.step.entry.start
    if start is None:
        return "A model that starts from random weights"
    base, *adapters = chain_of(start)
    name, _, commit = base.partition("@")
    text = f"`{name}` at commit `{commit}`" if is_hub_name(base) else f"The model `{_shown(base)}`"
    names = " and ".join(f"`{_shown(adapter)}`" for adapter in adapters)
    return text if not adapters else f"{text} with the adapter{'s' if adapters[1:] else ''} {names}"


def _shown(path: str) -> str:
    """A path as the config has it; only its last part if it is absolute or leads up."""
    return Path(path).name if Path(path).is_absolute() or ".." in Path(path).parts else path


def _stage(step: "Step") -> tuple[str, str, str]:
    return step.name, step.use, ", ".join(step.stage.describe(step.entry.config))


def _training_data(step: "Step") -> Sequence[Source]:
    training = step.entry.training
    return [] if training is None else training.draw.sources


def _data(chain: Sequence[FinishedStep], planned: "Plan") -> Iterator[tuple[str, ...]]:
    """Each data set that was used for training or calibration: its stage, name and path, format, rows and tokens."""
    names = {source.path: name for name, source in planned.pipeline.data.items()}
    for finished in chain:
        step, counts = finished.step, finished.metrics.get("data", [])
        if step.entry.start is None:
            continue
        for index, source in enumerate(_training_data(step) or sources_in(step.entry.config)):
            from_stage = source.path.startswith("$")
            path = f"rows of `{source.path[1:]}`" if from_stage else f"`{_shown(source.path)}`"
            name = "" if from_stage or source.path not in names else f"`{names[source.path]}`: "
            known = counts[index] if index < len(counts) else {}
            yield step.name, name + path, source.format, count(known.get("trained_rows")), count(known.get("tokens"))


def _figures(finished: FinishedStep) -> Iterator[tuple[str, ...]]:
    """The figures that a step measured itself: its name, the figure, before, after."""
    for figure in finished.step.stage.figures(dict(finished.metrics)) if finished.metrics else ():
        yield finished.step.name, figure.name, figure.before, figure.after


def _evaluation(metrics: Metrics, shown: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The figures that an evaluation has of the models in `shown`."""
    for metric, by_data in metrics["figures"].items():
        for data, by_model in by_data.items():
            yield metric, data, *(number(by_model.get(name)) for name in shown)


def _template(planned: "Plan") -> str:
    written = planned.pipeline.document.data.get("template")
    template = "the base model's own" if written is None else f"`{_shown(str(written))}`"
    return (
        f"## Template\n\nThe chat template is {template}, unless a stage has its own. It is stored with the tokenizer, "
        "and `apply_chat_template` renders messages as in training."
    )


_ON_BASE = {
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
}


def _use(last: "Step") -> str:
    """How to load the model with transformers alone."""
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
            "\n\nThe weights are quantized with GPTQ. transformers needs `gptqmodel` and `optimum` to load them; vLLM "
            "loads the folder directly. On a CPU, pass "
            f'`quantization_config=GPTQConfig(bits={last.entry.bits}, backend="torch")`; without it, a kernel is '
            "compiled first."
        )
    if last.entry.leaves_adapter:
        note = "\n\nThese are the weights of a LoRA adapter. transformers needs `peft` to load them onto their base."
        if (method := getattr(last.entry.config, "quantized_base", None)) is not None:
            bits = "4 bits (NF4)" if method == "nf4" else "8 bits"
            note += (
                f" They were trained on the base in {bits}, and make another model of the base as it is stored. Pass "
                f"`quantization_config={_ON_BASE[method]}`, which needs `bitsandbytes`, or use the model "
                "that `merge` writes."
            )
    return "## Use\n\n```python\n" + "\n".join(code) + "\n```" + note


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Secrets are masked before `|` is escaped, which could hide one."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(secret.mask(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
