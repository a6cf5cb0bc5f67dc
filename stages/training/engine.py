"""What runs a training stage in several processes: whether it is what was asked for, and whole weights out of it.

ZeRO-3 and FSDP2 leave each process a part of every weight. Weights are gathered one at a time, and kept by the first
process alone.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.facts import read_header
from stages.runtime.errors import StageError
from stages.runtime.events import main_process
from stages.training.sharing import Sharing, sharing

if TYPE_CHECKING:
    from torch import Tensor

ENGINES = {
    "ddp": "PyTorch's DistributedDataParallel",
    "fsdp2": "PyTorch's FSDP2",
    "zero2": "ZeRO-2 of DeepSpeed",
    "zero3": "ZeRO-3 of DeepSpeed",
}


def check_engine(wrapped: Any, asked: Sharing) -> None:
    """Compare what accelerate made of a model, at the start of training, with what was asked for.

    Raises:
        StageError: they differ, in the engine, in the number of processes or in the device.
    """
    import torch

    there = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if there != asked.processes:
        raise StageError(f"`launch` asks for {asked.processes} processes, and {there} train; run again")
    strategy = strategy_of(wrapped)
    due = None if asked == Sharing() else asked.strategy
    if strategy != due:
        found = ENGINES.get(strategy or "", "one process alone")
        wanted = ENGINES.get(due or "", "one process alone")
        raise StageError(f"`launch` asks for {wanted}, and accelerate made it {found}; use another `strategy`")
    if due in ("zero2", "zero3") and asked.offload != _offloaded(wrapped):
        raise StageError(f"`launch` asks for `offload: {asked.offload}`, and DeepSpeed does not do it; remove it")
    device = next(wrapped.parameters()).device.type
    if device != "cuda" and torch.cuda.is_available() and asked.offload is None:
        raise StageError(f"this machine has a GPU, and the model is on the device `{device}`; run again")


def strategy_of(wrapped: Any) -> str | None:
    """The strategy of the engine around a model; None for a model without one."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(wrapped, DistributedDataParallel):
        return "ddp"
    if isinstance(wrapped, FSDPModule):
        return "fsdp2"
    if type(wrapped).__module__.startswith("deepspeed."):
        return f"zero{wrapped.zero_optimization_stage()}"
    return None


def _offloaded(engine: Any) -> str | None:
    """What a DeepSpeed engine keeps in main memory."""
    if not engine.zero_cpu_offload():
        return None
    return "parameters" if engine.zero_offload_param() is not None else "optimizer"


def on_cpu() -> dict[str, Any]:
    """The arguments of a trainer that say where it computes."""
    import torch

    if torch.cuda.is_available():
        return {}
    # With `use_cpu` accelerate would not use DeepSpeed, and without a backend it would see one process.
    return {"ddp_backend": "gloo"} if sharing().strategy in ("zero2", "zero3") else {"use_cpu": True}


def load_whole(args: Any) -> None:
    """Let transformers load whole models from now on, which it would divide with ZeRO-3 while it loads them.

    Adapters are folded into whole weights; DeepSpeed divides the model once the trainer has it.
    """
    if getattr(args, "deepspeed_plugin", None) is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def shared(args: Any) -> None:
    """Let transformers and TRL know again of the ZeRO that is asked for."""
    if getattr(args, "deepspeed_plugin", None) is not None:
        from transformers.integrations.deepspeed import set_hf_deepspeed_config

        set_hf_deepspeed_config(args.deepspeed_plugin.dschf)


# Weights


def gathered(model: Any, wrapped: Any) -> "dict[str, Tensor] | None":
    """The state dict of a model with whole tensors in main memory, in the first process; None in the others.

    Of a model with an adapter, what is trained. Each process must call it. Tied weights are one tensor. `wrapped`: the
    engine around the model.
    """
    if strategy_of(wrapped) == "zero3":
        wrapped.empty_partition_cache()  # some weights are on their way to a forward pass that does not come
    state, found = model.state_dict(keep_vars=True), dict[int, Any]()
    wanted = [name for name in state if not hasattr(model, "peft_config") or state[name].requires_grad]
    for name in wanted:
        if id(state[name]) not in found:
            found[id(state[name])] = _whole(state[name])
    return {name: found[id(state[name])] for name in wanted} if main_process() else None


def _whole(tensor: Any) -> Any:
    """A whole tensor, without its gradient; every process takes part."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True) if main_process() else None
    if hasattr(tensor, "full_tensor"):
        whole = tensor.detach().full_tensor()
        return whole.cpu() if main_process() else None
    return tensor.detach()


def own_part(parameter: Any) -> "Tensor":
    """What this process holds of a parameter."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a whole tensor, of which this process may hold a part alone."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of the weights that `save_pretrained` writes of a model, tied ones once; of an adapter its own."""
    import torch

    state = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        empty = {name: torch.empty(shape_of(tensor), device="meta") for name, tensor in state.items()}
        kept = get_peft_model_state_dict(model, state_dict=empty, save_embedding_layers=False)
        return {name: tuple(tensor.shape) for name, tensor in kept.items()}
    once = {id(tensor): (name, shape_of(tensor)) for name, tensor in reversed(state.items())}
    return dict(once.values())


def check_whole(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check the safetensors files that were written of a model: every tensor must have the shape that the model has.

    `expected`: name → shape, each tensor once.

    Raises:
        StageError: a tensor is missing, empty or cut.
    """
    headers = [read_header(file)[0] for file in sorted(folder.glob("*.safetensors"))]
    found = {name: tuple(shape) for header in headers for name, shape in header.items()}
    wrong = [name for name, shape in found.items() if expected.get(name, shape) != shape]
    due, there = (sum(map(math.prod, known.values())) for known in (expected, found))
    if wrong or due != there:
        what = f"`{wrong[0]}` has the shape {found[wrong[0]]} and the model has {expected[wrong[0]]}" if wrong else ""
        what = what or f"its files have {there:,} numbers and the model has {due:,}"
        raise StageError(f"the weights that were written are not those of the model: {what}; run again")
