"""4-bit GPTQ: a whole model and calibration rows in, a folder that transformers and vLLM load out.

What quantization costs is measured on rows that calibration never sees: the original first; then, in a fresh process,
the written folder, which also answers a question, and the original rounded to nearest. The same seed gives the same
weights, bit for bit.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stages import Metrics, Model, Stage
from stages.data.source import Reading
from stages.measuring.calibration import MEASURED, Calibration, calibration_rows, split, too_few
from stages.measuring.quality import measure_original, measure_quantized, quality_figures
from stages.model.device import free_memory
from stages.model.facts import SIZE_PATTERN, Facts, Needs, parse_size, read_facts
from stages.model.folder import carried_files
from stages.model.gptq import check_interfaces, quantize_folder
from stages.model.inputs import Inputs
from stages.model.references import ModelRef
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit
from stages.runtime.figures import Figure, count, number, word

CONV1D = ("gpt2", "openai-gpt")
GROUPS = (1024, 512, 256, 128, 64, 32, 16)
# Entries of GPTQModel's `meta` that say how the weights were computed; the others are defaults and local paths.
META = ("quantizer", "damp_percent", "damp_auto_increment", "act_group_aware", "true_sequential", "mse")
OWN = ("bits", "group_size", "mse")  # settings of GPTQConfig that are settings of the stage
# Settings of GPTQConfig with which plain transformers cannot load the folder, or gives random weights silently.
UNREADABLE = ("lm_head", "rotation", "adapter", "activation")
LAYER = re.compile(r"\.\d+\.(?!.*embed).*weight$")  # weights that GPTQ quantizes, outputs × inputs

Ids = list[int]
Losses = dict[str, float | None]  # module → its loss; None for a module that was only rounded


class Config(BaseModel):
    """Settings of `quantize`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelRef
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 32
    """Weights that share a scale; -1: all weights of a row."""
    mse: float = Field(default=2.4, ge=0)
    """A group gets the scale with the smallest Σ |error|^mse; 0: the scale that fits its largest weight, in half the
    time."""
    gptq: dict[str, Any] = {}
    """Other settings of GPTQModel's GPTQConfig (`desc_act`, `sym`, `damp_percent`, …)."""
    calibration: Calibration
    question: str = "你好，请介绍一下你自己。"
    """A question that the result answers in a fresh process."""
    shard_size: str = Field(default="4GB", pattern=SIZE_PATTERN)
    seed: int = Field(default=42, ge=0, lt=2**32)


