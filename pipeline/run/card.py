"""A finished model's lineage in, its model card out: a README.md in the Hub's form, the same bytes for the same run.

No dates, no machine, no absolute paths: the card is one of the artifact's files, and its hash is in the record.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline import secret
from pipeline.config.pipeline import Card
from stages.data.source import Source, is_on_hub
from stages.model.facts import is_hub_name

if TYPE_CHECKING:
    from pipeline.plan.step import Plan, Step


FILE = "README.md"
Metrics = Mapping[str, Any]

# The settings that a reader asks for first; the whole of them is in record.json.
MAIN = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "max_length", "packing"),
    *("beta", "loss_type", "optim", "weight_decay", "neftune_noise_alpha", "metric_for_best_model"),
)
LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")


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
    while (above := by_folder.get(next(reversed(_models(chain[0])), ""))) is not None:
        chain.insert(0, above)
    return chain


def text(chain: Sequence[Made], done: Sequence[Made], planned: "Plan", versions: Metrics) -> str:
    """The whole card: metadata between two lines of dashes, then words."""
    last = chain[-1].step
    metadata = yaml.safe_dump(_metadata(chain, planned), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{metadata}---",
        f"# {planned.pipeline.name}: {last.name}",
        f"{_base(chain[0])}, after {', '.join(f'`{made.step.name}`' for made in chain)}.",
        "## Stages\n\n" + _table(("stage", "kind", "settings"), (_stage(made.step) for made in chain)),
    ]
    if rows := list(_data(chain, planned)):
        parts.append("## Data\n\n" + _table(("stage", "data", "format", "rows", "tokens"), rows))
    if rows := [row for made in chain for row in _figures(made)]:
        parts.append("## Figures\n\n" + _table(("stage", "figure", "before", "after"), rows))
    for made in done:
        shown = [name for name in made.metrics.get("models", ()) if name in ("base", *(one.step.name for one in chain))]
        if made.step.stage.use == "evaluate" and shown:
            title = f"## Evaluation: {made.step.name}\n\n"
            parts.append(title + _table(("metric", "data", *shown), _evaluated(made.metrics, shown)))
    parts += [_template(planned), _use(last)]
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "none")
    parts.append(f"## Versions\n\n{installed}.")
    return "\n\n".join(parts) + "\n"


def _metadata(chain: Sequence[Made], planned: "Plan") -> dict[str, Any]:
    given, last = planned.pipeline.card, chain[-1].step
    base, known = _hub_name(chain[0]), _front_matter(chain[0])
    theirs = given if given.license else Card.model_validate({key: known.get(key) for key in _LICENSE})
    sources = [source for made in chain for source in _training_data(made.step)]
    on_hub = [source.path.partition("@")[0] for source in sources if is_on_hub(source.path)]
    uses = [made.step.stage.use for made in chain if made.step.stage.use not in ("merge", "quantize", "init")]
    bits = getattr(last.config, "bits", None)
    found = {
        "license": theirs.license,
        "license_name": theirs.license_name,
        "license_link": theirs.license_link,
        "language": given.language,
        "base_model": given.base_model or base,
        "base_model_relation": "quantized" if bits else "finetune",
        "datasets": list(dict.fromkeys([*on_hub, *given.datasets])),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["stagewise", *uses, *(["gptq", f"{bits}-bit"] if bits else []), *given.tags])),
    }
    if found["base_model"] is None:
        del found["base_model_relation"]
    return {key: value for key, value in found.items() if value}


_LICENSE = ("license", "license_name", "license_link")


def _front_matter(first: Made) -> dict[str, Any]:
    """What the base model's own card says of its license, where it has one."""
    for folder in _models(first)[:1]:
        try:
            _, dashes, rest = (Path(folder) / FILE).read_text(encoding="utf-8").partition("---\n")
            known = yaml.safe_load(rest.partition("\n---")[0]) if dashes else None
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        if isinstance(known, dict):
            return {key: value for key, value in known.items() if key in _LICENSE and isinstance(value, str)}
    return {}


def _models(made: Made) -> list[str]:
    """The folders of the model that a step starts from."""
    model = getattr(made.step.config, "model", [])
    return [model] if isinstance(model, str) else list(model)


def _hub_name(first: Made) -> str | None:
    model = first.step.stage.model
    return model.partition("@")[0] if model is not None and is_hub_name(model) else None


def _base(first: Made) -> str:
    model = first.step.stage.model
    if model is None:
        return "A model that starts from random weights"
    name, _, commit = model.partition("@")
    return f"`{name}` at commit `{commit}`" if is_hub_name(model) else f"The model `{_shown(model)}`"


def _shown(path: str) -> str:
    """A path as it is written in the config; of one that leads elsewhere the last part."""
    return Path(path).name if Path(path).is_absolute() or ".." in Path(path).parts else path


