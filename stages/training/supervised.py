"""What `pt` and `sft` share: TRL's SFTTrainer on rows that are prepared already, or that stream."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.chat import encoding
from stages.data.drawing import Draw
from stages.model.inputs import Inputs
from stages.runtime.errors import Problem
from stages.runtime.events import emit
from stages.training import loop, packing, preparation
from stages.training import streaming as streaming_module
from stages.training.rehearsal import check_libraries
from stages.training.settings import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Config(TrainingConfig):
    """The settings that `pt` and `sft` share."""

    streaming: bool = False
    """Tokenize rows while training reads them and keep none: for data that does not fit on the disk twice."""


def check(config: Config) -> list[Problem]:
    """Problems that are known before the first stage starts."""
    return streaming_module.check(config) if config.streaming else []


def arguments(config: Config, out: Path, **defaults: Any) -> Any:
    """TRL's SFTConfig for prepared rows."""
    args: Any = loop.arguments("SFTConfig", config, out, **defaults)
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    return args


def rehearse(config: Config, inputs: Inputs, out: Path, *, cut: bool = False, **defaults: Any) -> None:
    """Build the settings and prepare the rows, of a stream those held out; the arguments are those of `run`."""
    args = arguments(config, out, **defaults)
    check_libraries(config, args)
    tokenizer = loop.tokenizer(config, inputs)
    if not config.streaming:
        preparation.prepare(config.draw(inputs), tokenizer, args, out, cut=cut)
    elif config.eval_data:
        _held(config.draw(inputs), tokenizer, args, out, cut=cut)


def run(config: Config, inputs: Inputs, out: Path, *, cut: bool = False, **defaults: Any) -> dict[str, Any]:
    """Train and leave the artifact in `out`; `cut` as in `preparation.prepare`, `defaults` for SFTConfig."""
    from trl import SFTTrainer

    tokenizer = loop.tokenizer(config, inputs)
    args = arguments(config, out, **defaults)
    check_libraries(config, args)
    seen, account = encoding.Tokens(), dict[str, Any]()
    if config.streaming:
        train: Any = streaming_module.rows(config.draw(inputs), tokenizer, args, seen, cut)
        rows = _held(config.draw(inputs), tokenizer, args, out, cut=cut) if config.eval_data else None
        held = rows.train if rows is not None else None
    else:
        rows = preparation.prepare(config.draw(inputs), tokenizer, args, out, cut=cut)
        train, held, account = rows.train, rows.held, rows.account
    model = loop.start(config, inputs, tokenizer)
    packing.prepare(model, args)
    trainer = loop.build(
        SFTTrainer,
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held,
        processing_class=tokenizer,
        peft_config=loop.adapter(config, inputs),
    )
    seen.clear()  # TRL has looked at the first row of the stream, for which it was read
    metrics = loop.train(trainer, config, inputs, out)
    if config.streaming:
        account = {"streamed": seen.as_dict()}
        emit(out, "note", text=f"{seen.rows:,} rows and {seen.tokens:,} tokens were read, {seen.untrained:,} dropped")
    return {**account, **metrics}


def _held(draw: Draw, tokenizer: "PreTrainedTokenizerBase", args: Any, out: Path, *, cut: bool) -> preparation.Prepared:
    """The held-out rows of a stage that streams, as rows to train on. They are prepared as without streaming."""
    args = copy.copy(args)
    args.packing = args.packing if args.eval_packing is None else args.eval_packing
    alone = Draw(sources=draw.eval_data, seed=draw.seed)
    return preparation.prepare(alone, tokenizer, args, out, cut=cut)
