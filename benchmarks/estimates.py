"""The memory that a training step is estimated to take against the memory that it takes.

    python benchmarks/estimates.py [--only llama] [--examples] [--markdown]

A case is a whole run of the stage `sft` or `dpo` on a small model with random weights, in a fresh process: the peak of
its live tensors, and beside it how far the memory of the process (its resident set) rose above what it was before the
model was loaded. The second does not use the code that counts tensors. With a GPU, `torch.cuda.max_memory_allocated`
takes the place of the resident set. The estimate is made in another process, of `config.json` and the shape of the
batch. `--examples` estimates models in their real size instead, for several GPUs; their shapes are below.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: TID253
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: TID253

from stages import dpo, init, pt, sft
from stages.chat.template import template_text
from stages.data.source import Source
from stages.model.folder import carried_files
from stages.model.inputs import Inputs
from stages.training import live_tensors, loop
from stages.training.estimate import Batch, estimate
from stages.training.sharing import Sharing

LETTERS = "BFGJKQVWXYZ"  # the tokenizer joins none of them: a letter is a token
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "bloom": {"hidden_size": 192, "n_layer": 4, "n_head": 6, "vocab_size": 32000},
    "llama": {
        **{"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"intermediate_size": 688, "vocab_size": 8000, "tie_word_embeddings": False, "head_dim": 32},
    },
    "qwen2": {
        **{"hidden_size": 224, "num_hidden_layers": 5, "num_attention_heads": 7, "num_key_value_heads": 1},
        **{"intermediate_size": 1216, "vocab_size": 16000, "tie_word_embeddings": True},
    },
}
LENGTHS = (128, 320, 768)  # tokens of the longest row
ROWS = 4
STAGES: Mapping[str, Any] = {"pt": pt, "sft": sft, "dpo": dpo}
FORMATS: Mapping[str, Any] = {"pt": "text", "sft": "alpaca", "dpo": "preference"}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "LoRA": {"lora": {"r": 8}},
    "QLoRA": {"lora": {"r": 8}, "quantized_base": "nf4"},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training stage on one shape."""

    shape: str
    stage: str
    method: str
    length: int
    checkpointing: bool
    more: tuple[tuple[str, Any], ...] = ()
    """Other settings under `trainer:`."""

    @property
    def packed(self) -> bool:
        """Whether documents are packed into one row."""
        return self.stage == "pt"

    @property
    def kind(self) -> str:
        """The TRL config of the stage."""
        return "DPOConfig" if self.stage == "dpo" else "SFTConfig"

    def config(self, data: str) -> Any:
        """The settings of the stage."""
        trainer = {
            "max_steps": 2,
            "max_length": self.length,
            "per_device_train_batch_size": 1 if self.packed else ROWS,
            "activation_checkpointing": self.checkpointing,
            "save_strategy": "no",
            "logging_steps": 1,
            **dict(self.more),
        }
        source = Source(path=data, format=FORMATS[self.stage])
        return STAGES[self.stage].Config(model="base", data=[source], trainer=trainer, **METHODS[self.method])


def cases() -> list[Case]:
    """Full, LoRA and QLoRA × packed, padded, pairs × shapes × lengths × checkpointing on and off."""
    return [
        Case(shape=shape, stage=stage, method=method, length=length, checkpointing=checkpointing)
        for shape in SHAPES
        for stage in STAGES
        for method in METHODS
        for length in LENGTHS
        for checkpointing in (False, True)
    ]


# Models and rows


def models(folder: Path) -> dict[str, Path]:
    """The folders of models with random weights, and a tokenizer of few tokens."""
    base = init.Config(
        architecture="llama",
        data=[Source(path=str(Path(__file__).parent.parent / "data/med_qa.json"), format="alpaca")],
        vocab_size=600,
        template=template_text("med"),
    )
    (folder / "tokens").mkdir()
    init.run(base, Inputs(), folder / "tokens")
    made = {}
    for name, sizes in SHAPES.items():
        made[name] = folder / name
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
        torch.manual_seed(0)
        shape = AutoConfig.for_model(name, **sizes, **ids)
        # in 16 bits, so that the stage does not use the pages of the file itself as weights
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(made[name])
        for path in carried_files(folder / "tokens"):
            shutil.copy(path, made[name])
    return made


