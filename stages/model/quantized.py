"""The base of QLoRA: its linear layers in NF4 with double quantization, or in int8, by bitsandbytes.

QLoRA is Dettmers et al. (arXiv 2305.14314): an adapter is trained on a base in 4 bits. LLM.int8 is Dettmers et al.
(arXiv 2208.07339). An adapter is right for the weights that it was trained on, which are those that bitsandbytes
multiplies with, and not those of the base. `QuantizedBase.values` computes them, for training and for every fold.

Weights are quantized on the CPU, also where a GPU trains, so that each fold finds the same ones. Let torch compute in
one thread meanwhile: the mean of all scales depends on how they are added up.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from stages.model.facts import read_json
from stages.runtime import aside
from stages.runtime.errors import StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Method = Literal["nf4", "int8"]
FILE = "quantized_base.json"
PACKAGE = "bitsandbytes"
INSTALL = f"`pip install {PACKAGE}`"
BLOCK = 64
"""Weights that share a scale in NF4; bitsandbytes quantizes the scales again, in blocks of 256."""
DTYPES = ("float32", "bfloat16", "float16")  # that bitsandbytes quantizes and computes in
THRESHOLD = 6.0
"""Inputs of a layer that are larger are not rounded to int8; the value of the paper."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"block_size": BLOCK, "double_quantization": True},
    "int8": {"threshold": THRESHOLD},
}
"""How each method quantizes, as it is written down beside an adapter."""


@dataclass(frozen=True)
class QuantizedBase:
    """Which weights of a base were quantized while an adapter was trained on it, and how."""

    method: Method
    dtype: str
    """The dtype of the weights when they were quantized, in the words of torch, such as `bfloat16`."""
    modules: frozenset[str]
    """The names of the modules."""

    def write(self, folder: Path) -> None:
        """Write it down beside the adapter."""
        content = {
            "quantized_base": self.method,
            **SETTINGS[self.method],
            "dtype": self.dtype,
            "bitsandbytes": version(PACKAGE),
            "modules": sorted(self.modules),
        }
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def values(self, name: str, weight: "torch.Tensor", *, transposed: bool = False) -> "torch.Tensor":
        """What the parameter `name` is in training, in float32; `weight` itself if it is not quantized.

        `weight` is outputs × inputs, with `transposed` inputs × outputs.

        Raises:
            StageError: bitsandbytes cannot be imported.
        """
        import torch

        if not name.endswith(".weight") or name.removesuffix(".weight") not in self.modules:
            return weight
        rounded = weight.to(getattr(torch, self.dtype))
        data, scales = _quantize(self.method, rounded.T if transposed else rounded)
        found = _dequantize(self.method, data, scales)
        return found.T if transposed else found


