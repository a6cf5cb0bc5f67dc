"""How several processes share a training stage: which part each holds, and which part of a batch each computes."""

import json
import math
import os
from dataclasses import dataclass
from typing import Literal

from stages.runtime.errors import StageError
from stages.runtime.events import LAUNCHED

Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]
Offload = Literal["optimizer", "parameters"]
MPI: tuple[str, ...] = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # `srun` sets some of them
MPI += tuple(f"{kind}_COMM_WORLD_{word}" for kind in ("OMPI", "MV2") for word in ("RANK", "SIZE", "LOCAL_RANK"))
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", LAUNCHED, *MPI)
"""Variables of the environment by which torch, accelerate and this project know of other processes."""


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

    @property
    def divides_weights(self) -> bool:
        """Whether each process holds a part of the weights alone."""
        return self.strategy in ("zero3", "fsdp2")


def sharing() -> Sharing:
    """The processes of which this one is one: of a launcher's group, or one alone."""
    text = os.environ.get(LAUNCHED)
    return Sharing(**json.loads(text)) if text else Sharing()


def leave_group() -> None:
    """Let this process forget that a launcher started it, for work that it does alone."""
    for name in GROUP:
        os.environ.pop(name, None)


def split(batch: int, accumulation: int, processes: int) -> tuple[int, int]:
    """Rows of a batch on one device, and batches of a step, so that a step of all processes has the rows of the YAML.

    The YAML says `batch` × `accumulation` rows a step. First the accumulation is divided, then the batch.

    Raises:
        StageError: the rows of a step cannot be divided between the processes.
    """
    common = math.gcd(accumulation, processes)
    parts = processes // common
    if batch % parts == 0:
        return batch // parts, accumulation // common
    rows = batch * accumulation
    shared = [count for count in range(1, rows + 1) if rows % count == 0]
    fewer = max(count for count in shared if count < processes)
    counts = [f"{fewer}}}", *[str(count) for count in shared if count > processes][:1]]
    batches = [str(size) for size in (batch // parts * parts, (batch // parts + 1) * parts) if size]
    said = f"{rows} row{'s' if rows > 1 else ''}"
    raise StageError(
        f"{processes} processes cannot share the {said} of a step equally (`per_device_train_batch_size: {batch}` × "
        f"`gradient_accumulation_steps: {accumulation}`); write `per_device_train_batch_size: {'` or `'.join(batches)}`"
        f", or `launch: {{processes: {'` or `'.join(counts)}`"
    )
