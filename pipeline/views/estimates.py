"""The estimates of a plan as text and as JSON."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.plan.estimate_rates import rate_text
from pipeline.plan.estimate_result import Change, StageEstimate
from pipeline.plan.step import Plan, Step
from pipeline.views.progress import duration
from stages.runtime.figures import size_of


def as_lines(plan: Plan) -> Iterator[str]:
    """The estimates of the stages that will run, for people."""
    steps = [step for step in plan.steps if step.state != "done" and step.name in plan.estimates]
    if not steps:
        return
    width = max(len(step.name) for step in steps)
    yield f"estimates for {plan.estimates[steps[0].name].device.name}:"
    for step in steps:
        found = plan.estimates[step.name]
        lines = [_memory(found), *_more(step, found)]
        for number, line in enumerate(lines):
            verdict = (found.verdict or "") if not number else ""
            yield f"{step.name if not number else '':{width}}  {verdict:12}  {line}"


def _memory(found: StageEstimate) -> str:
    if found.memory is not None:
        causes = ", ".join(f"{cause} {size_of(size)}" for cause, size in found.memory.items() if size)
        return f"{size_of(found.total)} of memory{_processes(found)}: {causes}"
    if found.why is not None:
        return f"memory is not known: {found.why}"
    return f"at least {size_of(found.least)} of memory" if found.least else "memory is not known"


def _processes(found: StageEstimate) -> str:
    """How many processes share the memory or the work, as a clause."""
    if found.batches is None or found.batches.processes == 1:
        return ""
    if found.device.gpu:
        return f" on each of {found.batches.processes} GPUs"
    count = found.batches.on_machine
    return f" for {count} processes of a machine, for each of them" if count > 1 else " on each machine"


def _more(step: Step, found: StageEstimate) -> Iterator[str]:
    """Whatever is known besides the memory: what is trained, rows and steps, time and disk, and what would fit."""
    if found.trainable:
        share = f"{found.trainable / found.parameters:.2%}" if found.trainable < found.parameters else "all"
        reached = f"; LoRA reaches {found.reached[0]:,} of {found.reached[1]:,} linear modules" if found.reached else ""
        yield f"trains {_count(found.trainable)} of {_count(found.parameters)} parameters ({share}){reached}"
    yield from _rows(found)
    time_and_disk = [*_time(found)]
    if found.disk:
        what = "checkpoints and result take" if step.entry.training is not None else "the result takes"
        time_and_disk.append(f"{what} at least {size_of(found.disk)} of disk")
    if time_and_disk:
        yield "; ".join(time_and_disk)
    if found.verdict == "does not fit" and step.entry.training is not None:
        yield from _changes(found)


def _rows(found: StageEstimate) -> Iterator[str]:
    if found.batches is None:
        return
    batches, work = found.batches, found.work
    packed = ("packed row" if batches.packed else "row") + ("s" if batches.of_step > 1 else "")
    longest = f"{batches.row_tokens:,} tokens" if batches.longest_seen else f"up to {batches.row_tokens:,} tokens"
    step = f"{batches.of_step:,} {packed} a step ({batches.rows} × {batches.accumulation} accumulation × "
    step += f"{batches.processes} process{'es' if batches.processes > 1 else ''}), each of {longest}"
    if work is None:
        yield f"{step}; how many rows there are is not known yet"
        return
    about = "" if work.counted else "about "
    tokens = f"{work.rows:,} row{'s' if work.rows != 1 else ''} and {about}{_count(work.tokens)} tokens an epoch"
    tokens += " (3 bytes a token: the tokenizer is not here yet)" if work.guessed else ""
    yield f"{tokens}; {'' if work.fixed else about}{work.steps:,} step{'s' if work.steps != 1 else ''}"
    yield f"{step}; about {work.step_tokens:,.0f} tokens a step"


def _time(found: StageEstimate) -> Iterator[str]:
    if found.seconds is not None and found.speed is not None:
        time = duration(found.seconds)
        amount = f"{time} or more" if found.speed.at_most else f"about {time}"
        yield f"{amount}, at the {rate_text(found.speed.rate)} {found.speed.source}"
    if found.last is not None:
        yield f"it took {duration(found.last)} when it ran last"


def _changes(found: StageEstimate) -> Iterator[str]:
    if not found.changes:
        yield "none of the settings that could be changed makes it fit; a lower `max_length` or a smaller model would"
        return
    yield "it fits with one of these, the cheapest first (`--fit` writes the first one):"
    for change in found.changes:
        where = " on each GPU" if "launch" in change.settings else ""
        yield f"  {settings_text(change)}: {size_of(change.memory)}{where}"


def settings_text(change: Change) -> str:
    """The settings of a change, such as `trainer.gradient_checkpointing: true`."""
    return ", ".join(f"{path}: {_value(value)}" for path, value in change.settings.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _count(value: int) -> str:
    """A large number for people, such as `3.1B`."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:,}"


def as_json(found: StageEstimate) -> dict[str, Any]:
    """An estimate as JSON: sizes in bytes, times in seconds; null is what is not known."""
    batches, work = found.batches, found.work
    return {
        "device": {"name": found.device.name, "memory": found.device.memory, "gpu": found.device.gpu},
        "verdict": found.verdict,
        "memory": {**found.memory, "total": found.total} if found.memory is not None else None,
        "memory_at_least": found.least or None,
        "why_not_known": found.why,
        "parameters": found.parameters or None,
        "trainable": found.trainable or None,
        "lora_modules": list(found.reached) if found.reached is not None else None,
        "batch": {
            "rows": batches.rows,
            "accumulation": batches.accumulation,
            "processes": batches.processes,
            "rows_of_step": batches.of_step,
            "tokens_of_row": batches.row_tokens,
            "packed": batches.packed,
        }
        if batches is not None
        else None,
        "work": {
            "rows": work.rows,
            "tokens": work.tokens,
            "steps_of_epoch": work.steps_of_epoch,
            "steps": work.steps,
            "tokens_of_step": round(work.step_tokens),
            "counted": work.counted,
            "tokens_guessed": work.guessed,
        }
        if work is not None
        else None,
        "disk_at_least": found.disk or None,
        "seconds": found.seconds,
        "seconds_last_time": found.last,
        "flops": found.flops,
        "rate": {"flops_per_second": found.speed.rate, "source": found.speed.source, "at_most": found.speed.at_most}
        if found.speed is not None
        else None,
        "changes": [{"settings": dict(change.settings), "memory": change.memory} for change in found.changes],
    }
