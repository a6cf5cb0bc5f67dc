"""The fold compared with PEFT's own layers, one layer at a time.

A layer alone is put under PEFT with the adapter's own config, its name unchanged, and its outputs are those that were
trained. `merge` proves each folded layer in this way. A training stage proves a small layer of each kind that its
adapter is on, with random weights, before it trains.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.model import quantized
from stages.model.lora import PREFIX, Adapter, AdapterChain, Layout, check_foldable
from stages.model.quantized import QuantizedBase
from stages.runtime.errors import StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Parameters = Mapping[str, "torch.Tensor"]
"""`weight`, and `bias` if the layer has one, in float32."""
INPUTS = 4  # random inputs of a layer
# The largest |output of the fold − output of PEFT|: a share of what the adapter adds, and one of the outputs. The
# second is the rounding of float32.
OF_ADDED, OF_OUTPUTS = 1e-3, 4e-6


class Difference(NamedTuple):
    """Outputs of a folded layer against those of PEFT's layer."""

    largest: float
    """The largest |difference| of two outputs."""
    outputs: float
    """The largest |output| of PEFT's layer."""
    added: float
    """The largest |difference| that the adapter makes."""

    @property
    def small(self) -> bool:
        """Whether it is a rounding error; False if an output is not a number."""
        return self.largest <= OF_ADDED * self.added + OF_OUTPUTS * self.outputs


