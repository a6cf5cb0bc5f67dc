"""Supervised fine-tuning: a model and conversations in, a chat model out. Only the answers are in the loss."""

from pathlib import Path
from typing import Any

from stages.model.facts import Facts, Problem
from stages.training import loop, packing, supervised
from stages.training.needs import facts_after_training, training_needs
from stages.training.settings import check_training

VERSION = 2
PARALLEL = True
SETTINGS = {"trainer": "trl.trainer.sft_config:SFTConfig", "lora": "peft.tuners.lora.config:LoraConfig"}
FORMATS = ["alpaca", "prompt_completion", "messages", "sharegpt"]

figure = loop.figure
needs = training_needs
facts_after = facts_after_training


class Config(supervised.Config):
    """Settings of `sft`; `trainer:` takes TRL's SFTConfig."""


def check(config: Config, facts: Facts) -> list[Problem]:
    """Problems that are known before the first stage starts."""
    problems = check_training(config, facts, FORMATS, chat=True)
    problems += supervised.check(config) + packing.check(config.trainer, facts, packing=False, wraps=False)
    return problems


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train on the conversations and leave the artifact in `out`."""
    return supervised.run(config, out)
