"""LoRA adapters folded into weights: W ← W + scale · B A, adapter after adapter, in float32, rounded once.

Training stages start from a folded chain, and `merge` writes one shard by shard. Both call `AdapterChain.fold` on
weights in the dtype of the base, so a stage starts from the very weights that `merge` would write. An adapter that was
trained on a quantized base is added to what the quantized weights stand for. LoRA is Hu et al. (arXiv 2106.09685), the
scale of rsLoRA Kalajdzievski (2312.03732), DoRA Liu et al. (2402.09353); files are PEFT's.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model import quantized
from stages.runtime.errors import Problem, StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


PREFIX = "base_model.model."

# Settings of LoraConfig that the fold knows, and those that do not reach the weights. Any other one is refused.
FOLDED = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
)
HARMLESS = (
    *("lora_dropout", "init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    *("velora_config", "runtime_config", "task_type", "peft_type", "peft_version", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision", "megatron_core", "qalora_group_size"),
)
# Values of `init_lora_weights` that leave the weights of the base as they are.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
BLOCK = 2**15
"""Numbers of a weight that are added at a time: 128 KB in float32."""


def check_foldable(lora: Mapping[str, Any]) -> list[Problem]:
    """The settings of a LoraConfig, as in the YAML or in an adapter's config, with which it could not be folded."""
    advice = "later stages could not fold the adapter into its base; remove it"
    problems = [
        (name, f"with `{name}` {advice}")
        for name, value in sorted(lora.items())
        if value and name not in (*FOLDED, *HARMLESS)
    ]
    if (start := lora.get("init_lora_weights")) not in STARTS:
        problems.append(("init_lora_weights", f"`{start}` also changes the base, so {advice}"))
    return problems


@dataclass(frozen=True)
class Layout:
    """What a fold must know of a model besides its weights."""

    transposed: frozenset[str] = frozenset()
    """Modules whose weight is inputs × outputs: transformers' Conv1D, as in GPT-2."""
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The name of a weight that has several names → the other names."""


def layout(model: "PreTrainedModel") -> Layout:
    """The layout of a model, whose weights may be on the meta device."""
    from transformers.pytorch_utils import Conv1D

    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    tied = {name: tuple(other for other in same if other != name) for same in names.values() for name in same}
    transposed = (name for name, module in model.named_modules() if isinstance(module, Conv1D))
    return Layout(frozenset(transposed), {name: others for name, others in tied.items() if others})


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread.

    A fold does little with each number, so threads wait for the memory and for each other: on a busy machine two take
    longer than one, and twice the processor time. With one, the bits do not depend on the number of cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Adapter:
    """An adapter folder in PEFT's layout, and the names of its tensors that are not folded yet.

    Raises:
        StageError: the folder cannot be read, holds a kind of adapter that cannot be folded, or needs bitsandbytes.
    """

    def __init__(self, folder: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        path = Path(folder, "adapter_config.json")
        try:
            self.config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            with safe_open(str(Path(folder, "adapter_model.safetensors")), framework="pt") as file:
                self.names = frozenset(file.keys())
        except (OSError, ValueError, SafetensorError) as error:
            raise StageError(f"the adapter `{folder}` cannot be read ({error})") from None
        for name, _ in check_foldable(self.config):
            setting = f"{name}: {json.dumps(self.config[name])}"
            raise StageError(
                f"the adapter `{folder}` was trained with `{setting}`, and cannot be folded into its base; train it "
                "again without"
            )
        self.base = quantized.read(folder)
        """How the base was quantized in training; None for a base that was not."""
        self.unused = set(self.names)
        own = (name.removeprefix(PREFIX) for name in self.names)
        parts = re.compile(r"\.(lora_|token_adapter\.|base_layer\.).*|\.[^.]*$")
        self.modules = frozenset(parts.sub("", name, count=1) for name in own)
        """The modules that it changes."""

    def take(self, name: str) -> "torch.Tensor | None":
        """A tensor in float32, which counts as used from now on; None if there is none of this name."""
        key = PREFIX + name
        if key not in self.names:
            return None
        self.unused.discard(key)
        return self.read(key).float()

    def read(self, key: str) -> "torch.Tensor":
        """A tensor of the file, which is opened for each: pages that were read stay in memory until it is closed."""
        from safetensors import safe_open

        with safe_open(str(Path(self.folder, "adapter_model.safetensors")), framework="pt") as file:
            return file.get_tensor(key)

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

    def token_ids(self, module: str) -> "torch.Tensor":
        """The ids in PEFT's `trainable_token_indices` for an embedding: a list, or lists by the names of modules."""
        import torch

        ids = self.config["trainable_token_indices"]
        if isinstance(ids, dict):
            ids = next(ids[name] for name in ids if f".{module}".endswith(f".{name}"))
        return torch.tensor(ids)

    def has_rows(self, name: str) -> bool:
        """Whether single rows of an embedding are trained, as `trainable_token_indices` names them."""
        return f"{PREFIX}{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta" in self.names

    def fold(self, name: str, weight: "torch.Tensor", *, transposed: bool = False) -> "torch.Tensor":
        """The parameter `name` with this adapter folded in, in float32; `weight` itself if the adapter has no part.

        `weight` is outputs × inputs, with `transposed` inputs × outputs; an embedding is tokens × width.

        Raises:
            StageError: the adapter has another shape.
        """
        folded = self._folded(name, weight, transposed)
        if folded.shape != weight.shape:
            raise self._other_shape(name, folded, weight)
        return folded

    def _other_shape(self, name: str, folded: "torch.Tensor", weight: "torch.Tensor") -> StageError:
        shapes = " and not ".join(" × ".join(map(str, one.shape)) for one in (folded, weight))
        return StageError(
            f"for the adapter `{self.folder}`, `{name}` is {shapes} as in the base: it was trained on another model"
        )

    def _folded(self, name: str, weight: "torch.Tensor", transposed: bool) -> "torch.Tensor":
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
            return weight.float().index_copy(0, self.token_ids(module), rows)
        a, b = self.take(f"{module}.lora_embedding_A"), self.take(f"{module}.lora_embedding_B")
        if a is not None and b is not None:
            transposed = True  # a token is the input
        else:
            a, b = self.take(f"{module}.lora_A.weight"), self.take(f"{module}.lora_B.weight")
        if a is None or b is None:
            return weight
        own = self.take(f"{module}.base_layer.weight")  # PEFT stores embeddings beside their adapters
        weight = weight if own is None else own
        change, magnitude = b @ a, self.take(f"{module}.lora_magnitude_vector")
        if (change.T if transposed else change).shape != weight.shape:
            raise self._other_shape(name, change.T if transposed else change, weight)
        if transposed:
            change *= self.scale(module)
            folded = weight + change.T  # in the order in memory that the weight has
        else:
            folded = _add(weight, change, self.scale(module))
        if magnitude is not None:  # DoRA: the norm of the weights that lead to one output
            norm = (weight.T + change if transposed else folded).norm(dim=1)
            folded *= (magnitude / norm).view((1, -1) if transposed else (-1, 1))
        return folded


