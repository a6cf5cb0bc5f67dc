"""A small project that is planned and not run, for the tests of what will run and why."""

import json
import os
import struct
from pathlib import Path

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.placing import build_plan
from pipeline.saves import artifact
from pipeline.saves.links import link
from stages.model.inputs import Inputs
from stages.runtime.hashes import Hashes

ROWS = {
    "books.jsonl": '{"text": "a"}\n{"text": "b"}\n',
    "consult.jsonl": '{"instruction": "a", "output": "b"}\n',
    "prefer.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
}
TOP = """\
template: med
data:
  books: {path: books.jsonl, format: text}
  consult: {path: consult.jsonl, format: alpaca}
  prefer: {path: prefer.jsonl, format: preference}
"""
INIT = TOP + "stages:\n  init: {architecture: bloom, data: books}\n"  # what a test adds starts in line 8
CHAIN = (
    INIT
    + """\
  pt: {data: books, lora: {r: 8}}
  sft:
    data: consult
    lora: {r: 8}
    trainer: {learning_rate: 5e-5, logging_steps: 10}
  dpo: {data: prefer, lora: {r: 8}}
  merge:
  quantize: {group_size: 32, calibration: {data: consult}}
"""
)
STAGES = ["init", "pt", "sft", "dpo", "merge", "quantize"]


def sample(cases, number):
    """One of some cases, another one for each `number`; all of them with EVERY_STOP=1, as `make faults` sets it."""
    return cases if os.environ.get("EVERY_STOP") else cases[number % len(cases) :][:1]


def inputs(config, *model):
    """The inputs of a stage that runs without a plan: folders of its model, and other models as they are written."""
    others = {name: getattr(config, name, None) for name in ("scorer", "embedder")}
    return Inputs(model=list(map(str, model)), others={name: other for name, other in others.items() if other})


class Project:
    """A folder with small data files, in which configs are written and planned."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        for name, content in ROWS.items():
            self.write(name, content)

    def write(self, name, content):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def validate(self, text, *words):
        """The exit code of `validate` and what it printed."""
        self.write("x.yaml", text)
        code = main(["validate", "x.yaml", *words])
        shown = self.capsys.readouterr()
        return code, shown.out + shown.err

    def plan(self, text=CHAIN, *assignments, name="x.yaml"):
        """The steps by stage name."""
        self.write(name, text)
        planned = build_plan(load_config(Path(name), assignments), Path("saves"))
        assert planned.problems == []
        return {step.name: step for step in planned.steps}

    def changed(self, text=CHAIN, *assignments):
        """The stages that another text or assignment gives another fingerprint than the chain's."""
        before, after = self.plan(), self.plan(text, *assignments)
        return [name for name in before if before[name].fingerprint != after[name].fingerprint]

    def model(self, folder="m", *, model_type="llama", template=None, weights=None, **more):
        """A model folder as `save_pretrained` leaves it, as far as it is read without torch."""
        header, end = {}, 0
        for name, shape in (weights or {"model.layers.0.self_attn.q_proj.weight": [4, 4]}).items():
            size = 4 * shape[0] * shape[1]
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        head = json.dumps(header).encode()
        self.write(f"{folder}/model.safetensors", struct.pack("<Q", len(head)) + head + bytes(end))
        self.write(f"{folder}/config.json", json.dumps({"model_type": model_type, **more}))
        self.write(f"{folder}/tokenizer.json", '{"added_tokens": [{"content": "</s>"}]}')
        self.write(f"{folder}/tokenizer_config.json", json.dumps({"eos_token": "</s>", "chat_template": template}))
        return f"model: {folder}\n{TOP}stages:\n"  # what a test adds starts in line 8

    def adapter(self, folder="a", *, weights=None, **config):
        """A LoRA adapter as PEFT leaves it, as far as it is read without torch."""
        tensors = weights or {
            "model.layers.0.self_attn.q_proj.lora_A.weight": [2, 8],
            "model.layers.0.self_attn.q_proj.lora_B.weight": [8, 2],
        }
        self.model(folder, weights={f"base_model.model.{name}": shape for name, shape in tensors.items()})
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (self.folder / folder / name).unlink()
        (self.folder / folder / "model.safetensors").rename(self.folder / folder / "adapter_model.safetensors")
        given = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **config}
        self.write(f"{folder}/adapter_config.json", json.dumps(given))


def pretend(step, **changes):
    """Leave what a run of this step leaves: a finished folder with its record, and the link."""
    step.part.mkdir(parents=True)
    (step.part / "model.safetensors").write_bytes(b"weights")
    record = {"recipe": dict(step.recipe), "versions": installed_versions(step.use), "started": 0.0, **changes}
    artifact.finish(step.part, step.folder, record, Hashes(None))
    link(step.folder, step.link)
