"""Continued pretraining: a model and raw text in, an adapter or a model out. Every token is in the loss."""

from pathlib import Path
from typing import Any

from stages import _model, _packing, _supervised, _trainer

VERSION = 2
PARALLEL = True
SETTINGS = {"trainer": "trl.trainer.sft_config:SFTConfig", "lora": "peft.tuners.lora.config:LoraConfig"}

figure = _trainer.figure
needs = _trainer.needs
facts_after = _trainer.facts_after


class Config(_supervised.Config):
    """Settings of `pt`; `trainer:` takes TRL's SFTConfig. `packing: true` unless said otherwise."""


def check(config: Config, facts: _model.Facts) -> list[_model.Problem]:
    """Problems that are known before the first stage starts."""
    problems = _trainer.check(config, facts, ["text"], chat=False)
    if config.trainer.get("packing", True) and config.trainer.get("packing_strategy") == "bfd":
        text = "`bfd` cuts off what is longer than `max_length`; `bfd_split` and `wrapped` lose no token"
        problems.append(("trainer.packing_strategy", text))
    problems += _supervised.check(config) + _packing.check(config.trainer, facts, packing=True, wraps=True)
    return problems


def run(config: Config, out: Path) -> dict[str, Any]:
    """Train on the texts and leave the artifact in `out`."""
    return _supervised.run(config, out, cut=True, packing=True, packing_strategy="bfd_split")
