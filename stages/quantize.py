"""4-bit GPTQ: a whole model and calibration rows in, a folder that transformers and vLLM load as it is out.

What it cost is measured on rows that calibration never sees: the original first, then the written folder in a fresh
process, which also answers a question, and rounding to nearest beside it. The same seed gives the same weights, bit
for bit.
"""

import contextlib
import gc
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stages import Metrics, Model, Stage
from stages.measuring import quality
from stages.measuring.calibration import MEASURED, Calibration, calibration_rows, split
from stages.measuring.metrics import Measured, compare_models
from stages.model.facts import SIZE_PATTERN, Facts, Needs, parse_size, read_facts
from stages.model.folder import carried_files
from stages.model.generation import load_engine
from stages.model.inputs import Inputs
from stages.model.references import ModelRef
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit
from stages.runtime.figures import Figure, count, number, word
from stages.runtime.processes import in_fresh_process

GROUPS = (1024, 512, 256, 128, 64, 32, 16)
# What says how the weights came about; the rest of GPTQModel's `meta` is defaults and local paths.
META = ("quantizer", "damp_percent", "damp_auto_increment", "act_group_aware", "true_sequential", "mse")
# Plain transformers loads such folders wrongly, or not at all: a quantized head comes out random, silently.
OWN = ("bits", "group_size", "mse")  # settings of GPTQConfig that the stage has itself
UNREADABLE = ("lm_head", "rotation", "adapter", "activation")
LAYER = re.compile(r"\.\d+\.(?!.*(embed|\.c_attn|\.c_proj|\.c_fc)).*weight$")  # GPT-2's c_* are transposed

Ids = list[int]
Sums = Sequence[tuple[float, float]]  # of each row its loss in nats and its tokens
Losses = dict[str, float | None]  # a module's loss; None where it was only rounded


class Config(BaseModel):
    """Settings of `quantize`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelRef
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 32
    """Weights that share a scale; -1 for a whole row."""
    mse: float = Field(default=2.4, ge=0)
    """The exponent of the error that the scale of a group is searched for; 0 takes its largest weight, in half the
    time."""
    gptq: dict[str, Any] = {}
    """Other settings of GPTQModel's GPTQConfig (`desc_act`, `sym`, `damp_percent`, …)."""
    calibration: Calibration
    question: str = "你好，请介绍一下你自己。"
    """Asked of the result in a fresh process."""
    shard_size: str = Field(default="4GB", pattern=SIZE_PATTERN)
    seed: int = Field(default=42, ge=0, lt=2**32)


