"""LoRA merge: a base and its chain of adapters in, one plain model out, folded shard by shard.

Only one shard of the base is in memory while adapters are folded in. The written folder is then loaded as any model
folder, and its logits are compared with those of the base under PEFT's own adapters, the last adapter unfolded.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from stages import Metrics, Stage
from stages.model.facts import SIZE_PATTERN, Facts, Needs, parse_size, weight_files
from stages.model.folder import carried_files, load_model
from stages.model.inputs import Inputs
from stages.model.lora import AdapterChain, fold_into
from stages.model.references import ModelRef
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit
from stages.runtime.figures import Figure

if TYPE_CHECKING:
    import torch


class Config(BaseModel):
    """Settings of `merge`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelRef
    shard_size: str = Field(default="4GB", pattern=SIZE_PATTERN)
    """Size of a weight file at most, such as `2GB`."""
    verify: bool = True
    """Compare logits afterwards; needs memory for the whole model, twice."""


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Whether adapters can be folded into the model."""
    if "quantization_config" in facts.config:
        return [("model", f"{facts.source} is quantized, and adapters cannot be folded into it; put `merge` before")]
    return []


def needs(config: Config, facts: Facts) -> Needs:
    """Memory: a shard of the result, and for `verify` two models in float32. Disk: the result, in the base's dtype.

    Not counted: the adapters, and the float32 copy of the weight that is being folded.
    """
    if not facts.weights:
        return Needs(0, 0)
    largest = max(map(math.prod, facts.weights.values())) * facts.stored // facts.parameters
    limit = parse_size(config.shard_size)
    shard = facts.stored if facts.stored <= limit else max(largest, limit - largest)
    return Needs(max(shard, 8 * facts.parameters) if config.verify else shard, disk=facts.stored)


def headline(metrics: Mapping[str, Any]) -> str:
    """The number of adapters, and the largest logit difference if it was measured."""
    folded = f"{metrics['adapters']} adapter{'s' if metrics['adapters'] != 1 else ''} folded"
    return (
        f"{folded}, largest logit difference {metrics['logit_difference']:.1e}"
        if "logit_difference" in metrics
        else folded
    )


def figures(metrics: Metrics) -> list[Figure]:
    """The largest logit difference, if it was measured."""
    if "logit_difference" not in metrics:
        return []
    name = "largest logit difference to the unmerged adapters"
    return [Figure(name, "", f"{metrics['logit_difference']:.1e}")]


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Write the merged model into `out`, shard by shard, and copy tokenizer and templates of the last folder."""
    base, adapters = Path(inputs.model[0]), list(inputs.model[1:])
    chain = AdapterChain(adapters)
    files = _write_shards(_folded(base, chain), out, parse_size(config.shard_size))
    chain.check_used()
    shutil.copy(base / "config.json", out)
    carried = carried_files(Path(inputs.model[-1]))
    for path in carried:
        shutil.copy(path, out)
    metrics: dict[str, Any] = {
        "adapters": len(adapters),
        "shards": files,
        "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
    }
    if config.verify:
        emit(out, "note", text="compares the logits of the merged model with those of base and adapters")
        metrics |= logit_difference(inputs.model, out)
    return metrics


def _folded(base: Path, chain: AdapterChain) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The base's weights in file order, each with the chain folded in."""
    from safetensors import safe_open

    for shard in weight_files(base):
        with safe_open(str(shard), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                weight = folded = file.get_tensor(name)
                # Weights of a base model on the Hub may lack the prefix that the language-model class adds.
                for whole in (name, *(f"{part}.{name}" for part in chain.parts)):
                    folded = chain.fold(whole, weight) if folded is weight else folded
                yield name, folded


def _write_shards(weights: Iterator[tuple[str, "torch.Tensor"]], out: Path, limit: int) -> int:
    """Write tensors in their order into files of at most `limit` bytes each; returns the number of files."""
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        save_file(shard, out / f"part-{len(names):05}.safetensors", metadata={"format": "pt"})
        names.append(list(shard))
        shard, size = {}, 0

    for name, weight in weights:
        weight_bytes = weight.numel() * weight.element_size()
        if shard and size + weight_bytes > limit:
            flush()
        shard[name] = weight.contiguous()
        size, total = size + weight_bytes, total + weight_bytes
    flush()
    _name_shards(out, names, total)
    return len(names)


def _name_shards(out: Path, names: list[list[str]], total: int) -> None:
    """Rename the files as transformers expects, and write an index if there are several."""
    if len(names) == 1:
        (out / "part-00000.safetensors").rename(out / "model.safetensors")
        return
    index = {}
    for number, tensors in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        (out / f"part-{number:05}.safetensors").rename(out / file)
        index.update(dict.fromkeys(tensors, file))
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def logit_difference(chain: Sequence[str], merged: Path) -> dict[str, float]:
    """Compare the logits of the merged model with those of its chain on 64 tokens, in float32.

    The chain is the base under PEFT's own adapters, the last one active and not folded, so the comparison also checks
    our folding. With a base in 16 bits, the folded weights are compared before they are rounded, and the written
    weights must be exactly the rounded ones.

    Returns:
        `logit_difference`: the largest |logits(merged) − logits(chain)|; `largest_logit`: the largest |logit| of the
        chain.

    Raises:
        StageError: the logits differ, or a written weight is not the folded one.
    """
    import torch
    from peft import PeftModel

    ids = torch.arange(64).reshape(2, 32) * 7 + 3
    with torch.no_grad():
        model: Any = load_model(chain[:1])
        ids = ids % model.get_input_embeddings().weight.shape[0]
        for folder in chain[1:]:
            model = PeftModel.from_pretrained(model, folder).eval()
            if folder != chain[-1]:  # the next adapter was trained on this one folded
                model = model.merge_and_unload()
        expected = model(input_ids=ids).logits
        model = load_model(chain[:1])
        fold_into(model, chain[1:])
        difference = float((model(input_ids=ids).logits - expected).abs().max())
        written = dict(load_model([str(merged)], dtype="auto").named_parameters())
        wrong = [name for name, weight in model.named_parameters() if not _same(written.get(name), weight)]
    largest = float(expected.abs().max())
    if wrong or not difference <= 1e-4 * max(1.0, largest / 10):
        text = f"`{wrong[0]}` is not the folded weight" if wrong else f"its logits differ by up to {difference:.3g}"
        raise StageError(f"the merged model is not the chain: {text}; please report this")
    return {"logit_difference": difference, "largest_logit": largest}


def _same(written: "torch.Tensor | None", weight: "torch.Tensor") -> bool:
    import torch

    return written is not None and torch.equal(written, weight.to(written.dtype))


STAGE = Stage(
    version=1,
    config=Config,
    run=run,
    headline=headline,
    check_model=check_model,
    needs=needs,
    facts=lambda config, facts: replace(facts, adapters=0),
    card=True,
    figures=figures,
)
