"""What `pt` and `sft` share: TRL's SFTTrainer on rows that are prepared already, or that stream."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.chat import encoding
from stages.data.drawing import Draw
from stages.model.inputs import Inputs
from stages.runtime.errors import Problem
from stages.runtime.events import emit
from stages.training import loop, loss_head, packing, preparation
from stages.training import streaming as streaming_module
from stages.training.rehearsal import check_adapter, check_libraries
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
    check_libraries("SFTConfig", config, out, **defaults)
    check_adapter(config, inputs)
    _prepare(config, loop.tokenizer(config, inputs), inputs, out, cut=cut, **defaults)


def _prepare(
    config: Config, tokenizer: "PreTrainedTokenizerBase", inputs: Inputs, out: Path, *, cut: bool, **defaults: Any
) -> preparation.Prepared | None:
    """The rows; of a stage that streams, those that are held out, as rows to train on, or None."""
    settings, draw = loop.row_settings("SFTConfig", config, **defaults), config.draw(inputs)
    if config.streaming:
        if not config.eval_data:
            return None
        draw = Draw(sources=draw.eval_data, seed=draw.seed)
        settings.packing = settings.packing if settings.eval_packing is None else settings.eval_packing
    return preparation.prepare(draw, tokenizer, settings, out, cut=cut)


def run(config: Config, inputs: Inputs, out: Path, *, cut: bool = False, **defaults: Any) -> dict[str, Any]:
    """Train and leave the artifact in `out`; `cut` as in `preparation.prepare`, `defaults` for SFTConfig."""
    from trl import SFTTrainer

    tokenizer = loop.tokenizer(config, inputs)
    check_libraries("SFTConfig", config, out, **defaults)
    rows = _prepare(config, tokenizer, inputs, out, cut=cut, **defaults)
    args = arguments(config, out, **loop.checkpointing(config, inputs, out), **defaults)
    seen, account = encoding.Tokens(), dict[str, Any]()
    if config.streaming:
        train: Any = streaming_module.rows(config.draw(inputs), tokenizer, args, seen, cut)
        held = rows.train if rows is not None else None
    else:
        assert rows is not None
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
    loss_head.install(trainer, every_step=False)
    seen.clear()  # TRL has looked at the first row of the stream, for which it was read
    metrics = loop.train(trainer, config, inputs, out)
    if config.streaming:
        account = {"streamed": seen.as_dict()}
        dropped = seen.untrained + seen.refused
        emit(out, "note", text=f"{seen.rows:,} rows and {seen.tokens:,} tokens were read, {dropped:,} dropped")
    return {**account, **metrics}
