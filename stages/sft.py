"""Supervised fine-tuning: a model and conversations in, a chat model out. Only the answers are in the loss."""

from pathlib import Path
from typing import Any

from stages import _model, _packing, _supervised, _trainer

VERSION = 2
PARALLEL = True
SETTINGS = {"trainer": "trl.trainer.sft_config:SFTConfig", "lora": "peft.tuners.lora.config:LoraConfig"}
FORMATS = ["alpaca", "prompt_completion", "messages", "sharegpt"]

figure = _trainer.figure
needs = _trainer.needs
facts_after = _trainer.facts_after


class Config(_supervised.Config):
    """Settings of `sft`; `trainer:` takes TRL's SFTConfig."""


def check(config: Config, facts: _model.Facts) -> list[_model.Problem]:
    """Problems that are known before the first stage starts."""
    problems = _trainer.check(config, facts, FORMATS, chat=True)
    problems += _supervised.check(config) + _packing.check(config.trainer, facts, packing=False, wraps=False)
    return problems


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train on the conversations and leave the artifact in `out`."""
    return _supervised.run(config, out)
