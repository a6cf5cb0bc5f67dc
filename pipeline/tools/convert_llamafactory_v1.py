"""A config of LLaMA-Factory's new code (`USE_V1=1`) in, the same with the arguments of its other code out.

`translated` gives the job that `convert_llamafactory` reads, and the data sets as entries of dataset_info.json.
Defaults that differ between the two are written as arguments.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.tools.convert_parts import Book, Given, Job, Kind, is_off, shown
from pipeline.tools.convert_reading import config_file
from stages.runtime.errors import nearest

SAME = (
    *("template", "cutoff_len", "learning_rate", "max_steps", "num_train_epochs", "max_grad_norm", "bf16", "seed"),
    *("output_dir", "save_steps", "save_total_limit", "logging_steps", "trust_remote_code", "resume_from_checkpoint"),
)
NAMES = {"model": "model_name_or_path", "micro_batch_size": "per_device_train_batch_size"}
PEFT = {"r": "lora_rank", "target_modules": "lora_target", "modules_to_save": "additional_target"}
PEFT |= {name: name for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "adapter_name_or_path")}
PEFT |= {name: name for name in ("export_dir", "export_size", "export_hub_model_id", "export_legacy_format")}
PEFT |= {name: name for name in ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")}
DEFAULTS = {
    **{"learning_rate": 1e-4, "num_train_epochs": 3, "bf16": True, "logging_steps": 1, "weight_decay": 0.01},
    **{"lr_scheduler_type": "constant", "template": "qwen3_nothink", "per_device_train_batch_size": 1},
}
ADAPTER = {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.05}
NOT_NEEDED = {
    "model_class": "the model's own config.json names its type",
    "init_config": "models are loaded one after the other",
    "batching_workers": "rows are prepared once and kept",
    "sample_backend": "a finished stage is used with `pipeline chat` and `pipeline serve`",
    "max_new_tokens": "a finished stage is used with `pipeline chat` and `pipeline serve`",
    "enable_activation_checkpointing": "TRL's default, too",
    "save_ckpt_as_hf": "checkpoints are whole, and a finished stage is a folder of transformers",
    "full_determinism": "a run on one machine is the same each time",
}
ATTENTION = {"eager": "disabled", "sdpa": "sdpa", "flash_attention_2": "fa2", "flash_attention2": "fa2"}
CONVERTERS: Mapping[str, dict[str, Any]] = {
    **{"alpaca": {}, "sharegpt": {"formatting": "sharegpt"}},
    "pair": {"ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}},
}
"""`converter` of a data set → what an entry of dataset_info.json says."""
KNOWN = (
    *(*SAME, *NAMES, *NOT_NEEDED, "train_dataset", "eval_dataset", "global_batch_size", "flash_attn", "peft_config"),
    *(
        "kernel_config",
        "quant_config",
        "dist_config",
        "batching_strategy",
        "lr_scheduler_config",
        "optim_config",
        "save_epochs",
    ),
)


def translated(job: Job, book: Book) -> tuple[Job, dict[str, Any]]:
    """The job with the arguments of the other code, and entries of dataset_info.json."""
    found = {name: job.given[name] for name in SAME if name in job.given}
    found |= {theirs: job.given[ours] for ours, theirs in NAMES.items() if ours in job.given}
    for name, given in job.given.items():
        if name in NOT_NEEDED:
            book.note("not needed", given.place, f"`{name}`: {NOT_NEEDED[name]}")
        elif name not in KNOWN:
            text = f"`{name}` is no argument of LLaMA-Factory's new code{nearest(name, KNOWN)}"
            book.note("unknown", given.place, text)
    _plugins(job, found, book)
    exports = "export_dir" in found
    kind = "dpo" if job.verb == "dpo" else "sft"
    entries: dict[str, Any] = {}
    if not exports:
        for word, name in (("train_dataset", "dataset"), ("eval_dataset", "eval_dataset")):
            if word in job.given and not is_off(job.given[word].value):
                sets = _sets(job.given[word], job, book, kind)
                entries |= sets
                found[name] = Given(list(sets), job.given[word].place)
        settings = {**DEFAULTS, "stage": kind, "do_train": True}
        found = {**{name: Given(value, job.place) for name, value in settings.items()}, **found}
    return replace(job, verb="export" if exports else "train", given=found), entries


def _plugins(job: Job, found: dict[str, Given], book: Book) -> None:
    """The arguments that are mappings with a `name`, and those that need a sum."""

    def plugin(name: str) -> tuple[Mapping[str, Any], str]:
        given = job.given.get(name)
        value = given.value if given is not None and isinstance(given.value, Mapping) else {}
        return value, given.place if given is not None else job.place

    peft, place = plugin("peft_config")
    method = str(peft.get("name", "full"))
    found["finetuning_type"] = Given(method, place)
    found |= {name: Given(value, place) for name, value in ADAPTER.items() if method == "lora"}
    found |= {PEFT[name]: Given(value, place) for name, value in peft.items() if name in PEFT and value is not None}
    for name in [name for name in peft if name not in (*PEFT, "name", "infer_dtype")]:
        book.note("not supported", place, f"`peft_config.{name}: {shown(peft[name])}` is not supported")
    quant, place = plugin("quant_config")
    if quant:
        found["quantization_bit"] = Given(quant.get("quantization_bit", 4), place)
    kernels, place = plugin("kernel_config")
    if kernels.get("name") == "liger_kernel":
        found["enable_liger_kernel"] = Given(True, place)
    elif kernels:
        book.note("not needed", place, "`kernel_config`: the library chooses kernels, and the result is the same")
    spread, place = plugin("dist_config")
    if spread.get("name") == "fsdp2":
        found |= {"fsdp": Given("full_shard", place), "fsdp_config": Given({"fsdp_version": 2}, place)}
    elif spread.get("name") == "deepspeed":
        found["deepspeed"] = Given(spread.get("config_file"), place)
    if spread.get("cp_size", 1) not in (None, 1):
        text = f"`dist_config.cp_size: {spread['cp_size']}`: parts of one sequence on several devices are not supported"
        book.note("not supported", place, text)
    if (batching := job.given.get("batching_strategy")) is not None:
        dynamic = str(batching.value).startswith("dynamic")
        text = "a step has as many rows as fit there, and always the same number here"
        text = text if dynamic else "padding does not change the result"
        kind: Kind = "differs" if dynamic else "not needed"
        book.note(kind, batching.place, f"`batching_strategy: {batching.value}`: {text}")
    for name in ("lr_scheduler_config", "optim_config", "save_epochs"):
        if name in job.given and not is_off(job.given[name].value):
            text = f"`{name}: {shown(job.given[name].value)}`: write it under `trainer`, in TRL's words"
            book.note("to do", job.given[name].place, text)
    if (attention := job.given.get("flash_attn")) is not None:
        found["flash_attn"] = replace(attention, value=ATTENTION.get(str(attention.value), attention.value))
    whole, micro = job.given.get("global_batch_size"), job.given.get("micro_batch_size")
    if whole is not None and isinstance(whole.value, int):
        one = (micro.value if micro is not None else 1) * (job.processes or 1)
        found["gradient_accumulation_steps"] = replace(whole, value=max(1, whole.value // one))


def _sets(given: Given, job: Job, book: Book, kind: str) -> dict[str, Any]:
    """Name → entry of dataset_info.json, of a YAML file with data sets, a file with rows, or a name on the Hub."""
    path = str(given.value)
    if Path(path).suffix not in (".yaml", ".yml"):
        name = Path(path).stem.lower()
        return {name: {"file_name": path} if Path(path).exists() or Path(path).suffix else {"hf_hub_url": path}}
    starts = [Path(), job.folder, *job.folder.resolve().parents]
    file = next((there for start in starts if (there := start / path).is_file()), None)
    if file is None:
        text = f"`{path}` is not found, which describes the data; write its data sets under `data`"
        book.note("to do", given.place, text)
        return {}
    found = {}
    for name, one in config_file(file).items():
        info = one.value if isinstance(one.value, Mapping) else {}
        converter = info.get("converter")
        if (converter == "pair") != (kind == "dpo"):
            rows = "pairs" if converter == "pair" else "no pairs"
            text = f"the data set `{name}`: it has {rows}, and `{kind}` is trained"
            book.note("not supported", one.place, text)
            continue
        where = {"local": "file_name", "ms_hub": "ms_hub_url"}.get(str(info.get("source", "hf_hub")), "hf_hub_url")
        entry = {where: str(info.get("path"))} | CONVERTERS.get(str(converter), {"formatting": "openai"})
        entry |= {"split": info["split"]} if info.get("split") else {}
        found[name] = entry | ({"num_samples": info["size"]} if info.get("size") else {})
        if info.get("weight", 1) not in (None, 1):
            text = f"`weight: {info['weight']}` of `{name}`: shares are written as `data: {{{name}: 0.5, …}}`"
            book.note("to do", one.place, text)
    return found
