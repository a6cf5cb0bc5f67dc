"""Packed training against unpacked training, and against LLaMA-Factory: trained tokens a second.

    python benchmarks/packing.py [--rounds 3] [--threads 1] [--only hidden64] [--llamafactory PYTHON --fixture FOLDER]

Each side is a whole run of the stage `pt` or `sft` with LoRA of rank 8 on a llama with random weights; the sides take
turns, round after round, in one process. Time is that of the trainer's loop, without loading and preparing: with one
thread that of the processor, which a busy machine disturbs less, and with more that of the clock. A trained token is
one that is in the loss. The table shows the median of each side, and the median and the range of the rounds' ratios.

`--llamafactory`, or `LLAMAFACTORY_PYTHON`, is the python of an environment where LLaMA-Factory is installed, and
`--fixture` a folder with `model/`, `pt.jsonl` (text), `sft.jsonl` (instruction, input, output) and LLaMA-Factory's
`dataset_info.json` with the names `pt` and `sft`. Without them that comparison is left out.
"""

import argparse
import contextlib
import functools
import inspect
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
import transformers  # noqa: TID253
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: TID253

from stages import init, pt, sft
from stages.chat.template import template_text
from stages.data.source import Source
from stages.model import attention
from stages.model.folder import carried_files
from stages.model.inputs import Inputs

Side = Callable[[], dict[str, float]]
STAGES: Mapping[str, Any] = {"pt": pt, "sft": sft}
FORMATS: Mapping[str, Any] = {"pt": "text", "sft": "alpaca"}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
LETTERS = "BFGJKQVWXYZ"  # the tokenizer joins none of them: a letter is a token
SMOLLM2 = {
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
}
# max_length → rows of a batch, and the median length of a document in tokens
LENGTHS = {256: (8, 90), 2048: (2, 500)}
# What LLaMA-Factory's environment runs: its training under the same clock.
DRIVER = """
import contextlib, json, sys, time, torch, transformers
from typing import Any
Iterator = list
{clock}
torch.set_num_threads(int(sys.argv[2]))
from llamafactory.train.tuner import run_exp
with clock() as measured:
    run_exp(json.loads(sys.argv[1]))
print("MEASURED", json.dumps(measured))
"""


@contextlib.contextmanager
def clock() -> Iterator[dict[str, float]]:
    """Seconds of transformers' training loop, by the clock and of the processor, and the tokens in its loss."""
    real, step = transformers.Trainer.train, transformers.Trainer.training_step
    measured: dict[str, float] = {"tokens": 0}

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter(), time.process_time()
        result = real(self, *args, **kwargs)
        measured.update(clock=time.perf_counter() - begin[0], processor=time.process_time() - begin[1])
        return result

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "labels" in inputs:
            measured["tokens"] += int((inputs["labels"][..., 1:] != -100).sum())
        return step(self, model, inputs, *args, **kwargs)

    transformers.Trainer.train, transformers.Trainer.training_step = train, training_step
    try:
        yield measured
    finally:
        transformers.Trainer.train, transformers.Trainer.training_step = real, step


def texts(kind: str, median: int, longest: int, count: int, file: Path) -> Source:
    """Rows of random letters: many short ones, few long ones, none above `longest` tokens."""
    draw = random.Random(0)

    def letters(share: float) -> str:
        return "".join(draw.choices(LETTERS, k=max(4, min(longest, int(draw.lognormvariate(0, 0.6) * median * share)))))

    rows = [
        {"text": letters(1)} if kind == "pt" else {"instruction": letters(0.3), "output": letters(0.6)}
        for _ in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(file), format=FORMATS[kind])


def small(folder: Path) -> Path:
    """A llama of 2 layers of 64 with a tokenizer of 600 tokens."""
    words = folder / "words.jsonl"
    words.write_text("".join(json.dumps({"text": word}) + "\n" for word in LETTERS), encoding="utf-8")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = init.Config(
        architecture="llama",
        data=[Source(path=str(words), format="text")],
        template=template_text("med"),
        **{**sizes, "vocab_size": 600, "max_position_embeddings": 2048},
    )
    (folder / "hidden64").mkdir()
    init.run(config, Inputs(), folder / "hidden64")
    return folder / "hidden64"


def large(folder: Path, like: Path) -> Path:
    """A llama in the shape of SmolLM2-135M with random weights and the tokenizer of `like`."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2, max_position_embeddings=2048)).save_pretrained(folder / "135M")
    for path in carried_files(like):
        if not path.name.startswith("generation_config"):
            shutil.copy(path, folder / "135M")
    return folder / "135M"


def ours(kind: str, model: Path, source: Source, steps: int, **trainer: Any) -> dict[str, float]:
    """A run of our stage; tokens and seconds."""
    settings = {"max_steps": steps, "save_strategy": "no", "activation_checkpointing": False, "learning_rate": 1e-3}
    config = STAGES[kind].Config(model="base", data=[source], lora=LORA, trainer={**settings, **trainer})
    with tempfile.TemporaryDirectory() as out, quiet(), clock() as measured:
        STAGES[kind].run(config, Inputs(model=[str(model)]), Path(out))
    return dict(measured)


def llamafactory(python: str, fixture: Path, kind: str, steps: int, threads: int, **settings: Any) -> dict[str, float]:
    """The same run of LLaMA-Factory, in its own environment."""
    with tempfile.TemporaryDirectory() as out:
        asked = {
            **{"stage": kind, "do_train": True, "model_name_or_path": str(fixture / "model"), "dataset": kind},
            **{"dataset_dir": str(fixture), "output_dir": out, "finetuning_type": "lora", "lora_rank": 8},
            **{"lora_alpha": 16, "lora_target": "all", "cutoff_len": 256, "per_device_train_batch_size": 8},
            **{"max_steps": steps, "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none"},
            **{"logging_steps": 10, "overwrite_output_dir": True, "template": "qwen", **settings},
        }
        command = [python, "-c", DRIVER.format(clock=inspect.getsource(clock)), json.dumps(asked), str(threads)]
        quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("MEASURED")), None)
    if line is None:
        raise SystemExit(f"LLaMA-Factory failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(line.removeprefix("MEASURED")))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def turns(sides: Mapping[str, Side], rounds: int, by: str) -> dict[str, list[float]]:
    """Trained tokens a second of each side, one figure a round; every other round goes through the sides backwards."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            measured = sides[name]()
            speeds[name].append(measured["tokens"] / measured[by])
    return speeds


