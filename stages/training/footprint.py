"""One step of the real trainer on a model without memory: what its tensors take at the peak, and what it computes."""

import contextlib
import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.training import bitsandbytes_ops, live_tensors, weightless_trainer
from stages.training.division import Weights, divide
from stages.training.like_gpu import KERNELS, like_gpu
from stages.training.offloaded import offloaded
from stages.training.optimizer_state import state
from stages.training.settings import TrainingConfig
from stages.training.sharing import Sharing
from stages.training.weightless import weightless
from stages.training.weightless_trainer import Batch

BLOCK = 512  # bytes: CUDA's allocator gives multiples of it


@dataclass(frozen=True)
class Footprint:
    """What one step takes on one device."""

    peak: Mapping[str, int]
    """Cause → bytes, as in `live_tensors.CAUSES`."""
    parameters: int
    """Of the whole model, adapters included."""
    trainable: int
    flops: float
    """Of one batch, forward and backward."""


def footprint(
    kind: str, config: TrainingConfig, folder: Path, batch: Batch, sharing: Sharing, *, gpu: bool
) -> Footprint:
    """Train one step of the stage on a model without memory, as `estimate` asks for.

    Raises:
        StageError: TRL or PEFT refuses the settings.
    """
    passes = min(2, int(config.trainer.get("gradient_accumulation_steps") or 1))
    ledger, work = live_tensors.Ledger(BLOCK if gpu else 1), Work()
    with tempfile.TemporaryDirectory() as out, weightless():
        args = weightless_trainer.arguments(kind, config, Path(out), batch, passes, gpu=gpu)
        half = args.bf16 and sharing.strategy != "ddp"  # these engines compute with weights in 16 bits
        trainer = weightless_trainer.trainer(kind, config, folder, batch, args, gpu=gpu, half=half)
        model, optim = trainer.model, str(config.trainer.get("optim"))
        weights = Weights.of(model, bool(args.bf16))
        division = divide(weights, sharing)
        ledger.shares = division.shares
        if config.trainer.get("activation_offloading") and gpu:
            trainer.maybe_activation_offload_context = offloaded(model)
        trainer.add_callback(live_tensors.callback(ledger, trainer, ahead=True, step=division.step, foreach=gpu))
        with contextlib.ExitStack() as stack:
            if gpu:
                stack.enter_context(like_gpu(work.count))
            stack.enter_context(live_tensors.head_apart(ledger))
            stack.enter_context(live_tensors.follow(ledger, work.add))
            gc.freeze()  # accelerate collects garbage, which goes through all objects of the libraries
            stack.callback(gc.unfreeze)
            trainer.train()
    peak = {cause: round(size) + division.more.get(cause, 0) for cause, size in ledger.peak.items()}
    peak["workspace"] += KERNELS if gpu else 0
    peak["optimizer"] += round(division.shares.get("optimizer", 1) * state(optim, model))
    return Footprint(peak, weights.trainable + weights.frozen, weights.trainable, work.flops / passes)


class Work:
    """Counts floating-point operations, by PyTorch's formulas: two for each multiplication and addition."""

    def __init__(self) -> None:
        self.flops = 0.0

    def count(self, flops: float) -> None:
        """Count operations."""
        self.flops += flops

    def add(self, operation: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operation."""
        from torch.utils import flop_counter

        packet = operation._overloadpacket
        formula = flop_counter.flop_registry.get(packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        else:
            self.flops += bitsandbytes_ops.flops(operation, args)
        if packet.__name__ == "_scaled_dot_product_flash_attention_for_cpu":
            self.flops += flop_counter.sdpa_flop_count(*(part.shape for part in args[:3]))
        elif packet.__name__ == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self.flops += flop_counter.sdpa_backward_flop_count(*(part.shape for part in args[:4]))
