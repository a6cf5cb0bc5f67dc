"""What the stages of a plan take: memory by cause, rows, tokens, steps, disk and time.

Nothing is loaded: shapes come from the config of the model, rows from the first rows of each data set or from what a
finished stage has counted. A process of its own loads torch and computes the memory; its answers are remembered.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config.pipeline import StageEntry
from pipeline.plan import machine
from pipeline.plan.estimate_changes import cheapest, leaves_out_checkpointing
from pipeline.plan.estimate_engine import Engine
from pipeline.plan.estimate_rates import measured_training, shape_of, speed_of
from pipeline.plan.estimate_result import Batches, StageEstimate
from pipeline.plan.estimate_rows import Counts, counted_rows, record_of, work_of
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.step import Plan, Step
from stages.training.adapters import is_targeted
from stages.training.checkpointing import CHOSEN

NOT_IN_MEMORY = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("weight_decay", "beta", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "eval_steps"),
    *("eval_strategy", "load_best_model_at_end", "metric_for_best_model", "report_to", "run_name", "seed"),
)
"""Settings under `trainer` that no memory depends on: an estimate holds whatever they are."""
NOT_OF_MODEL = ("data", "rows", "eval_data", "eval_size", "template", "seed", "model", "early_stopping", "streaming")
"""Settings of a stage that no memory depends on."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is asked of the estimates of a plan."""

    compute: bool = False
    """Whether to compute what is not remembered."""
    gpu: int | None = None
    """Bytes of memory of the GPU to estimate for; None for this machine."""
    rate: float | None = None
    """Floating-point operations a second of one device; None to measure them."""
    assignments: Sequence[str] = ()
    """The `--set` options of the plan."""


def estimates(plan: Plan, ask: Ask, say: Callable[[str], None]) -> dict[str, StageEstimate]:
    """The estimate of each stage of a plan; `say` is told once why computing takes a few seconds.

    Finished stages have an estimate only if it is remembered. Without `compute` that holds for all stages.
    """
    with Engine(plan.saves, compute=ask.compute, say=say) as engine:
        counts = Counts(plan, remembered_only=not ask.compute)
        made = _Estimates(plan, ask, engine, counts)
        return {step.name: made.of(step) for step in plan.steps}


class _Estimates:
    def __init__(self, plan: Plan, ask: Ask, engine: Engine, counts: Counts) -> None:
        self.plan, self.ask, self.engine, self.counts = plan, ask, engine, counts
        self.device = machine.device(ask.gpu)

    def of(self, step: Step) -> StageEstimate:
        """The estimate of one stage."""
        self.engine.compute = self.ask.compute and step.state != "done"
        last = (record_of(step.link.resolve()) or {}).get("seconds") if step.link.is_symlink() else None
        found = StageEstimate(device=self.device, disk=step.needs.disk, last=last)
        if step.entry.training is None:
            return replace(found, least=step.needs.memory)
        found = replace(found, reached=_reached(step))
        batches, work = self.counts.batches_and_work(step)
        if batches is None:
            return replace(found, work=work, why=self._unknown(step))
        found = replace(found, batches=batches, work=work)
        answer = self._answer(step.entry, step, batches)
        if answer is None or "why" in answer:
            return replace(found, why=answer["why"] if answer is not None else None)
        found = replace(found, memory=answer["memory"], parameters=answer["parameters"], trainable=answer["trainable"])
        found = self._with_time(found, step, answer, batches)
        if found.verdict == "does not fit" and self.engine.compute:
            self.engine.purpose = f"looking for settings with which stage `{step.name}` fits"
            found = replace(found, changes=self._changes(step))
        return found

    def _unknown(self, step: Step) -> str | None:
        """Why the longest row of a stage is not known."""
        if not self.engine.compute:
            return None
        return "its rows are not known, and `max_length` does not limit them"

    def _with_time(
        self, found: StageEstimate, step: Step, answer: Mapping[str, Any], batches: Batches
    ) -> StageEstimate:
        if found.work is None:
            return found
        share = found.work.padded_tokens / batches.row_tokens
        flops = answer["flops"] * share * batches.accumulation * found.work.steps
        speed = speed_of(
            step,
            answer,
            batches,
            self.device,
            self.engine,
            given=self.ask.rate,
            records=self.counts.records,
        )
        seconds = flops / speed.rate if speed is not None else None
        return replace(found, flops=flops, speed=speed, seconds=seconds)

    def _changes(self, step: Step) -> list[Any]:
        def measure(entry: StageEntry) -> Mapping[str, int] | None:
            changed = replace(step, entry=entry)
            batches, _ = self.counts.batches_and_work(changed)
            answer = self._answer(entry, changed, batches) if batches is not None else None
            return answer.get("memory") if answer is not None else None

        return cheapest(step, self.plan, self.ask.assignments, self.device, measure)

    def _answer(self, entry: StageEntry, step: Step, batches: Batches) -> dict[str, Any] | None:
        if not step.facts.known or not step.facts.config:
            return {"why": f"the config of {step.facts.source} is not on this machine; `--online` fetches it"}
        config = entry.config.model_dump(mode="json", exclude={*NOT_OF_MODEL})
        trainer = {key: value for key, value in config["trainer"].items() if key not in NOT_IN_MEMORY}
        if not any(name in trainer for name in CHOSEN):  # the stage chooses by the memory of its device
            trainer["gradient_checkpointing"] = not leaves_out_checkpointing(entry, step.facts, self.device)
        if batches.processes > 1:
            trainer["gradient_accumulation_steps"] = batches.accumulation  # of one process
        config["trainer"] = trainer
        batch = {"rows": batches.rows, "tokens": batches.row_tokens, "documents": list(batches.documents)}
        question = {
            "use": entry.use,
            "config": config,
            "model": dict(step.facts.config),
            "batch": batch,
            "sharing": asdict(entry.launch.sharing),
            "gpu": self.device.gpu,
        }
        return self.engine.ask({"estimate": question, "versions": installed_versions(entry.use)})


def _reached(step: Step) -> tuple[int, int] | None:
    """How many linear modules LoRA reaches, and of how many; None without LoRA, or where that is not known."""
    lora, modules = vars(step.entry.config)["lora"], step.facts.linear_modules()
    if lora is None or not modules:
        return None
    return sum(is_targeted(module, lora) for module in modules), len(modules)


def estimated_and_measured(step: Step, found: StageEstimate | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a training stage keeps beside its peak memory: its estimate, and how long its steps took.

    `training` has the steps and the seconds of the last attempt, and the floating-point operations of a step with the
    rows that the stage has counted in its `metrics`. What is not known is left out.
    """
    kept: dict[str, Any] = {}
    if (measured := measured_training(step.part)) is not None:
        kept["training"] = measured
    training = step.entry.training
    if training is None or found is None or found.memory is None or found.batches is None:
        return kept
    work, rows = found.work, counted_rows(metrics, training)
    if measured is not None and found.flops is not None and work is not None and rows is not None:
        counted = work_of(rows, found.batches, training, vars(step.entry.config)["trainer"])
        measured["flops_of_step"] = found.flops / work.steps * counted.padded_tokens / work.padded_tokens
    kept["estimate"] = {
        "memory": dict(found.memory),
        "total": found.total,
        "gpu": found.device.gpu,
        "seconds": found.seconds,
        "steps": work.steps if work is not None else None,
        "tokens": work.tokens if work is not None else None,
        "shape": shape_of(step, {"parameters": found.parameters, "trainable": found.trainable}, found.batches),
    }
    return kept