def check(config: Config) -> list[Problem]:
    """What the settings alone show."""
    problems: list[Problem] = []
    for name in OWN:
        if name in config.gptq:
            problems.append((f"gptq.{name}", f"`{name}` is a setting of the stage; write it beside `gptq`"))
    for name in UNREADABLE:
        if config.gptq.get(name):
            problems.append((f"gptq.{name}", f"plain transformers cannot load a model with `{name}`; leave it out"))
    for name in ("format", "checkpoint_format"):
        if (form := config.gptq.get(name, "gptq")) != "gptq":
            problems.append((f"gptq.{name}", f"transformers and vLLM load `gptq`, not `{form}`; leave it out"))
    if config.gptq.get("mock_quantization"):
        problems.append(("gptq.mock_quantization", "this rounds without calibration; leave it out"))
    for name, settings in (config.gptq.get("dynamic") or {}).items():
        if name.startswith("-") or {"bits", "group_size"} & set(settings or {}):
            text = f"plain transformers cannot load a model whose layers `{name}` differ; leave it out"
            problems.append(("gptq.dynamic", text))
    return problems


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Whether the model is whole, not quantized yet, and has groups of this size."""
    problems: list[Problem] = []
    if facts.adapters:
        problems.append(("model", "an adapter cannot be quantized; put a `merge` stage before"))
    if "quantization_config" in facts.config:
        problems.append(("model", f"{facts.source} is quantized already; start from the model before"))
    return problems + _check_groups(config.group_size, facts.weights)


def needs(config: Config, facts: Facts) -> Needs:
    """Memory: the model as it is stored, whose perplexity is measured. Disk: the result, twice when GPTQModel keeps
    the model on the disk while it works.

    Not in it: GPTQ's Hessians, the hidden states of the calibration rows, and what the original leaves to compare with.
    """
    size = _size(config, facts)
    on_disk = config.gptq.get("offload_to_disk", _is_large(facts))
    return Needs(facts.stored, disk=2 * size if on_disk else size)


def facts_after_quantizing(config: Config, facts: Facts) -> Facts:
    """What later stages can know of the result: it is quantized, so it can be asked but not trained."""
    after = {**facts.config, "quantization_config": {"bits": config.bits}}
    return replace(facts, config=after, stored=_size(config, facts))


def _size(config: Config, facts: Facts) -> int:
    """Bytes of the result: `bits` for a weight in a numbered block, 16 for a scale of each group and for all else."""
    size = 0
    for name, shape in facts.weights.items():
        count = math.prod(shape)
        if len(shape) == 2 and re.search(r"\.\d+\.", name) and "embed" not in name:
            size += count * config.bits // 8 + 2 * (count // (config.group_size if config.group_size > 0 else shape[1]))
        else:
            size += 2 * count
    return size


def _check_groups(group: int, weights: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    """GPTQModel takes a last group that is not full, and vLLM then refuses the folder."""
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
    """The stage's key figure for people."""
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


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Quantize, save, and let a fresh process try the folder."""
    folder, out = Path(inputs.model[0]).resolve(), out.resolve()
    facts = replace(read_facts(folder), adapters=len(inputs.model) - 1)
    if problems := [*check(config), *check_model(config, facts)]:
        raise StageError("\n".join(f"`{name}`: {text}" for name, text in problems))
    rows = calibration_rows(config.calibration, inputs.read, folder, config.seed)
    held_out, calibration = split(rows, config.calibration.samples, config.seed)
    if len(calibration) < config.calibration.samples or len(held_out) < MEASURED:
        asked = f"{len(calibration)} of {config.calibration.samples} rows to calibrate with"
        emit(out, "note", text=f"data is short: {asked}, {len(held_out)} of {MEASURED} to measure perplexity on")
    emit(out, "note", text=f"measures perplexity on {len(held_out)} rows before")
    work = out / ".gptq"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    before = _before(folder, held_out, work / "original.safetensors")
    emit(out, "note", text=f"quantizes to {config.bits} bits, calibrated on {len(calibration)} rows")
    losses = _quantize(config, facts, folder, calibration, work)
    _publish(folder, work / "model", out)
    _empty()
    emit(
        out,
        "note",
        text="a fresh process measures it after, rounds to nearest for comparison, and answers the question",
    )
    tried = _tried(config, out, folder, work / "original.safetensors", held_out)
    shutil.rmtree(work)
    return {
        **_quality_of(config, before, tried, out),
        "question": config.question,
        "answer": tried["answer"],
        "perplexity_rows": len(held_out),
        "perplexity_tokens": int(sum(count for _, count in before)),
        "bytes_before": _bytes(folder),
        "bytes_after": _bytes(out),
        **_summary(losses, out),
        "calibration_rows": len(calibration),
        "calibration_tokens": sum(map(len, calibration)),
    }


def _before(folder: Path, held_out: list[Ids], file: Path) -> Sums:
    engine = load_engine([str(folder)])
    losses = quality.reference(engine.model, held_out, file)
    del engine
    _empty()
    if not math.isfinite(found := _perplexity(losses)):
        raise StageError(f"the perplexity of `{folder}` is {found} before quantization; look at the stage before")
    return losses


def _empty() -> None:
    """Give memory back that the next model needs."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _perplexity(losses: Sums) -> float:
    mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


def _quantize(config: Config, facts: Facts, folder: Path, rows: list[Ids], work: Path) -> Losses:
    """Quantize into `work/model`."""
    # Its thread pool fails with fewer than two workers, and it would compile a packer for half a minute.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(12, max(2, (os.cpu_count() or 1) // 2))))
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig
    from transformers import set_seed

    set_seed(config.seed)
    settings = {"offload_to_disk": _is_large(facts), "offload_to_disk_path": str(work / "offload")}
    if config.group_size == -1:
        settings["act_group_aware"] = False  # it reorders groups, and refuses when there are none
    settings |= config.gptq
    try:
        wanted = GPTQConfig(bits=config.bits, group_size=config.group_size, mse=config.mse, **settings)
    except (TypeError, ValueError) as error:
        raise StageError(f"GPTQModel refuses the settings of `quantize`: {error}") from None
    # Left to itself, it turns float16 into bfloat16 on a CPU.
    half = (facts.config.get("dtype") or facts.config.get("torch_dtype")) == "float16"
    dtype, device = torch.float16 if half else torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu"
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(work):  # GPTQModel writes a folder `logs` wherever it runs
        model = GPTQModel.load(str(folder), wanted, device=device, dtype=dtype)
        examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
        log = model.quantize(examples, batch_size=1, calibration_data_min_length=1)
        model.save(str(work / "model"), max_shard_size=parse_size(config.shard_size))
    layers = model.extract_layers_node()[0]
    return {f"{layers}.{row['layer']}.{row['module']}": _loss(row["loss"]) for part in log.values() for row in part}