def show(case: str, speeds: Mapping[str, list[float]]) -> None:
    """A row of the table: medians, and the ratio of the first side to each other side."""
    first, *others = speeds
    cells = [f"{name} {statistics.median(figures):,.0f}" for name, figures in speeds.items()]
    for other in others:
        ratios = [left / right for left, right in zip(speeds[first], speeds[other], strict=True)]
        cells.append(f"{first} / {other} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"| {case} | " + " | ".join(cells) + " |", flush=True)


@torch.no_grad()
def difference(folder: Path, median: int, longest: int) -> str:
    """The largest difference between the loss of a token in a packed row and in its document alone.

    The document alone is plain transformers'. Weights are drawn wide, so that the attention matters; the second figure
    is the difference if documents are not kept apart.
    """
    draw = random.Random(1)
    lengths = [min(longest, max(4, int(draw.lognormvariate(0, 0.6) * median))) for _ in range(4)]
    ids = torch.randint(20, 200, (1, sum(lengths)))
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, weight in plain.named_parameters():
        if "layers" in name and weight.ndim == 2:
            weight.mul_(4)
    mixed = losses(plain(input_ids=ids, use_cache=False).logits, ids, lengths)
    alone = [plain(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)]
    expected = losses(torch.cat(alone, 1), ids, lengths)
    attention.install(plain)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = losses(plain(input_ids=ids, position_ids=positions, use_cache=False).logits, ids, lengths)
    apart, together = (float((each - expected).abs().max()) for each in (found, mixed))
    return f"{apart:.1e} (not kept apart: {together:.1e})"


def losses(logits: torch.Tensor, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The loss of each token of each document but its first, end to end."""
    pairs = zip(logits[0].split(lengths), ids[0].split(lengths), strict=True)
    each = [torch.nn.functional.cross_entropy(part[:-1], labels[1:], reduction="none") for part, labels in pairs]
    return torch.cat(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="of the small model; of the large one it is 1")
    parser.add_argument("--only", help="hidden64, 135M or llamafactory")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--llamafactory", default=os.environ.get("LLAMAFACTORY_PYTHON"))
    parser.add_argument("--fixture", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.logging.set_verbosity_error()
    by = "processor" if asked.threads == 1 else "clock"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {asked.threads} threads, ", end="")
    print(f"{asked.rounds} rounds, seconds of the {by}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        hidden64 = small(Path(folder))
        models = {"hidden64": hidden64}
        if asked.only in (None, "135M"):
            models["135M"] = large(Path(folder), hidden64)
        for name, model in models.items():
            if asked.only in (None, name):
                compare(name, model, Path(folder), asked, by)
    if asked.only in (None, "llamafactory"):
        against(asked, by)


def both(kind: str, model: Path, source: Source, steps: int, length: int, batch: int) -> dict[str, Side]:
    """Our stage packed and unpacked."""
    settings = {"max_length": length, "per_device_train_batch_size": batch}

    def side(*, packing: bool) -> Side:
        return lambda: ours(kind, model, source, steps, **settings, packing=packing)

    return {"packed": side(packing=True), "unpacked": side(packing=False)}


def compare(name: str, model: Path, folder: Path, asked: argparse.Namespace, by: str) -> None:
    """Packed against unpacked, for one model."""
    steps = asked.steps if name == "hidden64" else 1
    for length in asked.lengths:
        batch, median = LENGTHS[length]
        for kind in STAGES:
            rows = max(64, 3 * steps * batch * length // median)
            source = texts(kind, median, length, rows, folder / f"{kind}{length}.jsonl")
            sides = both(kind, model, source, steps, length, batch)
            show(f"{name}, `{kind}`, {length}", turns(sides, asked.rounds, by))
        with quiet():
            apart = difference(model, median, length)
        print(f"loss of a token at {length}, packed against alone, largest difference: {apart}", flush=True)


def against(asked: argparse.Namespace, by: str) -> None:
    """Ours against LLaMA-Factory, on its fixture."""
    if not (asked.llamafactory and asked.fixture):
        print("LLaMA-Factory was not given: that comparison is left out")
        return
    fixture, steps = asked.fixture.resolve(), 5 * asked.steps
    for kind in STAGES:
        source = Source(path=str(fixture / f"{kind}.jsonl"), format=FORMATS[kind])
        sides = both(kind, fixture / "model", source, steps, 256, 8)
        theirs = functools.partial(llamafactory, asked.llamafactory, fixture, kind, steps, asked.threads)
        show(f"its fixture, `{kind}`", turns({**sides, "LLaMA-Factory": theirs}, asked.rounds, by))


if __name__ == "__main__":
    main()
