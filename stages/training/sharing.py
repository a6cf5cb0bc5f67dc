"""How several processes share a training stage: which part each holds, and which part of a batch each computes."""

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]
Offload = Literal["optimizer", "parameters"]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The processes of a training stage; each has one device."""

    processes: int = 1
    """Of all machines."""
    strategy: Strategy = "ddp"
    """`ddp`: each process holds the whole model. `fsdp2`: PyTorch's fully sharded data parallel.

    `zero2`, `zero3`: stages of ZeRO (Rajbhandari et al., arXiv 1910.02054) in DeepSpeed.
    """
    offload: Offload | None = None
    """What is kept in main memory: moments of the optimizer, or also the weights."""