def rows(case: Case, file: Path) -> str:
    """Rows of one batch, of random letters; the first answer is cut at `max_length`, and the others are shorter."""
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(draw.choices(LETTERS, k=max(1, tokens)))

    if case.packed:  # documents that fill a row; each ends with one more token
        sizes = [case.length // 2 - 1, case.length // 3 - 1, case.length // 8 - 1]
    else:
        sizes = [case.length, case.length - 7, case.length * 3 // 4, case.length // 2]
    question = text(24)
    if case.packed:
        found: list[dict[str, str]] = [{"text": text(size)} for size in sizes]
    elif case.stage == "dpo":
        found = [{"prompt": question, "chosen": text(size), "rejected": text(size - 5)} for size in sizes]
    else:
        found = [{"instruction": question, "input": "", "output": text(size)} for size in sizes]
    file.write_text("\n".join(json.dumps(row) for row in found) + "\n", encoding="utf-8")
    return str(file)


# Measurement, each in a fork of this process


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function gives in a fresh process.

    Raises:
        RuntimeError: it failed there.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                if not os.environ.get("SHOW"):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    os.dup2(os.open(Path(folder, "error"), os.O_WRONLY | os.O_CREAT), 2)
                try:
                    file.write_text(json.dumps(work()), encoding="utf-8")
                except BaseException:
                    import traceback

                    traceback.print_exc()
            os._exit(0)
        os.waitpid(child, 0)
        if not file.is_file():
            error = Path(folder, "error")
            raise RuntimeError(error.read_text(encoding="utf-8")[-3000:] if error.is_file() else "it failed")
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result


def resident(name: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if name in line)
    return int(line.split()[1]) * 1024


def measure(case: Case, model: Path) -> dict[str, Any]:
    """Run the stage; bytes of live tensors at the peak by cause, growth of the resident set, and the batch."""
    real, found = loop.train, dict[str, Any]()
    ledger = live_tensors.Ledger()

    def train(trainer: Any, *arguments: Any) -> Any:
        trainer.add_callback(live_tensors.callback(ledger, trainer, ahead=False))
        prepare = trainer._prepare_inputs

        def seen(inputs: Any) -> Any:
            found["batch"] = described(inputs)
            return prepare(inputs)

        trainer._prepare_inputs = seen
        with live_tensors.follow(ledger), live_tensors.head_apart(ledger):
            return real(trainer, *arguments)

    with tempfile.TemporaryDirectory() as folder:
        config = case.config(rows(case, Path(folder, "rows.jsonl")))
        Path(folder, "first").mkdir()
        small = Inputs(model=[str(model.parent / "tokens")])  # what is imported and kept for later is there
        STAGES[case.stage].run(config, small, Path(folder, "first"))
        loop.train = train
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is the memory of now
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        STAGES[case.stage].run(config, Inputs(model=[str(model)]), Path(folder))
        found["grown"] = resident("VmHWM") - before
    if torch.cuda.is_available():
        found["grown"] = torch.cuda.max_memory_allocated()
    return {**found, "live": dict(ledger.peak)}


def described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a batch."""
    ids = inputs["input_ids"]
    if "completion_mask" in inputs:
        share = float(inputs["completion_mask"].float().mean())
        return {"rows": len(ids) // 2, "tokens": ids.shape[1], "labelled": share}
    share = float((inputs["labels"] != -100).float().mean())
    shape = {"rows": len(ids), "tokens": ids.shape[1], "labelled": share}
    if "position_ids" in inputs:
        begins = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        shape["documents"] = [end - begin for begin, end in zip(begins, [*begins[1:], ids.shape[1]], strict=True)]
    return shape


def estimated(case: Case, model: Path, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The estimate of the stage, from config.json alone."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model / "config.json", folder)
        began = time.perf_counter()
        shape = Batch(**{**batch, "documents": tuple(batch.get("documents", ()))})
        found = estimate(
            case.kind, case.config("rows.jsonl"), Path(folder), shape, Sharing(), gpu=torch.cuda.is_available()
        )
        return {"estimate": vars(found.memory), "flops": found.flops, "seconds": time.perf_counter() - began}


def compare(case: Case, model: Path) -> dict[str, Any]:
    """Measurement and estimate of a case, and the error of the estimate."""
    measured = forked(lambda: measure(case, model))
    guess = forked(lambda: estimated(case, model, measured["batch"]))
    live, said = sum(measured["live"].values()), sum(guess["estimate"].values())
    return {**vars(case), **measured, **guess, "error": said / live - 1, "against": said / measured["grown"] - 1}


# Models in their real size

# Shapes of bigscience/bloomz-7b1 and Qwen/Qwen2.5-7B, as their config.json has them.
REAL: Mapping[str, Mapping[str, Any]] = {
    "bloomz-7b1": {
        **{"model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 4096, "n_layer": 30},
        **{"n_head": 32, "vocab_size": 250880},
    },
    "Qwen2.5-7B": {
        **{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064},
        **{"tie_word_embeddings": False, "max_position_embeddings": 131072},
    },
}
CARDS = (24, 40, 80)  # GB
WAYS: tuple[tuple[str, str, Mapping[str, Any], Sharing], ...] = (
    ("bloomz-7b1", "LoRA of rank 8", {"lora": {"r": 8}}, Sharing()),
    ("Qwen2.5-7B", "QLoRA of rank 8", {"lora": {"r": 8}, "quantized_base": "nf4"}, Sharing()),
    *(
        (model, f"full, {processes} GPU{'s' if processes > 1 else ''}, {strategy}", {}, Sharing(**sharing))
        for model in REAL
        for processes, strategy in ((1, "ddp"), (4, "zero2"), (4, "zero3"), (4, "fsdp2"), (8, "zero3"), (8, "fsdp2"))
        for sharing in [{"processes": processes, "strategy": strategy}]
    ),
)


def examples(only: str) -> None:
    """Print the estimates of `WAYS` on GPUs: rows of 1,024 tokens, one on a GPU, with checkpointing."""
    print("| model | way | weights | gradients | optimizer | activations | logits | workspace | sum | fits on |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    data = [Source(path="rows.jsonl", format="alpaca")]
    for model, way, settings, sharing in WAYS:
        if not all(word in f"{model} {way}" for word in only.split()):
            continue
        trainer = {"activation_checkpointing": True, "per_device_train_batch_size": 1}
        config = sft.Config(model="base", data=data, trainer=trainer, **settings)

        def work(model: str = model, config: Any = config, sharing: Sharing = sharing) -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "config.json").write_text(json.dumps(REAL[model]), encoding="utf-8")
                batch = Batch(rows=1, tokens=1024)
                return vars(estimate("SFTConfig", config, Path(folder), batch, sharing, gpu=True).memory)

        found = forked(work)
        total = sum(found.values())
        # CUDA itself takes about 0.5 GB of a card, and 5 % are lost between blocks of the allocator
        fits = [f"{card} GB" for card in CARDS if 1.05 * total + 5e8 < card * 1e9]
        parts = [found[cause] for cause in ("weights", "gradients", "optimizer", "activations", "logits", "workspace")]
        figures = " | ".join(f"{size / 1e9:.1f}" for size in (*parts, total))
        print(f"| {model} | {way} | {figures} | {', '.join(fits) or 'none'} |", flush=True)


# The command


def table(found: list[dict[str, Any]]) -> str:
    """The cases as a table of Markdown, the lengths of a case in one row."""
    lines = ["| shape | stage | method | checkpointing | estimate / live tensors | estimate / resident set |"]
    lines.append("|---|---|---|---|---|---|")
    keys = list(dict.fromkeys((one["shape"], one["stage"], one["method"], one["checkpointing"]) for one in found))
    for key in keys:
        same = [one for one in found if (one["shape"], one["stage"], one["method"], one["checkpointing"]) == key]
        errors, against = (" · ".join(f"{one[name]:+.1%}" for one in same) for name in ("error", "against"))
        words = (key[0], f"`{key[1]}`", key[2], "on" if key[3] else "off", errors, against)
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def summary(found: list[dict[str, Any]], name: str) -> str:
    """Median and worst of an error, and the most that the estimate was below the measurement."""
    errors = [one[name] for one in found]
    sizes = [abs(error) for error in errors]
    low = min(0.0, *errors)
    return f"median {statistics.median(sizes):.2%}, worst {max(sizes):.2%}, most under {-low:.2%}, {len(found)} cases"


def main() -> None:
    """Print a line a case, and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that the name of a case or example must contain")
    parser.add_argument("--examples", action="store_true", help="models in their real size, on several GPUs")
    parser.add_argument("--causes", action="store_true", help="also the bytes of each cause")
    parser.add_argument("--markdown", action="store_true", help="also a table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # The forks need not import these again.
    from bitsandbytes import functional  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    if given.examples:
        examples(given.only)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        folders = models(Path(folder))
        for case in cases():
            name = f"{case.shape} {case.stage} {case.method} {case.length}"
            name += " checkpointing" if case.checkpointing else ""
            if not all(word in name for word in given.only.split()):
                continue
            result = compare(case, folders[case.shape])
            found.append(result)
            live, said = sum(result["live"].values()), sum(result["estimate"].values())
            print(
                f"{name:48} live {live / 1e6:8.2f} MB, estimate {said / 1e6:8.2f} ({result['error']:+.2%}), "
                f"resident {result['grown'] / 1e6:8.2f} ({result['against']:+.2%})",
                flush=True,
            )
            for cause, size in result["live"].items() if given.causes else ():
                print(f"    {cause:12} {size / 1e6:8.2f} {result['estimate'][cause] / 1e6:8.2f}")
    if given.markdown:
        print(table(found))
    print(f"against live tensors: {summary(found, 'error')}")
    print(f"against the resident set: {summary(found, 'against')}")


if __name__ == "__main__":
    main()
