"""What makes a stage fit into the memory of a device: settings that can be changed, each computed by the engine."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pipeline.config import settings as library
from pipeline.config.checker import load_config
from pipeline.config.pipeline import StageEntry
from pipeline.errors import ConfigError
from pipeline.plan import launching
from pipeline.plan.estimate_result import TIGHT, Change, Device
from pipeline.plan.step import Plan, Step
from stages.model.device import gpus
from stages.model.facts import Facts
from stages.training.settings import TrainingConfig

SHOWN = 3
"""Changes that are named."""
TRIED = 12
"""Changes, alone or together, that are computed."""
MOST = 4
"""Changes in a combination."""
PASS = ("activations", "logits", "workspace")
"""Causes that grow with the batch."""
HELD = ("weights", "gradients", "optimizer", "reference")
"""Causes that do not."""
LORA = {"r": 16, "lora_alpha": 32}
NF4 = {"quantized_base": "nf4"}

Memory = Mapping[str, int]
"""Cause → bytes on one device."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """Settings of a stage that can be changed together."""

    what: str
    """Candidates of the same name exclude each other."""
    cost: float
    """Orders candidates: by what they cost in time first, then in what is trained, then in machines."""
    settings: Mapping[str, Any]
    """Path below the stage → value."""
    keeps: Mapping[str, float]
    """Cause → the share of its memory that is left at best; of other causes all of it may be left."""


Measure = Callable[[StageEntry], Memory | None]
"""The memory of a stage with other settings; None where it is not known."""


def cheapest(step: Step, plan: Plan, assignments: Sequence[str], device: Device, measure: Measure) -> list[Change]:
    """The cheapest changes, at most `SHOWN`, that make a stage fit and not only just, in the order of what they cost.

    `assignments` are the `--set` options of the plan. A change that the checks of the config refuse is not named.
    """
    room = TIGHT * (device.memory or 0)
    trial = _Trial(step, plan, assignments, measure)
    now = trial.found(())
    if now is None:
        return []
    allowed = [one for one in _candidates(step, device) if trial.entry([one]) is not None]
    shares = {one: one.keeps for one in allowed}
    chosen: list[Sequence[Candidate]] = []
    tried = 0
    for many in sorted(_combinations(allowed), key=_cost_of):
        if len(chosen) >= SHOWN or tried >= TRIED:
            break
        predicted = now.total(device, _predicted(now.memory, [shares[one] for one in many]))
        if predicted > room or any(_contains(many, other) for other in chosen):
            continue
        tried += 1
        found = trial.found(many)
        if found is not None and len(many) == 1:
            shares[many[0]] = {cause: found.memory[cause] / size for cause, size in now.memory.items() if size}
        if found is not None and found.total(device) <= room:
            chosen.append(many)
    changes = []
    for many in chosen:
        if (together := trial.found(many)) is not None:
            changes.append(Change(settings=_together(many), memory=round(together.total(device))))
    return changes


def assignment(name: str, path: str, value: Any) -> str:
    """A setting of a stage as `--set` takes it."""
    return f"{name}.{path}={json.dumps(value, ensure_ascii=False)}"


class _Trial:
    """The memory of a stage with changes; each set of changes is computed once."""

    def __init__(self, step: Step, plan: Plan, assignments: Sequence[str], measure: Measure) -> None:
        self.step, self.plan, self.assignments, self.measure = step, plan, assignments, measure
        self.known: dict[str, Found | None] = {}

    def found(self, chosen: Sequence[Candidate]) -> "Found | None":
        """The memory with changes; None where a check refuses them, or where the memory is not known."""
        settings = _together(chosen)
        key = json.dumps(settings, sort_keys=True)
        if key not in self.known:
            entry = self.entry(chosen)
            memory = self.measure(entry) if entry is not None else None
            self.known[key] = (
                Found(memory, entry.launch.processes) if memory is not None and entry is not None else None
            )
        return self.known[key]

    def entry(self, chosen: Sequence[Candidate]) -> StageEntry | None:
        """The stage with changes; None where a check refuses them."""
        name, settings = self.step.name, _together(chosen)
        changed = [assignment(name, path, value) for path, value in settings.items()]
        try:
            pipeline = load_config(self.plan.pipeline.path, [*self.assignments, *changed])
        except ConfigError:
            return None
        entry = next(entry for entry in pipeline.stages if entry.name == name)
        problems = entry.stage.check(entry.config) + entry.stage.check_model(entry.config, self.step.facts)
        return None if [*problems, *launching.problems(entry)] else entry


@dataclass(frozen=True)
class Found:
    """The memory of a stage with changes."""

    memory: Memory
    processes: int

    def total(self, device: Device, memory: Mapping[str, float] | None = None) -> float:
        """Bytes of the memory of the device, which all processes share where there is no GPU."""
        return sum((memory or self.memory).values()) * (1 if device.gpu else self.processes)


def leaves_out_checkpointing(entry: StageEntry, facts: Facts, device: Device) -> bool:
    """Whether a stage trains without gradient checkpointing: it was told to, or its device has room for all layers."""
    config = entry.config
    assert isinstance(config, TrainingConfig)
    if "gradient_checkpointing" in config.trainer:
        return not config.trainer["gradient_checkpointing"]
    return config.room_for_layers(facts.config, device.memory) is not None


def _cost(candidate: Candidate) -> float:
    return candidate.cost


def _cost_of(chosen: Sequence[Candidate]) -> float:
    return sum(map(_cost, chosen))


def _together(chosen: Sequence[Candidate]) -> dict[str, Any]:
    return {path: value for one in chosen for path, value in one.settings.items()}


def _contains(chosen: Sequence[Candidate], other: Sequence[Candidate]) -> bool:
    """Whether one set changes at least what the other changes."""
    return {one.what for one in other} <= {one.what for one in chosen}


def _combinations(candidates: Sequence[Candidate]) -> Iterator[Sequence[Candidate]]:
    for count in range(1, MOST + 1):
        for chosen in combinations(candidates, count):
            if len({one.what for one in chosen}) == count:
                yield chosen


def _predicted(now: Memory, shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The memory with several changes, each of which leaves a share of some causes.

    That decides which changes are worth computing; the figure of a change is always computed.
    """
    return {cause: size * math.prod(share.get(cause, 1.0) for share in shares) for cause, size in now.items()}


