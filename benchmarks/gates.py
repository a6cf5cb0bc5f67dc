"""A healthy chain of SmolLM2 and three broken ones, before the gates of `configs/bloomz_med.yaml`.

    python benchmarks/gates.py MODEL TOYHOM DPO_ZH C4 FOLDER

MODEL is SmolLM2-135M-Instruct, TOYHOM the csv of Toyhom/Chinese-medical-dialogue-data's internal medicine (GB18030),
DPO_ZH and C4 LLaMA-Factory's `dpo_zh_demo.json` and `c4_demo.jsonl`. FOLDER gets the data, the configs and the runs;
called again, it goes on. Healthy: PT, SFT, DPO, merge, 4 bits, which must end with exit code 0. Broken: an SFT on the
answers of other questions, a merge that lost its adapters (the base model), an export to 2 bits; each model takes the
place of the healthy one in the table, and the gates are asked again. Hours on two cores.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LORA = {"r": 16, "lora_alpha": 32}
COMMON = {
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_length": 384,
    "gradient_checkpointing": False,
    "save_steps": 20,
    "logging_steps": 5,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-4,
}
DPO = {"max_length": 640, "learning_rate": 3e-4, "per_device_train_batch_size": 2, "logging_steps": 2}


def write(folder: Path, toyhom: Path, dpo_zh: Path, c4: Path) -> None:
    """The data, no row in two files: short rows, since this tokenizer spends two tokens on a Chinese character."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(11)
    with open(toyhom, encoding="gb18030", newline="") as file:
        talks = [
            {"instruction": row["ask"].strip(), "output": row["answer"].strip()}
            for row in csv.DictReader(file)
            if 80 <= len(row["ask"]) + len(row["answer"]) <= 175
        ]
    talks = list({talk["instruction"]: talk for talk in talks}.values())
    chance.shuffle(talks)
    held, consult, books = talks[:80], talks[80:400], talks[400:640]
    answers = [talk["output"] for talk in consult]
    shuffled = [{**talk, "output": answers[place - 1]} for place, talk in enumerate(consult)]
    pairs = [pair for pair in json.loads(dpo_zh.read_text(encoding="utf-8")) if _size(pair) <= 300]
    chance.shuffle(pairs)
    texts = [json.loads(line)["text"][:800] for line in c4.read_text(encoding="utf-8").splitlines()]
    files = {
        "consult_held": held,
        "consult": consult,
        "shuffled": shuffled,
        "books": [{"text": talk["instruction"] + "\n" + talk["output"]} for talk in books],
        "prefer_held": pairs[:14],
        "prefer": pairs[14:],
        "general": [{"text": text} for text in texts[40:]],
        "english_held": [{"text": text} for text in texts[:40]],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    shutil.copyfile(ROOT / "data/general_held.jsonl", folder / "general_held.jsonl")


def _size(pair: dict[str, Any]) -> int:
    asked = sum(len(said["value"]) for said in pair["conversations"])
    return asked + max(len(pair[side]["value"]) for side in ("chosen", "rejected"))


def gates() -> list[dict[str, Any]]:
    """Those of `bloomz_med.yaml`, as they are."""
    text = (ROOT / "configs/bloomz_med.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load(text)["stages"]["evaluate"]["gates"])


def configs(model: str, data: Path) -> dict[str, dict[str, Any]]:
    """The healthy chain, and what is needed of the broken ones."""
    healthy, shuffled, two_bits = (config(model, data, sft=name) for name in ("consult", "shuffled", "consult"))
    only = {"data": "consult_held", "max_length": 640}
    stages = shuffled["stages"]
    stages["sft"]["trainer"] = {**COMMON, "max_steps": 40}
    shuffled["stages"] = {"pt": stages["pt"], "sft": stages["sft"], "evaluate": {**only, "compare": ["sft"]}}
    two_bits["stages"]["quantize"] = {**two_bits["stages"]["quantize"], "bits": 2}
    two_bits["stages"]["evaluate"] = {**only, "compare": ["quantize"]}
    return {"healthy": healthy, "shuffled": shuffled, "two_bits": two_bits}


def config(model: str, data: Path, *, sft: str) -> dict[str, Any]:
    formats = {"books": "text", "consult": "alpaca", "prefer": "preference", "general": "text"}
    formats |= {"consult_held": "alpaca", "prefer_held": "preference", "general_held": "text", "english_held": "text"}
    declared = {name: {"path": str(data / f"{name}.jsonl"), "format": form} for name, form in formats.items()}
    declared["consult"]["path"] = str(data / f"{sft}.jsonl")
    declared["consult_held"]["max_samples"] = 32
    measured = ["consult_held", "general_held", "prefer_held"]
    return {
        "model": model,
        "question": "高血压患者平时饮食要注意什么？",
        "data": declared,
        "stages": {
            "pt": {"data": "books", "eval_size": 0.1, "lora": LORA, "trainer": COMMON},
            "sft": {"data": "consult", "eval_size": 0.1, "lora": LORA, "trainer": COMMON},
            "dpo": {
                "data": "prefer",
                "eval_size": 0.1,
                "lora": {"r": 8, "lora_alpha": 16},
                "trainer": {**COMMON, **DPO},
            },
            "merge": None,
            "quantize": {"calibration": {"data": {"consult": 3, "general": 1}, "samples": 128}},
            "evaluate": {"data": measured, "max_length": 640, "gates": gates()},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "toyhom", "dpo_zh", "c4", "folder"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    data = folder / "data"
    write(data, asked.toyhom, asked.dpo_zh, asked.c4)
    for name, made in configs(str(asked.model.resolve()), data).items():
        text = yaml.safe_dump(made, allow_unicode=True, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    codes = {name: run(folder, name) for name in ("healthy", "shuffled", "two_bits")}
    print("healthy: exit code", codes["healthy"])
    if codes["healthy"] not in (0, 3) or codes["shuffled"] or codes["two_bits"]:
        raise SystemExit(f"a run failed: {codes}")
    healthy = table(folder, "healthy")
    base = [one for one in healthy["figures"] if one["model"] == "base"]
    broken = {"answers of other questions": ("sft", table(folder, "shuffled")["figures"])}
    broken |= {"a merge without its adapters": ("merge", base)}
    broken |= {"2 bits": ("quantize", table(folder, "two_bits")["figures"])}
    print("| chain | gate | |\n|---|---|---|")
    for gate in gates():
        told("healthy", gate, healthy)
    for name, (stage, figures) in broken.items():
        rest = [one for one in healthy["figures"] if one["model"] != stage]
        mixed = {**healthy, "figures": rest + [{**one, "model": stage} for one in figures], "comparisons": []}
        for gate in gates():
            if gate["stage"] == stage:
                told(name, gate, mixed)


def run(folder: Path, name: str) -> int:
    command = [sys.executable, "-m", "pipeline.cli", "run", f"{name}.yaml"]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode


def table(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"saves/{name}/evaluate/evaluation.json").read_text(encoding="utf-8")))


def told(chain: str, gate: dict[str, Any], figures: dict[str, Any]) -> None:
    from stages.measuring.gates import Gate, judge_gate

    verdict = judge_gate(Gate.model_validate(gate), figures)
    print(f"| {chain} | {verdict.text} | {'passed' if verdict.passed else '**no**'} |")


if __name__ == "__main__":
    main()
