"""Preparation of SFT rows: this project, plain TRL and LLaMA-Factory on the same file with the same tokenizer.

    python benchmarks/preparation.py [--rows 50000] [--llamafactory PYTHON] [--repeats 3] [--model FOLDER] [--only A,B]

Without a model, whose template must be ChatML, a byte-level BPE tokenizer of 32,000 tokens is trained on the rows: one
that fits the language, as BLOOM's and Qwen's do Chinese. Each side reads one JSON file of questions and answers and
ends with token ids and labels on the disk, cut at 1,024 tokens, in two processes, with nothing cached before. Timed is
the work alone, not the imports or the loading of the tokenizer; every run is a process of its own, and the sides take
turns. Memory is the largest resident set of the main process and of any other, shared pages counted in both. PYTHON is
that of an environment with LLaMA-Factory 0.9.5.
"""

import argparse
import json
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

LENGTH, PROCESSES = 1024, 2


def write(file: Path, rows: int) -> None:
    """Chinese questions of about 40 characters and answers of about 150, of words under Zipf's law."""
    chance = random.Random(7)
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
    words = ["".join(chance.choices(characters, k=chance.choice((1, 2, 2, 2, 3, 4)))) for _ in range(20_000)]
    summed = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(least: int, most: int) -> str:
        drawn = chance.choices(words, cum_weights=summed, k=chance.randint(least, most))
        return "，".join("".join(drawn[start : start + 7]) for start in range(0, len(drawn), 7)) + "。"

    with open(file, "w", encoding="utf-8") as out:
        for _ in range(rows):
            row = {"instruction": text(10, 30), "input": "", "output": text(40, 110)}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def tokenizer(folder: Path, file: Path) -> Path:
    """A ChatML tokenizer of the rows' language, and the config that other tools want beside one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from stages.chat.template import template_text

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    with open(file, encoding="utf-8") as rows:
        texts = (json.loads(line)["output"] for line, _ in zip(rows, range(5000), strict=False))
        made.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=32_000, special_tokens=marks, initial_alphabet=alphabet)
        )
    whole = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    whole.chat_template = template_text("chatml")
    whole.save_pretrained(folder)
    LlamaConfig(vocab_size=len(whole), architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def ours(model: str, file: Path, folder: Path) -> Callable[[], int]:
    from types import SimpleNamespace

    import datasets  # noqa: F401 - imports are not timed
    import pyarrow  # noqa: F401

    from stages import sft
    from stages.data.source import Source
    from stages.model.inputs import Inputs
    from stages.training import loop, preparation

    config = sft.Config(model=model, data=[Source(path=str(file), format="alpaca")])
    args = SimpleNamespace(max_length=LENGTH, dataset_num_proc=PROCESSES, per_device_train_batch_size=8)
    tokenizer = loop.tokenizer(config, Inputs(model=[model]))
    out = folder / "sft.part"
    out.mkdir()
    return lambda: preparation.prepare(config.draw(), tokenizer, args, out).account["tokens"]


def trl(model: str, file: Path, folder: Path) -> Callable[[], int]:
    """SFTTrainer on prompt and completion, the form in which it leaves the question out of the loss."""
    return _trl(model, file, folder, completion=True)


def trl_all(model: str, file: Path, folder: Path) -> Callable[[], int]:
    """SFTTrainer on messages, every token in the loss, which is less work."""
    return _trl(model, file, folder, completion=False)


def _trl(model: str, file: Path, folder: Path, *, completion: bool) -> Callable[[], int]:
    from datasets import Dataset, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    args = SFTConfig(
        output_dir=str(folder / "out"),
        max_length=LENGTH,
        dataset_num_proc=PROCESSES,
        use_cpu=True,
        report_to="none",
        bf16=False,
    )
    network = LlamaForCausalLM(small)

    def row(example: dict[str, str]) -> dict[str, Any]:
        asked = [{"role": "user", "content": example["instruction"]}]
        answer = [{"role": "assistant", "content": example["output"]}]
        return {"prompt": asked, "completion": answer} if completion else {"messages": asked + answer}

    def trainer(rows: Dataset) -> SFTTrainer:
        return SFTTrainer(model=network, args=args, train_dataset=rows, processing_class=tokenizer)

    warm = Dataset.from_list([{"instruction": "a", "input": "", "output": "b"}] * 4)
    trainer(warm.map(row, remove_columns=warm.column_names))

    def work() -> int:
        rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
        rows = rows.map(row, remove_columns=rows.column_names, num_proc=PROCESSES)
        return _tokens(trainer(rows).train_dataset)

    return work


def llamafactory(model: str, file: Path, folder: Path) -> Callable[[], int]:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": str(file)}}), encoding="utf-8")
    settings = {
        "model_name_or_path": model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset_dir": str(folder),
        "dataset": "rows",
        "template": "chatml",
        "cutoff_len": LENGTH,
        "preprocessing_num_workers": PROCESSES,
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "overwrite_cache": True,
        "report_to": "none",
    }
    model_args, data_args, training_args, _, _ = get_train_args(settings)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)

    def work() -> int:
        found = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)
        return _tokens(found["train_dataset"])

    return work


def _tokens(rows: Any) -> int:
    from pyarrow import compute

    return sum(compute.sum(compute.list_value_length(chunk)).as_py() for chunk in rows.data["input_ids"].chunks)


SIDES = {"ours": ours, "trl": trl, "trl_all": trl_all, "llamafactory": llamafactory}


def measure(side: str, model: str, file: Path) -> None:
    """One run, in this process."""
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        work = SIDES[side](model, file, Path(name))
        used, start = _used(), time.perf_counter()
        tokens = work()
        seconds, used = time.perf_counter() - start, _used() - used
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage's begins with the parent's
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    most = [own / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]
    print(json.dumps({"seconds": seconds, "tokens": tokens, "cpu": used, "memory": most}), flush=True)


def _used() -> float:
    """Seconds that the cores have spent on this process and its ended children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(entry.ru_utime + entry.ru_stime for entry in usage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--llamafactory", metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="ours,trl,trl_all,llamafactory")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        measure(asked.side, asked.model, asked.file)
        return
    folder = Path(tempfile.mkdtemp(prefix="preparation-"))
    file = folder / "rows.jsonl"
    write(file, asked.rows)
    model = asked.model or str(tokenizer(folder / "model", file))
    pythons = {side: asked.llamafactory if side == "llamafactory" else sys.executable for side in asked.only.split(",")}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side, python in pythons.items() if python}
    for _ in range(asked.repeats):
        for side, done in runs.items():
            command = [str(pythons[side]), __file__, "--model", model, "--side", side, "--file", str(file)]
            made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            done.append(json.loads(made.stdout.splitlines()[-1]))
    shutil.rmtree(folder)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("trl", "datasets", "tokenizers"))
    print(f"{asked.rows:,} rows, {PROCESSES} processes, Python {platform.python_version()}, {versions}\n")
    print("| side | rows/s | tokens/s | seconds (each run) | core seconds | memory main, child (MB) |")
    print("|---|---|---|---|---|---|")
    for side, done in runs.items():
        seconds = median(run["seconds"] for run in done)
        tokens, memory = done[0]["tokens"], [max(run["memory"][place] for run in done) for place in (0, 1)]
        each = ", ".join(f"{run['seconds']:.1f}" for run in done)
        rates = f"{asked.rows / seconds:,.0f} | {tokens / seconds:,.0f}"
        cpu = median(run["cpu"] for run in done)
        print(f"| {side} | {rates} | {each} | {cpu:.1f} | {memory[0]:,.0f}, {memory[1]:,.0f} |")


if __name__ == "__main__":
    main()
