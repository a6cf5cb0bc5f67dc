"""Model cards as the Hub reads them, without training: what a plan and made-up figures come to."""

import re
from pathlib import Path

import pytest
from planned import CHAIN

from pipeline.config.checker import load_config
from pipeline.plan.placing import build_plan
from pipeline.run import card

FIGURES = {
    "pt": {
        "data": [{"trained_rows": 1200, "tokens": 34567}],
        **{"steps": 40, "loss_first": 3.0, "loss_last": 2.5, "eval_loss_before": 3.25, "eval_loss": 2.75},
    },
    "sft": {"data": [{"trained_rows": 90, "tokens": 1000}], "steps": 30, "stopped_early": True, "best_step": 20},
    "dpo": {"steps": 5, "eval_rewards/accuracies_before": 0, "eval_rewards/accuracies": 0.625},
    "merge": {"adapters": 3, "logit_difference": 1.5e-6},
    "quantize": {
        **{"perplexity_before": 10.0, "perplexity_after": 10.5, "perplexity_rows": 64},
        **{"bytes_before": 5000, "bytes_after": 1500},
    },
}
VERSIONS = {"torch": "2.13.0", "gptqmodel": "none"}


@pytest.fixture
def written(project):
    """The card of a config's last stage, with made-up figures, as the Hub's own parser reads it."""

    def write(text, figures=FIGURES):
        from huggingface_hub import ModelCard

        project.write("x.yaml", text)
        planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
        assert planned.problems == []
        made = [card.Made(step, figures.get(step.name, {})) for step in planned.steps]
        card.write(Path(), made[-1].step, made[-1].metrics, planned, made[:-1], VERSIONS)
        return ModelCard.load("README.md")

    return write


def cells(content, first, column=-1):
    """A column of the table rows that begin with a word."""
    found = [[cell.strip() for cell in line.split(" | ")] for line in content.splitlines() if line.startswith("| ")]
    return [row[column].rstrip(" |") for row in found if row[0] == f"| {first}"]


def test_the_card_of_a_chain_tells_base_stages_data_and_figures(project, written):
    made = written(project.model() + CHAIN.partition("data: books}\n")[2].replace("group_size: 32", "group_size: -1"))
    assert made.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["stagewise", "pt", "sft", "dpo", "gptq", "4-bit"],
    }
    assert "# x: quantize\n\nThe model `m`, after `pt`, `sft`, `dpo`, `merge`, `quantize`." in made.text
    assert cells(made.text, "sft")[0] == "LoRA (r 8), learning_rate 5e-05, seed 42"
    assert (
        cells(made.text, "quantize")[0] == "bits 4, group_size -1, seed 42, calibrated on up to 256 rows of 512 tokens"
    )
    assert "| pt | `books`: `books.jsonl` | text | 1,200 | 34,567 |" in made.text
    assert "| pt | held-out loss | 3.25 | 2.75 |" in made.text
    assert "| sft | steps |  | 30, stopped early |\n| sft | step that was kept |  | 20 |" in made.text
    assert "| dpo | held-out preference accuracy | a tie | 0.625 |" in made.text
    assert "| merge | largest logit difference to the unmerged adapters |  | 1.5e-06 |" in made.text
    assert "| quantize | bytes | 5,000 | 1,500 |" in made.text
    assert "The chat template is `med`" in made.text
    assert made.text.endswith("## Versions\n\ntorch 2.13.0.\n")
    code = re.search(r"```python\n(.*?)```", made.text, re.DOTALL)
    compile(code[1], "README.md", "exec")


BASE = "license: other\nlicense_name: open-rail\nlicense_link: https://example.org\nlanguage: [fr]\n"


@pytest.mark.parametrize(
    ("said", "base", "expected"),
    [
        ("", f"---\n{BASE}---\n# Base\n", ("other", "open-rail", None)),
        ("card: {license: mit, language: zh}\n", f"---\n{BASE}---\n", ("mit", None, "zh")),
        ("", "# No metadata\n", (None, None, None)),
        ("", "---\nlicense: [\n---\n", (None, None, None)),
        ("", b"---\n\xff\n---\n", (None, None, None)),
    ],
)
def test_the_license_is_the_config_s_or_else_the_base_model_s_own(project, written, said, base, expected):
    text = project.model()
    project.write("m/README.md", base)
    made = written(said + text + "  sft: {data: consult, lora: {r: 2}}\n  merge:\n").data
    assert (made.license, made.get("license_name"), made.language) == expected


@pytest.mark.parametrize(("last", "relation"), [("merge:", "finetune"), ("quantize: {QUANTIZE}", "quantized")])
def test_a_base_model_with_a_name_is_related_to_it(project, written, last, relation):
    text = project.model()
    last = last.replace("QUANTIZE", "group_size: -1, calibration: {data: consult}")
    given = "card: {base_model: org/base, datasets: [org/more], tags: [medical]}\n"
    made = written(f"{given}{text}  sft: {{data: consult}}\n  {last}\n").data
    assert (made.base_model, made.base_model_relation, made.datasets) == ("org/base", relation, ["org/more"])
    assert made.tags[-1] == "medical"


def test_an_evaluation_above_is_in_the_card_for_the_models_that_it_comes_from(project, written):
    figures = {"perplexity": {"consult": {"base": 9.0, "sft": 8.0, "other": 7.0, "more": None}}}
    chain = (
        "  sft: {data: consult}\n  other: {use: sft, model: m, data: consult, seed: 1}\n"
        "  more: {use: sft, model: $sft, data: consult}\n"
    )
    measured = {"evaluate": {"models": ["base", "sft", "other", "more"], "figures": figures}}
    made = written(project.model() + chain + "  evaluate: {data: consult}\n  merge:\n", measured)
    assert "| metric | data | base | sft | more |\n| --- | --- | --- | --- | --- |\n" in made.text
    assert "| perplexity | consult | 9 | 8 | – |" in made.text
    assert "| other" not in made.text


def test_the_card_says_nothing_of_this_machine_and_of_no_secret(project, written, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "canary-1234")
    away = str(project.folder / "books.jsonl")
    text = (
        project.model()
        .replace("path: books.jsonl", f"path: {away}")
        .replace("model: m", f"model: {Path('m').resolve()}")
    )
    made = written(f"card: {{tags: [canary-1234]}}\n{text}  pt: {{data: books}}\n  merge:\n")
    assert "`books.jsonl`" in made.text
    assert str(project.folder) not in made.content
    assert made.data.tags[-1] == "<MY_SECRET>"


def test_the_card_s_keys_are_checked_and_change_no_fingerprint(project):
    assert project.validate(f"card: {{licence: mit}}\n{CHAIN}") == (
        2,
        "x.yaml:1:8: `card` has no setting `licence`; did you mean `license`?\n",
    )
    assert project.changed(f"card: {{license: mit}}\n{CHAIN}") == []
