"""LoRA merge: a base and its chain of adapters in, one plain model out, folded weight by weight.

No more than one weight is in memory at a time. While a weight is there, each layer that an adapter changes is compared
with PEFT's own layer under the same adapter, and the weight in the file with the fold.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from stages import Metrics, Stage
from stages.model import shards
from stages.model.facts import SIZE_PATTERN, Facts, Needs, parse_size
from stages.model.folder import carried_files, refuse_missing
from stages.model.inputs import Inputs
from stages.model.lora import Adapter, AdapterChain, layout, one_thread
from stages.model.probe import Difference, Parameters, proof, skeleton
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
    """Compare each folded layer with PEFT's own, and read each written weight again."""


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
    model, source = _read_folder(base)
    fold = _Fold(model, AdapterChain(adapters, layout(model)), source, prove=config.verify)
    if config.verify:
        emit(out, "note", text="compares each folded layer with PEFT's own, and each written weight with the fold")
    limit = parse_size(config.shard_size)
    with one_thread():
        count = shards.write(source, fold.weight, out, limit, _compare_bits if config.verify else None)
    fold.check()
    shutil.copy(base / "config.json", out)
    for path in carried_files(*map(Path, inputs.model)):
        shutil.copy(path, out)
    metrics: dict[str, Any] = {
        "adapters": len(adapters),
        "shards": count,
        "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")),
    }
    if config.verify:
        _compare_entries(source, _read_folder(out)[1])
        metrics |= fold.figures()
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


# The fold and its proof


class _Fold:
    """A base with its adapters, folded weight by weight; with `prove` each changed layer is compared with PEFT's."""

    def __init__(
        self, model: "PreTrainedModel", chain: AdapterChain, source: shards.Weights, *, prove: bool = True
    ) -> None:
        self.model, self.chain, self.source = model, chain, source
        self.names = _whole_names(source, model)
        self.due = self._due() if prove else {}
        self.found: list[Difference] = []
        self.trouble: StageError | None = None
        self._rooms: dict[torch.dtype, torch.Tensor] = {}

    def _places(self, name: str) -> tuple[str, ...]:
        """The name of a weight of the file in the model, and the other names of the same weight."""
        whole = self.names[name]
        return (whole, *self.chain.layout.tied.get(whole, ()))

    def _due(self) -> dict[str, dict[str, dict[str, str]]]:
        """Weight of the file → the changed modules that are proved with it → their parameters → names in the file.

        A module is proved with the largest of its weights. Two modules with one weight are both proved with it.
        """
        modules: dict[str, dict[str, str]] = {}
        for name in self.names:
            for place in self._places(name):
                module, _, part = place.rpartition(".")
                modules.setdefault(module, {}).setdefault(part, name)
        for name, whole in self.names.items():  # of two names that are both in the file, each is proved
            module, _, part = whole.rpartition(".")
            modules[module][part] = name
        touched = {module for adapter in self.chain.adapters for module in adapter.modules}
        due: dict[str, dict[str, dict[str, str]]] = {}
        for module, parts in modules.items():
            places = [place for name in parts.values() for place in self._places(name)]
            if not touched.isdisjoint(place.rpartition(".")[0] for place in places):
                due.setdefault(max(parts.values(), key=self.source.size), {})[module] = parts
        return due

    def weight(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """The folded weight, in the dtype of the stored one; it may be overwritten by the next call.

        Raises:
            StageError: an adapter does not fit.
        """
        import torch

        modules = self.due.get(name)
        if modules is None or self.trouble:
            folded = weight
            for _, _, after in self.chain.steps(self.names[name], weight):
                folded = after
            return self._copy(folded, weight.dtype)
        before = {
            part: self.source.read(part).float()
            for parts in modules.values()
            for part in parts.values()
            if part != name
        }
        before[name] = after = self._copy(weight, torch.float32)
        steps = (self.chain.steps(self.names[part], one) for part, one in before.items())
        for step in zip(*steps, strict=True):
            taken = dict(zip(before, step, strict=True))
            for module, parts in modules.items():
                sides = ({part: taken[one][side] for part, one in parts.items()} for side in (1, 2))
                self._prove(module, step[0][0], *sides)
            after = taken[name][2]
        return self._copy(after, weight.dtype)

    def _copy(self, weight: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
        """A weight in another dtype, always in the same memory; the weight itself if it has the dtype.

        The system takes longer to hand out memory than to copy. And of the memory for one weight after the other the
        allocator of C keeps more with each layer: it gives back what it had at the end of its heap only.
        """
        import torch

        if weight.dtype == dtype:
            return weight
        if dtype not in self._rooms or self._rooms[dtype].numel() < weight.numel():
            self._rooms.pop(dtype, None)  # first free the memory
            self._rooms[dtype] = torch.empty(weight.numel(), dtype=dtype)
        return self._rooms[dtype][: weight.numel()].view(weight.shape).copy_(weight)

    def check(self) -> None:
        """Check that every tensor of every adapter was folded, and that the fold is what PEFT would compute.

        A tensor without a place is the reason for a difference, so it is reported first.

        Raises:
            StageError: it is not; names the adapter or the layer.
        """
        self.chain.check_used()
        if self.trouble:
            raise self.trouble

    def figures(self) -> Metrics:
        """`layers`: how many layers were compared with PEFT's; `layer_difference`: the largest |difference| of an
        output as a share of the largest |output| of its layer.
        """
        shares = [one.largest / one.outputs for one in self.found if one.outputs]
        return {"layers": len(shares), "layer_difference": max(shares, default=0.0)}

    def _prove(self, module: str, adapter: Adapter, before: Parameters, after: Parameters) -> None:
        tied = (f"{module}.weight", *self.chain.layout.tied.get(f"{module}.weight", ()))
        stored = next((name for name in tied if adapter.has_rows(name)), f"{module}.weight")  # rows have one name
        try:
            like = self.model.get_submodule(module)
        except AttributeError:
            self._note(f"it has no `{module}`, which the adapter `{adapter.folder}` changes")
            return
        found = proof(stored.rpartition(".")[0], like, adapter, before, after)
        if isinstance(found, str):
            self._note(f"`{module}` after the adapter `{adapter.folder}`: {found}")
        elif not found.small:
            trouble = f"differ from those of PEFT by up to {found.largest:.2g} of {found.outputs:.2g}"
            self._note(f"the outputs of `{module}` after the adapter `{adapter.folder}` {trouble}")
        else:
            self.found.append(found)

    def _note(self, trouble: str) -> None:
        self.trouble = self.trouble or _other(trouble)


def _read_folder(folder: Path) -> tuple["PreTrainedModel", shards.Weights]:
    """
    Raises:
        StageError: transformers does not find every weight in the folder.
    """
    model, missing = skeleton(folder)
    refuse_missing(str(folder), missing)
    return model, shards.Weights(folder)


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


def _compare_bits(name: str, folded: "torch.Tensor", written: "torch.Tensor") -> None:
    """
    Raises:
        StageError: the written weight is not, bit for bit, the folded one.
    """
    import torch

    wide = torch.int64 if folded.nbytes % 8 == 0 else torch.uint8
    if not torch.equal(written.reshape(-1).view(wide), folded.contiguous().reshape(-1).view(wide)):
        raise _other(f"`{name}` is not the folded weight")


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