def skeleton(folder: Path) -> tuple["PreTrainedModel", list[str]]:
    """The model of a folder without memory for its weights, and the names of weights that the folder lacks."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        device_map="meta",
    )
    return model, sorted(info["missing_keys"])


def layer(like: Any, parameters: Parameters) -> Any:
    """A layer of the kind of `like` with these parameters; None if it is not Linear, Conv1D or Embedding."""
    import torch
    from transformers.pytorch_utils import Conv1D

    rows, columns = parameters["weight"].shape if parameters["weight"].dim() == 2 else (0, 0)
    with torch.device("meta"):
        if isinstance(like, torch.nn.Linear):
            made: Any = torch.nn.Linear(columns, rows, bias="bias" in parameters)
        elif isinstance(like, Conv1D):
            made = Conv1D(columns, rows)
        elif isinstance(like, torch.nn.Embedding):
            made = torch.nn.Embedding(rows, columns)
        else:
            return None
    for name in ("weight", "bias"):
        if getattr(made, name, None) is not None:
            setattr(made, name, torch.nn.Parameter(parameters[name], requires_grad=False))
    return made


def under_peft(name: str, alone: Any, config: Any, *, empty: bool = False) -> Any:
    """A model that consists of one layer at its place in the real model, under PEFT.

    Args:
        name: the name of the layer in the real model.
        alone: the layer.
        config: PEFT's LoraConfig.
        empty: the adapter has no memory for its tensors, because all of them will be loaded.

    Raises:
        ValueError: PEFT finds no place for the adapter.
    """
    import torch
    from peft import inject_adapter_in_model

    root = inner = torch.nn.Module()
    *path, last = name.split(".")
    for part in path:
        inner.add_module(part, torch.nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module(last, alone)
    with warnings.catch_warnings():  # PEFT tells of each Conv1D that its weight is inputs × outputs
        warnings.simplefilter("ignore")
        return inject_adapter_in_model(copy.deepcopy(config), root, low_cpu_mem_usage=empty).eval()


def difference(folded: Any, peft: Any) -> Difference:
    """Compare a folded layer with PEFT's, and that with the layer that its adapter is on, on random inputs."""
    import torch

    rows, columns = folded.weight.shape
    if isinstance(folded, torch.nn.Embedding):
        inputs = torch.arange(rows)[:: max(1, rows // 64)]
    else:
        width = columns if isinstance(folded, torch.nn.Linear) else rows
        inputs = torch.randn(INPUTS, width, generator=torch.Generator().manual_seed(0))
    alone = []  # what PEFT's layer gives without the adapter, caught on the way
    peft.get_base_layer().register_forward_hook(lambda layer, given, outputs: alone.append(outputs.clone()))
    with torch.no_grad():
        expected = peft(inputs)
        largest, added = ((outputs - expected).abs().max() for outputs in (folded(inputs), alone[0]))
        return Difference(float(largest), float(expected.abs().max()), float(added))


# The proof of a merged layer


def proof(name: str, like: Any, adapter: Adapter, before: Parameters, after: Parameters) -> Difference | str:
    """Compare one layer after an adapter with PEFT's layer: PEFT's own weights before, and the adapter on them.

    Returns:
        The difference, or the reason why there is none.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    own = f"{PREFIX}{name}."
    tensors = {key: adapter.read(key) for key in adapter.names if key.startswith(own)}
    if not any(".lora_" in key for key in tensors):
        return _whole(own, tensors, adapter, before, after)
    inner, folded = layer(like, before), layer(like, after)
    if inner is None:
        return f"it is a {type(like).__name__}, of which no adapter can be folded"
    config = LoraConfig.from_pretrained(adapter.folder)
    config.init_lora_weights, config.modules_to_save, config.trainable_token_indices = True, None, None
    try:
        root = under_peft(name, inner, config, empty=True)
        state = {key.removeprefix(PREFIX): one.float() for key, one in tensors.items()}
        loaded = set_peft_model_state_dict(root, state, low_cpu_mem_usage=True)
        if loaded.unexpected_keys:
            return f"PEFT has no place for `{loaded.unexpected_keys[0]}`"
        return difference(folded, root.get_submodule(name))
    except (ValueError, RuntimeError) as error:
        return f"PEFT does not put the adapter there ({error})"
    finally:
        inner.weight = None  # PEFT's objects refer to each other, and would keep it until the garbage is collected


def _whole(own: str, tensors: Parameters, adapter: Adapter, before: Parameters, after: Parameters) -> Difference | str:
    """A layer that the adapter stores as a whole, or of which it stores rows, or that it does not change."""
    import torch

    expected = {key: tensors.get(f"{own}{key}", one).float() for key, one in before.items()}
    rows = tensors.get(f"{own}token_adapter.trainable_tokens_delta")
    if rows is not None:
        ids = adapter.token_ids(own.removeprefix(PREFIX).removesuffix("."))
        expected["weight"] = expected["weight"].index_copy(0, ids, rows.float())
    for key, one in expected.items():
        if not torch.equal(after[key], one):
            return f"its {key} is not that of the adapter"
    return Difference(0.0, 0.0, 0.0)


# The proof before training


def check_fold(make: Callable[[Any], Any], shape: Any, config: Any, method: "quantized.Method | None" = None) -> None:
    """Prove with small random layers that the fold of an adapter of this kind is what PEFT will train.

    Args:
        make: the class of the model that the adapter goes on, or what makes a model from its config.
        shape: the config of that model.
        config: PEFT's LoraConfig.
        method: how the linear layers of the model are quantized.

    Raises:
        StageError: PEFT does not take the settings, or the fold gives other outputs than PEFT; names the layer.
    """
    import torch

    for _, text in check_foldable(config.to_dict()):
        raise StageError(text)
    for name, like, rank, small in _kinds(make, shape, config):
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                trouble = _probe(name, like, rank, config, method if small else None)
        except (ValueError, RuntimeError, StageError) as error:
            trouble = str(error)
        if trouble:
            raise StageError(
                f"what these settings under `lora` train on `{name}`, a {type(like).__name__}, cannot be folded into "
                f"the base: {trouble}; change them, or leave this layer out of the targets"
            )


def _kinds(make: Callable[[Any], Any], shape: Any, config: Any) -> Iterator[tuple[str, Any, int, bool]]:
    """One target of each kind: its name, its module in the base, its rank, and whether it can be quantized."""
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = make(copy.deepcopy(shape))
        linear = quantized.quantizable(empty)
        plain = copy.deepcopy(config)
        plain.init_lora_weights = True  # other starts read the weights
        try:
            wrapped = get_peft_model(empty, plain, low_cpu_mem_usage=True)
        except (ValueError, TypeError, RuntimeError) as error:
            raise StageError(f"PEFT refuses the settings under `lora`: {error}") from None
    seen = set()
    for name, module in wrapped.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base, rank, scale = module.get_base_layer(), module.r["default"], module.scaling["default"]
        kind = (type(base), type(module), rank, scale, getattr(base, "bias", None) is not None, name in linear)
        if kind not in seen:
            seen.add(kind)
            yield name, base, rank, name in linear


def _probe(name: str, like: Any, rank: int, config: Any, method: "quantized.Method | None") -> str | None:
    """Why a small layer of this kind cannot be folded; None if it can."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    size = max(rank, 1) + 4
    size += -size % quantized.BLOCK if method is not None else 0
    before = {"weight": torch.randn(size, size)}
    if getattr(like, "bias", None) is not None:
        before["bias"] = torch.randn(size)
    alone = layer(like, before)
    if alone is None:
        return "of this kind of layer no adapter can"
    transposed = isinstance(like, Conv1D)
    if method is not None:
        weight = before["weight"].T if transposed else before["weight"]
        alone = quantized.layer(method, weight, alone.bias, torch.float32)
    own = copy.deepcopy(config)
    own.target_modules, own.exclude_modules, own.modules_to_save, own.trainable_token_indices = [name], None, None, None
    own.layers_to_transform = own.layers_pattern = None
    root = under_peft(name, alone, own)
    alone.train()  # in evaluation int8 also rounds the inputs
    for key, parameter in root.named_parameters():
        if ".lora_" in key or parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        state = get_peft_model_state_dict(root, save_embedding_layers=False)
        tensors = {PREFIX + key: one.contiguous() for key, one in state.items()}
        save_file(tensors, Path(folder, "adapter_model.safetensors"))
        own.save_pretrained(folder)
        if method is not None:
            QuantizedBase(method, "float32", frozenset([name])).write(Path(folder))
        chain = AdapterChain([folder], Layout(frozenset([name] if transposed else [])))
        after = {key: next(chain.steps(f"{name}.{key}", one))[2] for key, one in before.items()}
        if unused := chain.adapters[0].unused:
            return f"the fold has no place for `{min(unused)}`"
        found = difference(layer(like, after), root.get_submodule(name))
    return None if found.small else f"outputs differ by up to {found.largest:.2g} of {found.outputs:.2g}"
