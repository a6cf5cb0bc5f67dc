"""A command or config of TRL or alignment-handbook in, the stage that does the same out.

Settings of TRL's trainers keep their names. What differs is where the model, the data and the adapter are named.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tools.convert_datasets import FORMATS, CommitOf, declare, is_local, pinned
from pipeline.tools.convert_launch import DEEPSPEED, FSDP, FSDP_DETAIL, write_launch
from pipeline.tools.convert_parts import Arguments, Book, Job, Known, Noted, Part, by_name, is_off, shown
from pipeline.tools.convert_quantized import quantize_base
from pipeline.tools.convert_trainer import Trainer, adapter

VERBS = {"sft": "sft", "cpt": "pt", "dpo": "dpo", "kto": "kto", "reward": "reward"}
UNSUPPORTED = ("orpo", "cpo", "simpo", "ppo", "grpo", "rloo", "gkd", "prm")
"""Methods of TRL that have no stage, as files and folders are named after them."""
DEFAULT = "the default there"

SAME: Mapping[str, str] = {
    "max_seq_length": "trainer.max_length",
    "evaluation_strategy": "trainer.eval_strategy",
    "dataset_streaming": "streaming",
    "preprocessing_num_workers": "trainer.dataset_num_proc",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "lora_dropout": "lora.lora_dropout",
}
MADE: Mapping[str, str] = {
    "deepspeed": DEEPSPEED,
    "fsdp": FSDP,
    "fsdp_config": FSDP_DETAIL,
    "model_name_or_path": "`model` of the config, or of the stage",
    "model_revision": "the commit in `model: org/name@commit`",
    "use_peft": "`lora:` of the stage, or nothing",
    "lora_r": "`lora: {r: …}`; 16 where it is not given",
    "load_in_4bit": "`quantized_base: nf4`",
    "load_in_8bit": "`quantized_base: int8`",
    "bnb_4bit_quant_type": "nothing; 4 bits are NF4",
    "use_bnb_nested_quant": "nothing; the scales of NF4 are quantized too",
    "lora_alpha": "`lora: {lora_alpha: …}`; 32 where it is not given",
    "lora_target_modules": "`lora: {target_modules: […]}`",
    "lora_modules_to_save": "`lora: {modules_to_save: […]}`",
    "dataset_name": "a name under `data:`",
    "dataset_config": "`subset` of the data set",
    "dataset_train_split": "`split` of the data set",
    "dataset_test_split": "`eval_data`, where `eval_strategy` asks for it",
    "datasets": "names under `data:`",
    "dataset_mixer": "names under `data:`; a share of a data set has to be written as `max_samples`",
    "dataset_mixture": "names under `data:`; a share of a data set has to be written as `max_samples`",
    "dataset_splits": "`split` of each data set; the second is `eval_data`",
    "dataset_configs": "`subset` of each data set",
    "dataset_text_field": "a stage `pt` on `format: text`",
    "columns": "`columns` of the data set",
    "text_column": "`columns: {text: …}`",
    "chat_template": "`template`: a .jinja file beside the config",
    "torch_dtype": "`trainer: {model_init_kwargs: {dtype: …}}`",
    "dtype": "`trainer: {model_init_kwargs: {dtype: …}}`",
    "attn_implementation": "`trainer: {model_init_kwargs: {attn_implementation: …}}`",
    "use_flash_attention_2": "`trainer: {model_init_kwargs: {attn_implementation: flash_attention_2}}`",
    "use_liger_kernel": "`trainer: {model_init_kwargs: {use_kernels: true}}`",
    "warmup_ratio": "`trainer: {warmup_steps: …}`, where a value below 1 is a share",
    "group_by_length": "`trainer: {train_sampling_strategy: group_by_length}`",
    "rpo_alpha": "`trainer: {loss_type: [sigmoid, sft], loss_weights: [1, …]}`",
    "report_to": "`trainer: {report_to: …}`",
    "seed": "`seed`",
    "output_dir": "which stage starts from which; every stage writes into a folder of its own",
    "do_train": "a training stage",
}
NOT_NEEDED: Mapping[str, str] = by_name(
    {
        "every stage writes into a folder of its own": "overwrite_output_dir hub_model_revision logging_dir",
        "`eval_strategy` and held-out rows say when is measured": "do_eval",
        "`max_length` counts the prompt and the answer together": "max_prompt_length max_completion_length "
        "max_target_length",
        "`sft` trains the answers, `pt` every token": "assistant_only_loss completion_only_loss dataset_kwargs",
        "models are loaded with the code of transformers alone": "trust_remote_code",
        "the tokenizer has them, and the template ends the answers": "eos_token pad_token tokenizer_name_or_path "
        "truncation_side auto_insert_empty_system_msg chat_template_path",
        "the pipeline shows the progress itself": "verbose log_level disable_tqdm",
        "the library chooses it, and the result is the same": "gradient_checkpointing_use_reentrant "
        "ignore_bias_buffers model_code_revision lora_task_type remove_unused_columns "
        "save_safetensors generate_during_eval dataset_batch_size num_of_sequences "
        "precompute_ref_batch_size env benchmarks callbacks system_prompt wandb_entity "
        "wandb_project wandb_log_unique_prompts",
        "a quantized base computes in the dtype of the other weights": "bnb_4bit_compute_dtype bnb_4bit_quant_storage",
    }
)
NOT_SUPPORTED: Mapping[str, str] = by_name(
    {
        "the reference is always the model that the stage starts from": "ref_model model_init_kwargs_ref "
        "reference_model_name_or_path",
        "a run uploads nothing; `pipeline push` uploads a finished stage": "push_to_hub hub_model_id hub_strategy "
        "hub_private_repo push_to_hub_revision",
        "this is not trained with LoRA here": "lora_target_parameters base_model_revision",
        "a stage tunes no hyperparameters": "hp_search",
    }
)
KNOWN = Known(NOT_NEEDED, NOT_SUPPORTED, frozenset({*SAME, *MADE}))


def convert_job(job: Job, book: Book, commit_of: CommitOf) -> list[Part]:
    """The stage of one command."""
    take = Arguments(job, book)
    kind = VERBS.get(method := method_of(job))
    if kind is None:
        book.note("not supported", job.place, f"`{method}` is not supported; no stage is written for it")
        return []
    part = Part(job.place, kind, take.text("model_name_or_path"), take.text("model_revision"))
    part.leaves, part.seed = take.text("output_dir"), take.number("seed", 42)
    write_launch(take, part, book)
    text_field = take.text("dataset_text_field") or take.text("text_column")
    if kind == "sft" and text_field and not any("mess" in str(one) for one in take.words("columns")):
        part.kind = "pt"
        book.note("differs", take.place("dataset_text_field"), f"rows are read as texts in `{text_field}`, by `pt`")
    if not Data(take, book, commit_of, part, text_field).write():
        book.note("not supported", job.place, "no data set is named, so no stage is written")
        return []
    template = take.text("chat_template")
    if template:
        book.files[book.beside("chat_template.jinja")] = str(template)
        part.template = book.beside("chat_template.jinja")
    if part.kind == "sft" and not take.flag("assistant_only_loss"):
        text = "TRL trains every token of a conversation without `assistant_only_loss`; `sft` trains the answers alone"
        book.note("differs", job.place, text)
    _adapter(take, part, book)
    _trainer(take, part, book)
    take.report_rest(KNOWN)
    return [part]


def method_of(job: Job) -> str:
    """The command; else the method that a folder or the file is named after, or that arguments belong to."""
    if job.verb:
        return job.verb
    given, words = job.given, re.split("[^a-z]+", "/".join(Path(job.place).parts[-3:]).lower())
    if (other := next((method for method in UNSUPPORTED if method in words), None)) is not None:
        return other
    if "desirable_weight" in given or "undesirable_weight" in given:
        return "kto"
    if "center_rewards_coefficient" in given:
        return "reward"
    if {"beta", "loss_type", "max_prompt_length", "rpo_alpha"} & given.keys():
        return "dpo"
    return next((verb for verb in VERBS if any(word.startswith(verb) for word in words)), "sft")


class Data:
    """The data sets of one command."""

    def __init__(self, take: Arguments, book: Book, commit_of: CommitOf, part: Part, text_field: Any) -> None:
        self.take, self.book, self.commit_of, self.part = take, book, commit_of, part
        self.text_field = text_field

    def write(self) -> bool:
        """Put `data` and `eval_data` into the stage; whether there is any."""
        shares = self._mixed() or self._named()
        if not shares:
            return False
        for name, share in shares.items():
            if share != 1:
                text = f"`{name}`: a share of {shown(share)} of its rows is used there; write that as `max_samples`"
                self.book.note("to do", self.take.place("dataset_mixer"), text)
        names = list(shares)
        self.part.settings["data"] = names[0] if len(names) == 1 else names
        return True

    def _declared(self, name: str, subset: Any = None, split: Any = None, files: Any = None) -> str:
        place = self.take.place("dataset_name")
        path = str(files) if isinstance(files, str) else name
        path = path if files or is_local(name) else pinned(self.book, self.commit_of, "dataset", name, place)
        form = "messages" if self.part.kind == "sft" else FORMATS[self.part.kind]
        settings: dict[str, Any] = {"path": path, "format": form}
        if self.part.kind == "pt" and self.text_field not in (None, "text"):
            settings["columns"] = {"text": str(self.text_field)}
        settings |= {"subset": subset} if subset else {}
        settings |= {"split": split} if split and split != "train" else {}
        text = f"`{name}`: its format is taken to be `{settings['format']}`; correct it under `data` if rows differ"
        self.book.note("to do", place, text)
        return declare(
            self.book, name + (f"_{split}" if split not in (None, "train") else ""), settings, self.part.kind
        )

    def _format(self) -> str:
        return FORMATS[self.part.kind]

    def _named(self) -> dict[str, Any]:
        """`dataset_name`, with its splits."""
        name = self.take.text("dataset_name")
        subset, split = self.take.text("dataset_config"), self.take.text("dataset_train_split")
        test = self.take.text("dataset_test_split")
        if name is None:
            return {}
        if not is_off(self.take.given.get("eval_strategy", self.take.given.get("evaluation_strategy"))):
            self._held([str(name)], test or "test")
        return {self._declared(str(name), subset, split): 1}

    def _held(self, names: list[str], split: Any, subset: Any = None) -> None:
        held = [self._declared(name, subset, split) for name in names]
        self.part.settings["eval_data"] = held

    def _mixed(self) -> dict[str, Any]:
        """`datasets` and `dataset_mixture` of lists, `dataset_mixer` of names with shares."""
        mixture = self.take.take("dataset_mixture") or {}
        listed = self.take.take("datasets") or (mixture.get("datasets") if isinstance(mixture, Mapping) else None) or []
        shares: dict[str, Any] = {}
        for one in listed if isinstance(listed, list) else ():
            if isinstance(one, Mapping):
                name = str(one.get("id") or one.get("path"))
                split = str(one["split"]) if one.get("split") else None
                ours = self._declared(name, one.get("config") or one.get("name"), split, one.get("data_files"))
                shares[ours] = one.get("weight", 1)
        mixer, splits = self.take.take("dataset_mixer") or {}, self.take.words("dataset_splits")
        configs = self.take.words("dataset_configs")
        train = next((split for split in splits if "train" in split), None)
        for index, (name, share) in enumerate(mixer.items() if isinstance(mixer, Mapping) else ()):
            subset = configs[index] if index < len(configs) else None
            shares[self._declared(str(name), subset, train)] = share
        if isinstance(mixer, Mapping) and (test := [split for split in splits if "test" in split]):
            self._held(list(map(str, mixer)), test[0])
        size = mixture.get("test_split_size") if isinstance(mixture, Mapping) else None
        if size:
            self.part.settings["eval_size"] = Noted(size, "test_split_size")
        return {name: share for name, share in shares.items() if not is_off(share)}


def _adapter(take: Arguments, part: Part, book: Book) -> None:
    """`lora:` with TRL's own defaults, where `use_peft` asks for it, and `quantized_base`."""
    bits = [size for size in (4, 8) if take.flag(f"load_in_{size}bit")]
    kind, double = take.text("bnb_4bit_quant_type") or "nf4", take.flag("use_bnb_nested_quant")
    wanted = take.flag("use_peft")
    rank, alpha = take.number("lora_r"), take.number("lora_alpha")
    dropout = take.number("lora_dropout", 0.05)
    targets, saved = take.words("lora_target_modules"), take.words("lora_modules_to_save")
    flags = {name: take.flag(name) for name in ("use_rslora", "use_dora")}
    if wanted or (bits and rank):
        rank, alpha = 16 if rank is None else rank, 32 if alpha is None else alpha
        part.settings["lora"] = adapter(rank, alpha, dropout=dropout, targets=targets, saved=saved, **flags)
    for size in bits[:1]:
        quantize_base(take, part, book, f"load_in_{size}bit", size, kind, double=double)


def _trainer(take: Arguments, part: Part, book: Book) -> None:
    """`trainer:`, whose settings keep their names."""
    trainer = Trainer(take, book)
    trainer.take_same(part.kind, part.settings, SAME, {*MADE, *NOT_NEEDED, *NOT_SUPPORTED})
    if part.kind == "pt":
        trainer.default("packing", False, DEFAULT)
    dtype = take.take("dtype", take.take("torch_dtype"))
    if dtype is not None and dtype != "auto":
        trainer.model("dtype", str(dtype))
    attention = take.take("attn_implementation")
    if attention is None and take.flag("use_flash_attention_2"):
        attention = "flash_attention_2"
    if attention is not None:
        trainer.model("attn_implementation", str(attention))
    if take.flag("use_liger_kernel"):
        trainer.model("use_kernels", True)
    trainer.shared(part.kind)
    alpha = take.number("rpo_alpha")
    if alpha is not None:
        trainer.set("loss_type", ["sigmoid", "sft"], "rpo_alpha")
        trainer.set("loss_weights", [1, alpha])
    take.left.pop("do_train", None)
    trainer.finish(part)
