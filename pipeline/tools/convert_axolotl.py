"""A config of Axolotl in, the stage that does the same out.

Axolotl's own defaults are written where TRL's or PEFT's differ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tools.convert_axolotl_arguments import KNOWN, READ, SAME
from pipeline.tools.convert_datasets import FORMATS, USUAL, CommitOf, declare, is_local, pinned
from pipeline.tools.convert_launch import write_launch
from pipeline.tools.convert_parts import Arguments, Book, Job, Noted, Part, is_off, shown
from pipeline.tools.convert_quantized import quantize_base
from pipeline.tools.convert_templates import chat_template
from pipeline.tools.convert_trainer import Trainer, adapter

DEFAULT = "the default there"
KINDS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto"}
# Pairs: the last part of `type` → our column → the file's.
PAIRS: Mapping[str, Mapping[str, str]] = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {},
    "icr": {"prompt": "input"},
    "ultra": {},
    "prompt_pairs": {},
    "zephyr": {},
}
ATTENTION = {"flash": "flash_attention_2", "sdpa": "sdpa", "eager": "eager"}
SWITCHES = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}


def convert_job(job: Job, book: Book, commit_of: CommitOf) -> list[Part]:
    """The stage of one config."""
    take = Arguments(job, book)
    if job.verb == "merge-lora":
        part = Part(job.place, "merge", take.text("base_model"))
        part.adapters = take.words("lora_model_dir") or take.words("output_dir")
        return [part]
    if job.verb not in ("", "train"):
        book.note("not needed", job.place, f"`axolotl {job.verb}`: it trains nothing")
        return []
    method = take.take("rl")
    kind = KINDS.get(str(method)) if not is_off(method) else "reward" if take.flag("reward_model") else "sft"
    if kind is None:
        book.note("not supported", take.place("rl"), f"`rl: {method}` is not supported; no stage is written for it")
        return []
    part = Part(job.place, kind, take.text("base_model"), take.text("revision_of_model"))
    part.adapters, part.leaves = take.words("lora_model_dir"), take.text("output_dir") or "./model-out"
    part.seed = take.number("seed", 42)
    write_launch(take, part, book)
    part.words = take.words("tokens")
    if not Rows(take, book, commit_of, part).write():
        book.note("not supported", job.place, "no data set is left, so no stage is written")
        return []
    if part.kind != "pt":
        part.template = _template(take, book, alpaca=any(one["format"] == "alpaca" for one in book.data.values()))
    _adapter(take, part, book)
    _trainer(take, part, book, method)
    take.report_rest(KNOWN)
    return [part]


class Rows:
    """The data sets of one config."""

    def __init__(self, take: Arguments, book: Book, commit_of: CommitOf, part: Part) -> None:
        self.take, self.book, self.commit_of, self.part = take, book, commit_of, part

    def write(self) -> bool:
        """Put `data`, `eval_data` and `eval_size` into the stage; whether there is any data."""
        texts = self._listed("pretraining_dataset")
        listed = texts or self._listed("datasets")
        if self.part.kind == "sft" and listed and all(self._is_text(one) or texts for one in listed):
            self.part.kind = "pt"
            if texts:
                self.part.settings["streaming"] = True
        names = [name for one in listed if (name := self._declared(one, "datasets")) is not None]
        if not names:
            return False
        self.part.settings["data"] = names[0] if len(names) == 1 else names
        held = [self._declared(one, "test_datasets") for one in self._listed("test_datasets")]
        if held := [name for name in held if name is not None]:
            self.part.settings["eval_data"] = held
        size = self.take.number("val_set_size", 0)
        if not is_off(size) and not texts:
            self.part.settings["eval_size"] = Noted(size, "val_set_size")
        return True

    def _listed(self, name: str) -> list[Mapping[str, Any]]:
        value = self.take.take(name) or []
        items = value if isinstance(value, list) else [value]
        return [one if isinstance(one, Mapping) else {"path": str(one)} for one in items]

    def _is_text(self, one: Mapping[str, Any]) -> bool:
        return str(one.get("type", "")).startswith(("completion", "pretrain"))

    def _declared(self, one: Mapping[str, Any], word: str) -> str | None:
        place, path = self.take.place(word), str(one.get("path"))
        found = self._form(one)
        if found is None:
            kind = shown(one.get("type"))
            self.book.note("not supported", place, f"the data set `{path}`: `type: {kind}` has no format here")
            return None
        files = one.get("data_files")
        if files:
            owner, path = path, str(files[0] if isinstance(files, list) else files)
            if isinstance(files, list) and len(files) > 1:
                text = f"`{path}` and {len(files) - 1} more files: name their folder or a pattern under `data`"
                self.book.note("to do", place, text)
            if not is_local(owner) and "/" in owner:
                text = f"`{path}` is a file of `{owner}` on the Hub; `hf download {owner} {path} --repo-type dataset`"
                self.book.note("to do", place, f"{text} fetches it; write its path under `data`")
        local = files or is_local(path)
        place_of = path if local else pinned(self.book, self.commit_of, "dataset", path, place, one.get("revision"))
        settings: dict[str, Any] = {"path": place_of, **found}
        settings |= {"subset": one["name"]} if one.get("name") and not local else {}
        split, part, _ = str(one.get("split") or "").partition("[")
        if part:
            text = f"`split: {one['split']}`: a part of a split is written as `max_samples`"
            self.book.note("to do", place, text)
        settings |= {"split": split} if split and split != "train" and not local else {}
        return declare(self.book, Path(path).stem if local else path, settings, self.part.kind)

    def _form(self, one: Mapping[str, Any]) -> dict[str, Any] | None:
        """The format of a `type`, and the file's names; None for one that has no format here."""
        written = one.get("type") or ("completion" if self.part.kind == "pt" else "alpaca")
        if isinstance(written, Mapping):
            theirs = {"instruction": "field_instruction", "input": "field_input", "output": "field_output"}
            if self.part.kind in ("dpo", "reward"):
                theirs = {"prompt": "field_prompt", "chosen": "field_chosen", "rejected": "field_rejected"}
            form = FORMATS[self.part.kind]
            return {"format": form, **self._columns({our: written.get(their) for our, their in theirs.items()})}
        head, _, tail = str(written).partition(".")
        if self.part.kind == "pt":
            return {"format": "text", **self._columns({"text": one.get("field") or one.get("text_column")})}
        if self.part.kind in ("dpo", "reward"):
            return self._pairs(one, head, tail)
        if self.part.kind == "kto":
            return {"format": "labelled"}
        if head in ("chat_template", "sharegpt") or "conversation" in one:
            return self._talk(one, head)
        return {"format": "alpaca"} if head.startswith("alpaca") or head == "gpteacher" else None

    def _pairs(self, one: Mapping[str, Any], head: str, tail: str) -> dict[str, Any] | None:
        if "chat_template" in (head, tail):
            names = {"conversations": one.get("field_messages")}
            names |= {"chosen": one.get("field_chosen"), "rejected": one.get("field_rejected")}
            return {"format": "preference", **self._columns(names), **self._names(one)}
        columns = PAIRS.get(tail)
        return None if columns is None else {"format": "preference", **self._columns(columns)}

    def _talk(self, one: Mapping[str, Any], head: str) -> dict[str, Any]:
        own = "messages" if head == "chat_template" else "conversations"
        column = one.get("field_messages")
        form = "messages" if head == "chat_template" else "sharegpt"
        return {"format": form, **self._columns({own: column}), **self._names(one)}

    def _names(self, one: Mapping[str, Any]) -> dict[str, Any]:
        """`roles` and `message_keys`, where they differ from the usual names."""
        mapped, roles_ = one.get("message_property_mappings"), one.get("roles")
        keys = dict(mapped) if isinstance(mapped, Mapping) else {}
        keys |= {"role": one["message_field_role"]} if one.get("message_field_role") else {}
        keys |= {"content": one["message_field_content"]} if one.get("message_field_content") else {}
        usual = (keys.get("role"), keys.get("content")) in ((None, None), ("role", "content"), ("from", "value"))
        roles = {
            ours: theirs[0]
            for ours, theirs in (roles_.items() if isinstance(roles_, Mapping) else ())
            if isinstance(theirs, list) and theirs and ours in USUAL and theirs[0] not in USUAL[ours]
        }
        kept = {name: keys[name] for name in ("role", "content") if keys.get(name)}
        return {**({"roles": roles} if roles else {}), **({} if usual else {"message_keys": kept})}

    def _columns(self, names: Mapping[str, Any]) -> dict[str, Any]:
        columns = {ours: str(theirs) for ours, theirs in names.items() if theirs and theirs != ours}
        return {"columns": columns} if columns else {}


