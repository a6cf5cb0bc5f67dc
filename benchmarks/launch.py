"""Losses of several processes beside those of one process with the same rows a step: `python benchmarks/launch.py`.

A tiny chain is trained whole and with LoRA, in one process and in two with each strategy, on the CPU; `sft` is killed
once and goes on. Prints a table in Markdown: the largest difference of a loss, the time, whether the files are whole,
and whether the result after the kill has the same sha256. Takes about ten minutes on two idle cores.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.saves import artifact
from stages.model.facts import read_header
from stages.runtime.events import read_events

ROOT = Path(__file__).parents[1]
KINDS, KILLED = ("pt", "sft", "dpo"), "sft"
CONFIG = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 60}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 60}}
  prefer:  {{path: {data}/med_prefer.jsonl, format: preference, max_samples: 60}}
stages:
  init: {{architecture: {architecture}, hidden_size: 64, num_attention_heads: 4, vocab_size: 600, data: [books]}}
  pt:  {{data: books, eval_size: 8, {lora} trainer: {{{common}, learning_rate: 1e-3}}}}
  sft: {{data: consult, eval_size: 8, {lora} trainer: {{{common}, learning_rate: 1e-3}}}}
  dpo: {{data: prefer, eval_size: 8, {lora} trainer: {{{common}, learning_rate: 1e-4}}}}
"""
COMMON = (
    "max_steps: 6, max_length: 128, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, "
    "logging_steps: 1, save_steps: 2, gradient_checkpointing: false"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3"])
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--architecture", default="llama")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("| method | launch | stage | largest difference of a loss | files | after kill -9 | seconds |")
    print("|---|---|---|---|---|---|---|")
    for method in chosen.methods:
        with tempfile.TemporaryDirectory() as place:
            measure(Path(place), method, chosen)


def measure(place: Path, method: str, chosen: argparse.Namespace) -> None:
    lora = "lora: {r: 4}," if method == "lora" else ""
    config = place / "two.yaml"
    words = {"data": ROOT / "data", "lora": lora, "common": COMMON, "architecture": chosen.architecture}
    config.write_text(CONFIG.format(**words), encoding="utf-8")
    run(config)
    alone = {kind: (place / "saves" / "two" / kind).resolve() for kind in KINDS}
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    for strategy in chosen.strategies:
        for kind in KINDS:
            words = ["--until", kind, "--set", f"{kind}.launch.processes=2"]
            words += ["--set", f"{kind}.launch.strategy={strategy}"]
            run(config, *words)
            shared = (place / "saves" / "two" / kind).resolve()
            pairs = zip(losses(alone[kind]), losses(shared), strict=True)
            difference = max(abs(one - two) for one, two in pairs)
            whole = read_header(shared / name)[0] == read_header(alone[kind] / name)[0]
            record = artifact.read(shared)
            again = "" if kind != KILLED else _again(config, shared, name, record, *words)
            print(
                f"| {method} | `{strategy}` × 2 | `{kind}` | {difference:.1e} | {'whole' if whole else 'NOT WHOLE'} | "
                f"{again} | {record['seconds']:.0f} |",
                flush=True,
            )


def _again(config: Path, shared: Path, name: str, record: dict[str, Any], *words: str) -> str:
    """Whether a stage that was killed ends with the same weights."""
    shutil.rmtree(shared)
    kill(config, config.parent / "saves", KILLED, *words)
    run(config, *words)
    same = artifact.read((config.parent / "saves" / "two" / KILLED).resolve())["files"][name]["sha256"]
    return "same sha256" if same == record["files"][name]["sha256"] else "OTHER sha256"


def command(config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", "run", str(config), "--saves", str(config.parent / "saves"), *words]


def run(config: Path, *words: str) -> None:
    subprocess.run(command(config, *words), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def kill(config: Path, saves: Path, kind: str, *words: str) -> None:
    """Run a stage and kill its first process after the third step."""
    runner = subprocess.Popen(command(config, *words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while runner.poll() is None:
        for part in saves.glob(f"{kind}-*.part"):
            events = list(read_events(part))
            if any(event["kind"] == "log" and event.get("step", 0) >= 3 for event in events):
                os.kill(next(event["pid"] for event in events if event["kind"] == "start"), signal.SIGKILL)
                runner.wait()
                return
        time.sleep(0.02)
    raise RuntimeError(f"{json.dumps(words)}: ended before it could be killed")


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder) if event["kind"] == "log" and "loss" in event]


if __name__ == "__main__":
    main()
