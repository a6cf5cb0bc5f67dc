"""Selection of rows without a model: its settings, its place in a plan, and what is chosen from given scores."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from planned import TOP, inputs, pretend

from pipeline.config.checker import load_config
from pipeline.errors import StageFailed
from pipeline.plan.placing import build_plan
from pipeline.plan.step import check_unchanged
from pipeline.saves import artifact
from stages import select
from stages.data.source import Source, rows_of
from stages.measuring import choosing
from stages.runtime.errors import StageError
from stages.runtime.hashes import Hashes

CHAIN = (
    TOP
    + """\
stages:
  init: {architecture: bloom, data: books}
  pt: {data: books, lora: {r: 8}}
  select: {data: consult, method: ifd, keep: 0.5}
  sft: {data: [$select, consult], lora: {r: 8}, eval_size: 2}
  merge:
  quantize: {group_size: 32, calibration: {data: $select}}
"""
)  # `select` is in line 9


def refused(project, settings, text=CHAIN):
    """What `validate` says of other settings for the stage, less the place."""
    code, said = project.validate(text.replace("{data: consult, method: ifd, keep: 0.5}", settings))
    assert code == 2
    return said


# Its place in the plan


def test_the_stage_below_starts_from_the_model_above_and_reads_the_rows(project):
    steps = project.plan(CHAIN)
    rows = str(steps["select"].folder / "rows.jsonl")
    assert steps["sft"].inputs.model == steps["select"].inputs.model == steps["pt"].produces
    assert [source.path for source in steps["sft"].entry.config.data.sources] == ["$select", "consult.jsonl"]
    assert steps["sft"].inputs.rows == steps["quantize"].inputs.rows == {"$select": rows}
    assert steps["sft"].recipe["data"][0]["sha256"] == f"step:{steps['select'].fingerprint}"
    assert steps["select"].produces == []
    code, said = project.validate(CHAIN)
    assert (code, "6 stages (init → pt → select → sft → merge → quantize)" in said) == (0, True)


def test_another_share_runs_the_selection_and_what_reads_it(project):
    before, after = project.plan(CHAIN), project.plan(CHAIN, "select.keep=0.25")
    changed = [name for name in before if before[name].fingerprint != after[name].fingerprint]
    assert changed == ["select", "sft", "merge", "quantize"]
    for step in before.values():
        pretend(step)
    again = project.plan(CHAIN, "select.keep=0.25")
    assert again["pt"].state == "done"
    assert again["select"].why == "because `keep` 0.5 → 0.25 (--set select.keep)"
    assert again["sft"].why == "because `$select` changed"


def test_the_name_of_the_stage_counts_for_nothing(project):
    named = CHAIN.replace("$select", "$best").replace("select: {", "best: {use: select, ")
    assert project.plan(named)["sft"].fingerprint == project.plan(CHAIN)["sft"].fingerprint


def test_a_selection_that_asks_no_model_does_not_run_again_with_the_model(project):
    project.model("e")
    text = CHAIN.replace("method: ifd, keep: 0.5", "method: k_center, keep: 5, embedder: e")
    before, after = project.plan(text), project.plan(text, "pt.lora.r=4")
    assert before["select"].fingerprint == after["select"].fingerprint
    assert before["sft"].fingerprint != after["sft"].fingerprint
    assert "e/config.json" in before["select"].files
    project.model("e", hidden_size=8)
    assert project.plan(text)["select"].fingerprint != before["select"].fingerprint


def test_a_small_model_scores_and_the_stage_below_starts_from_the_one_above(project):
    project.model("small", template="x")
    steps = project.plan(CHAIN.replace("method: ifd", "method: ifd, model: small"))
    assert steps["select"].inputs.model == ["small"]
    assert steps["sft"].inputs.model == steps["pt"].produces


def test_rows_that_were_damaged_after_the_plan_stop_the_stage_that_reads_them(project):
    for step in project.plan(CHAIN).values():
        pretend(step)
    steps = project.plan(CHAIN)
    (steps["select"].folder / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(StageFailed, match=r"whose rows it reads, is damaged \(`model.safetensors` has changed\)"):
        check_unchanged(steps["sft"], Hashes(None), read=True)
    (steps["select"].folder / artifact.RECORD).unlink()
    assert project.plan(CHAIN)["select"].state == "run"


def test_tools_in_the_data_are_known_of_the_rows_selected_from_it(project):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    said = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "1"}]
    row = {"messages": [*said, {"role": "assistant", "content": "b"}]}
    project.write("consult.jsonl", json.dumps(row) + "\n")
    text = CHAIN.replace("format: alpaca", "format: messages").replace("[$select, consult]", "$select")
    refused = "the chat template cannot be used for 1 of 1 rows of data"
    shown = project.validate(text)[1]
    assert (
        f"stage `select`: {refused} `consult`, which is more than `max_dropped` 0.01 of them: consult.jsonl:1:" in shown
    )
    assert f"stage `sft`: {refused} `$select`, so none is left: consult.jsonl:1:" in shown
    shown = project.validate(text.replace("method: ifd", "method: k_center"))[1]
    assert "stage `select`:" not in shown  # it reads the words alone
    assert f"stage `sft`: {refused} `$select`" in shown


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[$select, consult]", "$pt", "10:15: stage `sft`: `pt` leaves a model, not rows; name declared data"),
        ("[$select, consult]", "$sft", "10:15: stage `sft`: no stage `sft` is above it; it stands below or is the "),
        ("[$select, consult]", "$selct", "10:15: stage `sft`: no stage `selct` is above it; did you mean `select`?"),
        ("$select, consult]", "consult, $selct]", "10:25: stage `sft`: no stage `selct` is above it"),
        ("path: books.jsonl", "path: $select", "3:17: data `books`: `$select` is what a stage leaves; name it in "),
        ("eval_size: 2", "model: $select", "10:56: stage `sft`: `select` leaves rows, not a model; name it under "),
        ("data: consult, m", "data: books, m", "9:18: stage `select`: `books.jsonl` has format `text`; `ifd` reads "),
        ("data: consult, method: ifd", "data: prefer, method: k_center", "`$select` has format `preference`; this "),
    ],
)
def test_what_names_rows_wrongly_is_refused(project, old, new, said):
    code, shown = project.validate(CHAIN.replace(old, new))
    assert code == 2
    assert said in shown


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{data: consult, method: ifd}", "`ifd` needs `keep`, such as 0.1 or 1000"),
        ("{data: consult, method: ifd, keep: 1.5}", "`keep` 1.5 is neither a share below 1 nor a whole number"),
        ("{data: consult, method: ifd, keep: 9, above: 1}", "`ifd` does not use `above`, which is for `quality`; "),
        ("{data: consult, method: quality, above: 0.0}", "`quality` needs `scorer`, the folder of a model that "),
        ("{data: consult, method: necessity, scorer: m}", "`necessity` needs `below`, a limit for the score such"),
        ("{data: consult, method: cars, keep: 9}", "`method` is `cars`; did you mean `car`?"),
        ("{data: [consult, books], method: k_center, keep: 9}", "which do not go into one file; use two stages"),
        ("{data: consult, method: quality, above: 0, scorer: no}", "the model folder `no` does not exist"),
        ("{data: consult, method: quality, above: 0, scorer: m}", "and a scorer is a model for sequence classi"),
        ("{data: consult, method: quality, above: 0, scorer: two}", "`two` has 2 labels, and a scorer has one"),
        (
            "{data: consult, method: quality, above: 0, scorer: a/b}",
            "`a/b` is not a folder here; for a model on the Hub pin",
        ),
        (
            "{data: consult, method: ifd, keep: 9, model: q}",
            "`q` is quantized; score with the model before its quantization",
        ),
        ("{data: consult, method: ifd, keep: 9, model: m, template: x}", "there is no template `x`"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_to_do(project, settings, said):
    project.model("m", architectures=["LlamaForCausalLM"])
    project.model("two", architectures=["BertForSequenceClassification"], id2label={"0": "a", "1": "b"})
    project.model("q", quantization_config={})
    assert said in refused(project, settings)


# What is chosen


def chosen(tmp_path, count, **settings):
    """Run the stage on `count` numbered rows; its metrics, the numbers kept, and the scores it wrote."""
    rows = [{"instruction": f"问{number}", "output": f"答{number}"} for number in range(count)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = Source(path=str(tmp_path / "data.jsonl"), format="alpaca")
    made = select.Config(model="m", data=[source], **settings)
    metrics = select.run(made, inputs(made, "m"), tmp_path)
    kept = rows_of(Source(path=str(tmp_path / "rows.jsonl"), format="messages"))
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    return metrics, [int(row["messages"][0]["content"][1:]) for row in kept], scores


@pytest.fixture
def given(monkeypatch):
    """Put results in the place of what a model would say."""

    def put(name, result):
        monkeypatch.setattr(choosing, name, lambda *_, **__: result)

    return put


def test_ifd_keeps_the_hardest_answers_that_the_question_helps_with(given, tmp_path):
    # By hand: 1/2, 3/2 (dropped), too long, 3/4, 2/2 = 1 (kept: only above 1 is dropped), 0/0 (no score).
    given(
        "answer_losses",
        ([1.0, 3.0, None, 1.5, 2.0, 0.0], [2.0, 2.0, None, 2.0, 2.0, 0.0], {2: "longer than `max_length`"}),
    )
    metrics, kept, scores = chosen(tmp_path, 6, method="ifd", keep=2)
    assert kept == [3, 4]
    assert [score["ifd"] for score in scores] == [0.5, 1.5, None, 0.75, 1.0, None]
    assert [score["why"] for score in scores] == [
        *("not among the best", "with an IFD above 1", "longer than `max_length`"),
        *(None, None, "without a score"),
    ]
    assert (metrics["rows"], metrics["kept"], sum(metrics["dropped"].values())) == (6, 2, 4)
    assert metrics["score"]["50%"] == pytest.approx(0.875)  # of 0.5, 0.75, 1, 1.5
    assert select.headline(metrics) == "2 of 6 rows kept, ifd 0.75 to 1"
    assert scores[3] | {"data": ""} == {
        **{"data": "", "row": 4, "ifd": 0.75, "loss_given_question": 1.5, "loss_alone": 2.0},
        **{"kept": True, "why": None},
    }


def test_a_share_is_taken_of_the_rows_that_are_left(given, tmp_path):
    given("answer_losses", ([1.0, 1.1, 1.2, 9.0, 9.0, 9.0, 1.3], [2.0] * 7, {}))
    assert chosen(tmp_path, 7, method="ifd", keep=0.5)[1] == [2, 6]


def test_of_equal_scores_the_first_rows_are_kept(given, tmp_path):
    given("answer_losses", ([1.0] * 4, [2.0] * 4, {}))
    assert chosen(tmp_path, 4, method="ifd", keep=2)[1] == [0, 1]


def test_when_nothing_is_left_the_stage_says_why(given, tmp_path):
    given("answer_losses", ([3.0, 3.0, None], [2.0, 2.0, None], {2: "longer than `max_length`"}))
    with pytest.raises(StageError, match=r"^no row of 3 is kept: 2 with an IFD above 1, 1 longer than `max_length`; "):
        chosen(tmp_path, 3, method="ifd", keep=2)


def test_quality_is_above_alpha(given, tmp_path):
    given("rewards", ([0.5, 0.0, -1.0, 2.0, math.nan], 3))
    metrics, kept, _ = chosen(tmp_path, 5, method="quality", scorer="s", above=0.0)
    assert (kept, metrics["cut"]) == ([0, 3], 3)
    assert chosen(tmp_path, 5, method="quality", scorer="s", above=-5.0, keep=3)[1] == [0, 1, 3]


def test_necessity_is_below_beta_and_keeps_the_rows_own_answers(given, tmp_path):
    given("own_answers", (["坏", "好", None, "坏"], {2: "longer than `max_length`"}))
    given("rewards", ([-2.0, 1.0, -1.0], 0))
    _, kept, scores = chosen(tmp_path, 4, method="necessity", scorer="s", below=0.0)
    assert kept == [0, 3]
    assert [score["answer"] for score in scores] == ["坏", "好", None, "坏"]
    assert [score["necessity"] for score in scores] == [-2.0, 1.0, None, -1.0]
    row = rows_of(Source(path=str(tmp_path / "rows.jsonl"), format="messages"))[0]
    assert row["messages"][-1]["content"] == "答0"
    assert chosen(tmp_path, 4, method="necessity", scorer="s", keep=1)[1] == [0]  # the worst


# Four points on a line. From 0 the farthest is 10, then 4 (4 from 0), then 1; from the others as far as that goes.
LINE = np.array([[0.0], [1.0], [10.0], [4.0]], dtype=np.float32)
ORDERS = {0: [0, 2, 3, 1], 1: [1, 2, 3, 0], 2: [2, 0, 3, 1], 3: [3, 2, 0, 1]}


def test_k_center_in_the_stage(given, tmp_path):
    given("embeddings", (LINE, 0))
    metrics, kept, scores = chosen(tmp_path, 4, method="k_center", keep=3, seed=1)
    order = ORDERS[random.Random(1).randrange(4)][:3]
    assert kept == sorted(order)
    assert {score["row"] - 1: score["place"] for score in scores if score["kept"]} == {
        index: place for place, index in enumerate(order, 1)
    }
    assert metrics["radius"] == 1.0  # 0 and 1 are 1 apart, and only one of them was chosen
    assert metrics["dropped"] == {"covered by the rows chosen": 1}


def test_k_center_stops_when_all_points_are_chosen(given, tmp_path):
    given("embeddings", (np.array([[1.0], [1.0], [2.0], [2.0]], dtype=np.float32), 0))
    metrics, kept, _ = chosen(tmp_path, 4, method="k_center", keep=4)
    assert (len(kept), metrics["dropped"], metrics["radius"]) == (2, {"at the same point as a row chosen": 2}, 0.0)


def test_car_joins_the_best_of_all_with_the_best_of_each_cluster(given, tmp_path):
    # 8 rows are ⌊√4⌋ = 2 clusters; the second, around 100, has the lowest scores and would be lost without them.
    given("embeddings", (np.array([[0.0], [1], [2], [100], [101], [102], [3], [4]], dtype=np.float32), 0))
    given("rewards", ([5.0, 9.0, 8.0, 1.0, 3.0, 2.0, 7.0, 6.0], 0))
    metrics, kept, scores = chosen(tmp_path, 8, method="car", scorer="s", keep=2)
    assert kept == [1, 2, 4]
    assert [score["cluster"] for score in scores] == [0, 0, 0, 1, 1, 1, 0, 0]
    assert (metrics["clusters"], metrics["dimensions"]) == (2, 1)
    assert chosen(tmp_path, 8, method="car", scorer="s", keep=2, per_cluster=2)[1] == [1, 2, 4, 5]
    assert chosen(tmp_path, 8, method="car", scorer="s", keep=0.25, per_cluster=0)[1] == [1, 2]


# The rows that it leaves


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
KINDS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "{{name}}\u2028"},
            {"role": "user", "content": " 问 "},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "答"},
        ],
        "tools": [TOOL],
    },
    "text": {"text": "\ufeff文 {{name}}\r\n\x0b"},
    "preference": {"instruction": "问", "system": "s", "chosen": "好", "rejected": "坏", "tools": [TOOL]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_read_back_exactly(given, tmp_path, kind):
    (tmp_path / "data.jsonl").write_text(json.dumps(KINDS[kind]) + "\n", encoding="utf-8")
    source = Source(path=str(tmp_path / "data.jsonl"), format=kind, fill={})
    given("embeddings", (np.ones((1, 1), dtype=np.float32), 0))
    made = select.Config(model="m", data=[source], method="k_center", keep=1)
    select.run(made, inputs(made, "m"), tmp_path)
    again = Source(path=str(tmp_path / "rows.jsonl"), format=select.format_of_rows(made), encoding="utf-8", fill={})
    assert rows_of(again) == rows_of(source)


def test_the_config_survives_its_way_to_the_worker(project):
    project.write("x.yaml", CHAIN)
    step = build_plan(load_config(Path("x.yaml")), Path("saves")).steps[2]
    assert select.Config.model_validate(step.entry.config.model_dump(mode="json")) == step.entry.config


MODS = (
    TOP
    + """\
model: m
stages:
  good:      {use: select, data: consult, method: quality, scorer: r, above: 0.0}
  seeds:     {use: select, data: $good, method: k_center, keep: 1000, embedder: e}
  sft_seeds: {use: sft, data: $seeds}
  necessary: {use: select, data: $good, method: necessity, scorer: r, below: 0.0}
  sft:       {model: m, data: [$seeds, $necessary]}
"""
)


def test_mods_as_its_three_steps(project):
    for folder in "me":
        project.model(folder)
    project.model("r", architectures=["BertForSequenceClassification"], id2label={"0": "reward"})
    steps = project.plan(MODS)
    asked = {name: step.inputs.model for name, step in steps.items()}
    assert asked == {
        **{"good": [], "seeds": [], "sft_seeds": ["m"], "sft": ["m"]},
        "necessary": steps["sft_seeds"].produces,
    }
    assert steps["sft"].inputs.rows == {
        f"${name}": str(steps[name].folder / "rows.jsonl") for name in ("seeds", "necessary")
    }
    trained = project.plan(MODS, "sft_seeds.trainer.learning_rate=1e-3")
    assert [name for name in steps if steps[name].fingerprint != trained[name].fingerprint] == [
        *("sft_seeds", "necessary", "sft"),
    ]