def read(folder: str) -> QuantizedBase | None:
    """What is written down beside an adapter; None for an adapter on a base that was not quantized.

    Raises:
        StageError: the file is damaged, or of another version, or bitsandbytes is not installed.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    content = read_json(path, "")
    method: Method | None = next((known for known in get_args(Method) if known == content.get("quantized_base")), None)
    modules, dtype = content.get("modules"), content.get("dtype")
    as_here = method is not None and all(content.get(name) == value for name, value in SETTINGS[method].items())
    if method is None or not as_here or not isinstance(modules, list) or dtype not in (*DTYPES, "float64"):
        raise StageError(
            f"`{path}` does not say how the base was quantized in words that are known here; train the adapter again"
        )
    aside.bring_back(PACKAGE)  # a run that trains on no quantized base has set it aside
    if find_spec(PACKAGE) is None:
        what = f"the adapter `{folder}` was trained on a base in {method}, and cannot be folded without a package"
        raise StageError(f"{what}; {INSTALL}")
    return QuantizedBase(method, str(dtype), frozenset(map(str, modules)))


@cache
def _library() -> Any:
    """bitsandbytes.

    Raises:
        StageError: it cannot be imported.
    """
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(logging.ERROR)  # it warns of a kernel that it does not need, and of each layer in int8
    aside.bring_back(PACKAGE)
    try:
        import bitsandbytes
    except ImportError as error:
        raise StageError(f"`quantized_base` needs {PACKAGE}, which cannot be imported ({error}); {INSTALL}") from None
    return bitsandbytes


def _quantize(method: Method, weight: "torch.Tensor") -> tuple["torch.Tensor", Any]:
    """A weight, outputs × inputs on the CPU, as bitsandbytes stores it, and its scales."""
    import torch

    functional = _library().functional
    if method == "int8":
        data, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        return data, scales
    settings = {"blocksize": BLOCK, "compress_statistics": True, "quant_type": "nf4"}
    data, scales = functional.quantize_4bit(weight.float().contiguous(), **settings)
    return data, scales


def _dequantize(method: Method, data: "torch.Tensor", scales: Any) -> "torch.Tensor":
    """The weight in float32, outputs × inputs."""
    functional = _library().functional
    if method == "int8":
        return data.float().mul_(scales.unsqueeze(1).mul(1 / 127))  # as its layer computes
    found: torch.Tensor = functional.dequantize_4bit(data, scales)
    return found


def size(method: Method, shape: Sequence[int]) -> int:
    """Bytes of a quantized weight with its scales."""
    count = math.prod(shape)
    if method == "int8":
        return count + 4 * shape[0]  # a scale in float32 for each output
    blocks = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / 256)


# Layers


def layer(method: Method, weight: "torch.Tensor", bias: Any, dtype: "torch.dtype", device: Any = "cpu") -> Any:
    """A layer of bitsandbytes with this weight, outputs × inputs, which computes in `dtype`.

    bitsandbytes repacks the weights for a CPU with AVX512-BF16 at the first pass without gradients, and then computes
    in bfloat16. That is switched off: it fails for some shapes, and would measure another model than was trained.
    """
    import torch

    modules = _library().nn
    rows, columns = weight.shape
    data, scales = _quantize(method, weight)
    with torch.device("meta"):
        if method == "nf4":
            made = modules.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
        else:
            made = modules.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
    if method == "nf4":
        made.support_avx512bf16_for_cpu = False
        scales.dtype = dtype  # in the backward pass
        scales.to(device)
        settings = {"blocksize": BLOCK, "quant_type": "nf4", "module": made, "bnb_quantized": True}
        made.weight = modules.Params4bit(data.to(device), quant_state=scales, **settings)
        made.quant_state = scales
    else:
        data = data.to(device)
        made.weight = modules.Int8Params(data, requires_grad=False, CB=data, SCB=scales.to(device))
    made.bias = bias
    return made


def _linear(model: "PreTrainedModel") -> dict[str, Any]:
    """The layers to quantize by name: Linear and Conv1D, without output embeddings and weights of two names."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    count: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        count[id(parameter)] = count.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and module is not head and count[id(module.weight)] == 1
    }


def quantizable(model: "PreTrainedModel") -> frozenset[str]:
    """The names of the modules that `quantize` quantizes; the weights may be on the meta device."""
    return frozenset(_linear(model))


def quantize(model: "PreTrainedModel", method: Method, dtype: "torch.dtype") -> QuantizedBase:
    """Quantize the linear layers of a model in place, layer after layer. They compute in `dtype`, on the GPU if any.

    The weights of the model are as its folder has them: the other stages quantize the same numbers.

    Raises:
        StageError: bitsandbytes cannot be imported.
    """
    import torch

    layers, stored = _linear(model), model.dtype
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with torch.no_grad():
        for name, module in layers.items():
            weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
            model.set_submodule(name, layer(method, weight.to(stored), module.bias, dtype, device))
    return QuantizedBase(method, str(stored).removeprefix("torch."), frozenset(layers))
