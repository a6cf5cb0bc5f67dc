"""A training stage in words: its key figure, and its settings and figures for a model card."""

from collections.abc import Mapping
from typing import Any

from stages.runtime.figures import Figure, count, number, word
from stages.training.settings import TrainingConfig

# The settings that a reader asks for first; all of them are in record.json.
MAIN = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "max_length", "packing"),
    *("beta", "loss_type", "desirable_weight", "undesirable_weight", "center_rewards_coefficient"),
    *("optim", "weight_decay", "neftune_noise_alpha", "metric_for_best_model"),
)
LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
QUANTIZED = {"nf4": "4 bits (NF4, double quantization)", "int8": "8 bits (LLM.int8)"}
HELD_OUT = (
    ("eval_loss", "held-out loss"),
    ("eval_rewards/accuracies", "held-out preference accuracy"),
    ("eval_rewards/margins", "held-out reward margin"),
)


def best(metrics: Mapping[str, Any]) -> str:
    """Which step was kept, if it is not the last, as a clause."""
    if "best_step" not in metrics:
        return ""
    stopped = f", stopped early at step {metrics['steps']}" if metrics.get("stopped_early") else ""
    return f"{stopped}, best at step {metrics['best_step']}"


def on_few(metrics: Mapping[str, Any]) -> str:
    """On how little a held-out figure was measured, as a clause, if that is too little."""
    return f" (on only {metrics['few_held_out']})" if metrics.get("few_held_out") else ""


def of_pairs(metrics: Mapping[str, Any]) -> str:
    """On how many held-out pairs an accuracy was measured, as a clause."""
    return f" of {metrics['held_out']:,} pairs" if metrics.get("held_out") else ""


def headline(metrics: Mapping[str, Any]) -> str:
    """The key figure of a training stage: its held-out loss if it has one."""
    if "eval_loss" in metrics:
        change = f"{metrics['eval_loss_before']:.3f} → {metrics['eval_loss']:.3f}"
        return f"held-out loss {change}{on_few(metrics)}{best(metrics)}"
    if "loss_last" in metrics:
        return f"loss {metrics['loss_first']:.3f} → {metrics['loss_last']:.3f}"
    return f"{metrics['steps']} steps"


def preference_headline(metrics: Mapping[str, Any]) -> str:
    """The key figure of a stage that trains on preferences: its held-out accuracy if it has one."""
    if "eval_rewards/accuracies" in metrics:
        accuracy = f"{metrics['eval_rewards/accuracies']:.0%}"
        return f"held-out preference accuracy {accuracy}{of_pairs(metrics)}{best(metrics)}"
    return headline(metrics)


def describe(config: TrainingConfig) -> list[str]:
    """LoRA or the whole model, and the settings that a reader asks for first."""
    if config.lora is None:
        words = ["the whole model"]
    else:
        named = [f"{key} {word(config.lora[key])}" for key in LORA if key in config.lora]
        words = [f"LoRA ({', '.join(named) or 'defaults'})"]
    if config.quantized_base is not None:
        words.append(f"on the base in {QUANTIZED[config.quantized_base]}")
    words += [f"{key} {word(config.trainer[key])}" for key in MAIN if key in config.trainer]
    words += [f"early_stopping {config.early_stopping}"] if config.early_stopping is not None else []
    return [*words, f"seed {config.seed}"]


def figures(metrics: Mapping[str, Any]) -> list[Figure]:
    """Losses, held-out figures and steps."""
    found = []
    if "loss_last" in metrics:
        found.append(Figure("training loss", number(metrics["loss_first"]), number(metrics["loss_last"])))
    for key, name in HELD_OUT:
        if key in metrics:
            before = metrics.get(f"{key}_before")
            tie = key.endswith("accuracies") and not before  # all pairs have a margin of 0
            found.append(Figure(name, "a tie" if tie else number(before), number(metrics[key])))
    early = ", stopped early" if metrics.get("stopped_early") else ""
    found.append(Figure("steps", "", count(metrics["steps"]) + early))
    if "best_step" in metrics:
        found.append(Figure("step that was kept", "", count(metrics["best_step"])))
    return found
