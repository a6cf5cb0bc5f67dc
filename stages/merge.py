"""LoRA merge: a base and its chain of adapters in, one plain model out, folded weight by weight.

No more than one weight is in memory at a time. The written folder is then compared, weight by weight, with the fold,
and each layer that an adapter changes with PEFT's own layer under the same adapter.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from stages import Metrics, Stage
from stages.model import shards
from stages.model.facts import SIZE_PATTERN, Facts, Needs, parse_size
from stages.model.folder import carried_files, refuse_missing
from stages.model.inputs import Inputs
from stages.model.lora import Adapter, AdapterChain, layout
from stages.model.probe import Difference, proof, skeleton
from stages.model.references import ModelRef
from stages.runtime.errors import Problem, StageError
from stages.runtime.events import emit
from stages.runtime.figures import Figure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Config(BaseModel):
    """Settings of `merge`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelRef
    shard_size: str = Field(default="4GB", pattern=SIZE_PATTERN)
    """Size of a weight file at most, such as `2GB`."""
    verify: bool = True
    """Read the result again, and compare each folded layer with PEFT's own."""


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Whether adapters can be folded into the model."""
    if "quantization_config" in facts.config:
        return [("model", f"{facts.source} is quantized, and adapters cannot be folded into it; put `merge` before")]
    return []


def needs(config: Config, facts: Facts) -> Needs:
    """Memory: the largest weight, for `verify` also as it was written. Disk: the result, in the base's dtype.

    Not counted: the adapters, and the float32 copies of a weight that an adapter changes.
    """
    if not facts.weights:
        return Needs(0, 0)
    largest = max(map(math.prod, facts.weights.values())) * facts.stored // facts.parameters
    return Needs(2 * largest if config.verify else largest, disk=facts.stored)


def headline(metrics: Mapping[str, Any]) -> str:
    """The number of adapters, and the largest difference to PEFT's layers if it was measured."""
    folded = f"{metrics['adapters']} adapter{'s' if metrics['adapters'] != 1 else ''} folded"
    if "layer_difference" not in metrics:
        return folded
    return f"{folded}, largest difference to PEFT's layers {metrics['layer_difference']:.1e}"


def figures(metrics: Metrics) -> list[Figure]:
    """The largest difference to PEFT's layers as a share of the largest output, if it was measured."""
    if "layer_difference" not in metrics:
        return []
    name = "largest difference to the outputs of PEFT's layers"
    return [Figure(name, "", f"{metrics['layer_difference']:.1e}")]


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Write the merged model into `out`, weight by weight, and copy tokenizer and templates of the last folder."""
    base, adapters = Path(inputs.model[0]), list(inputs.model[1:])
    model, missing = skeleton(base)
    refuse_missing(str(base), missing)
    chain, source = AdapterChain(adapters, layout(model)), shards.Weights(base)
    names = _whole_names(source, model)
    limit = parse_size(config.shard_size)
    count = shards.write(source, lambda name, weight: chain.fold(names[name], weight), out, limit)
    chain.check_used()
    shutil.copy(base / "config.json", out)
    for path in carried_files(*map(Path, inputs.model)):
        shutil.copy(path, out)
    metrics: dict[str, Any] = {
        "adapters": len(adapters),
        "shards": count,
        "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
    }
    if config.verify:
        emit(out, "note", text="compares each weight with the fold, and each folded layer with PEFT's own")
        metrics |= verify(inputs.model, out)
    return metrics


def _whole_names(weights: shards.Weights, model: "PreTrainedModel") -> dict[str, str]:
    """The name of each weight in a file → its name in the language model.

    Weights of a base model on the Hub may lack the prefix that the language-model class adds.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = model.base_model_prefix
    return {
        name: name if name in known or name.startswith(f"{prefix}.") else f"{prefix}.{name}" for name in weights.entries
    }


# The proof


