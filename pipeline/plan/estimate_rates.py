"""How long a training stage takes: its floating-point operations over a rate that was given or measured."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.plan.estimate_engine import Engine
from pipeline.plan.estimate_result import Batches, Device, Speed
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.step import Step
from stages.model.device import has_gpu
from stages.runtime.events import read_events
from stages.runtime.processes import usable_cores

RATE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?) ?(?P<unit>[GTP])FLOPS?(/s)?", re.IGNORECASE)
MEASURED_TOKENS, MEASURED_WIDTH = 2048, 4096
"""The largest product of matrices that is measured; in float32 it takes a quarter of a second at 1 TFLOP/s."""
UNITS = {"G": 1e9, "T": 1e12, "P": 1e15}

Records = Sequence[tuple[Path, Mapping[str, Any]]]
"""Folders of finished stages, each with its record."""


def parse_rate(text: str) -> float | None:
    """The floating-point operations a second of `400TFLOPS`; None for any other text."""
    match = RATE.fullmatch(text)
    return float(match["number"]) * UNITS[match["unit"].upper()] if match else None


def rate_text(rate: float) -> str:
    """A rate for people, such as `8.2 TFLOP/s`."""
    unit = next((unit for unit in ("P", "T") if rate >= UNITS[unit]), "G")
    return f"{rate / UNITS[unit]:.3g} {unit}FLOP/s"


def speed_of(
    step: Step,
    answer: Mapping[str, Any],
    batches: Batches,
    device: Device,
    engine: Engine,
    *,
    given: float | None,
    records: Records,
) -> Speed | None:
    """The rate that a stage will compute with: given, else measured in the finished stage that is most like it.

    Before any stage has finished on this machine, a product of matrices of its sizes is measured; on an idle machine no
    stage is faster.
    """
    if given is not None:
        return Speed(rate=given, source="given with `--rate`")
    if not device.here:
        return None
    shape = shape_of(step, answer, batches)
    found = [(folder, record) for folder, record in records if _measured_here(record, device)]
    if found:
        folder, record = max(found, key=lambda one: (_likeness(one[1]["estimate"]["shape"], shape), one[1]["started"]))
        training = record["training"]
        rate = training["flops_of_step"] * training["steps"] / training["seconds"]
        return Speed(rate=rate, source=f"of `{folder.name}`")
    hidden = min(MEASURED_WIDTH, int(step.facts.config.get("hidden_size") or step.facts.config.get("n_embd") or 1024))
    tokens = min(MEASURED_TOKENS, batches.rows * batches.row_tokens)  # larger products are no faster
    sizes = {"tokens": tokens, "hidden": hidden, "wide": 4 * hidden, "gpu": device.gpu}
    machine = {"host": platform.node(), "cores": usable_cores(), "threads": os.environ.get("OMP_NUM_THREADS")}
    machine |= {"memory": device.memory, "torch": installed_versions(step.use)["torch"]}
    measured = engine.ask({"measure": sizes, "machine": machine})
    if measured is None or "rate" not in measured:
        return None
    return Speed(rate=measured["rate"], source="of a product of matrices", at_most=True)


def shape_of(step: Step, answer: Mapping[str, Any], batches: Batches) -> dict[str, Any]:
    """What the speed of a stage depends on, the most important first."""
    return {
        "parameters": answer["parameters"],
        "trainable": answer["trainable"],
        "use": step.use,
        "tokens": batches.rows * batches.row_tokens,
    }


def _likeness(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[bool]:
    return [one.get(name) == value for name, value in other.items()]


def _measured_here(record: Mapping[str, Any], device: Device) -> bool:
    """Whether a record has an estimate and a measurement of a kind of device of this machine."""
    machine, training = record.get("machine", {}), record.get("training") or {}
    here = machine.get("host") == platform.node() and machine.get("gpu") == has_gpu() == device.gpu
    known = all(training.get(name, 0) > 0 for name in ("flops_of_step", "steps", "seconds"))
    return here and known and "shape" in record.get("estimate", {})


def measured_training(folder: Path) -> dict[str, float] | None:
    """The optimizer steps of the last attempt of a stage and the seconds that they took, by its events.

    None for a stage that does not train.
    """
    began, last = None, None
    for event in read_events(folder):
        if event["kind"] == "total" and "batch" in event:
            began, last = event, None
        elif began is not None and "step" in event and event["step"] > (last or began)["step"]:
            last = event
    if began is None or last is None:
        return None
    return {"steps": last["step"] - began["step"], "seconds": round(last["time"] - began["time"], 3)}
