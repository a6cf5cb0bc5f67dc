"""A command or a config file of LLaMA-Factory in, the stages that do the same out.

LLaMA-Factory's own defaults are written where a result depends on them and TRL's or PEFT's differ.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.foreign import is_new_llamafactory
from pipeline.tools.convert_datasets import CommitOf, Sets, declare, read_info
from pipeline.tools.convert_launch import write_launch
from pipeline.tools.convert_llamafactory_arguments import EARLIER, KNOWN
from pipeline.tools.convert_llamafactory_settings import DEFAULT, Settings
from pipeline.tools.convert_llamafactory_v1 import translated
from pipeline.tools.convert_parts import Arguments, Book, Job, Noted, Part, is_off, shown
from pipeline.tools.convert_quantized import quantize_base
from pipeline.tools.convert_reading import config_file
from pipeline.tools.convert_templates import chat_template, differences
from pipeline.tools.convert_trainer import adapter

STAGES = {"pt": "pt", "sft": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
CHAT = ("chat", "api", "webchat", "webui")
TASKS = {"mmlu": "mmlu", "cmmlu": "cmmlu", "ceval": "ceval-valid"}
GENERATION = {"temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024}


def convert_job(job: Job, book: Book, commit_of: CommitOf, info: Path | None) -> list[Part]:
    """The stages of one command; what has no place in them is noted."""
    entries = None
    if is_new_llamafactory(job.given):
        job, entries = translated(job, book)
    arguments = Arguments(job, book, EARLIER)
    verb = job.verb or verb_of(job)
    made = Command(arguments, book, commit_of, info)
    if entries is not None:
        made.sets = Sets(book, commit_of, "", entries)
    parts = made.parts(verb)
    arguments.report_rest(KNOWN)
    return parts


def verb_of(job: Job) -> str:
    """What a config file is for, by its keys."""
    given = job.given
    if "export_dir" in given:
        return "export"
    if "task" in given:
        return "eval"
    return "train" if {"dataset", "eval_dataset", "stage", "output_dir", "do_train"} & given.keys() else "chat"


class Command:
    """One command: its arguments, and what they become."""

    def __init__(self, arguments: Arguments, book: Book, commit_of: CommitOf, info: Path | None) -> None:
        self.arguments, self.book, self.job = arguments, book, arguments.job
        self.commit_of = commit_of
        self.info = info
        self.part = Part(self.job.place, "")
        self.sets: Sets | None = None

    def parts(self, verb: str) -> list[Part]:
        """The stages, in their order."""
        take = self.arguments
        self.part.model = take.text("model_name_or_path")
        self.part.revision = take.text("model_revision")
        self.part.adapters = take.words("adapter_name_or_path")
        if self.job.environment.get("USE_MODELSCOPE_HUB") in ("1", "true") and self.part.model is not None:
            text = (
                f"`{self.part.model}` is a name on ModelScope; download it and name its folder, or check it on the Hub"
            )
            self.book.note("to do", self.job.place, text)
        if self.job.environment.get("FORCE_TORCHRUN") in ("1", "true") and self.job.processes is None:
            text = "`FORCE_TORCHRUN=1` starts a process on every GPU; write `launch: {processes: N}` for N GPUs"
            self.book.note("to do", self.job.place, text)
        self._tokens()
        if verb == "train":
            return self._train()
        if verb == "export":
            return self._export()
        if verb == "eval":
            return self._tasks()
        return self._chat() if verb in CHAT else []

    def _note(self, kind: Any, name: str, text: str) -> None:
        self.book.note(kind, self.arguments.place(name), text)

    def _tokens(self) -> None:
        """Tokens that the command adds to the tokenizer."""
        take, part = self.arguments, self.part
        part.words, part.special = take.words("add_tokens"), take.words("add_special_tokens")
        path = take.text("new_special_tokens_config")
        if path is None:
            return
        starts = [Path(), self.job.folder, *self.job.folder.resolve().parents]
        file = next((there for start in starts if (there := start / str(path)).is_file()), None)
        if file is None:
            text = f"`{path}` is not found; write its tokens under `add_tokens`"
            self._note("to do", "new_special_tokens_config", text)
        else:
            part.special = list(config_file(file))

    # Training

    def _train(self) -> list[Part]:
        take, part = self.arguments, self.part
        stage = str(take.take("stage", "sft"))
        if stage not in STAGES:
            self._note("not supported", "stage", f"`stage: {stage}`: no stage is written for it")
            return []
        trains = take.flag("do_train")
        predicts = take.flag("predict_with_generate") | take.flag("do_predict")
        data, eval_data = take.words("dataset"), take.words("eval_dataset")
        part.kind, part.leaves = STAGES[stage], take.text("output_dir")
        part.template = None if part.kind == "pt" else self._template()
        samples = take.number("max_samples")
        if not data or not (trains or not predicts):
            return self._evaluation(eval_data or data, samples, part.template, predicts)
        if not trains:
            self._note("differs", "do_train", "`do_train` is missing or false, and a training stage is written")
        part.seed = take.number("seed", 42)
        write_launch(take, part, self.book)
        if not self._mixture(data, eval_data, samples):
            self._note("not supported", "dataset", f"no data set of `{part.kind}` is left, so no stage is written")
            return []
        self._adapter()
        self._base()
        Settings(take, part, self.book).write()
        found = [part]
        if predicts and eval_data:
            after = Part(part.place, "evaluate", part.model, adapters=[part.leaves or ""], template=part.template)
            found += self._questions(after, eval_data, samples, predicts)
        return found

    def _mixture(self, data: list[str], eval_data: list[str], samples: int | None) -> bool:
        """`data`, `eval_data` and `eval_size`; whether any data is left."""
        take, settings, kind = self.arguments, self.part.settings, self.part.kind
        names = [(name, self._sets_of().declared(name, kind, take.place("dataset"), samples)) for name in data]
        ours = [name for _, name in names if name is not None]
        if not ours:
            return False
        strategy = str(take.take("mix_strategy", "concat"))
        weights = take.numbers("interleave_probs")
        settings["data"] = ours[0] if len(ours) == 1 else ours
        if strategy in ("interleave_under", "interleave_over") and len(ours) > 1:
            given = weights if len(weights) == len(data) else [1.0] * len(data)
            settings["data"] = {name: given[at] for at, (_, name) in enumerate(names) if name is not None}
            if strategy == "interleave_over":
                text = (
                    "`interleave_over` repeats rows until every data set is used up; set `rows:` of the stage for that"
                )
                self._note("differs", "mix_strategy", text)
        elif strategy == "interleave_once":
            self._note("differs", "mix_strategy", "`interleave_once` uses every row once, as a list of names does")
        held = [self._sets_of().declared(name, kind, take.place("eval_dataset"), samples) for name in eval_data]
        if held := [name for name in held if name is not None]:
            settings["eval_data"] = held
        streaming, size = take.flag("streaming"), take.number("val_size", 0)
        if streaming:
            settings["streaming"] = True
        if not is_off(size) and streaming:
            text = f"`val_size: {size}`: a stream has no rows to hold out; name a file under `eval_data`"
            self._note("not supported", "val_size", text)
        elif not is_off(size):
            settings["eval_size"] = Noted(int(size) if size >= 1 else size, "val_size")
        return True

    def _sets_of(self) -> Sets:
        if self.sets is None:
            folder = self.arguments.text("dataset_dir") or "data"
            place = self.arguments.place("dataset_dir")
            if folder.startswith("REMOTE:"):
                text = f"`{folder}`: download dataset_info.json and the files, and name it with `--dataset-info`"
                self.book.note("to do", place, text)
                folder = "data"
            entries, folder = read_info(self.book, self.info, folder, self.job.folder, place)
            self.sets = Sets(self.book, self.commit_of, folder, entries)
        return self.sets

    def _adapter(self) -> None:
        """`lora:`, or nothing for full fine-tuning."""
        take, settings = self.arguments, self.part.settings
        method = str(take.take("finetuning_type", "lora"))
        fresh = take.flag("create_new_adapter")
        if method == "full":
            return
        rank = take.number("lora_rank", 8)
        alpha = take.number("lora_alpha", 2 * rank)
        if method != "lora":
            self._note("not supported", "finetuning_type", f"`finetuning_type: {method}`: LoRA is written instead")
        flags = {name: take.take(name) for name in ("use_rslora", "use_dora")}
        dropout, targets = take.number("lora_dropout", 0), take.words("lora_target")
        saved = take.words("additional_target")
        settings["lora"] = adapter(rank, alpha, dropout=dropout, targets=targets, saved=saved, **flags)
        if self.part.adapters and not fresh:
            text = "LLaMA-Factory goes on with the adapter; here the adapter is folded in, and a new one is trained"
            if self.part.kind in ("dpo", "kto"):
                text = "LLaMA-Factory's reference is the base model; here it is the base with the adapter"
            self._note("differs", "adapter_name_or_path", text)

    def _base(self) -> None:
        """`quantized_base`."""
        take = self.arguments
        bits, kind = take.number("quantization_bit"), take.text("quantization_type") or "nf4"
        method, double = str(take.take("quantization_method", "bnb")).lower(), take.flag("double_quantization", True)
        if is_off(bits):
            return
        if method not in ("bnb", "bitsandbytes"):
            text = f"`quantization_method: {method}`: bitsandbytes quantizes the base here"
            self._note("differs", "quantization_method", text)
        quantize_base(take, self.part, self.book, "quantization_bit", bits, kind, double=double)

    def _template(self) -> str | None:
        """Our template, a built-in name or the path of a new file; None for the model's own."""
        take = self.arguments
        name = take.text("template")
        default, thinking = take.text("default_system"), take.flag("enable_thinking", True)
        if name is None:
            return None
        try:
            built_in, text = chat_template(str(name), default=default, thinking=thinking)
        except ValueError as error:
            self._note("to do", "template", f"`template: {name}`: {error}; the model keeps its own template")
            return None
        for difference in differences(str(name)) if self.part.kind in ("sft", "dpo", "kto") else []:
            self._note("differs", "template", difference)
        if built_in is not None:
            return built_in
        variants = (f"{name}.jinja", f"{name}_system.jinja", *(f"{name}_{number}.jinja" for number in range(2, 100)))
        file = next(file for file in variants if self.book.files.setdefault(self.book.beside(file), text) == text)
        return self.book.beside(file)

    # Export, evaluation, chat

    def _export(self) -> list[Part]:
        take, part = self.arguments, self.part
        bits, size = take.number("export_quantization_bit"), take.number("export_size")
        part.leaves, part.kind = take.text("export_dir"), "merge" if is_off(bits) else "quantize"
        data = take.text("export_quantization_dataset")
        size = Noted("5GB", DEFAULT) if size is None else Noted(f"{shown(size).removesuffix('GB')}GB", "export_size")
        for name in ("template", "finetuning_type", "trust_remote_code", "stage"):
            take.left.pop(name, None)
        if part.kind == "merge":
            part.settings = {"shard_size": size}
            return [part]
        rows = {"samples": take.number("export_quantization_nsamples", 128)}
        rows |= {"max_length": take.number("export_quantization_maxlen", 1024)}
        part.settings = {"bits": bits, "group_size": Noted(128, "fixed there")}
        part.settings |= {"calibration": {"data": self._calibration(data), **rows}, "shard_size": size}
        return [part]

    def _calibration(self, data: Any) -> str:
        """The name of the calibration data: a file with a column `text`, or a name on the Hub."""
        path = str(data or "data/calibration.jsonl")
        if data is None or not Path(path).suffix:
            text = f"`{shown(data)}`: name a file with calibration texts under `data`"
            self._note("to do", "export_quantization_dataset", text)
            path = f"data/{Path(path).name}.jsonl" if not Path(path).suffix else path
        return declare(self.book, Path(path).stem, {"path": path, "format": "text"}, "quantize")

    def _tasks(self) -> list[Part]:
        take, part = self.arguments, self.part
        task = str(take.take("task"))
        known = next((ours for theirs, ours in TASKS.items() if task.startswith(theirs)), None)
        if known is None:
            self._note("unknown", "task", f"`task: {task}`; there is mmlu_test, cmmlu_test and ceval_validation")
            return []
        harness = {"num_fewshot": take.number("n_shot", 5), "batch_size": take.number("batch_size", 4)}
        part.kind, part.settings = "evaluate", {"tasks": [known], "harness": harness}
        part.seed = take.number("seed", 42)
        for name in ("template", "finetuning_type", "dataset_dir", "stage"):
            take.left.pop(name, None)
        text = "tasks need lm-evaluation-harness (`pip install lm_eval`), which reads its data from the Hub"
        self._note("to do", "task", text)
        return [part]

    def _evaluation(self, data: list[str], samples: int | None, template: str | None, predicts: bool) -> list[Part]:
        """`evaluate` for a command that trains nothing."""
        if not data:
            self._note("not supported", "stage", "no `dataset` or `eval_dataset` is named, so no stage is written")
            return []
        self.part.leaves, self.part.template, self.part.seed = None, template, self.arguments.number("seed", 42)
        for name in ("finetuning_type", "per_device_eval_batch_size", "per_device_train_batch_size", "output_dir"):
            self.arguments.left.pop(name, None)
        return self._questions(self.part, data, samples, predicts)

    def _questions(self, like: Part, data: list[str], samples: int | None, predicts: bool) -> list[Part]:
        """`evaluate` on data sets; where answers are wanted, a stage for each of them."""
        take = self.arguments
        names = [self._sets_of().declared(name, "evaluate", take.place("eval_dataset"), samples) for name in data]
        found = [name for name in names if name is not None]
        settings: dict[str, Any] = {"max_length": take.number("cutoff_len", 2048)}
        settings |= {"generation": self._generation()} if predicts else {}
        if not predicts:
            return [replace(like, kind="evaluate", settings={"data": found, **settings})] if found else []
        return [replace(like, kind="evaluate", settings={"data": name, "prompts": name, **settings}) for name in found]

    def _generation(self) -> dict[str, Any]:
        take = self.arguments
        sampled = take.flag("do_sample", True)
        values = {"do_sample": sampled, **{name: take.number(name, default) for name, default in GENERATION.items()}}
        penalty = take.number("repetition_penalty", 1.0)
        if not sampled:
            values = {"do_sample": False, "max_new_tokens": values["max_new_tokens"]}
        return values | ({"repetition_penalty": penalty} if penalty != 1.0 else {})

    def _chat(self) -> list[Part]:
        """A model to talk to: it is asked a question, where nothing else is to be done."""
        self.part.kind, self.part.template = "chat", self._template()
        self.part.settings = {"prompts": ["你好，请介绍一下你自己。"], "generation": self._generation()}
        for name in ("finetuning_type", "stage", "trust_remote_code"):
            self.arguments.left.pop(name, None)
        return [self.part]