def _stage(step: "Step") -> tuple[str, str, str]:
    config, words = step.config, []
    if hasattr(config, "lora"):
        named = (f"{key} {_word(config.lora[key])}" for key in LORA if key in config.lora) if config.lora else ()
        words.append("the whole model" if config.lora is None else f"LoRA ({', '.join(named) or 'defaults'})")
    trainer = getattr(config, "trainer", {})
    words += [f"{key} {_word(trainer[key])}" for key in MAIN if key in trainer]
    shown = ("bits", "group_size", "architecture", "hidden_size", "num_hidden_layers", "early_stopping", "seed")
    words += [f"{key} {_word(getattr(config, key))}" for key in shown if getattr(config, key, None) is not None]
    words += [f"{key} {_word(value)}" for key, value in (config.model_extra or {}).items()]
    if hasattr(config, "calibration"):
        words.append(f"calibrated on up to {config.calibration.samples} rows of {config.calibration.max_length} tokens")
    return step.name, step.stage.use, ", ".join(words)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _training_data(step: "Step") -> list[Source]:
    return [] if step.stage.use in ("init", "quantize") else list(getattr(step.config, "data", []))


def _data(chain: Sequence[Made], planned: "Plan") -> Iterator[tuple[str, ...]]:
    """Each data set that was trained on, or calibrated with, by its name and where the config says that it lies."""
    names = {source.path: name for name, source in planned.pipeline.data.items()}
    for made in chain:
        step, counted = made.step, made.metrics.get("data", [])
        there = _training_data(step) or list(getattr(getattr(step.config, "calibration", None), "data", []))
        for index, source in enumerate(there):
            made_by = next((folder.name for folder in step.data if folder == Path(source.path).parent), None)
            where = f"rows of `{made_by}`" if made_by else f"`{_shown(source.path)}`"
            name = "" if made_by or source.path not in names else f"`{names[source.path]}`: "
            count = counted[index] if index < len(counted) else {}
            rows, tokens = count.get("trained_rows"), count.get("tokens")
            yield step.name, name + where, source.format, _count(rows), _count(tokens)


def _figures(made: Made) -> Iterator[tuple[str, ...]]:
    """What a step measured itself."""
    found, name = made.metrics, made.step.name
    if "loss_last" in found:
        yield name, "training loss", _number(found["loss_first"]), _number(found["loss_last"])
    for key, words in (
        ("eval_loss", "held-out loss"),
        ("eval_rewards/accuracies", "held-out preference accuracy"),
        ("eval_rewards/margins", "held-out reward margin"),
    ):
        if key in found:
            before = _number(found.get(f"{key}_before"))
            yield name, words, "a tie" if key.endswith("accuracies") else before, _number(found[key])
    if "steps" in found:
        early = ", stopped early" if found.get("stopped_early") else ""
        yield name, "steps", "", _count(found["steps"]) + early
    if "best_step" in found:
        yield name, "step that was kept", "", _count(found["best_step"])
    if "logit_difference" in found:
        yield name, "largest logit difference to the unmerged adapters", "", f"{found['logit_difference']:.1e}"
    if "perplexity_after" in found:
        before, after = (_number(found[f"perplexity_{when}"]) for when in ("before", "after"))
        yield name, f"perplexity on {found['perplexity_rows']} rows that it was not calibrated with", before, after
        yield name, "bytes", _count(found["bytes_before"]), _count(found["bytes_after"])


def _evaluated(metrics: Metrics, shown: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The figures of an evaluation above, of the models that this one comes from."""
    for metric, by_data in metrics["figures"].items():
        for data, by_model in by_data.items():
            yield metric, data, *(_number(by_model.get(name)) for name in shown)


def _template(planned: "Plan") -> str:
    written = planned.pipeline.document.data.get("template")
    whose = "the base model's own" if written is None else f"`{_shown(str(written))}`"
    return (
        f"## Template\n\nThe chat template is {whose}, unless a stage says otherwise; it travels with the tokenizer, "
        "and `apply_chat_template` renders what the model was trained on."
    )


def _use(last: "Step") -> str:
    """How to load it: plain transformers."""
    quantized = hasattr(last.config, "bits")
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
    if quantized:
        note = (
            "\n\nThe weights are GPTQ; transformers needs `gptqmodel` and `optimum` for them, vLLM loads the folder as "
            'it is. On a CPU add `quantization_config=GPTQConfig(bits=BITS, backend="torch")`, or a kernel is compiled '
            "first."
        ).replace("BITS", str(getattr(last.config, "bits", 4)))
    return "## Use\n\n```python\n" + "\n".join(code) + "\n```" + note


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"


def _count(value: Any) -> str:
    return "–" if value is None else f"{value:,}"
