"""LoRA adapters folded into weights: W ← W + scale · B A, adapter after adapter, in float32, rounded once.

Training stages start from a folded chain, and `merge` writes one shard by shard. Both call `AdapterChain.fold` on
weights in the dtype of the base, so a stage starts from the very weights that `merge` would write. LoRA is Hu et al.
(arXiv 2106.09685), the scale of rsLoRA Kalajdzievski (2312.03732), DoRA Liu et al. (2402.09353); files are PEFT's.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


PREFIX = "base_model.model."


class Adapter:
    """An adapter folder in PEFT's layout, and the names of its tensors that are not folded yet.

    Raises:
        StageError: the folder cannot be read.
    """

    def __init__(self, folder: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        path = Path(folder, "adapter_config.json")
        try:
            self.config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.file: Any = safe_open(str(Path(folder, "adapter_model.safetensors")), framework="pt")
        except (OSError, ValueError, SafetensorError) as error:
            raise StageError(f"the adapter `{folder}` cannot be read ({error})") from None
        self.unused: set[str] = set(self.file.keys())

    def take(self, name: str) -> "torch.Tensor | None":
        """A tensor in float32, which counts as used from now on; None if there is none of this name or it was used."""
        key = PREFIX + name
        if key not in self.unused:
            return None
        self.unused.discard(key)
        return self.file.get_tensor(key).float()

    def scale(self, module: str) -> float:
        """The factor of B A for a module: α / r, or α / √r for rsLoRA."""
        rank = self._pattern("rank_pattern", module, self.config["r"])
        alpha = self._pattern("alpha_pattern", module, self.config["lora_alpha"])
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def _pattern(self, name: str, module: str, default: float) -> float:
        """The value for a module in PEFT's `rank_pattern` or `alpha_pattern`."""
        for pattern, value in (self.config.get(name) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return default

    def _token_ids(self, module: str) -> "torch.Tensor":
        """The ids in PEFT's `trainable_token_indices` for an embedding: a list, or lists by the names of modules."""
        import torch

        ids = self.config["trainable_token_indices"]
        if isinstance(ids, dict):
            ids = next(ids[name] for name in ids if f".{module}".endswith(f".{name}"))
        return torch.tensor(ids)

    def fold(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """The parameter `name` (out × in, float32) with this adapter folded in; `weight` itself if it has no part."""
        whole = self.take(name)  # a module of `modules_to_save` is stored as a whole
        if whole is None and name.endswith(".bias"):  # with `bias: all`, the bias of a layer that also has LoRA
            whole = self.take(f"{name.removesuffix('.bias')}.base_layer.bias")
        if whole is not None:
            return whole
        module = name.removesuffix(".weight")
        if name.endswith(".bias"):
            bias = self.take(name.removesuffix(".bias") + ".lora_B.bias")
            return weight if bias is None else weight + self.scale(name.removesuffix(".bias")) * bias
        rows = self.take(f"{module}.token_adapter.trainable_tokens_delta")
        if rows is not None:  # PEFT stores the trained rows themselves, and not what is added to them
            return weight.index_copy(0, self._token_ids(module), rows)
        a, b = self.take(f"{module}.lora_embedding_A"), self.take(f"{module}.lora_embedding_B")
        if a is not None and b is not None:
            return weight + self.scale(module) * (b @ a).T
        a, b = self.take(f"{module}.lora_A.weight"), self.take(f"{module}.lora_B.weight")
        if a is None or b is None:
            return weight
        delta = self.scale(module) * (b @ a)
        folded = weight + (delta.T if self.config.get("fan_in_fan_out") else delta)
        magnitude = self.take(f"{module}.lora_magnitude_vector")
        if magnitude is None:
            return folded
        return folded * (magnitude / folded.norm(dim=1)).unsqueeze(1)


class AdapterChain:
    """Adapters on one base, in the order in which they were trained."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.adapters = [Adapter(folder) for folder in folders]
        names = {name.removeprefix(PREFIX) for adapter in self.adapters for name in adapter.unused}
        self.parts = sorted({name.partition(".")[0] for name in names})
        """The outermost modules that the adapters have tensors for, such as `model` or `transformer`."""

    def fold(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """The parameter with every adapter folded in, in its own dtype; `weight` itself if no adapter has a part."""
        folded = original = weight.float()
        for adapter in self.adapters:
            folded = adapter.fold(name, folded)
        return weight if folded is original else folded.to(weight.dtype)

    def check_used(self) -> None:
        """Check that every tensor of every adapter was folded.

        Raises:
            StageError: a tensor was not: its adapter belongs to another base, or is of a kind that cannot be folded.
        """
        for adapter in self.adapters:
            if adapter.unused:
                unused = sorted(adapter.unused)
                raise StageError(
                    f"{len(unused)} tensors of the adapter `{adapter.folder}` have no place in the base (first "
                    f"`{unused[0]}`): it was trained on another model, or its kind cannot be folded"
                )


def fold_into(model: "PreTrainedModel", folders: Sequence[str]) -> None:
    """Fold adapters into a loaded model, in place.

    Raises:
        StageError: an adapter cannot be read, or a tensor of it has no place in the model.
    """
    import torch

    if not folders:
        return
    chain = AdapterChain(folders)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = parameter.data
            folded = chain.fold(name, weight)
            if folded is not weight:
                weight.copy_(folded)
    chain.check_used()
