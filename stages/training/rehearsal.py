"""What can fail before training, done before the first stage trains: settings, optimizer, schedule, and rows."""

from typing import Any

from stages.runtime.errors import StageError
from stages.training import loop
from stages.training.settings import TrainingConfig

# Optimizers that transformers builds from the layers of the real model.
FROM_LAYERS = ("galore", "apollo", "lomo", "adalomo")
OPTIMIZER_SETTINGS = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs")


def check_libraries(config: TrainingConfig, args: Any) -> None:
    """Build the adapter's config, and the optimizer and the schedule of a dummy layer.

    Raises:
        StageError: PEFT, the optimizer or the schedule refuses the settings, or a package is missing.
    """
    import torch
    from transformers import Trainer, get_scheduler

    loop.adapter(config)
    layer = torch.nn.Linear(2, 2)
    try:
        if not str(args.optim.value).startswith(FROM_LAYERS):
            kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = kind(layer.parameters(), **kwargs)
        else:
            optimizer = torch.optim.AdamW(layer.parameters())
        settings = {"num_warmup_steps": args.get_warmup_steps(10), "num_training_steps": 10}
        get_scheduler(args.lr_scheduler_type, optimizer, scheduler_specific_kwargs=args.lr_scheduler_kwargs, **settings)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        given = ", ".join(f"`{name}`" for name in OPTIMIZER_SETTINGS if name in config.trainer)
        what = f"{given} under `trainer`" if given else "its defaults"
        raise StageError(f"the optimizer or its schedule refuses {what}: {first}") from None
