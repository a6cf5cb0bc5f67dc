"""Whether this machine has what the stages of a plan take."""

import os

from pipeline.plan.step import Plan
from pipeline.saves import artifact
from stages.model.device import gpus


def main_memory() -> int:
    """The bytes of main memory, whatever is free of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def note_memory(plan: Plan) -> None:
    """Note each stage to run that takes more memory than there is. Nothing is known of the memory of a GPU."""
    if gpus():
        return
    found = main_memory()
    for step in plan.steps:
        if step.state != "done" and step.needs.memory > found:
            taken, there = artifact.size_of(step.needs.memory), artifact.size_of(found)
            plan.notes.append(f"stage `{step.name}` takes at least {taken} of memory, and this machine has {there}")
