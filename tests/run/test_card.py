"""Model cards as the Hub reads them, from plans and made-up figures, without training."""

import json
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
    "merge": {"adapters": 3, "layer_difference": 1.5e-6},
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
        made = [card.FinishedStep(step, figures.get(step.name, {})) for step in planned.steps]
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
    assert "| merge | largest difference to the outputs of PEFT's layers |  | 1.5e-06 |" in made.text
    assert "| quantize | bytes | 5,000 | 1,500 |" in made.text
    assert "The chat template is `med`" in made.text
    assert made.text.endswith("## Versions\n\ntorch 2.13.0.\n")
    code = re.search(r"```python\n(.*?)```", made.text, re.DOTALL)
    compile(code[1], "README.md", "exec")


BASE = "license: other\nlicense_name: open-rail\nlicense_link: https://example.org\nlanguage: [fr]\n"


@pytest.mark.parametrize(("method", "words"), [("nf4", "4 bits (NF4)"), ("int8", "8 bits")])
def test_the_card_of_an_adapter_on_a_quantized_base_says_how_to_load_it(project, written, method, words):
    stage = f"  sft: {{data: consult, quantized_base: {method}, lora: {{r: 8}}}}\n"
    made = written(project.model() + stage).text
    described = {"nf4": "4 bits (NF4, double quantization)", "int8": "8 bits (LLM.int8)"}[method]
    assert cells(made, "sft")[0] == f"LoRA (r 8), on the base in {described}, seed 42"
    on_base = {
        "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
        "int8": "load_in_8bit=True",
    }[method]
    assert (
        f"They were trained on the base in {words}, and make another model of the base as it is stored. Pass "
        f"`quantization_config=BitsAndBytesConfig({on_base})`, which needs `bitsandbytes`, or use the model that "
        "`merge` writes.\n"
    ) in made
    assert (
        "They were trained on" not in written(project.model() + stage.replace(f"quantized_base: {method}, ", "")).text
    )


