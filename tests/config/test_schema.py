"""The JSON Schema accepts what `validate` accepts, and refuses mistakes at the keys that `validate` names."""

import json
from pathlib import Path

import jsonschema
import pytest

from pipeline.cli import main
from pipeline.config.document import read
from pipeline.config.schema import schema

ROOT = Path(__file__).parents[2]
MISTAKES = """\
template: medd
modell: m
data:
  books: {path: books.jsonl, format: text}
  consult: {path: consult.jsonl, format: alpaca}
stages:
  init: {architecture: bloom, data: books, hiden_size: 64}
  pt:
    data: books
    lora: {loraalpha: 16}
    trainer: {learning_rate: fast, packing: no}
  sftt: {data: consult}
  dpo:
    use: sft
    data: consult
    trainer:
      lerning_rate: 5e-5
"""


@pytest.fixture(scope="module")
def validator():
    built = schema()
    jsonschema.Draft202012Validator.check_schema(built)
    return jsonschema.Draft202012Validator(built)


def mistakes(validator, path):
    """The key and the name of each mistake."""
    found = set()
    for error in validator.iter_errors(read(path).data):
        place = ".".join(map(str, error.absolute_path))
        extra = error.validator == "additionalProperties"
        found |= {(place, name) for name in error.instance if f"'{name}'" in error.message} if extra else {(place, "")}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_it_accepts_every_shipped_config(validator, path):
    assert mistakes(validator, path) == set()
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


def test_it_refuses_mistakes_at_the_keys_that_validate_names(validator, project, tmp_path):
    (tmp_path / "x.yaml").write_text(MISTAKES, encoding="utf-8")
    assert mistakes(validator, tmp_path / "x.yaml") == {
        ("template", ""),
        ("", "modell"),
        ("stages.init", "hiden_size"),
        ("stages.pt.lora", "loraalpha"),
        ("stages.pt.trainer.learning_rate", ""),
        ("stages.pt.trainer.packing", ""),
        ("stages.sftt", ""),
        ("stages.dpo.trainer", "lerning_rate"),
    }
    assert main(["validate", "x.yaml"]) == 2
    said = project.capsys.readouterr().err
    words = ("medd", "modell", "hiden_size", "loraalpha", "learning_rate", "packing", "sftt", "lerning_rate")
    assert all(f"`{word}`" in said for word in words)


@pytest.mark.parametrize(
    "stages",
    [
        "sft: {data: {consult: 3, books: 1}, lora: {}, trainer: {optim: adamw_torch, max_length: 64}}",
        "sft: {data: [consult], evaluate: consult}\n  merge:",
        "second: {use: sft, data: consult, launch: {processes: 2}}",
        "sft: {data: consult, lora: {target_modules: [q_proj], init_lora_weights: pissa_niter_16}}",
        "sft: {data: consult}\n  evaluate: {data: consult, gates: [{metric: perplexity, max: 9}], prompts: [问]}",
        "quantize: {bits: 4, calibration: {data: {consult: 1}, samples: 8}}",
        "dpo: {data: consult, trainer: {loss_type: [sigmoid, sft], loss_weights: [1.0, 0.1]}}",
    ],
)
def test_it_accepts_the_ways_to_write_a_stage(validator, tmp_path, stages):
    text = f"model: m\nx-common: &common {{r: 8}}\ndata:\n  consult: {{path: a.json, format: alpaca, clean: [html]}}\nstages:\n  {stages}\n"  # noqa: E501
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    assert mistakes(validator, tmp_path / "x.yaml") == set()


def test_the_file_beside_the_configs_is_the_schema():
    written = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(schema())), "run `pipeline schema --out configs/schema.json`"


def test_settings_have_their_types_choices_and_help(validator):
    parts = validator.schema["$defs"]
    assert parts["SFTConfig"]["properties"]["packing"]["type"] == "boolean"
    assert "paged_adamw_8bit" in json.dumps(parts["SFTConfig"]["properties"]["optim"])
    assert parts["sft"]["properties"]["eval_size"]["description"].startswith("Rows of `data` held out")
    assert "output_dir" not in parts["SFTConfig"]["properties"]
