"""The trainer of a stage as the stage builds it, on a model without memory and a batch of a given shape."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.chat.labels import IGNORED
from stages.model.inputs import Inputs
from stages.training import bitsandbytes_ops, loop, loss_head, packing
from stages.training.optimizer_state import stand_in
from stages.training.settings import TrainingConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments

PAD, END, ANY = range(3)  # ids of tokens
# What a step without memory does not do, or does on the CPU.
QUIET = {
    "use_cpu": True,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "eval_on_start": False,
    "report_to": "none",
    "push_to_hub": False,
    "auto_find_batch_size": False,
    "full_determinism": False,
    "max_steps": 1,
    "dataloader_num_workers": 0,
    "torch_compile": False,
}
# Settings that need a GPU, other packages or files, and that change nothing of the memory or are counted apart.
LEFT_OUT = (
    *("tf32", "fp16", "fp16_full_eval", "bf16_full_eval", "use_liger_kernel", "activation_offloading", "deepspeed"),
    *("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model", "fsdp", "fsdp_config", "use_cpu"),
    *("resume_from_checkpoint", "optim_args", "optim_target_modules", "dataloader_persistent_workers", "no_cuda"),
    "dataloader_prefetch_factor",
)
WITH_REFERENCE = ("DPOConfig", "KTOConfig")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass reads on one device."""

    rows: int
    """Sequences; of a preference pair or of a packed row one."""
    tokens: int
    """Tokens of a row with its padding, or of a packed row."""
    documents: tuple[int, ...] = ()
    """Lengths of the documents in a packed row; empty for rows that are padded."""
    labelled: float = 1.0
    """The share of the tokens that are in the loss."""


def arguments(
    kind: str, config: TrainingConfig, out: Path, batch: Batch, passes: int, *, gpu: bool
) -> "TrainingArguments":
    """TRL's settings of the stage, for one quiet step on the CPU that computes in the dtypes of the device."""
    given = config.trainer
    ours = {
        **QUIET,
        "bf16": bool(given.get("bf16", gpu) or given.get("fp16")),
        "per_device_train_batch_size": batch.rows,
        "gradient_accumulation_steps": passes,
    }
    if kind == "SFTConfig":
        packs = bool(batch.documents) or given.get("packing_strategy") == "wrapped"
        ours |= {"packing": packs, "dataset_kwargs": {"skip_prepare_dataset": True}}
    if kind == "KTOConfig":
        ours["train_sampling_strategy"] = "sequential"
    if "optim" in given:
        ours["optim"] = stand_in(str(given["optim"]))
    theirs = {key: value for key, value in given.items() if key not in LEFT_OUT}
    return loop.arguments(kind, config.model_copy(update={"trainer": {**theirs, **ours}}), out)


def trainer(
    kind: str, config: TrainingConfig, folder: Path, batch: Batch, args: "TrainingArguments", *, gpu: bool, half: bool
) -> Any:
    """TRL's trainer of the stage, on a model without memory and a batch of this shape."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    precomputed = bool(config.trainer.get("precompute_ref_log_probs"))
    wrapped = bool(getattr(args, "packing", False)) and not batch.documents  # every row is full
    rows = _rows(kind, batch, precomputed=precomputed, padded=not wrapped) * args.gradient_accumulation_steps
    model = _model(kind, config, folder, gpu=gpu, half=half)
    if kind == "SFTConfig":
        packing.prepare(model, args)
    parts: dict[str, Any] = {"model": model, "args": args, "train_dataset": Dataset.from_list(rows)}
    if kind in WITH_REFERENCE and config.lora is None:
        parts["ref_model"] = _model(kind, config, folder, gpu=gpu, half=half)
    base: Any = getattr(trl, kind.removesuffix("Config") + "Trainer")

    class Trainer(base):  # type: ignore[misc, unused-ignore]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    parts |= {"processing_class": _tokenizer(), "peft_config": _adapter(kind, config, folder)}
    trainer: Any = Trainer(**parts)
    if precomputed:
        trainer.precompute_ref_logps, trainer.ref_model = True, None
    if config.lora is not None:
        loop.finish_adapter(trainer.model)
    if kind != "RewardConfig" and not gpu:
        loss_head.install(trainer, every_step=True)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _model(kind: str, config: TrainingConfig, folder: Path, *, gpu: bool, half: bool) -> Any:
    """The model of a folder as `loop.start` loads it, without memory; `half`: in bfloat16 in any case."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    settings = dict(config.trainer.get("model_init_kwargs") or {})
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    dtype = settings.get("dtype") or ("bfloat16" if config.lora is not None and gpu else "float32")
    dtype = (shape.dtype or "float32") if dtype == "auto" else dtype
    dtype = "bfloat16" if half else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    attention = {} if settings.get("attn_implementation") != "eager" else {"attn_implementation": "eager"}
    auto = AutoModelForCausalLM
    if kind == "RewardConfig":
        auto, shape.num_labels = AutoModelForSequenceClassification, 1
        shape.get_text_config().pad_token_id = PAD
    model = auto.from_config(shape, dtype=dtype, **attention)
    method = getattr(config, "quantized_base", None)
    if method is not None:
        from stages.model.quantized import quantize

        with bitsandbytes_ops.plain_weights():
            quantize(model, method, dtype)
    return model


def _adapter(kind: str, config: TrainingConfig, folder: Path) -> Any:
    """PEFT's config, as the stage builds it."""
    if kind == "RewardConfig" and config.lora is not None:
        config = config.model_copy(update={"lora": {**config.lora, "task_type": "SEQ_CLS"}})
    return loop.adapter(config, Inputs(model=[str(folder)]), head=kind != "RewardConfig")


def _tokenizer() -> Any:
    """A tokenizer of three tokens; rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"pad": PAD, "end": END, "any": ANY}, "any"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end", unk_token="any")


def _rows(kind: str, batch: Batch, *, precomputed: bool, padded: bool) -> list[dict[str, Any]]:
    """Rows in the columns that TRL's collator reads. Of rows that are padded, the first has the full width."""
    documents = list(batch.documents)
    if documents:
        length, lengths = sum(documents), [sum(documents)] * batch.rows
    else:
        length, lengths = batch.tokens, [batch.tokens] + [max(1, batch.tokens - padded)] * (batch.rows - 1)
    answer = max(1, round(batch.labelled * length))
    found: list[dict[str, Any]] = []
    for row in lengths:
        prompt, rest = [ANY] * (row - min(row, answer)), [ANY] * min(row, answer)
        if kind == "SFTConfig":
            found.append({"input_ids": prompt + rest, "labels": [IGNORED] * len(prompt) + rest})
            found[-1] |= {"seq_lengths": documents} if documents else {}
        elif kind == "DPOConfig":
            found.append({"prompt_ids": prompt, "chosen_ids": rest, "rejected_ids": rest})
            found[-1] |= {f"ref_{name}_logps": 0.0 for name in ("chosen", "rejected")} if precomputed else {}
        elif kind == "KTOConfig":
            label = len(found) % 2 == 0
            found.append({"prompt_ids": prompt, "completion_ids": rest, "KL_completion_ids": rest, "label": label})
            found[-1] |= {"ref_logps": 0.0, "ref_KL_logps": 0.0} if precomputed else {}
        else:
            found.append({"chosen_ids": prompt + rest, "rejected_ids": prompt + rest})
    return found
