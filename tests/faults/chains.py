"""The runs that are killed: two small configs, and for each run the stage that it makes and what is there before it."""

import json
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parents[2] / "data"
INIT = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 16}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 40}}
  prefer:  {{path: {data}/med_prefer.jsonl, format: preference, max_samples: 14}}
  thumbs:  {{path: {folder}/thumbs.jsonl, format: labelled}}
  held:    {{path: {data}/med_qa_held.json, format: alpaca, max_samples: 4}}
stages:
  init: {{architecture: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 400,
         data: [books]}}
"""
CONFIGS = {
    "chain": INIT
    + """\
  pt:
    data: books
    eval_size: 2
    trainer: {{learning_rate: 1e-2, max_steps: 6, max_length: 64, per_device_train_batch_size: 2,
              gradient_checkpointing: false, logging_steps: 2, save_steps: 2, save_total_limit: 1}}
  sft:
    data: consult
    eval_size: 4
    lora: {{r: 2, lora_dropout: 0.1}}
    trainer: {{learning_rate: 1e-2, max_steps: 6, max_length: 256, per_device_train_batch_size: 2, packing: true,
              gradient_checkpointing: false, logging_steps: 2, save_steps: 2, eval_strategy: steps, eval_steps: 3}}
  dpo:
    data: prefer
    eval_size: 2
    lora: {{r: 2, target_modules: [q_proj, v_proj]}}
    trainer: {{learning_rate: 1e-3, max_steps: 4, max_length: 256, per_device_train_batch_size: 2,
              gradient_checkpointing: false, logging_steps: 2, save_steps: 2}}
  merge:
  quantize: {{group_size: 32, calibration: {{data: consult, samples: 8, max_length: 64}}}}
""",
    "judged": INIT
    + """\
  add_tokens: {{special: ["<|turn|>"], words: [血压]}}
  reward:
    data: prefer
    eval_size: 2
    lora: {{r: 2, target_modules: [q_proj, v_proj]}}
    trainer: {{learning_rate: 1e-3, max_steps: 4, max_length: 1024, per_device_train_batch_size: 2,
              gradient_checkpointing: false, logging_steps: 2, save_steps: 2}}
  select: {{data: consult, method: car, scorer: $reward, keep: 8}}
  kto:
    data: thumbs
    eval_size: 2
    lora: {{r: 2, target_modules: [q_proj, v_proj]}}
    trainer: {{learning_rate: 1e-3, max_steps: 4, max_length: 1024, per_device_train_batch_size: 2,
              gradient_checkpointing: false, logging_steps: 2, save_steps: 2}}
  evaluate:
    compare: [add_tokens, kto]
    data: [held, prefer]
    prompts: held
    max_prompts: 2
    generation: {{max_new_tokens: 8}}
    gates:
      - {{metric: perplexity, data: held, stage: kto, versus: add_tokens, max_increase: 50%}}
      - {{metric: reward_accuracy, data: prefer, min: 0}}
""",
}
STAGES = {
    "chain": ["init", "pt", "sft", "dpo", "merge", "quantize"],
    "judged": ["init", "add_tokens", "reward", "select", "kto", "evaluate"],
}


@dataclass(frozen=True)
class Case:
    """A run that is killed: `pipeline run CHAIN --until STAGE`."""

    chain: str
    stage: str
    above: tuple[str, ...]
    """Stages that are finished before it."""
    rows: bool = False
    """Whether the rows of the stage were prepared before, by another run."""
    at: str = ""
    """Kills are tried at calls whose path contains this."""


def _cases() -> dict[str, Case]:
    found = {}
    for chain, stages in STAGES.items():
        for number, stage in enumerate(stages[1:], 1):
            found[stage] = Case(chain, stage, tuple(stages[:number]))
    trained = ("pt", "sft", "dpo", "reward", "kto")
    return (
        found
        | {f"{stage}+rows": Case(found[stage].chain, stage, found[stage].above, rows=True) for stage in trained}
        | {"rehearsal": Case("judged", "kto", ("init", "add_tokens"), at=".rehearsal")}
    )


CASES = _cases()
"""By name: a stage; `STAGE+rows`, a stage whose rows were prepared before; `rehearsal`, that of `kto` by a run that
makes `reward`, `select` and `kto`."""


def write(folder: Path, name: str) -> Path:
    """Write a config and its labelled answers into a folder; the path of the config."""
    pairs = [json.loads(line) for line in (DATA / "med_prefer.jsonl").read_text(encoding="utf-8").splitlines()[:7]]
    answers = [(pair["prompt"], pair[key], key == "chosen") for pair in pairs for key in ("chosen", "rejected")]
    lines = [json.dumps({"prompt": prompt, "completion": text, "label": good}) for prompt, text, good in answers]
    (folder / "thumbs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = folder / f"{name}.yaml"
    config.write_text(CONFIGS[name].format(data=DATA, folder=folder), encoding="utf-8")
    return config
