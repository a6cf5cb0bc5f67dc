"""What can fail before training, done before the first stage trains: settings, adapter, optimizer, schedule, rows."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stages.model.device import hide_all_gpus_but_one
from stages.model.inputs import Inputs
from stages.model.probe import check_fold
from stages.runtime.errors import StageError
from stages.runtime.events import main_process
from stages.runtime.processes import in_fork
from stages.training import loop
from stages.training.settings import TrainingConfig
from stages.training.sharing import leave_group

# Optimizers that transformers builds from the layers of the real model.
FROM_LAYERS = ("galore", "apollo", "lomo", "adalomo")
OPTIMIZER_SETTINGS = ("optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs")


def check_libraries(kind: str, config: TrainingConfig, out: Path, **defaults: Any) -> None:
    """Build the adapter's config, the TRL config `kind`, and the optimizer and the schedule of a dummy layer.

    A forked process builds them, as it opens the GPU; this process can then fork again, to prepare rows. `defaults` as
    for `loop.arguments`. Of several processes that a launcher started, one checks.

    Raises:
        StageError: TRL, PEFT, the optimizer or the schedule refuses the settings, or a package is missing.
    """
    if main_process():
        in_fork(partial(_build, kind, config, out, defaults))


def _build(kind: str, config: TrainingConfig, out: Path, defaults: Mapping[str, Any]) -> None:
    leave_group()
    hide_all_gpus_but_one()
    loop.adapter(config)
    _build_optimizer(config, loop.arguments(kind, config, out, **defaults))


def check_adapter(config: TrainingConfig, inputs: Inputs) -> None:
    """Prove that the adapter can be folded; nothing is known if the folder of the tokenizer holds no whole model.

    Raises:
        StageError: PEFT refuses the settings, or the adapter could not be folded.
    """
    if config.lora is not None and Path(inputs.model[0], "config.json").is_file():
        in_fork(partial(_check_fold, config, inputs.model[0]))


def _check_fold(config: TrainingConfig, folder: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    check_fold(AutoModelForCausalLM.from_config, shape, loop.adapter(config), config.quantized_base)


def _build_optimizer(config: TrainingConfig, args: Any) -> None:
    import torch
    from transformers import Trainer, get_scheduler

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