def verify(chain: Sequence[str], merged: Path) -> dict[str, Any]:
    """Prove a merged folder against its chain, with one layer in memory at a time.

    Transformers finds all weights in the folder. It has the weights of the base, and no other. Each of them is, bit for
    bit, the fold of the base's weight, rounded once. Each layer that an adapter changes gives, in float32 and before it
    is rounded, the outputs of PEFT's own layer under that adapter, not merged, on what the adapters before left.

    Args:
        chain: the folder of the base, and those of the adapters.
        merged: the folder to prove.

    Returns:
        `layers`: how many layers were compared with PEFT's; `layer_difference`: the largest |difference| of an output
        as a share of the largest |output| of its layer.

    Raises:
        StageError: the folder is not the chain; names the weight or the layer.
    """
    model, missing = skeleton(merged)
    refuse_missing(str(merged), missing)
    adapters = AdapterChain(chain[1:], layout(model))
    source, written = shards.Weights(Path(chain[0])), shards.Weights(merged)
    _compare_entries(source, written)
    names = _whole_names(source, model)
    touched = {module for adapter in adapters.adapters for module in adapter.modules}
    found: list[Difference] = []
    for module, parts in _modules(names, adapters.layout.tied).items():
        places = [place for name in parts.values() for place in _places(names[name], adapters.layout.tied)]
        if touched.isdisjoint(place.rpartition(".")[0] for place in places):
            steps: dict[str, Any] = {}
        else:
            steps = {part: adapters.steps(names[name], source.read(name).float()) for part, name in parts.items()}
        last = {part: source.read(name) for part, name in parts.items()}
        for step in zip(*steps.values(), strict=True):
            before = {part: one for part, (_, one, _) in zip(steps, step, strict=True)}
            last = {part: one for part, (_, _, one) in zip(steps, step, strict=True)}
            found.append(_prove(model, module, step[0][0], before, last))
        for part, name in parts.items():
            if not _same(written.read(name), last[part]):
                raise _other(f"`{name}` is not the folded weight")
    shares = [one.largest / one.outputs for one in found if one.outputs]
    return {"layers": len(shares), "layer_difference": max(shares, default=0.0)}


def _places(name: str, tied: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return (name, *tied.get(name, ()))


def _modules(names: Mapping[str, str], tied: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, str]]:
    """Module → its parameters, such as `weight` → the names of the weights in the file. Tied modules are all in it."""
    modules: dict[str, dict[str, str]] = {}
    for name, whole in names.items():
        for place in _places(whole, tied):
            module, _, part = place.rpartition(".")
            modules.setdefault(module, {})[part] = name
    return modules


def _prove(
    model: "PreTrainedModel",
    module: str,
    adapter: Adapter,
    before: Mapping[str, "torch.Tensor"],
    after: Mapping[str, "torch.Tensor"],
) -> Difference:
    """Compare a module after an adapter with what PEFT makes of it."""
    try:
        like = model.get_submodule(module)
    except AttributeError:
        raise _other(f"it has no `{module}`, which the adapter `{adapter.folder}` changes") from None
    found = proof(module, like, adapter, before, after)
    if isinstance(found, str):
        raise _other(f"`{module}` after the adapter `{adapter.folder}`: {found}")
    if not found.small:
        trouble = f"differ from those of PEFT by up to {found.largest:.2g} of {found.outputs:.2g}"
        raise _other(f"the outputs of `{module}` after the adapter `{adapter.folder}` {trouble}")
    return found


def _compare_entries(source: shards.Weights, written: shards.Weights) -> None:
    """
    Raises:
        StageError: the written files lack a weight, or have one that the base has not.
    """
    for name in sorted(source.entries.keys() | written.entries.keys()):
        wanted, entry = source.entries.get(name), written.entries.get(name)
        if wanted is None or entry is None:
            raise _other(f"`{name}` is missing" if entry is None else f"`{name}` is not a weight of the base")
        if (wanted["dtype"], wanted["shape"]) != (entry["dtype"], entry["shape"]):
            raise _other(f"`{name}` has another dtype or shape than in the base")


def _same(written: "torch.Tensor", weight: "torch.Tensor") -> bool:
    """Whether a written weight is, bit for bit, this one in its dtype."""
    import torch

    rounded = weight.to(written.dtype).contiguous()
    return bool(torch.equal(written.reshape(-1).view(torch.uint8), rounded.reshape(-1).view(torch.uint8)))


def _other(trouble: str) -> StageError:
    return StageError(f"the merged model is not the chain: {trouble}; please report this")


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
