"""A healthy chain and three broken ones, before the gates of `configs/bloomz_med.yaml`.

    python benchmarks/gates.py MODEL TOYHOM DPO_ZH C4 FOLDER

MODEL is SmolLM2-135M-Instruct, TOYHOM the csv of Toyhom/Chinese-medical-dialogue-data's internal medicine (GB18030),
DPO_ZH and C4 LLaMA-Factory's `dpo_zh_demo.json` and `c4_demo.jsonl`. FOLDER gets the data, the configs and the runs;
called again, it goes on. Healthy: PT, SFT, DPO, merge, 4 bits. Broken: an SFT on answers of other questions, a merge
that lost its adapters, an export to 2 bits. Each must end with exit code 3 and name the gate, the healthy one with 0.
"""

import argparse
import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
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


def config(model: str, data: Path, *, sft: str = "consult") -> dict[str, Any]:
    """The chain, with the gates of `bloomz_med.yaml` as they are."""
    gates = yaml.safe_load((ROOT / "configs/bloomz_med.yaml").read_text(encoding="utf-8"))["stages"]["evaluate"][
        "gates"
    ]
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
            "quantize": {"group_size": 32, "calibration": {"data": ["consult", "general"]}},
            "evaluate": {"data": measured, "max_length": 640, "gates": gates},
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
    for name, sft in (("healthy", "consult"), ("shuffled", "shuffled")):
        text = yaml.safe_dump(config(str(asked.model.resolve()), data, sft=sft), allow_unicode=True, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
