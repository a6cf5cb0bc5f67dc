"""A command of MedicalGPT's scripts in, the stage that does the same out.

Defaults of the scripts are written where TRL's or PEFT's differ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tools.convert_datasets import CommitOf, declare, pinned
from pipeline.tools.convert_launch import DEEPSPEED, FSDP, FSDP_DETAIL, write_launch
from pipeline.tools.convert_parts import Arguments, Book, Job, Known, Noted, Part, by_name
from pipeline.tools.convert_quantized import quantize_base
from pipeline.tools.convert_templates import chat_template
from pipeline.tools.convert_trainer import Trainer, adapter

DEFAULT = "the default there"
KINDS = ("pt", "sft", "dpo", "reward")
OTHERS = {
    "model_quant": "`model_quant.py` writes 4 bits of bitsandbytes; add a stage `quantize`, which writes GPTQ",
    "eval_quantize": "`eval_quantize.py` reads 4 bits of bitsandbytes; add `evaluate: {data: …, compare: […]}`",
}
"""Scripts that train nothing, and what to do here instead."""
# The settings of a data set, by the kind of stage: pairs have their own columns.
_COLUMNS = {"prompt": "question", "chosen": "response_chosen", "rejected": "response_rejected"}
PAIRS: dict[str, Any] = {"format": "preference", "columns": _COLUMNS}
ROWS: Mapping[str, dict[str, Any]] = {
    **{"pt": {"format": "text"}, "sft": {"format": "sharegpt"}, "dpo": PAIRS, "reward": PAIRS},
}
# Defaults of the scripts that differ from TRL's, by the kind of stage.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "pt": {"learning_rate": 5e-5, "max_length": 1024},
    "sft": {"learning_rate": 5e-5, "max_length": 512},
    "reward": {"learning_rate": 5e-5, "max_length": 512, "disable_dropout": False},
    "dpo": {
        **{"learning_rate": 5e-4, "max_length": 512, "lr_scheduler_type": "cosine", "warmup_steps": 100},
        **{"weight_decay": 0.05, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "max_steps": 200},
        "per_device_eval_batch_size": 1,
    },
}
SAME: Mapping[str, str] = {
    "block_size": "trainer.max_length",
    "model_max_length": "trainer.max_length",
    "evaluation_strategy": "trainer.eval_strategy",
    "preprocessing_num_workers": "trainer.dataset_num_proc",
    "neft_alpha": "trainer.neftune_noise_alpha",
}
MADE: Mapping[str, str] = {
    "deepspeed": DEEPSPEED,
    "fsdp": FSDP,
    "fsdp_config": FSDP_DETAIL,
    "model_name_or_path": "`model` of the config, or of the stage",
    "model_revision": "the commit in `model: org/name@commit`",
    "peft_path": "`model: $stage` of the stage that wrote the adapter",
    "train_file_dir": "`path` of a data set: every file in the folder",
    "validation_file_dir": "`eval_data`",
    "dataset_name": "a name under `data:`",
    "dataset_config_name": "`subset` of the data set",
    "max_train_samples": "`max_samples` of the data set",
    "max_eval_samples": "`max_samples` of the held-out data set",
    "validation_split_percentage": "`eval_size`; one hundredth where it is not given",
    "template_name": "`template`; `vicuna` where it is not given",
    "use_peft": "`lora:` of the stage; on where it is not given",
    "target_modules": "`lora: {target_modules: […]}`; nothing for `all`",
    "load_in_4bit": "`quantized_base: nf4`",
    "load_in_8bit": "`quantized_base: int8`",
    "qlora": "nothing; 4 bits are NF4, and the scales are quantized too",
    "lora_rank": "`lora: {r: …}`; 8 where it is not given",
    "lora_alpha": "`lora: {lora_alpha: …}`; 32 where it is not given, 16 in DPO",
    "lora_dropout": "`lora: {lora_dropout: …}`; 0.05 where it is not given",
    "modules_to_save": "`lora: {modules_to_save: […]}`",
    "max_source_length": "`trainer: {max_length: …}`, together with `max_target_length`",
    "max_target_length": "`trainer: {max_length: …}`, together with `max_source_length`",
    "packing": "`trainer: {packing: …, packing_strategy: wrapped}` in `pt`",
    "flash_attn": "`trainer: {model_init_kwargs: {attn_implementation: flash_attention_2}}`",
    "torch_dtype": "`trainer: {model_init_kwargs: {dtype: …}}`",
    "warmup_ratio": "`trainer: {warmup_steps: …}`, where a value below 1 is a share",
    "report_to": "`trainer: {report_to: …}`",
    "base_model": "`model` of the `merge` stage",
    "base_model_name_or_path": "`model` of the `merge` stage",
    "lora_model": "the stage that `merge` folds",
    "peft_model_path": "the stage that `merge` folds",
    "seed": "`seed`",
    "output_dir": "which stage starts from which; every stage writes into a folder of its own",
    "do_train": "a training stage",
}
NOT_NEEDED: Mapping[str, str] = by_name(
    {
        "every stage writes into a folder of its own": "overwrite_output_dir overwrite_cache",
        "`eval_strategy` and held-out rows say when is measured": "do_eval",
        "`HF_HOME` says where the Hub's files are": "cache_dir",
        "the model's own config.json names its type and its tokenizer": "model_type tokenizer_name_or_path "
        "tokenizer_path use_fast_tokenizer trust_remote_code",
        "the library chooses it, and the result is the same": "device_map ddp_find_unused_parameters ddp_timeout "
        "remove_unused_columns ignore_pad_token_for_loss keep_linebreaks resize_emb min_target_length streaming",
        "the chat template writes the calls of tools": "tool_format",
        "tokens come from the environment only": "hf_hub_token hf_token",
    }
)
NOT_SUPPORTED: Mapping[str, str] = by_name(
    {
        "positions are not scaled here; set `rope_scaling` in the model's config.json": "rope_scaling",
        "LongLoRA's shifted attention is not supported": "shift_attn",
        "a run uploads nothing; `pipeline push` uploads a finished stage": "push_to_hub hub_model_id hf_hub_model_id",
    }
)
KNOWN = Known(NOT_NEEDED, NOT_SUPPORTED, frozenset({*SAME, *MADE}))


def convert_job(job: Job, book: Book, commit_of: CommitOf) -> list[Part]:
    """The stage of one command."""
    take = Arguments(job, book)
    if job.verb == "merge":
        return [_merge(take, job, book)]
    if job.verb in OTHERS:
        book.note("not supported", job.place, OTHERS[job.verb])
        return []
    if job.verb not in KINDS:
        book.note("not supported", job.place, f"`{job.verb}` is not supported; no stage is written for it")
        return []
    part = Part(job.place, job.verb, take.text("model_name_or_path"), take.text("model_revision"))
    part.adapters = take.words("peft_path")
    part.leaves, part.seed = take.text("output_dir"), take.number("seed", 42)
    write_launch(take, part, book)
    if not _data(take, part, book, commit_of):
        book.note("not supported", job.place, "no `train_file_dir` is given, so no stage is written")
        return []
    name = str(take.take("template_name", "vicuna"))
    if part.kind != "pt":
        part.template = _template(name, book, take.place("template_name"))
    _adapter(take, part, book)
    _trainer(take, part, book)
    take.report_rest(KNOWN)
    return [part]


def _merge(take: Arguments, job: Job, book: Book) -> Part:
    model = take.text("base_model") or take.text("base_model_name_or_path")
    adapters = take.words("lora_model") or take.words("peft_model_path")
    part = Part(job.place, "merge", model, adapters=adapters, leaves=take.text("output_dir"))
    take.report_rest(KNOWN)
    return part


def _data(take: Arguments, part: Part, book: Book, commit_of: CommitOf) -> bool:
    """`data`, `eval_data` and `eval_size`; whether there is any data."""
    folder, held, hub = take.text("train_file_dir"), take.text("validation_file_dir"), take.text("dataset_name")
    samples, held_samples = take.number("max_train_samples"), take.number("max_eval_samples")
    share = take.number("validation_split_percentage", 1)
    subset = take.text("dataset_config_name")
    if hub is not None:
        path = pinned(book, commit_of, "dataset", str(hub), take.place("dataset_name"))
        settings = {"path": path, **ROWS[part.kind]} | ({"subset": subset} if subset else {})
        name = str(hub)
    elif folder is not None:
        settings, name = {"path": str(folder), **ROWS[part.kind]}, Path(str(folder)).name
    else:
        return False
    settings |= {"max_samples": samples} if samples is not None and samples > 0 else {}
    part.settings["data"] = declare(book, name, settings, part.kind)
    if held is not None and str(held) != str(folder):
        rows = {"path": str(held), **ROWS[part.kind]}
        rows |= {"max_samples": held_samples} if held_samples is not None and held_samples > 0 else {}
        part.settings["eval_data"] = declare(book, f"{Path(str(held)).name}_held", rows, part.kind)
    elif held is not None and held_samples:
        text = "`validation_file_dir` is the folder of the training data; held-out rows are never trained on here"
        book.note("differs", take.place("validation_file_dir"), text)
        part.settings["eval_size"] = Noted(int(held_samples), "max_eval_samples")
    else:
        part.settings["eval_size"] = Noted(share / 100, "validation_split_percentage")
    return True


def _template(name: str, book: Book, place: str) -> str | None:
    """Our template for one of theirs, which are FastChat's; LLaMA-Factory's of the same name write nearly the same."""
    try:
        built_in, text = chat_template(name)
    except ValueError as error:
        book.note("to do", place, f"`template_name: {name}`: {error}; the model keeps its own template")
        return None
    book.note("differs", place, f"`template_name: {name}`: blanks between turns may differ; `pipeline data` shows them")
    if built_in is not None:
        return built_in
    file = book.beside(f"{name}.jinja")
    book.files[file] = text
    return file


def _adapter(take: Arguments, part: Part, book: Book) -> None:
    """`lora:` with the scripts' own defaults, and `quantized_base`; without `qlora` their 4 bits are FP4."""
    wanted = take.flag("use_peft", True)
    rank, dropout = take.number("lora_rank", 8), take.number("lora_dropout", 0.05)
    alpha = take.number("lora_alpha", 16 if part.kind == "dpo" else 32)
    targets, saved = take.words("target_modules"), take.words("modules_to_save")
    bits, qlora = [size for size in (8, 4) if take.flag(f"load_in_{size}bit")], take.flag("qlora")
    if wanted:
        part.settings["lora"] = adapter(rank, alpha, dropout=dropout, targets=targets, saved=saved)
    for size in bits[:1]:
        quantize_base(take, part, book, f"load_in_{size}bit", size, "nf4" if qlora else "fp4", double=qlora)
    if qlora and not bits:
        book.note(
            "not needed", take.place("qlora"), "`qlora`: the scripts load no base in 4 bits without `load_in_4bit`"
        )


def _trainer(take: Arguments, part: Part, book: Book) -> None:
    trainer = Trainer(take, book)
    trainer.take_same(part.kind, part.settings, SAME, {*MADE, *NOT_NEEDED, *NOT_SUPPORTED})
    source, target = take.number("max_source_length"), take.number("max_target_length")
    if source or target:
        trainer.set("max_length", (source or 256) + (target or 256), "max_source_length and max_target_length")
    for name, value in DEFAULTS[part.kind].items():
        trainer.default(name, value, DEFAULT)
    if part.kind == "pt":
        trainer.set("packing", take.flag("packing", True))
    if take.flag("flash_attn"):
        trainer.model("attn_implementation", "flash_attention_2")
    dtype = take.take("torch_dtype")
    if dtype not in (None, "auto"):
        trainer.model("dtype", str(dtype))
    if "bf16" not in trainer.found and "fp16" not in trainer.found:
        trainer.set("fp16" if part.kind == "dpo" else "bf16", part.kind == "dpo", DEFAULT)
    trainer.shared(part.kind)
    take.left.pop("do_train", None)
    trainer.finish(part)
