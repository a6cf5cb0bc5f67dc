"""How long planning takes with many rows: the first plan, which reads every row, and the plans after it.

    python benchmarks/planning.py FOLDER [--rows 10000000] [--baseline CHECKOUT]

Writes one .jsonl file of questions and answers in Chinese (about 200 bytes a row) into FOLDER, and plans an `sft` stage
on it three times: with another data set that does not exist, with all of them, and once more. Prints wall seconds,
processor seconds of all processes, and the peak memory of the largest process. With `--baseline` the first plan of
another checkout of this project is measured in the same run.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = """\
template: med
data:
  tiny: {{path: tiny.jsonl, format: text}}
  many: {{path: many.jsonl, format: alpaca}}
  held: {{path: {held}, format: text}}
stages:
  init:
    {{architecture: llama, hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 4, vocab_size: 500, data: tiny}}
  pt: {{data: tiny, eval_data: held, trainer: {{max_steps: 1, max_length: 64}}}}
  sft: {{data: many, trainer: {{max_steps: 1, max_length: 64}}}}
"""
WORDS = ["感冒", "发热", "头痛", "咳嗽", "血压", "休息", "多喝水", "医生", "就医", "药物", "症状", "治疗", "。", "，"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--baseline", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{options.rows}.written").exists():  # by an earlier run
        write(folder, options.rows)
        (folder / f"{options.rows}.written").touch()
    size = (folder / "many.jsonl").stat().st_size / 1e9
    time.sleep(3)  # the hash of a file that is younger than two seconds is not remembered
    print(f"{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}")
    print(f"\n{options.rows:,} rows, {size:.2f} GB\n")
    print("| plan | wall s | processor s | peak MB of a process |\n|---|---|---|---|", flush=True)
    plan("first, and another data set is missing", folder, ROOT, "gone.jsonl")
    plan("second, and none is missing", folder, ROOT, "held.jsonl")
    plan("third", folder, ROOT, "held.jsonl")
    if options.baseline is not None:
        plan("first, the other checkout", folder, options.baseline.resolve(), "held.jsonl", saves="baseline")


def write(folder: Path, rows: int) -> None:
    chance = random.Random(1)
    (folder / "tiny.jsonl").write_text('{"text": "感冒。"}\n' * 20, encoding="utf-8")
    (folder / "held.jsonl").write_text('{"text": "头痛。"}\n' * 20, encoding="utf-8")
    phrases = ["".join(chance.choices(WORDS, k=8)) for _ in range(5_000)]
    with open(folder / "many.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            question, answer = chance.choice(phrases), chance.choice(phrases) + chance.choice(phrases)
            row = {"instruction": f"{number} {question}", "input": "", "output": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def plan(name: str, folder: Path, checkout: Path, held: str, saves: str = "saves") -> None:
    (folder / "x.yaml").write_text(CONFIG.format(held=held), encoding="utf-8")
    words = [sys.executable, "-m", "pipeline.cli", "plan", "x.yaml", "--no-estimate", "--saves", saves]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, check=False
    )
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    expected = 2 if held == "gone.jsonl" else 0
    if done.returncode != expected:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout.decode()}{done.stderr.decode()}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"| {name} | {seconds:.1f} | {used:.1f} | {after.ru_maxrss / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()
