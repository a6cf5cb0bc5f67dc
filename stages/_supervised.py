"""What `pt` and `sft` share: TRL's SFTTrainer on rows that are prepared already, or that stream."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import _account, _model, _packing, _prepared, _streamed, _trainer
from stages._events import emit

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Config(_trainer.TrainingConfig):
    """The settings that `pt` and `sft` share."""

    streaming: bool = False
    """Tokenize rows while training reads them and keep none, for data that does not fit on the disk twice."""


def check(config: Config) -> list[_model.Problem]:
    """Problems that are known before the first stage starts."""
    return _streamed.check(config) if config.streaming else []


def run(config: Config, out: Path, *, cut: bool = False, **defaults: Any) -> dict[str, Any]:
    """Train and leave the artifact in `out`; `cut` as in `_prepared.prepare`, `defaults` are settings of SFTConfig."""
    from trl import SFTTrainer

    tokenizer = _trainer.tokenizer(config)
    args: Any = _trainer.arguments("SFTConfig", config, out, **defaults)
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    seen, account = _account.Tokens(), dict[str, Any]()
    if config.streaming:
        train: Any = _streamed.rows(config, tokenizer, args, seen, cut)
        held = _held(config, tokenizer, args, out, cut=cut) if config.eval_data else None
    else:
        rows = _prepared.prepare(config, tokenizer, args, out, cut=cut)
        train, held, account = rows.train, rows.held, rows.account
    model = _trainer.start(config, tokenizer)
    _packing.prepare(model, args)
    trainer = _trainer.build(
        SFTTrainer,
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held,
        processing_class=tokenizer,
        peft_config=_trainer.adapter(config),
    )
    metrics = _trainer.train(trainer, config, out)
    if config.streaming:
        account = {"streamed": seen.as_dict()}
        emit(out, "note", text=f"{seen.rows:,} rows and {seen.tokens:,} tokens were read, {seen.untrained:,} dropped")
    return {**account, **metrics}


def _held(config: Config, tokenizer: "PreTrainedTokenizerBase", args: Any, out: Path, *, cut: bool) -> "Dataset":
    """The held-out rows of a stage that streams, prepared as others are."""
    args = copy.copy(args)
    args.packing = args.packing if args.eval_packing is None else args.eval_packing
    alone = {"data": config.eval_data, "eval_data": [], "weights": [], "rows": None}
    return _prepared.prepare(config.model_copy(update=alone), tokenizer, args, out, cut=cut).train