def _add(weight: "torch.Tensor", change: "torch.Tensor", scale: float) -> "torch.Tensor":
    """weight + scale · change, in place of `change`.

    Some rows at a time, so that they stay in the cache: the float32 copy that torch makes of a whole weight takes more
    time than the sum.
    """
    rows = max(1, BLOCK // max(1, change.shape[1]))
    for some, own in zip(change.split(rows), weight.split(rows), strict=True):
        some.mul_(scale).add_(own)
    return change


class AdapterChain:
    """Adapters on one base, in the order in which they were trained."""

    def __init__(self, folders: Sequence[str], layout: Layout) -> None:
        self.adapters = [Adapter(folder) for folder in folders]
        self.layout = layout

    def fold(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """The parameter with every adapter folded in, in its own dtype; `weight` itself if no adapter has a part.

        Raises:
            StageError: an adapter does not fit, or changes what only one of two names of the weight stands for.
        """
        folded = weight
        for _, _, after in self.steps(name, weight):
            folded = after
        return folded.to(weight.dtype)

    def steps(self, name: str, weight: "torch.Tensor") -> Iterator[tuple[Adapter, "torch.Tensor", "torch.Tensor"]]:
        """Each adapter, with the parameter that it was trained on and that with the adapter; errors as `fold`.

        The parameter is in float32 as soon as an adapter or its quantized base has changed it.
        """
        import torch

        twins = self.layout.tied.get(name, ())
        for adapter in self.adapters:
            weight = self._trained_on(adapter, name, weight)
            folded = self._fold(adapter, name, weight)
            for twin in twins:
                other = self._fold(adapter, twin, weight)
                if other is not folded and not torch.allclose(other, folded, rtol=1e-4, atol=1e-6):
                    raise StageError(
                        f"`{name}` and `{twin}` are one weight in the base, and the adapter `{adapter.folder}` changes "
                        "only one of them, or each in its own way; train it again without the embeddings"
                    )
            yield adapter, weight, folded
            weight = folded

    def _trained_on(self, adapter: Adapter, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """What the parameter was while the adapter was trained."""
        if adapter.base is None:
            return weight
        return adapter.base.values(name, weight, transposed=name.removesuffix(".weight") in self.layout.transposed)

    def _fold(self, adapter: Adapter, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        same = (name, *self.layout.tied.get(name, ()))
        name = next(filter(adapter.has_rows, same), name)  # PEFT trains rows of tokens under all names of a weight
        return adapter.fold(name, weight, transposed=name.removesuffix(".weight") in self.layout.transposed)

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
    chain = AdapterChain(folders, layout(model))
    with torch.no_grad(), one_thread():
        for name, parameter in model.named_parameters():
            weight = parameter.data
            folded = chain.fold(name, weight)
            if folded is not weight:
                weight.copy_(folded)
    chain.check_used()
