"""What `pt` and `sft` share: TRL's SFTTrainer on rows that are prepared already."""

from pathlib import Path
from typing import Any

from stages import _packing, _prepared, _trainer


def run(config: _trainer.TrainingConfig, out: Path, *, cut: bool = False, **defaults: Any) -> dict[str, Any]:
    """Train and leave the artifact in `out`; `cut` as in `_prepared.prepare`, `defaults` are settings of SFTConfig."""
    from trl import SFTTrainer

    tokenizer = _trainer.tokenizer(config)
    args: Any = _trainer.arguments("SFTConfig", config, out, **defaults)
    rows = _prepared.prepare(config, tokenizer, args, out, cut=cut)
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    model = _trainer.start(config, tokenizer)
    _packing.prepare(model, args)
    trainer = _trainer.build(
        SFTTrainer,
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.held,
        processing_class=tokenizer,
        peft_config=_trainer.adapter(config),
    )
    return {**rows.account, **_trainer.train(trainer, config, out)}
