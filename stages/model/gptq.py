"""GPTQModel: all of it that this project uses, in one file.

A model folder and token ids in, a quantized folder and the loss of every module out; and one matrix rounded to nearest
on the same grid. GPTQModel promises none of these interfaces, so `check_interfaces` looks for them before any work.
"""

import ast
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from stages.model.device import torch_device
from stages.runtime.errors import StageError
from stages.runtime.interfaces import require
from stages.runtime.processes import usable_cores

if TYPE_CHECKING:
    from torch import Tensor

# The file of a definition in the package; the definition, a class, a function or a module; its methods, parameters or
# constants that are used here.
USED = (
    ("models/auto.py", "GPTQModel.load", ("model_id_or_path", "quantize_config", "device")),
    ("models/base.py", "BaseQModel", ("quantize", "save", "extract_layers_node")),
    ("models/base.py", "BaseQModel.quantize", ("calibration", "batch_size", "calibration_data_min_length")),
    ("models/base.py", "BaseQModel.save", ("save_dir", "max_shard_size")),
    ("models/writer.py", "", ("PROCESS_LOG_LAYER = 'layer'", "PROCESS_LOG_MODULE = 'module'")),  # keys of the log
    ("models/writer.py", "", ("QUANT_LOG_LOSS = 'loss'",)),
    ("quantization/quantizer.py", "Quantizer", ("configure", "find_params")),
    ("quantization/quantizer.py", "Quantizer.configure", ("perchannel",)),
    ("quantization/quantizer.py", "Quantizer.find_params", ("x", "weight")),
    ("quantization/quantizer.py", "quantize", ("x", "scale", "zero", "maxq", "requires_groupwise_processing")),
)


def check_interfaces() -> None:
    """Look for everything in `USED` in the source of the installed GPTQModel.

    It is read and not imported: importing GPTQModel patches transformers, before the original is measured.

    Raises:
        StageError: something is missing; names the installed version and the version that is known to work.
    """
    spec = find_spec("gptqmodel")
    folder = Path((spec.submodule_search_locations or [""])[0] if spec else "")
    for file, name, parts in USED:
        owner = SimpleNamespace(**dict.fromkeys(_parts(folder / file, name)))
        owner.__name__ = name or f"gptqmodel/{file}"
        require("gptqmodel", owner, *parts)


def _parts(file: Path, name: str) -> Iterator[str]:
    """The methods of a class, the parameters of a function, or the constants of a module, as they are written."""
    found: Any = _tree(file)
    for word in filter(None, name.split(".")):
        found = next((node for node in found.body if getattr(node, "name", None) == word), _NOTHING)
    if isinstance(found, ast.FunctionDef):
        yield from (argument.arg for argument in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs))
        return
    for node in found.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield ast.unparse(node)


_NOTHING = ast.Module([], [])


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else _NOTHING


def quantize_folder(
    folder: Path,
    rows: Sequence[Sequence[int]],
    work: Path,
    settings: Mapping[str, Any],
    *,
    half: bool,
    seed: int,
    shard_size: int,
) -> dict[str, float | None]:
    """Quantize a model folder into `work/model` by GPTQ (Frantar et al., arXiv 2210.17323), calibrated on token ids.

    `settings` are those of GPTQModel's GPTQConfig. `half`: compute in float16, or else in bfloat16. `shard_size`: bytes
    of a weight file at most.

    Returns:
        Module → its loss; None for a module that was only rounded to nearest.

    Raises:
        StageError: GPTQModel refuses the settings.
    """
    # Its thread pool fails with fewer than two workers, and it would compile a packer for half a minute.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(12, max(2, usable_cores() // 2))))
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig
    from transformers import set_seed

    set_seed(seed)
    try:
        config = GPTQConfig(**settings)
    except (TypeError, ValueError) as error:
        raise StageError(f"GPTQModel refuses the settings of `quantize`: {error}") from None
    # Without a dtype, GPTQModel would turn float16 into bfloat16 on a CPU.
    dtype = torch.float16 if half else torch.bfloat16
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(work):  # GPTQModel writes a folder `logs` into the current folder
        model = GPTQModel.load(str(folder), config, device=torch_device(), dtype=dtype)
        examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
        log = model.quantize(examples, batch_size=1, calibration_data_min_length=1)
        model.save(str(work / "model"), max_shard_size=shard_size)
    layers = model.extract_layers_node()[0]
    return {f"{layers}.{row['layer']}.{row['module']}": _loss(row["loss"]) for part in log.values() for row in part}


def _loss(text: str) -> float | None:
    """A loss in the log, such as `0.0000279413`; None for a module that was only rounded.

    The log then has `fallback(rtn): …`, `rtn fallback` or 999999999.
    """
    try:
        loss = float(text)
    except ValueError:
        return None
    return loss if loss < 999999999 else None


def round_to_nearest(weight: "Tensor", settings: Mapping[str, Any]) -> "Tensor":
    """A matrix (outputs × inputs) rounded to nearest, on the grid that GPTQModel uses with the same settings.

    `settings` are those that GPTQModel writes into a quantized folder: `bits`, `sym`, `group_size`, `meta` with `mse`.
    """
    import torch
    from gptqmodel.quantization.quantizer import Quantizer, quantize

    grid = SimpleNamespace(bits=settings["bits"], sym=settings["sym"], mse=settings["meta"].get("mse", 0.0))
    size = settings["group_size"] if settings["group_size"] > 0 else weight.shape[1]
    parts = []
    for group in weight.float().split(size, dim=1):
        quantizer = Quantizer(grid)
        quantizer.configure(perchannel=True)
        quantizer.find_params(group, weight=True)
        parts.append(quantize(group, quantizer.scale, quantizer.zero, quantizer.maxq, False))
    return torch.cat(parts, dim=1)