def _candidates(step: Step, device: Device) -> Iterator[Candidate]:
    """What can be changed without another result, then what trains otherwise, then what needs other machines.

    `max_length` is not among them: it decides which tokens are trained.
    """
    config = vars(step.entry.config)
    trainer, lora = config["trainer"], config["lora"]
    known = library.settings(step.stage.settings["trainer"])
    if lora is None and "precompute_ref_log_probs" in known and not trainer.get("precompute_ref_log_probs"):
        yield Candidate("reference", 1, {"trainer.precompute_ref_log_probs": True}, {"reference": 0})
    training = step.entry.training
    batch, accumulation = (training.batch if training else 1), int(trainer.get("gradient_accumulation_steps", 1))
    for size in range(batch - 1, 0, -1):
        if batch % size == 0:
            smaller = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation * batch // size}
            settings = {f"trainer.{name}": value for name, value in smaller.items()}
            keeps = dict.fromkeys(PASS, size / batch)
            yield Candidate("batch", 2 + 0.1 * math.log2(batch / size), settings, keeps)
    if leaves_out_checkpointing(step.entry, step.facts, device):
        yield Candidate("checkpointing", 3, {"trainer.gradient_checkpointing": True}, {"activations": 0.02})
    if device.gpu and not trainer.get("activation_offloading"):
        yield Candidate("offloading", 3.5, {"trainer.activation_offloading": True}, {"activations": 0})
    yield from _of_precision(trainer, lora, device, step)
    yield from _of_processes(step, device)


def _of_precision(
    trainer: Mapping[str, Any], lora: Mapping[str, Any] | None, device: Device, step: Step
) -> Iterator[Candidate]:
    """Weights and moments in fewer bits, and LoRA."""
    dtype = (trainer.get("model_init_kwargs") or {}).get("dtype")
    if dtype in ("float32", "float64") or (dtype is None and not (device.gpu and lora is not None)):
        settings, half = {"trainer.model_init_kwargs.dtype": "bfloat16"}, dict.fromkeys((*PASS, *HELD), 0.5)
        yield Candidate("dtype", 2.5 if lora is not None else 6, settings, half)
    optimizer = str(trainer.get("optim", "adamw_torch"))
    if optimizer.startswith("adamw_torch"):
        yield Candidate("optimizer", 4, {"trainer.optim": "adamw_8bit"}, {"optimizer": 0.25})
    has_nf4 = "quantized_base" in type(step.entry.config).model_fields
    if lora is None:
        few = {"gradients": 0.0, "optimizer": 0.0, "reference": 0.0, "workspace": 0.0}
        yield Candidate("lora", 8, {"lora": LORA}, {**few, "weights": 0.5})
        if has_nf4:
            yield Candidate("lora", 9, {"lora": LORA, **NF4}, {**few, "weights": 0.13})
    elif has_nf4 and not vars(step.entry.config)["quantized_base"]:
        yield Candidate("base", 5, NF4, {"weights": 0.13})


def _of_processes(step: Step, device: Device) -> Iterator[Candidate]:
    """More GPUs, where this machine has them, or where it is another machine that is asked for."""
    launch = step.entry.launch
    if device.gpu and step.stage.parallel is not None and launch.strategy == "ddp" and launch.machines == 1:
        for processes in (2, 4, 8):
            if processes >= launch.processes and (not device.here or processes <= gpus()):
                settings = {"launch": {"processes": processes, "strategy": "zero3"}}
                keeps = dict.fromkeys(PASS, launch.processes / processes) | dict.fromkeys(HELD, 1 / processes)
                yield Candidate("processes", 10 + math.log2(processes), settings, keeps)
