"""Configs of LLaMA-Factory's new code, which it reads with `USE_V1=1`."""

from pathlib import Path

import pytest
import yaml
from converted import COMMIT, notes, stages, written

from pipeline.cli import main

LORA = """\
model: Qwen/Qwen3-4B
model_class: llm
template: qwen3_nothink
peft_config: {name: lora, r: 16, lora_alpha: 32, target_modules: all}
kernel_config: {name: auto, include_kernels: auto}
dist_config: {name: fsdp2, dcp_path: null}
train_dataset: data/sets.yaml
output_dir: ./outputs/lora
micro_batch_size: 1
global_batch_size: 8
batching_strategy: dynamic_batching
cutoff_len: 1024
max_steps: 10
sample_backend: hf
"""
EXPORT = """\
model: Qwen/Qwen3-4B
peft_config: {name: lora, adapter_name_or_path: ./outputs/lora, export_dir: ./merged, export_size: 5}
"""
SETS = """\
identity: {path: data/identity.json, source: local, converter: alpaca, size: 50}
talks: {path: org/talks, converter: sharegpt, split: train_sft}
pairs: {path: org/pairs, converter: pair}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/sets.yaml").write_text(SETS, encoding="utf-8")
    for name, text in (("sft.yaml", LORA), ("export.yaml", EXPORT)):
        Path(name).write_text(text, encoding="utf-8")


def test_training_and_export_are_a_chain_with_the_defaults_of_the_new_code():
    found, pipeline = written("sft.yaml", "export.yaml")
    assert stages(pipeline).keys() == {"sft", "merge"}
    sft = stages(pipeline)["sft"]
    assert (sft.start, stages(pipeline)["merge"].start) == (f"Qwen/Qwen3-4B@{COMMIT}", "$sft")
    assert sft.config.lora == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    asked = {
        **{"learning_rate": 1e-4, "lr_scheduler_type": "constant", "weight_decay": 0.01, "num_train_epochs": 3},
        **{"max_steps": 10, "max_length": 1024, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        **{"bf16": True, "logging_steps": 1},
    }
    assert {name: sft.config.trainer[name] for name in asked} == asked
    assert yaml.safe_load(found.text)["data"] == {
        "identity": {"path": "data/identity.json", "format": "alpaca", "max_samples": 50},
        "talks": {"path": f"org/talks@{COMMIT}", "split": "train_sft", "format": "sharegpt"},
    }
    said = (
        "`batching_strategy: dynamic_batching`: a step has as many rows as fit there, and always the same number here"
    )
    assert said in notes(found, "differs")
    assert notes(found, "not supported", "unknown") == ["the data set `pairs`: it has pairs, and `sft` is trained"]


def test_dpo_takes_the_pairs_and_full_training_has_no_adapter():
    text = LORA.replace("peft_config", "x-none").replace("micro_batch_size: 1", "micro_batchsize: 1")
    Path("full.yaml").write_text(text, encoding="utf-8")
    found, pipeline = written("USE_V1=1 llamafactory-cli dpo full.yaml")
    (name,) = stages(pipeline)
    assert name == "dpo"
    assert stages(pipeline)[name].config.lora is None
    assert yaml.safe_load(found.text)["data"]["pairs"] == {"path": f"org/pairs@{COMMIT}", "format": "preference"}
    assert "`micro_batchsize` is no argument of LLaMA-Factory's new code; did you mean `micro_batch_size`?" in notes(
        found, "unknown"
    )


def test_plan_names_convert_for_it(capsys):
    assert main(["plan", "sft.yaml"]) == 2
    said = (
        "sft.yaml: this is a config of LLaMA-Factory; `pipeline convert sft.yaml` writes it as a config of this program"
    )
    assert capsys.readouterr().err.splitlines()[0] == said
