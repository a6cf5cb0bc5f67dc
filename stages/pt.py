"""Continued pretraining: a model and raw text in, an adapter or a model out. Every token is in the loss."""

from pathlib import Path
from typing import Any

from stages.model.facts import Facts, Problem
from stages.training import loop, packing, supervised
from stages.training.needs import facts_after_training, training_needs
from stages.training.settings import check_training

VERSION = 2
PARALLEL = True
SETTINGS = {"trainer": "trl.trainer.sft_config:SFTConfig", "lora": "peft.tuners.lora.config:LoraConfig"}

figure = loop.figure
needs = training_needs
facts_after = facts_after_training


class Config(supervised.Config):
    """Settings of `pt`; `trainer:` takes TRL's SFTConfig. `packing: true` unless said otherwise."""


def check(config: Config, facts: Facts) -> list[Problem]:
    """Problems that are known before the first stage starts."""
    problems = check_training(config, facts, ["text"], chat=False)
    if config.trainer.get("packing", True) and config.trainer.get("packing_strategy") == "bfd":
        text = "`bfd` cuts off what is longer than `max_length`; `bfd_split` and `wrapped` lose no token"
        problems.append(("trainer.packing_strategy", text))
    problems += supervised.check(config) + packing.check(config.trainer, facts, packing=True, wraps=True)
    return problems


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train on the texts and leave the artifact in `out`."""
    return supervised.run(config, out, cut=True, packing=True, packing_strategy="bfd_split")
