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
from stages.runtime.interfaces import require

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

    Weights of a base model on the Hub may lack the prefix that the language-model class adds, and transformers renames
    some when it loads a file, such as the output embedding of GPT-NeoX.
    """
    from transformers import conversion_mapping, core_model_loading

    require("transformers", conversion_mapping, "get_model_conversion_mapping")
    require("transformers", core_model_loading, "WeightRenaming")
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    transforms = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, core_model_loading.WeightRenaming)]
    prefix = model.base_model_prefix

    def whole(name: str) -> str:
        renamed = name
        for one in renamings:
            renamed = one.rename_source_key(renamed)[0]
        found = next((other for other in (name, renamed) if other in known), name)
        return found if found in known or found.startswith(f"{prefix}.") else f"{prefix}.{found}"

    return {name: whole(name) for name in weights.entries}


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
    both = _Both(model, AdapterChain(chain[1:], layout(model)), shards.Weights(Path(chain[0])), shards.Weights(merged))
    _compare_entries(both.source, both.written)
    found = [one for module, parts in both.modules().items() for one in both.compare(module, parts)]
    shares = [one.largest / one.outputs for one in found if one.outputs]
    return {"layers": len(shares), "layer_difference": max(shares, default=0.0)}


class _Both:
    """A base with its adapters, and what was written."""

    def __init__(
        self, model: "PreTrainedModel", chain: AdapterChain, source: shards.Weights, written: shards.Weights
    ) -> None:
        self.model, self.chain, self.source, self.written = model, chain, source, written
        self.names = _whole_names(source, model)
        self.touched = {module for adapter in chain.adapters for module in adapter.modules}

    def _places(self, name: str) -> tuple[str, ...]:
        """The name of a weight of the file in the model, and the other names of the same weight."""
        whole = self.names[name]
        return (whole, *self.chain.layout.tied.get(whole, ()))

    def modules(self) -> dict[str, dict[str, str]]:
        """Module → its parameters, such as `weight` → their names in the file."""
        modules: dict[str, dict[str, str]] = {}
        for name in self.names:
            for place in self._places(name):
                module, _, part = place.rpartition(".")
                modules.setdefault(module, {}).setdefault(part, name)
        for name, whole in self.names.items():  # of two names that are both in the file, each is compared
            module, _, part = whole.rpartition(".")
            modules[module][part] = name
        return modules

    def compare(self, module: str, parts: Mapping[str, str]) -> list[Difference]:
        """Compare the written weights of a module with the fold, and after each adapter the fold with PEFT's layer.

        Raises:
            StageError: they differ.
        """
        before = {part: self.source.read(name) for part, name in parts.items()}
        after, found = before, []
        places = [place for name in parts.values() for place in self._places(name)]
        if not self.touched.isdisjoint(place.rpartition(".")[0] for place in places):
            steps = [self.chain.steps(self.names[name], before[part].float()) for part, name in parts.items()]
            for step in zip(*steps, strict=True):
                before, after = ({part: one[side] for part, one in zip(parts, step, strict=True)} for side in (1, 2))
                found.append(self._prove(module, step[0][0], before, after))
        for part, name in parts.items():
            if not _same(self.written.read(name), after[part]):
                raise _other(f"`{name}` is not the folded weight")
        return found

    def _prove(
        self,
        module: str,
        adapter: Adapter,
        before: Mapping[str, "torch.Tensor"],
        after: Mapping[str, "torch.Tensor"],
    ) -> Difference:
        try:
            like = self.model.get_submodule(module)
        except AttributeError:
            raise _other(f"it has no `{module}`, which the adapter `{adapter.folder}` changes") from None
        tied = (f"{module}.weight", *self.chain.layout.tied.get(f"{module}.weight", ()))
        stored = next((name for name in tied if adapter.has_rows(name)), f"{module}.weight")  # rows have one name
        found = proof(stored.rpartition(".")[0], like, adapter, before, after)
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
    wide = torch.int64 if rounded.nbytes % 8 == 0 else torch.uint8
    return bool(torch.equal(written.reshape(-1).view(wide), rounded.reshape(-1).view(wide)))


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
