"""Whether this machine, or a GPU that is asked for, has what the stages of a plan take."""

from collections.abc import Iterator

from pipeline.plan.estimate_result import Device
from pipeline.plan.step import Plan
from stages.model.device import gpu_memory, gpus, main_memory
from stages.runtime.figures import size_of


def device(gpu: int | None = None) -> Device:
    """A GPU with so many bytes of memory; without it the first GPU of this machine, or else its processor."""
    if gpu is not None:
        return Device(name=f"a GPU of {size_of(gpu)}", memory=gpu, gpu=True, here=False)
    if gpus():
        there = gpu_memory()
        size = f" of {size_of(there)}" if there is not None else ""
        return Device(name=f"the GPU{size} of this machine", memory=there, gpu=True)
    found = main_memory()
    return Device(name=f"this machine, without a GPU, with {size_of(found)} of memory", memory=found, gpu=False)


def memory_notes(plan: Plan) -> Iterator[str]:
    """A sentence for each stage to run that takes more memory than there is: by its estimate, or by its lower bound.

    Without an estimate nothing is said of the memory of a GPU.
    """
    for step in plan.steps:
        known = plan.estimates.get(step.name)
        estimated = known is not None and known.memory is not None and known.device.memory is not None
        if step.state == "done" or (gpus() and not estimated):
            continue
        if estimated and known is not None:
            least, taken, there = "about", known.total, known.device.memory or 0
        else:
            least, taken, there = "at least", step.needs.memory, main_memory()
        if taken > there:
            where = "its GPU" if gpus() else "this machine"
            sizes = size_of(taken), size_of(there)
            way = "; `pipeline plan` names what would make it fit" if estimated else ""
            yield f"stage `{step.name}` takes {least} {sizes[0]} of memory, and {where} has {sizes[1]}{way}"