@pytest.mark.parametrize(
    ("said", "base", "expected"),
    [
        ("", f"---\n{BASE}---\n# Base\n", ("other", "open-rail", None)),
        ("card: {license: mit, language: zh}\n", f"---\n{BASE}---\n", ("mit", None, "zh")),
        ("", "# No metadata\n", (None, None, None)),
        ("", "", (None, None, None)),
        ("", "---\n", (None, None, None)),
        ("", "---\n- a\n---\n", (None, None, None)),
        ("", "---\nlicense: [mit]\nlicense_name: 3\n---\n", (None, None, None)),
        ("", f"\ufeff---\r\n{BASE}---\r\n", ("other", "open-rail", None)),
        # broken cards, each with another error of the parser
        ("", "---\nlicense: [\n---\n", (None, None, None)),
        ("", b"---\n\xff\n---\n", (None, None, None)),
        ("", "---\nlicense: !!int ''\n---\n", (None, None, None)),
        ("", "---\nlicense: !!bool mit\n---\n", (None, None, None)),
        ("", "---\nlicense: !!timestamp mit\n---\n", (None, None, None)),
        ("", f"---\nlicense: {'[' * 3000}\n---\n", (None, None, None)),
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


EVALUATED = """\
  sft: {data: consult, lora: {r: 2}}
  evaluate: {data: consult}
  other: {use: evaluate, data: books}
  merge:
"""
MEASURED = {
    "evaluate": {
        "models": ["base", "sft"],
        "figures": {
            "perplexity": {"consult": {"base": 9.0, "sft": 0.1 + 0.2}},
            "answer_match": {"consult": {"base": 0.25, "sft": 1e-05}},
            "reward_margin": {"consult": {"base": 1.0, "sft": None}},
        },
    },
    "other": {
        "models": ["base", "sft"],
        "figures": {"perplexity": {"books": {"base": 7.0, "sft": 6}, "consult": {"base": 9.0, "sft": 8.5}}},
    },
}


def results(made):
    """The `model-index` of a card: (data, metric) → value."""
    found = made.data.eval_results or []
    assert {(one.task_type, one.dataset_name == one.dataset_type) for one in found} <= {("text-generation", True)}
    assert len({(one.dataset_name, one.metric_type) for one in found}) == len(found)
    return {(one.dataset_name, one.metric_type): one.metric_value for one in found}


def test_an_evaluation_before_the_merge_is_the_model_index_of_the_merged_model(project, written):
    text = project.model() + EVALUATED.replace("  other: {use: evaluate, data: books}\n", "")
    made = written(text, MEASURED)
    assert results(made) == {("consult", "perplexity"): 0.1 + 0.2, ("consult", "answer_match"): 1e-05}
    (index,) = made.data.to_dict()["model-index"]
    assert index["name"] == "x: merge"
    assert index["results"] == [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": "consult", "type": "consult"},
            "metrics": [{"type": "perplexity", "value": 0.1 + 0.2}, {"type": "answer_match", "value": 1e-05}],
        }
    ]


def test_of_two_evaluations_the_later_one_counts(project, written):
    assert results(written(project.model() + EVALUATED, MEASURED)) == {
        ("consult", "perplexity"): 8.5,
        ("consult", "answer_match"): 1e-05,
        ("books", "perplexity"): 6,
    }


QUANTIZE = "  quantize: {group_size: -1, calibration: {data: consult}}\n"


@pytest.mark.parametrize(
    ("stages", "figures"),
    [
        ("  sft: {data: consult}\n  merge:\n", MEASURED),
        (EVALUATED, {}),
        (EVALUATED, {"evaluate": {"models": ["base"], "figures": {"perplexity": {"consult": {"base": 9.0}}}}}),
        (EVALUATED + QUANTIZE, MEASURED),  # the 4-bit model is another model than the one that was measured
    ],
    ids=["no evaluation", "no figures", "another model", "quantized"],
)
def test_a_model_that_no_evaluation_has_measured_has_no_model_index(project, written, stages, figures):
    made = written(project.model() + stages, figures)
    assert made.data.eval_results is None
    assert not {"model-index", "model_name", "eval_results"} & made.data.to_dict().keys()


def test_the_hub_reads_the_card_and_writes_the_same_metadata(project, written):
    project.write("m/README.md", f"---\n{BASE}---\n")
    card_settings = "card: {base_model: org/base, language: ['no', zh], datasets: [org/more], tags: ['4', 'a: b']}\n"
    made = written(card_settings + project.model() + EVALUATED, MEASURED)
    assert made.data.language == ["no", "zh"]
    assert made.data.tags == ["stagewise", "sft", "4", "a: b"]
    assert made.content == Path("README.md").read_text(encoding="utf-8")
    assert made.content.startswith(f"---\n{made.data.to_yaml()}\n---\n\n# x: merge\n")
    made.validate = None  # the Hub's own check needs the network
    made.save("again.md")
    assert Path("again.md").read_bytes() == Path("README.md").read_bytes()


def test_the_same_run_gives_the_same_bytes(project, written):
    text = "card: {tags: [b, a, b]}\n" + project.model() + EVALUATED
    once = written(text, MEASURED).content
    assert b"\r" not in Path("README.md").read_bytes()
    assert written(text, MEASURED).content == once


LONG = "canary # " + " ".join(["1234"] * 30)


@pytest.mark.parametrize("value", ["canary: 1234", "can|ary|1234", 'say "canary\'s 1234"', LONG])
def test_a_secret_that_yaml_or_a_table_would_change_is_masked(project, written, monkeypatch, value):
    monkeypatch.setenv("MY_SECRET", value)
    project.write(f"{value}.jsonl", '{"text": "a"}\n')
    text = project.model().replace("path: books.jsonl", f"path: {json.dumps(f'{value}.jsonl')}")
    made = written(f"card: {{tags: [{json.dumps(value)}]}}\n{text}  pt: {{data: books, lora: {{r: 2}}}}\n  merge:\n")
    assert made.data.tags[-1] == "<MY_SECRET>"
    assert "| pt | `books`: `<MY_SECRET>.jsonl` | text |" in made.text
    assert "1234" not in made.content
