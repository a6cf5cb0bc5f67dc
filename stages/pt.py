"""Continued pretraining: a model and raw text in, an adapter or a model out. Every token is in the loss."""

from pathlib import Path

from stages import Metrics, Model, Parallel, Stage
from stages.model.facts import Facts
from stages.model.inputs import Inputs
from stages.runtime.errors import Problem
from stages.training import description, packing, supervised
from stages.training.needs import facts_after_training, training_needs
from stages.training.settings import check_training, more_memory, training_notes

DEFAULTS = {"packing": True, "packing_strategy": "bfd_split"}  # of SFTConfig


class Config(supervised.Config):
    """Settings of `pt`; `trainer:` takes TRL's SFTConfig. `packing: true` unless said otherwise."""


def check(config: Config) -> list[Problem]:
    """Problems of the settings alone."""
    problems = supervised.check(config)
    if config.trainer.get("packing", True) and config.trainer.get("packing_strategy") == "bfd":
        text = "`bfd` cuts off what is longer than `max_length`; `bfd_split` and `wrapped` lose no token"
        problems.append(("trainer.packing_strategy", text))
    return problems


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Problems that are known before the first stage starts."""
    problems = check_training(config, facts, ["text"], chat=False)
    return problems + packing.check(config.trainer, facts, packing=True, wraps=True)


def rehearse(config: Config, inputs: Inputs, out: Path) -> None:
    """Build the settings and prepare the texts."""
    supervised.rehearse(config, inputs, out, cut=True, **DEFAULTS)


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Train on the texts and leave the artifact in `out`."""
    return supervised.run(config, inputs, out, cut=True, **DEFAULTS)


STAGE = Stage(
    version=3,
    config=Config,
    run=run,
    headline=description.headline,
    leaves=Model(adapter=lambda config: config.lora is not None),
    check=check,
    check_model=check_model,
    notes=training_notes,
    more_memory=more_memory,
    needs=training_needs,
    facts=facts_after_training,
    rehearse=rehearse,
    trains=lambda config: config.training(cut=True),
    settings={"trainer": "trl.trainer.sft_config:SFTConfig", "lora": "peft.tuners.lora.config:LoraConfig"},
    parallel=Parallel(),
    describe=description.describe,
    figures=description.figures,
)