def check(config: Config) -> list[Problem]:
    """What the settings alone show."""
    problems: list[Problem] = []
    for name in OWN:
        if name in config.gptq:
            problems.append((f"gptq.{name}", f"`{name}` is a setting of the stage; write it beside `gptq`, not in it"))
    for name in UNREADABLE:
        if config.gptq.get(name):
            problems.append((f"gptq.{name}", f"plain transformers cannot load a model with `{name}`; remove it"))
    for name in ("format", "checkpoint_format"):
        if (form := config.gptq.get(name, "gptq")) != "gptq":
            problems.append((f"gptq.{name}", f"transformers and vLLM load `gptq`, not `{form}`; remove it"))
    damp, step = config.gptq.get("damp_percent"), config.gptq.get("damp_auto_increment")
    if isinstance(damp, int | float) and not 0 < damp < 1:
        problems.append(("gptq.damp_percent", f"`damp_percent` is {damp}; it is a share: above 0 and below 1"))
    if isinstance(step, int | float) and step < 0:
        problems.append(("gptq.damp_auto_increment", f"`damp_auto_increment` is {step}; it must be 0 or more"))
    if config.gptq.get("act_group_aware"):
        without = {"desc_act": config.gptq.get("desc_act"), "group_size: -1": config.group_size == -1}
        for name in (name for name, given in without.items() if given):
            text = f"`act_group_aware` orders whole groups and cannot be used with `{name}`; remove one of the two"
            problems.append(("gptq.act_group_aware", text))
    if config.gptq.get("mock_quantization"):
        problems.append(("gptq.mock_quantization", "this rounds without calibration; remove it"))
    for name, settings in (config.gptq.get("dynamic") or {}).items():
        if name.startswith("-") or {"bits", "group_size"} & set(settings or {}):
            text = f"plain transformers cannot load a model whose layers `{name}` differ; remove it"
            problems.append(("gptq.dynamic", text))
    return problems


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Whether the model is whole, is not quantized yet, and can be cut into groups of this size."""
    problems: list[Problem] = []
    if facts.adapters:
        problems.append(("model", "an adapter cannot be quantized; put a `merge` stage above"))
    if "quantization_config" in facts.config:
        problems.append(("model", f"{facts.source} is quantized already; start from the model before its quantization"))
    if why := _cannot_load(facts):
        problems.append(
            ("model", f"transformers cannot load a quantized `{facts.model_type}`: {why}; remove the stage")
        )
        return problems
    if text := facts.too_long(config.calibration.max_length):
        problems.append(("calibration.max_length", text))
    return problems + _check_groups(config.group_size, facts.weights)


def _cannot_load(facts: Facts) -> str | None:
    """Why transformers cannot load the quantized folder of this architecture; None if no reason is known."""
    if facts.model_type in CONV1D:
        return "its layers are Conv1D"
    if facts.experts > 1:
        return f"it has {facts.experts} experts, whose weights are one tensor"
    return None


def needs(config: Config, facts: Facts) -> Needs:
    """Memory: the model as it is stored, to measure its perplexity. Disk: the result, twice if the model is offloaded.

    Not counted: GPTQ's Hessians, the hidden states of the calibration rows, and the file that holds what the comparison
    needs of the original.
    """
    size = _size(config, facts)
    on_disk = config.gptq.get("offload_to_disk", _is_large(facts))
    return Needs(facts.stored, disk=2 * size, result=size) if on_disk else Needs(facts.stored, disk=size)


def more_memory(config: Config) -> str:
    """What to set when memory runs out."""
    rows, length = config.calibration.samples, config.calibration.max_length
    offload = "" if config.gptq.get("offload_to_disk") else "set `gptq: {offload_to_disk: true}`, or "
    return f"{offload}halve `calibration.max_length`, which is {length}, or `calibration.samples`, which is {rows}"


def facts_after_quantizing(config: Config, facts: Facts) -> Facts:
    """What later stages can know of the result: it is quantized, so it can be evaluated but not trained."""
    after = {**facts.config, "quantization_config": {"bits": config.bits}}
    return replace(facts, config=after, stored=_size(config, facts))


def _size(config: Config, facts: Facts) -> int:
    """Bytes of the result: `bits` for each weight of a numbered block, 16 bits for each scale and each other weight."""
    size = 0
    for name, shape in facts.weights.items():
        count = math.prod(shape)
        if len(shape) == 2 and re.search(r"\.\d+\.", name) and "embed" not in name:
            size += count * config.bits // 8 + 2 * (count // (config.group_size if config.group_size > 0 else shape[1]))
        else:
            size += 2 * count
    return size


def _check_groups(group: int, weights: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    """GPTQModel accepts a last group that is not full, but vLLM then refuses the folder."""
    layers = {name: shape for name, shape in weights.items() if len(shape) == 2 and LAYER.search(name)}
    widths = {name.removesuffix(".weight"): shape[1] for name, shape in layers.items()}
    odd = [name for name, width in widths.items() if group > 0 and width % group]
    if not odd:
        return []
    whole = math.gcd(*widths.values())
    better = next((size for size in GROUPS if whole % size == 0), -1)
    more = f" and of {len(odd) - 1} more" if odd[1:] else ""
    text = f"{group} does not divide the {widths[odd[0]]} inputs of `{odd[0]}`{more}, and vLLM needs that"
    return [("group_size", f"{text}; set `group_size: {better}`")]


def headline(metrics: Mapping[str, Any]) -> str:
    """Size and perplexity, before and after."""
    smaller = metrics["bytes_before"] / metrics["bytes_after"]
    before, after, fallback = (metrics[key] for key in ("perplexity_before", "perplexity_after", "fallback"))
    note = f", {len(fallback)} modules only rounded" if fallback else ""
    return f"{smaller:.1f} times smaller, perplexity {before:.2f} → {after:.2f}{note}"


def describe(config: Config) -> list[str]:
    """Bits, groups, GPTQModel's settings and calibration."""
    words = [f"bits {config.bits}", f"group_size {config.group_size}", f"seed {config.seed}"]
    words += [f"{name} {word(value)}" for name, value in config.gptq.items()]
    rows, length = config.calibration.samples, config.calibration.max_length
    return [*words, f"calibrated on up to {rows} rows of {length} tokens"]


def figures(metrics: Metrics) -> list[Figure]:
    """Perplexity and size."""
    name = f"perplexity on {metrics['perplexity_rows']} rows that it was not calibrated with"
    return [
        Figure(name, number(metrics["perplexity_before"]), number(metrics["perplexity_after"])),
        Figure("bytes", count(metrics["bytes_before"]), count(metrics["bytes_after"])),
    ]