def _template(take: Arguments, book: Book, *, alpaca: bool) -> str | None:
    """Our template; rows of `type: alpaca` are written in Alpaca's form unless a chat template is named."""
    name, text = take.text("chat_template"), take.text("chat_template_jinja")
    default = take.text("default_system_message")
    if text:
        file = book.beside("chat_template.jinja")
        book.files[file] = str(text)
        return file
    if name is None and not alpaca:
        return None
    name = str(name or "alpaca").removeprefix("tokenizer_default_fallback_")
    if name == "tokenizer_default":
        return None
    known = {"phi_3": "phi", "phi_35": "phi", "qwen_25": "qwen", "mistral_v1": "mistral", "llama3_2_vision": "mllama"}
    try:
        built_in, text = chat_template(known.get(name, name), default=default)
    except ValueError as error:
        place = take.place("chat_template")
        book.note("to do", place, f"`chat_template: {name}`: {error}; the model keeps its own template")
        return None
    if built_in is not None:
        return built_in
    file = book.beside(f"{name}.jinja")
    book.files[file] = text
    return file


def _adapter(take: Arguments, part: Part, book: Book) -> None:
    method = take.take("adapter")
    rank, alpha, dropout = take.number("lora_r", 8), take.number("lora_alpha", 16), take.number("lora_dropout", 0)
    targets, saved = take.words("lora_target_modules"), take.words("lora_modules_to_save")
    linear = take.flag("lora_target_linear")
    flags = {"use_dora": take.flag("peft_use_dora"), "use_rslora": take.flag("peft_use_rslora")}
    bits = [size for size in (4, 8) if take.flag(f"load_in_{size}bit")]
    words = take.take("bnb_config_kwargs") or {}
    given = words if isinstance(words, Mapping) else {}
    kind, double = given.get("bnb_4bit_quant_type", "nf4"), bool(given.get("bnb_4bit_use_double_quant", True))
    if is_off(method):
        return
    if method not in ("lora", "qlora"):
        book.note(
            "not supported", take.place("adapter"), f"`adapter: {method}` is not supported; LoRA is written instead"
        )
    targets = [] if linear else targets
    part.settings["lora"] = adapter(rank, alpha, dropout=dropout, targets=targets, saved=saved, **flags)
    if bits or method == "qlora":
        name = f"load_in_{bits[0]}bit" if bits else "adapter"
        quantize_base(take, part, book, name, bits[0] if bits else 4, kind, double=double)


