"""Settings under `trainer:` that a library accepts without effect, and values that are hardly meant."""

import ast
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from stages.model.device import has_gpu
from stages.runtime.errors import Problem, nearest
from stages.runtime.interfaces import source
from stages.training.packages import optimizer_arguments

IGNORE_KWARGS = ("constant", "constant_with_warmup")  # transformers passes them no `lr_scheduler_kwargs`
IGNORE_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
FROM_TARGETS = ("galore", "apollo")  # optimizers that need `optim_target_modules`, the only ones that read it
HIGH_RATE = 0.1  # above it, a note
SCHEDULE_PARTS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # transformers gives them itself


def check(trainer: Mapping[str, Any]) -> list[Problem]:
    """Settings of the optimizer and of its schedule that contradict each other."""
    return [*_check_schedule(trainer), *_check_optimizer(trainer)]


def _check_schedule(trainer: Mapping[str, Any]) -> list[Problem]:
    schedule, given = str(trainer.get("lr_scheduler_type", "linear")), trainer.get("lr_scheduler_kwargs") or {}
    problems: list[Problem] = []
    if isinstance(given, dict) and given and schedule in IGNORE_KWARGS:
        text = f"`{schedule}` reads none; remove it, or name another `lr_scheduler_type`"
        problems.append(("trainer.lr_scheduler_kwargs", f"`lr_scheduler_kwargs`: {text}"))
    elif isinstance(given, dict) and (known := schedule_arguments().get(schedule)) is not None:
        problems += [
            (f"trainer.lr_scheduler_kwargs.{name}", f"`{schedule}` has no setting `{name}`{nearest(name, known)}")
            for name in given
            if name not in known
        ]
        problems += [
            ("trainer.lr_scheduler_type", f"`{schedule}` needs `lr_scheduler_kwargs: {{{name}: …}}`")
            for name, needed in known.items()
            if needed and name not in given
        ]
        if {"min_lr", "min_lr_rate"} <= known.keys() and ("min_lr" in given) == ("min_lr_rate" in given):
            text = (
                f"`{schedule}` needs one of `min_lr` and `min_lr_rate`, as `lr_scheduler_kwargs: {{min_lr_rate: 0.1}}`"
            )
            problems.append(("trainer.lr_scheduler_type", text))
    if schedule in IGNORE_WARMUP and isinstance(warm := trainer.get("warmup_steps"), int | float) and warm > 0:
        other = "`constant_with_warmup`" if schedule == "constant" else "another `lr_scheduler_type`"
        problems.append(("trainer.warmup_steps", f"`{schedule}` has no warmup; remove it, or write {other}"))
    return problems


def _check_optimizer(trainer: Mapping[str, Any]) -> list[Problem]:
    name, given = trainer.get("optim"), trainer.get("optim_args")
    problems: list[Problem] = []
    if given is not None and not re.fullmatch(r"[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*", str(given)):
        problems.append(("trainer.optim_args", f"`{given}` is no list such as `rank=64,scale=0.5`"))
    elif given is not None and (known := optimizer_arguments().get(str(name or "adamw_torch"))) is not None:
        optimizer = name or "the default optimizer"
        for word in (part.partition("=")[0].strip() for part in str(given).split(",")):
            if word not in known:
                there = nearest(word, known) if known else ", which reads none"
                problems.append(("trainer.optim_args", f"`{word}` has no effect with `{optimizer}`{there}"))
    targets, from_targets = trainer.get("optim_target_modules"), str(name).startswith(FROM_TARGETS)
    if from_targets and targets is None:
        problems.append(("trainer.optim", f"`{name}` needs `optim_target_modules: all-linear`, or names of layers"))
    if targets is not None and not from_targets:
        text = "only GaLore and APOLLO read it; remove it, or write `optim: galore_adamw`"
        problems.append(("trainer.optim_target_modules", f"`optim_target_modules`: {text}"))
    if str(name).endswith("layerwise") and trainer.get("gradient_accumulation_steps", 1) != 1:
        text = f"`{name}` steps after each layer and cannot accumulate gradients; write 1"
        problems.append(("trainer.gradient_accumulation_steps", text))
    return problems


@cache
def schedule_arguments() -> dict[str, dict[str, bool]]:
    """Name of a schedule → its settings that `lr_scheduler_kwargs` can have → whether it needs them.

    Schedules that take any name are left out. Read from the source of the installed transformers.
    """
    text = source("transformers", "optimization.py")
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    values = dict(re.findall(r'^    ([A-Z]\w*) = "(\w+)"', source("transformers", "trainer_utils.py"), re.M))
    found: dict[str, dict[str, bool]] = {}
    for word, name in re.findall(r"^    SchedulerType\.(\w+): (\w+),", text, re.M):
        function = functions.get(name)
        if word not in values or function is None or function.args.kwarg is not None:
            continue
        arguments = [argument.arg for argument in function.args.args]
        needed = arguments[: len(arguments) - len(function.args.defaults)]
        found[values[word]] = {name: name in needed for name in arguments if name not in SCHEDULE_PARTS}
    return found


# Notes


def notes(trainer: Mapping[str, Any]) -> list[str]:
    """What a user should know of settings that are no mistake in themselves."""
    found = []
    rate = trainer.get("learning_rate")
    if isinstance(rate, int | float) and rate > HIGH_RATE:
        found.append(
            f"`learning_rate` is {rate:g}; most runs take 1e-6 to 1e-3, and one so high makes the loss explode"
        )
    if str(trainer.get("optim")).startswith("paged_") and not has_gpu():
        found.append(f"`{trainer['optim']}` moves moments out of a full GPU; without a GPU the pages have no effect")
    found += [f"`{name}` has no effect {why}" for name, why in _idle(trainer).items() if trainer.get(name) is not None]
    return found


def _idle(trainer: Mapping[str, Any]) -> dict[str, str]:
    """Settings that other settings leave without effect, whether they are written or not → why."""
    steps, evaluates = trainer.get("max_steps"), trainer.get("eval_strategy", "no")
    best = trainer.get("load_best_model_at_end") or trainer.get("lr_scheduler_type") in IGNORE_WARMUP[1:]
    idle = {
        "num_train_epochs": isinstance(steps, int) and steps > 0 and "with `max_steps`, which says when training ends",
        "eval_steps": evaluates != "steps" and "without `eval_strategy: steps`",
        "eval_delay": evaluates == "no" and "without `eval_strategy`",
        "save_steps": trainer.get("save_strategy", "steps") != "steps" and "without `save_strategy: steps`",
        "logging_steps": trainer.get("logging_strategy", "steps") != "steps" and "without `logging_strategy: steps`",
        "metric_for_best_model": not best and "without `load_best_model_at_end: true`",
        "greater_is_better": not best and "without `load_best_model_at_end: true`",
        "liger_kernel_config": not trainer.get("use_liger_kernel") and "without `use_liger_kernel: true`",
        "eval_packing": trainer.get("packing") is False and "without `packing: true`",
        "loss_weights": isinstance(trainer.get("loss_type"), str) and "with a single `loss_type`",
    }
    return {name: why for name, why in idle.items() if isinstance(why, str)}
