"""A model, data files and this machine in, a commented config out."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.config.checker import NAME
from pipeline.errors import ConfigError
from pipeline.tools.convert_chain import FOLDERS
from pipeline.tools.convert_hub import pinned_commit
from stages.chat.template import template_names, template_text
from stages.data.guess import Guess, guess
from stages.data.source import CONVERSATIONS
from stages.model.device import has_gpu
from stages.model.facts import check_template, is_hub_name, locate_model, read_facts
from stages.runtime.errors import StageError

LORA = "lora: {r: 16, lora_alpha: 32}             # every linear layer; without `lora` the whole model is trained"

TEMPLATES = ("chatml", "llama3", "med")
"""Templates for a tokenizer without one, the first that fits it; `med` fits all."""


@dataclass(frozen=True)
class Found:
    """A data set and its name in the config."""

    name: str
    guess: Guess

    @property
    def words(self) -> str:
        """What was found, one sentence."""
        source, encoding = self.guess.source, self.guess.encoding
        columns = "".join(f", `{theirs}` as `{ours}`" for ours, theirs in source.columns.items())
        bad = f"; {len(self.guess.bad)} bad among the first {self.guess.rows}" if self.guess.bad else ""
        return f"{source.path}: `{source.format}`{columns}{f', {encoding}' if encoding else ''}{bad}"

    @property
    def line(self) -> str:
        """Its line under `data:`."""
        source = self.guess.source
        settings: dict[str, object] = {"path": source.path, "format": source.format}
        if source.columns:
            settings["columns"] = dict(source.columns)
        text = yaml.safe_dump(settings, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10_000)
        encoding = self.guess.encoding
        note = f"   # {encoding}" if encoding not in (None, "utf-8") else ""
        return f"  {self.name}: {text.strip()}{note}"


def look_into(paths: Sequence[str]) -> list[Found]:
    """How each data file is read.

    Raises:
        ConfigError: with every file that cannot be read.
    """
    found: list[Found] = []
    problems = []
    for path in paths:
        try:
            found.append(Found(_name(path, [one.name for one in found]), guess(path)))
        except StageError as error:
            problems.append(f"--data {path}: {error}")
    if problems:
        raise ConfigError(problems)
    return found


def _name(path: str, taken: Sequence[str]) -> str:
    """A name for a data set: that of its file, if it is one."""
    stem = re.sub(r"[^a-z0-9_-]+", "_", Path(path).name.partition(".")[0].lower()).strip("_-")
    base = stem if NAME.match(stem) else "data"
    base = base if isinstance(yaml.safe_load(base), str) else f"data_{base}"  # `null` is no name in YAML
    name, number = base, 2
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


def write(model: str | None, data: Sequence[Found], template: str | None, question: str | None, *, bits: bool) -> str:
    """The text of a config; without a model it makes a tiny one.

    Raises:
        ConfigError: there is no data for a training stage, no such template, or no such model.
    """
    by_stage = {
        "pt": [one.name for one in data if one.guess.source.format == "text"],
        "sft": [one.name for one in data if one.guess.source.format in CONVERSATIONS],
        "dpo": [one.name for one in data if one.guess.source.format == "preference"],
        "kto": [one.name for one in data if one.guess.source.format == "labelled"],
    }
    if not any(by_stage.values()):
        raise ConfigError(["--data: name at least one file of texts, conversations or preference pairs"])
    lines = ["# `pipeline plan` shows what this would do; every key is explained in docs/config.md."]
    if template is not None:
        _check_template(template)
    if model is not None:
        model = _checked_model(model)
        lines.append(f"model: {_plain(model)}")
        template = template or _needed_template(model)
    else:
        template = template or "chatml"
    known = ", ".join(template_names())
    if template is not None:
        lines.append(f"template: {_plain(template)}   # built in: {known}; or a .jinja file")
    else:
        lines.append(f"# template: chatml   # the model's own unless set; built in: {known}")
    if question:
        lines.append(f"question: {_quoted(question)}   # asked of the models at the end of a run")
    lines += ["data:", *(one.line for one in data), "stages:"]
    if model is None:
        corpus = ", ".join(one.name for one in data if one.guess.source.format in ("text", *CONVERSATIONS))
        lines += [
            "  init:                                       # a tiny model made on the spot; `model:` trains yours",
            "    {architecture: llama, hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 4,",
            f"     vocab_size: 2048, data: [{corpus}]}}",
        ]
    for stage, names in by_stage.items():
        if names:
            lines += _stage(stage, names, tiny=model is None)
    lines.append("  merge:                                      # adapters are folded into one model")
    calibration = by_stage["sft"] or by_stage["pt"]
    if bits and calibration:
        lines += ["  quantize:                                   # 4-bit GPTQ", "    bits: 4"]
        lines += [f"    calibration: {{data: [{', '.join(calibration)}], samples: 256, max_length: 512}}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=10_000).strip()


def _plain(text: str) -> str:
    """A text as one line of YAML, quoted where it must be."""
    return yaml.safe_dump(text, allow_unicode=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _check_template(template: str) -> None:
    try:
        template_text(template)
    except StageError as error:
        raise ConfigError([f"--template {template}: {error}"]) from None


def _checked_model(model: str) -> str:
    """A folder as it is named, a name on the Hub with its commit.

    Raises:
        ConfigError: there is no such folder, or the commit is not known here and the Hub does not say it.
    """
    if is_hub_name(model) and "@" not in model and model.partition("/")[0] not in FOLDERS:
        if (commit := pinned_commit("model", model)) is not None:
            return f"{model}@{commit}"
        look = f"`git ls-remote https://huggingface.co/{model} HEAD` shows it"
        text = f"is no folder here; a model on the Hub is named with its commit, `{model}@COMMIT`; {look}"
        raise ConfigError([f"--model {model}: {text}"])
    try:
        locate_model(f"./{model}" if is_hub_name(model) and "@" not in model else model, download=False)
    except StageError as error:
        raise ConfigError([f"--model {model}: {error}"]) from None
    return model


def _needed_template(model: str) -> str | None:
    """The first template that a tokenizer without one knows all special tokens of; None if it needs none, or no folder.

    Raises:
        ConfigError: the folder holds no model.
    """
    if not Path(model).is_dir():
        return None
    try:
        facts = read_facts(Path(model), model)
    except StageError as error:
        raise ConfigError([f"--model {model}: {error}"]) from None
    if facts.template is not None:
        return None
    return next((name for name in TEMPLATES if not check_template(template_text(name), facts)), None)


def _stage(stage: str, names: Sequence[str], *, tiny: bool) -> list[str]:
    """The lines of a training stage, with batches for this machine; a tiny model is trained whole."""
    gpu = has_gpu()
    batch, steps = (4, 1) if tiny else (4, 4) if gpu else (1, 16)  # a tiny model is for few rows
    if stage in ("dpo", "kto"):  # KTO compares answers of a batch, so it needs two
        batch, steps = max(1 if stage == "dpo" else 2, batch // 2), steps * 2
    rate = ("5e-5" if tiny else "5e-6") if stage in ("dpo", "kto") else "1e-3" if tiny else "1e-4"
    what = {
        "pt": "continued pretraining on texts",
        "sft": "questions and answers",
        "dpo": "pairs of a better and a worse answer",
        "kto": "answers labelled good or bad",
    }
    data = names[0] if len(names) == 1 else f"[{', '.join(names)}]"
    more = ", bf16: true" if gpu else ""
    beta = "beta: 0.1, " if stage in ("dpo", "kto") else ""
    warmup = "" if tiny else " warmup_steps: 0.03,"  # of a few steps it would be the first, with a learning rate of 0
    return [
        f"  {stage}:{' ' * (43 - len(stage))}# {what[stage]}",
        f"    data: {data}",
        "    eval_size: 0.05                           # held out, never trained on",
        *([] if tiny else [f"    {LORA}"]),
        f"    trainer: {{{beta}learning_rate: {rate}, lr_scheduler_type: cosine,{warmup}",
        f"              num_train_epochs: 1, max_length: 1024, per_device_train_batch_size: {batch},",
        f"              gradient_accumulation_steps: {steps}{more}}}   # {batch * steps} rows a step",
    ]


def machine() -> str:
    """This machine, for people."""
    cores = os.cpu_count() or 1
    return "a GPU is here" if has_gpu() else f"there is no GPU; {cores} CPU cores train small models only"
