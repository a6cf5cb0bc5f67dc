"""Supervised fine-tuning: a model and conversations in, a chat model out. Only the answers are in the loss."""

from pathlib import Path

from stages import Metrics, Model, Parallel, Stage
from stages.data.source import CONVERSATIONS
from stages.model.facts import Facts
from stages.model.inputs import Inputs
from stages.runtime.errors import Problem
from stages.training import description, packing, supervised
from stages.training.needs import facts_after_training, training_needs
from stages.training.settings import check_training, more_memory, training_notes


class Config(supervised.Config):
    """Settings of `sft`; `trainer:` takes TRL's SFTConfig."""


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Problems that are known before the first stage starts."""
    problems = check_training(config, facts, CONVERSATIONS, chat=True)
    return problems + packing.check(config.trainer, facts, packing=False, wraps=False)


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Train on the conversations and leave the artifact in `out`."""
    return supervised.run(config, inputs, out)


STAGE = Stage(
    version=3,
    config=Config,
    run=run,
    headline=description.headline,
    leaves=Model(adapter=lambda config: config.lora is not None),
    check=supervised.check,
    check_model=check_model,
    notes=training_notes,
    more_memory=more_memory,
    needs=training_needs,
    facts=facts_after_training,
    rehearse=supervised.rehearse,
    trains=lambda config: config.training(),
    settings={"trainer": "trl.trainer.sft_config:SFTConfig", "lora": "peft.tuners.lora.config:LoraConfig"},
    parallel=Parallel(),
    describe=description.describe,
    figures=description.figures,
)