def rehearse(config: Config, inputs: Inputs, out: Path) -> None:
    """Count the different rows of the calibration data, as far as that is needed.

    Raises:
        StageError: there are too few of them.
    """
    found: set[str] = set()
    for source in config.calibration.data.sources:
        for _, row in Reading(inputs.read(source)).kept():
            found.add(json.dumps(row, ensure_ascii=False, sort_keys=True))
            if too_few(len(found), config.calibration.samples) is None:
                return
    raise StageError(str(too_few(len(found), config.calibration.samples)))


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Quantize, save, and measure the folder in a fresh process."""
    check_interfaces()
    folder, out = Path(inputs.model[0]).resolve(), out.resolve()
    facts = replace(read_facts(folder), adapters=len(inputs.model) - 1)
    if problems := [*check(config), *check_model(config, facts)]:
        raise StageError("\n".join(f"`{name}`: {text}" for name, text in problems))
    held_out, calibration = _rows(config, inputs, folder, out)
    work = out / ".gptq"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    original = work / "original.safetensors"
    emit(out, "note", text=f"measures perplexity before, on {len(held_out)} rows")
    before = measure_original(folder, held_out, original)
    emit(out, "note", text=f"quantizes to {config.bits} bits, calibrated on {len(calibration)} rows")
    losses = _quantize(config, facts, folder, calibration, work)
    _publish(folder, work / "model", out)
    free_memory()
    emit(out, "note", text="measures the result and rounding to nearest, and asks the question, in a fresh process")
    measured = measure_quantized(out, folder, original, held_out, config.question)
    shutil.rmtree(work)
    return {
        **quality_figures(before, measured, config.seed, out),
        "question": config.question,
        "answer": measured["answer"],
        "perplexity_rows": len(held_out),
        "perplexity_tokens": int(sum(count for _, count in before)),
        "bytes_before": _bytes(folder),
        "bytes_after": _bytes(out),
        **_summary(losses, out),
        "calibration_rows": len(calibration),
        "calibration_tokens": sum(map(len, calibration)),
    }


def _rows(config: Config, inputs: Inputs, folder: Path, out: Path) -> tuple[list[Ids], list[Ids]]:
    """Rows to measure on and rows to calibrate with; a note says if there are fewer than wanted."""
    wanted = config.calibration.samples
    held_out, calibration = split(
        calibration_rows(config.calibration, inputs.read, folder, config.seed, out), wanted, config.seed
    )
    if len(calibration) < wanted or len(held_out) < MEASURED:
        rows = f"{len(calibration)} of {wanted} rows to calibrate with"
        text = f"the data is short: {rows}, {len(held_out)} of {MEASURED} to measure perplexity on"
        emit(out, "note", text=text, warning=True)
    return held_out, calibration


def _quantize(config: Config, facts: Facts, folder: Path, rows: list[Ids], work: Path) -> Losses:
    """Quantize into `work/model`."""
    settings: dict[str, Any] = {"bits": config.bits, "group_size": config.group_size, "mse": config.mse}
    settings |= {"offload_to_disk": _is_large(facts), "offload_to_disk_path": str(work / "offload")}
    if config.group_size == -1:
        settings["act_group_aware"] = False  # it reorders groups, and GPTQModel refuses it without groups
    return quantize_folder(
        folder,
        rows,
        work,
        settings | config.gptq,
        half=(facts.config.get("dtype") or facts.config.get("torch_dtype")) == "float16",
        seed=config.seed,
        shard_size=parse_size(config.shard_size),
    )


def _is_large(facts: Facts) -> bool:
    """Whether the model in 16 bits takes more than half the memory; it is then offloaded to disk, which is slow."""
    weights = sum(math.prod(shape) for shape in facts.weights.values())
    return 2 * weights > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def _publish(folder: Path, made: Path, out: Path) -> None:
    """Move weights and quantization settings of GPTQModel into `out`, and copy all other files from the source.

    GPTQModel rewrites the tokenizer (another class, `fix_mistral_regex`) and the generation config (`do_sample`), and
    leaves a CSV of timings; these are not used.
    """
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    for weights in made.glob("model*.safetensors*"):
        weights.rename(out / weights.name)
    written = json.loads((made / "config.json").read_text(encoding="utf-8"))
    quantization = written["quantization_config"]
    quantization["meta"] = {name: value for name, value in quantization["meta"].items() if name in META}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = written["dtype"]
    config["quantization_config"] = quantization
    for name, content in (("config.json", config), ("quantize_config.json", quantization)):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in carried_files(folder):
        shutil.copyfile(path, out / path.name)


def _summary(losses: Losses, out: Path) -> dict[str, Any]:
    """GPTQ's loss over the modules, and the modules that were only rounded; a note names these."""
    known = {name: loss for name, loss in sorted(losses.items()) if loss is not None}
    fallback = sorted(losses.keys() - known.keys())
    if fallback:
        named = ", ".join(fallback[:5]) + (", …" if fallback[5:] else "")
        text = f"{len(fallback)} of {len(losses)} modules could not be calibrated and were only rounded: {named}"
        emit(out, "note", text=text, warning=True)
    worst = max(known, key=lambda name: known[name], default=None)
    return {
        "modules": len(losses),
        "fallback": fallback,
        "loss_mean": sum(known.values()) / len(known) if known else None,
        "loss_max": known[worst] if worst else None,
        "loss_max_module": worst,
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


STAGE = Stage(
    version=3,
    config=Config,
    run=run,
    headline=headline,
    leaves=Model(bits=lambda config: config.bits),
    check=check,
    check_model=check_model,
    rehearse=rehearse,
    needs=needs,
    more_memory=more_memory,
    facts=facts_after_quantizing,
    settings={"gptq": "gptqmodel.quantization.config:GPTQConfig"},
    libraries=("gptqmodel",),
    judges_only=("question",),
    card=True,
    describe=describe,
    figures=figures,
)
