"""What is known to be wrong with the launch of a stage before it starts."""

from collections.abc import Iterator
from importlib.util import find_spec

from pipeline.config.pipeline import StageEntry
from stages.model.device import gpus
from stages.runtime.errors import Problem, StageError
from stages.training.settings import BATCH
from stages.training.sharing import split

DEEPSPEED = "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
SHARED_ON_CPU = "`ddp`, `zero2` or `zero3`"


def problems(entry: StageEntry) -> Iterator[Problem]:
    """The problems of a stage with its `launch`."""
    launch, parallel = entry.launch, entry.stage.parallel
    if parallel is None:
        return
    if launch.processes > (there := gpus()) > 0:
        count = f"{there} GPU{'s' if there > 1 else ''}"
        text = f"`processes` is {launch.processes}, one for each GPU, and this machine has {count}"
        yield "launch.processes", f"{text}; write `launch: {{processes: {there}}}`"
    yield from _engine(entry)
    trainer = getattr(entry.config, "trainer", {})
    if launch.world > 1 and trainer.get("auto_find_batch_size"):
        text = "`auto_find_batch_size` would change the rows of a step, which several processes share"
        yield "trainer.auto_find_batch_size", f"{text}; remove it and set `per_device_train_batch_size`"
    for word in parallel.not_divided if launch.sharing.divides_weights else ():
        if trainer.get(word):
            text = f"`{word}` needs the whole model in each process, which `{launch.strategy}` divides"
            yield f"trainer.{word}", f"{text}; remove it, or set `strategy: ddp` or `zero2`"
    size = "per_device_train_batch_size"
    rows = trainer.get(size, BATCH), trainer.get("gradient_accumulation_steps", 1)
    if all(type(count) is int and count > 0 for count in rows):
        where, least = f"trainer.{size}" if size in trainer else "launch.processes", parallel.least_rows(entry.config)
        try:
            own, _ = split(*rows, launch.world)
        except StageError as error:
            yield where, str(error)
        else:
            if own < least and launch.world > 1:
                text = (
                    f"each of {launch.world} processes would get {own} row of a batch, and `{entry.use}` needs {least}"
                )
                yield where, f"{text}; write `{size}: {least * launch.world}`"


def _engine(entry: StageEntry) -> Iterator[Problem]:
    """Whether the strategy works for the stage and on this machine."""
    launch, parallel = entry.launch, entry.stage.parallel
    assert parallel is not None
    zero = launch.strategy in ("zero2", "zero3")
    if launch.strategy not in parallel.strategies:
        ways = " or ".join(f"`{name}`" for name in parallel.strategies)
        yield "launch.strategy", f"`{entry.use}` does not work with `strategy: {launch.strategy}`; write {ways}"
    elif launch.strategy == "fsdp2" and not gpus():
        text = "`fsdp2` needs GPUs, and this machine has none (accelerate would use `ddp` without a word)"
        yield "launch.strategy", f"{text}; write {SHARED_ON_CPU}"
    elif zero and find_spec("deepspeed") is None:
        yield "launch.strategy", f"`{launch.strategy}` needs DeepSpeed, which is not installed; `{DEEPSPEED}`"
    elif launch.sharing.divides_weights and getattr(entry.config, "quantized_base", None) is not None:
        text = f"`{launch.strategy}` divides weights, and those of `quantized_base` cannot be divided"
        yield "launch.strategy", f"{text}; write `ddp` or `zero2`"
    if launch.offload is not None and not gpus():
        text = "`offload` moves from the memory of a GPU to main memory, and this machine has no GPU"
        yield "launch.offload", f"{text}; remove it"
