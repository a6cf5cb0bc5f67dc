"""A step of our stages against a step of a bare TRL script with the same arguments: seconds and losses.

    python benchmarks/steps.py [--rounds 3] [--steps 20] [--threads 1] [--default]

Each side trains a Llama of 2 layers of width 64 with random weights and LoRA of rank 8 on the same rows in the same
order: `sft` on tokenized conversations and `dpo` on pairs. The bare side is TRL's trainer as its documentation shows
it. Both sides have the same settings; with `--default` gradient checkpointing is left to each side, which this project
then leaves out. Time is that of transformers' training loop, without loading and preparing: with one thread seconds of
the processor, which a busy machine disturbs less. The exit code is 1 if the losses of a step differ by more than 1e-5.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packing
import torch  # noqa: TID253
import transformers  # noqa: TID253
import trl  # noqa: TID253
from peft import LoraConfig  # noqa: TID253
from transformers import AutoModelForCausalLM  # noqa: TID253

from stages import dpo, sft
from stages.data.source import Source
from stages.model.inputs import Inputs
from stages.training import loop

TOLERANCE = 1e-5
LENGTH, BATCH = 256, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--default", action="store_true", help="leave gradient checkpointing to each side")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.logging.set_verbosity_error()
    by = "processor" if asked.threads == 1 else "clock"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {asked.threads} threads, ", end="")
    print(f"{asked.rounds} rounds of {asked.steps} steps, seconds of the {by}, load {os.getloadavg()[0]:.1f}")
    print("\n| stage | ours, ms a step | bare TRL | ours / bare, median | rounds | largest difference of a loss |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        model = packing.small(Path(folder))
        for kind in (sft, dpo):
            worst = max(worst, compare(kind, model, Path(folder), asked, by))
    raise SystemExit(int(worst > TOLERANCE))


def compare(kind: Any, model: Path, folder: Path, asked: argparse.Namespace, by: str) -> float:
    """A row of the table; the largest difference of the losses of a step."""
    name = kind.__name__.rpartition(".")[2]
    source = rows(name, folder / f"{name}.jsonl", asked.steps * BATCH)
    given = {
        **{"max_length": LENGTH, "per_device_train_batch_size": BATCH, "max_steps": asked.steps, "logging_steps": 1},
        **{"save_strategy": "no", "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        **({} if asked.default else {"activation_checkpointing": True}),
    }
    sides: dict[str, Callable[[], tuple[float, list[float]]]] = {
        "ours": lambda: measured(kind, model, source, given, by, bare=False),
        "bare": lambda: measured(kind, model, source, given, by, bare=True),
    }
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    losses: dict[str, list[float]] = {}
    for number in range(asked.rounds):
        for side in list(sides) if number % 2 == 0 else reversed(list(sides)):
            took, losses[side] = sides[side]()
            seconds[side].append(1000 * took / asked.steps)
    ratios = [left / right for left, right in zip(seconds["ours"], seconds["bare"], strict=True)]
    apart = max(abs(left - right) for left, right in zip(losses["ours"], losses["bare"], strict=True))
    cells = [f"{statistics.median(seconds[side]):.1f}" for side in sides]
    cells += [f"{statistics.median(ratios):.2f}", ", ".join(f"{ratio:.2f}" for ratio in ratios), f"{apart:.1e}"]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return apart


def rows(name: str, file: Path, count: int) -> Source:
    """Conversations, or pairs, of random letters."""
    if name == "sft":
        return packing.texts("sft", 90, LENGTH, count, file)
    source = packing.texts("sft", 60, LENGTH // 2, count, file)
    talks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [{"instruction": t["instruction"], "chosen": t["output"], "rejected": t["output"][::-1]} for t in talks]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return source.model_copy(update={"format": "preference"})


class Done(Exception):
    """The bare side has trained, and the stage around it is left."""


def measured(
    kind: Any, model: Path, source: Source, given: dict[str, Any], by: str, *, bare: bool
) -> tuple[float, list[float]]:
    """Seconds of the training loop, and the loss of each step."""
    config = kind.Config(model="base", data=[source], lora=packing.LORA, trainer=given)
    built: list[Any] = []
    real = loop.build

    def build(trainer: Any, **parts: Any) -> Any:
        transformers.set_seed(0)  # the matrices A of LoRA are drawn now
        built.append(plain(kind, config, model, parts) if bare else real(trainer, **parts))
        if bare:
            built[0].train()
            raise Done
        return built[0]

    loop.build = build
    try:
        with tempfile.TemporaryDirectory() as out, packing.quiet(), packing.clock() as clock, contextlib.suppress(Done):
            kind.run(config, Inputs(model=[str(model)]), Path(out))
    finally:
        loop.build = real
    return clock[by], [entry["loss"] for entry in built[0].state.log_history if "loss" in entry]


def plain(kind: Any, config: Any, model: Path, parts: dict[str, Any]) -> Any:
    """TRL's own trainer, with a model from its folder, on the rows that our stage has prepared."""
    name = {sft: "SFT", dpo: "DPO"}[kind]

    class Plain(getattr(trl, f"{name}Trainer")):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    args = loop.arguments(f"{name}Config", config, Path(parts["args"].output_dir).parent)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", **packing.LORA)
    given = {"train_dataset": parts["train_dataset"], "processing_class": parts["processing_class"]}
    return Plain(model=loaded, args=args, peft_config=lora, **given)


if __name__ == "__main__":
    main()