def _trainer(take: Arguments, part: Part, book: Book, method: Any) -> None:
    trainer = Trainer(take, book)
    trainer.take_same(part.kind, part.settings, SAME, READ)
    trainer.default("max_length", 512, DEFAULT)
    trainer.default("lr_scheduler_type", "cosine", DEFAULT)
    trainer.default("num_train_epochs", 1, DEFAULT)
    trainer.default("per_device_train_batch_size", 1, DEFAULT)
    checkpointing = take.take("gradient_checkpointing", False)
    trainer.set("gradient_checkpointing", not is_off(checkpointing), "" if checkpointing else DEFAULT)
    packs = take.flag("sample_packing")
    if part.kind == "pt":
        trainer.set("packing", packs, "sample_packing")
        if packs:
            trainer.set("packing_strategy", "bfd_split", "texts stay apart")
    elif part.kind == "sft" and packs:
        trainer.set("packing", True, "sample_packing")
    _precision(take, trainer)
    _schedule(take, trainer)
    beta = take.number("rl_beta", take.number("dpo_beta"))
    if beta is not None:
        trainer.set("beta", beta, "rl_beta")
    if method == "ipo":
        trainer.set("loss_type", "ipo", "rl")
    alpha = take.number("rpo_alpha")
    if alpha is not None:
        trainer.set("loss_type", ["sigmoid", "sft"], "rpo_alpha")
        trainer.set("loss_weights", [1, alpha])
    trainer.shared(part.kind)
    trackers = {"wandb_project": "wandb", "mlflow_tracking_uri": "mlflow", "use_tensorboard": "tensorboard"}
    trackers |= {"use_mlflow": "mlflow", "use_trackio": "trackio", "use_swanlab": "swanlab"}
    asked = [tracker for name, tracker in trackers.items() if not is_off(take.take(name))]
    trainer.report_to(asked)
    if "early_stopping" in part.settings:
        trainer.default("load_best_model_at_end", True, "early_stopping_patience")
    trainer.finish(part)


def _precision(take: Arguments, trainer: Trainer) -> None:
    bf16, fp16, whole = take.take("bf16"), take.take("fp16"), take.flag("bfloat16")
    if whole or bf16 == "full":
        trainer.set("bf16", False, "bfloat16: weights in bfloat16, no autocast")
        trainer.model("dtype", "bfloat16")
    elif not is_off(fp16) and fp16 != "auto":
        trainer.set("fp16", True)
    elif bf16 != "auto":
        trainer.set("bf16", not is_off(bf16))
    whole_types = {"float16": take.flag("float16"), "float32": take.flag("float32")}
    if (dtype := next((name for name, on in whole_types.items() if on), None)) is not None:
        trainer.model("dtype", dtype)
    if take.flag("use_kernels"):
        trainer.model("use_kernels", True)
    own = take.take("attn_implementation", ATTENTION.get(str(take.take("attention"))))
    asked = own or next((ours for name, ours in SWITCHES.items() if take.flag(name)), None)
    for name in SWITCHES:
        take.left.pop(name, None)
    if asked is not None:
        trainer.model("attn_implementation", str(asked))


def _schedule(take: Arguments, trainer: Trainer) -> None:
    """The least learning rate, and evaluations and checkpoints as shares of all steps."""
    least = take.number("cosine_min_lr_ratio")
    if least is not None:
        trainer.set("lr_scheduler_type", "cosine_with_min_lr", "cosine_min_lr_ratio")
        trainer.set("lr_scheduler_kwargs", {"min_lr_rate": least})
    epochs = trainer.found.get("num_train_epochs")
    epochs = epochs.value if isinstance(epochs, Noted) else epochs
    epochs = epochs if isinstance(epochs, int | float) and epochs > 0 else 1
    for word, name in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        count = take.number(word)
        if not is_off(count) and count > 0:
            trainer.set(name, round(1 / (count * epochs), 6), word)
            if name == "eval_steps":
                trainer.set("eval_strategy", "steps", word)
    if trainer.has("eval_steps"):
        trainer.default("eval_strategy", "steps", "eval_steps")
