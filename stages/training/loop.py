"""A training run: the starting model, the trainer, the artifact and its metrics."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from stages.chat.template import install_template
from stages.model.device import has_bf16
from stages.model.facts import read_json
from stages.model.folder import load_model, load_tokenizer, set_stop_tokens
from stages.model.inputs import Inputs
from stages.model.probe import check_fold
from stages.model.tokens import new_rows
from stages.runtime.errors import Interrupted, StageError
from stages.runtime.events import emit, main_process
from stages.training import engine
from stages.training.adapters import is_named
from stages.training.checkpoint import newest_whole
from stages.training.checkpointing import note as without_checkpointing
from stages.training.progress import Progress, batch_sizes, check_finite
from stages.training.settings import BATCH, TrainingConfig, saving
from stages.training.sharing import Sharing, sharing, split

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainingArguments,
    )


Save = Callable[[Any, TrainingConfig, Inputs, Path], None]
"""Writes a trained model into the stage's folder."""


def tokenizer(config: TrainingConfig, inputs: Inputs) -> "PreTrainedTokenizerBase":
    """The tokenizer of the starting model, with the chat template of the run."""
    loaded = load_tokenizer(inputs.model)
    install_template(loaded, config.template)
    return loaded


def start(config: TrainingConfig, inputs: Inputs, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """Load the model that the stage starts from, with its adapters folded in.

    Weights are bfloat16 for LoRA on a GPU that computes in it, and float32 elsewhere, unless `model_init_kwargs` has a
    `dtype`. With `quantized_base`, that is the dtype of the other weights, and the one that the layers compute in.
    """
    settings = dict(config.trainer.get("model_init_kwargs") or {})
    settings.setdefault("dtype", "bfloat16" if config.lora is not None and has_bf16() else "float32")
    if config.quantized_base is not None:
        settings["quantized_base"] = config.quantized_base
    model = load_model(inputs.model, **settings)
    set_stop_tokens(model, tokenizer)
    return model


def arguments(kind: str, config: TrainingConfig, out: Path, **defaults: Any) -> "TrainingArguments":
    """The TRL config `kind`: the settings of the user, then `defaults`, then those of this project.

    It opens the GPU, and in a launched process it joins the group of processes. So prepare rows first: that forks.

    Raises:
        StageError: the library itself refuses the settings.
    """
    import torch
    import trl

    gpu = torch.cuda.is_available()
    ours = {
        "output_dir": str(out / "checkpoints"),
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # transformers would log a NaN loss as 0
        **engine.on_cpu(),
        "bf16": has_bf16() and not config.trainer.get("fp16"),
        **saving(config.trainer),
        "dataloader_pin_memory": gpu,
    }
    try:
        made: TrainingArguments = getattr(trl, kind)(**{**ours, **_given(config, defaults)})
    except (ValueError, TypeError, ImportError) as error:
        raise StageError(f"{kind} refuses these settings: {error}") from None
    engine.load_whole(made)
    return made


def checkpointing(config: TrainingConfig, inputs: Inputs, out: Path) -> dict[str, bool]:
    """`activation_checkpointing: false` where the stage does not need it and its settings do not name it; else nothing.

    The events of the stage say so. It is transformers' newer name of `gradient_checkpointing`.
    """
    room = config.room_for_layers(read_json(Path(inputs.model[0], "config.json"), ""))
    if room is None:
        return {}
    emit(out, "note", text=without_checkpointing(*room))
    return {"activation_checkpointing": False}


def row_settings(kind: str, config: TrainingConfig, **defaults: Any) -> Any:
    """The attributes of `arguments` that decide what rows become, such as `max_length` and `packing`; no GPU is opened.

    `bf16` and the like, which follow the machine, keep TRL's defaults.
    """
    import trl

    made: dict[str, Any] = {}
    for field in fields(getattr(trl, kind)):
        made[field.name] = field.default if field.default_factory is MISSING else field.default_factory()
    return SimpleNamespace(**{**made, **_given(config, defaults)})


def _given(config: TrainingConfig, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the user that go to TRL's config, over `defaults`, and the seed.

    The batch and the steps of accumulation are those of one process.
    """
    ours = ("model_init_kwargs", "save_total_limit")
    theirs = {key: value for key, value in config.trainer.items() if key not in ours}
    given = {"seed": config.seed, **defaults, **theirs}
    if (processes := sharing().processes) > 1:
        rows = given.get("per_device_train_batch_size", BATCH), given.get("gradient_accumulation_steps", 1)
        given["per_device_train_batch_size"], given["gradient_accumulation_steps"] = split(*rows, processes)
    return given


def build(trainer: Any, **parts: Any) -> Any:
    """Build a TRL trainer.

    Raises:
        StageError: TRL or PEFT refuses the settings, or the adapter could not be folded.
    """
    if parts.get("peft_config") is not None:
        base = getattr(parts["model"], "quantized_base", None)
        method = None if base is None else base.method
        check_fold(type(parts["model"]), parts["model"].config, parts["peft_config"], method)
    engine.shared(parts["args"])
    try:
        built = trainer(**parts)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise StageError(f"TRL refuses these settings: {error}") from None
    if parts.get("peft_config") is not None:
        finish_adapter(built.model)
    return built


def finish_adapter(model: Any) -> None:
    """Prepare a model on which TRL has put an adapter: what is trained is in float32, see also `_name_missing_bias`."""
    _name_missing_bias(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # in bfloat16, as PEFT leaves `modules_to_save`, small steps get lost
            parameter.data = parameter.data.float()


def _name_missing_bias(model: Any) -> None:
    """Give embeddings whose rows PEFT trains the attribute `bias`, None: TRL reads it of the output embedding."""
    from peft.utils import TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.register_parameter("bias", None)


def adapter(config: TrainingConfig, inputs: Inputs | None = None, *, head: bool = True) -> Any:
    """PEFT's LoraConfig, or None when the whole model is trained.

    With the rows of new tokens (`add_tokens`) of the starting model, in both embeddings, or without `head` in the input
    embedding alone.

    Raises:
        StageError: PEFT refuses the settings.
    """
    if config.lora is None:
        return None
    from peft import LoraConfig

    rows = _rows_to_train(config.lora, inputs, head=head) if inputs is not None else {}
    ours = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    try:
        return LoraConfig(**{**ours, **({"trainable_token_indices": rows} if rows else {}), **config.lora})
    except (ValueError, TypeError, ImportError) as error:
        raise StageError(f"PEFT refuses the settings under `lora`: {error}") from None


def _rows_to_train(lora: Mapping[str, Any], inputs: Inputs, *, head: bool) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: embedding → ids of the rows of new tokens.

    Empty if the base has no new tokens, or if the settings say themselves how the embeddings are trained.
    """
    modules, ids = new_rows(Path(inputs.model[0]))
    if "trainable_token_indices" in lora:
        return {}
    named = [lora.get("modules_to_save") or [], lora.get("target_modules") or []]
    own = [module for module in modules if any(is_named(module, names) for names in named if names != "all-linear")]
    return {module: ids for module in modules[: len(modules) if head else 1] if module not in own}


def train(
    trainer: "Trainer", config: TrainingConfig, inputs: Inputs, out: Path, save: Save | None = None
) -> dict[str, Any]:
    """Run a prepared trainer from where it was, leave the artifact in `out`, and hand back its metrics.

    `save` writes the trained model instead of `save_trained`; it is called in one process, with finite weights.

    Raises:
        Interrupted: SIGTERM came; a checkpoint was written at the next step.
        StageError: the loss or a weight is not finite.
    """
    from transformers import set_seed

    checkpoints = Path(trainer.args.output_dir)
    checkpoint, notes = _chosen(checkpoints, with_best=trainer.args.load_best_model_at_end)
    for note in notes:
        emit(out, "note", text=note)
    progress = Progress(trainer, out, int(config.trainer.get("save_total_limit") or 2), config.early_stopping)
    trainer.add_callback(progress.callback())
    alone = sharing() == Sharing()
    if alone:
        before = _evaluate_before(trainer, out, resumed=checkpoint is not None)
    else:  # accelerate would not share a model among processes that evaluated before
        trainer.args.eval_on_start = trainer.eval_dataset is not None
    if checkpoint is None:
        set_seed(trainer.args.seed)  # the held-out pass above drew random numbers
    else:
        trainer.args.eval_on_start = False
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    early = progress.no_better()  # the evaluation below would count as one more
    if progress.stopped and not early:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
    after = trainer.evaluate() if trainer.eval_dataset is not None else {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_finite(model, trainer.state.global_step)
    whole = engine.gathered(model, trainer.model_wrapped) if sharing().divides_weights else None
    if main_process():
        if save is not None:
            save(model, config, inputs, out)
        else:
            save_trained(model, config, inputs, out, whole)
            engine.check_whole(out, engine.shapes_of(model))
        trainer.processing_class.save_pretrained(out)
    if not alone:
        before = next((entry for entry in trainer.state.log_history if "eval_loss" in entry), {})
    stopped = {"stopped_early": early} if config.early_stopping is not None else {}
    return {**_metrics(trainer, before, after), **stopped}


def _chosen(checkpoints: Path, *, with_best: bool) -> tuple[Path | None, list[str]]:
    """`newest_whole`; of several processes one chooses, since choosing sets damaged checkpoints aside."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return newest_whole(checkpoints, with_best=with_best)
    chosen = [newest_whole(checkpoints, with_best=with_best) if main_process() else None]
    torch.distributed.broadcast_object_list(chosen, src=0)
    return chosen[0] or (None, [])


def _evaluate_before(trainer: "Trainer", out: Path, *, resumed: bool) -> dict[str, float]:
    """Measure the starting model on the held-out rows; a resumed run reads what it measured before the stop."""
    if trainer.eval_dataset is None:
        return {}
    file = out / "before.json"
    if resumed:
        with contextlib.suppress(OSError, ValueError):  # a power cut can tear the file
            return dict(json.loads(file.read_text(encoding="utf-8")))
    emit(out, "note", text="measures the held-out rows before training")
    figures = trainer.evaluate()
    if main_process():
        file.write_text(json.dumps(figures), encoding="utf-8")
    return dict(figures)


def save_trained(
    model: Any, config: TrainingConfig, inputs: Inputs, out: Path, whole: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter, the generation config of its base and how that was quantized, or the whole model.

    `whole`: its weights, where no process holds them all.
    """
    if config.lora is None:
        model.save_pretrained(out, state_dict=whole)
        return
    alone = len(inputs.model) == 1
    # An adapter on adapters must not be loaded onto the bare base: that would be another model, silently.
    base = str(Path(inputs.model[0]).resolve()) if alone else "a chain of adapters, see `model` in record.json"
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(out, save_embedding_layers=False, **({} if whole is None else {"state_dict": whole}))
    if config.quantized_base is not None:
        model.get_base_model().quantized_base.write(out)
    model.get_base_model().generation_config.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def _metrics(trainer: "Trainer", before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics: dict[str, Any] = {"steps": trainer.state.global_step, **batch_sizes(trainer.args)}
    if logs:
        metrics |= {"loss_first": logs[0], "loss_last": logs[-1]}
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        metrics["best_step"] = trainer.state.best_global_step
    kept = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_mean_token_accuracy")
    for key in kept:
        if key in before and key in after:
            metrics |= {f"{key}_before": before[key], key: after[key]}
    return metrics