def _is_large(facts: Facts) -> bool:
    """Does the model in 16 bits take more than half the memory? Keeping it on disk is slow."""
    weights = sum(math.prod(shape) for shape in facts.weights.values())
    return 2 * weights > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def _loss(text: str) -> float | None:
    """The log has `0.0000279413`, or `fallback(rtn): …`, `rtn fallback` or 999999999 for plain rounding."""
    try:
        loss = float(text)
    except ValueError:
        return None
    return loss if loss < 999999999 else None


def _publish(folder: Path, made: Path, out: Path) -> None:
    """Weights and quantization settings come from GPTQModel, all else from the source, byte for byte.

    GPTQModel rewrites the tokenizer (another class, `fix_mistral_regex`) and the generation config
    (`do_sample`), and leaves a CSV of timings.
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


def _tried(config: Config, out: Path, folder: Path, reference: Path, held_out: list[Ids]) -> dict[str, Any]:
    """What a fresh process gets from the written folder."""
    asked = [{"role": "user", "content": config.question}]
    request = {"model": str(out), "original": str(folder), "reference": str(reference), "texts": held_out}
    found = in_fresh_process("stages.measuring.quality", {**request, "messages": asked, "max_new_tokens": 64})
    if found["missing"]:
        names = ", ".join(found["missing"][:5])
        raise StageError(f"transformers cannot load the quantized model: it finds no {names}; quantize all layers")
    return found


def _quality_of(config: Config, before: Sums, tried: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The figures of the quantized model and of plain rounding, both against the original.

    Raises:
        StageError: the quantized model's perplexity is no number.
    """
    after = _perplexity(tried["quantized"]["losses"])
    if not math.isfinite(after):
        raise StageError(f"the quantized model's perplexity is {after}; use more rows or more `bits`")
    original = Measured(before)
    quantized = Measured([tuple(row) for row in tried["quantized"]["losses"]])
    found = {"quantized": _against(original, quantized, tried["quantized"], config.seed), "rounded": tried["rounded"]}
    if "why" not in tried["rounded"]:
        rounded = Measured([tuple(row) for row in tried["rounded"]["losses"]])
        found["rounded"] = _against(original, rounded, tried["rounded"], config.seed)
        change = compare_models("perplexity", quantized, rounded, config.seed)
        _warn(change, tried["quantized"]["kl"] < tried["rounded"]["kl"], out)
    return {"perplexity_before": _perplexity(before), "perplexity_after": after, **found}


def _against(original: Measured, made: Measured, tried: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A model's figures against the original's, or why there are none."""
    change = compare_models("perplexity", made, original, seed)
    if change["why"] is not None:
        return {"why": change["why"]}
    figures = {key: tried[key] for key in ("kl", "top1_agreement", "layer_errors")}
    return {"perplexity": _perplexity(tried["losses"]), "ratio": change["change"], "ratio_ci": change["ci"], **figures}


def _warn(change: Mapping[str, Any], closer: bool, out: Path) -> None:
    """Tell when plain rounding is better beyond chance. Not where GPTQ is `closer` to the original by KL: with 8 bits,
    rounding may happen to lower the perplexity."""
    if change["better"] == 0 and not closer:
        low, high = change["ci"]
        times = f"{change['change']:.3f} times the perplexity, 95 % CI {low:.3f} to {high:.3f}"
        way = "calibrate with more and longer rows, of the kind that the model will see"
        emit(out, "note", text=f"GPTQ lost more than plain rounding does ({times}): {way}")


def _summary(losses: Losses, out: Path) -> dict[str, Any]:
    """GPTQ's loss over the modules; those it could not calibrate are named, and told."""
    known = {name: loss for name, loss in sorted(losses.items()) if loss is not None}
    fallback = sorted(losses.keys() - known.keys())
    if fallback:
        named = ", ".join(fallback[:5]) + (", …" if fallback[5:] else "")
        text = f"{len(fallback)} of {len(losses)} modules could not be calibrated and were only rounded: {named}"
        emit(out, "note", text=text)
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
    version=2,
    config=Config,
    run=run,
    headline=headline,
    leaves=Model(bits=lambda config: config.bits),
    check=check,
    check_model=check_model,
    needs=needs,
    facts=facts_after_quantizing,
    settings={"gptq": "gptqmodel.quantization.config:GPTQConfig"},
    libraries=("gptqmodel",),
    judges_only=("question",),
    card=True,
    describe=describe,
    figures=figures,
)
