"""A project whose stages are estimated, and what the process that estimates has answered about it.

`python -P tests/plan/estimated.py` asks the process again and writes `estimates.json`, when an estimate has changed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

ROWS = {
    "consult.jsonl": json.dumps({"instruction": "a" * 600, "output": "b" * 600}) + "\n",
    "prefer.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
}
CONFIG = """\
# what the top says
template: med
data:
  consult: {path: consult.jsonl, format: alpaca}   # questions
  prefer: {path: prefer.jsonl, format: preference}
stages:
  init: {architecture: llama, hidden_size: 256, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 600,
         data: consult}   # two layers
  sft:
    data: consult
    # without checkpointing it is fast
    trainer: {gradient_checkpointing: false,   # and takes memory
              per_device_train_batch_size: 16, max_length: 512}
  dpo:
    data: prefer
    lora: {r: 8}
    trainer:
      # pairs are short
      per_device_train_batch_size: 1  # a pair
      max_length: 128
"""
FILE = Path(__file__).with_name("estimates.json")
ROOT = Path(__file__).parents[2]


def key(question):
    """What an answer depends on, without settings that came later and are not used, and without versions."""
    asked = question["estimate"]
    config = {name: value for name, value in asked["config"].items() if value not in (None, {}, [], False)}
    return json.dumps({**asked, "config": config}, sort_keys=True)


def main():
    """Write what the real process answers while the project is planned for a GPU that is too small."""
    sys.path[:0] = [str(ROOT)]
    from pipeline.config.checker import load_config
    from pipeline.plan.estimate import Ask, estimates
    from pipeline.plan.estimate_engine import Engine
    from pipeline.plan.placing import build_plan

    asked, found = Engine._asked, {}

    def remember(engine, question):
        answer = asked(engine, question)
        if "estimate" in question:
            found[key(question)] = answer
        return answer

    Engine._asked = remember
    os.chdir(tempfile.mkdtemp())
    for name, text in ROWS.items():
        Path(name).write_text(text, encoding="utf-8")
    Path("x.yaml").write_text(CONFIG, encoding="utf-8")
    for ask in (Ask(compute=True, gpu=500_000_000, rate=1e12), Ask(compute=True, rate=1e12)):
        estimates(build_plan(load_config(Path("x.yaml")), Path("saves")), ask, print)
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
