"""Evaluation without a model: what a config may say, what gates say to a table, and figures of known rows."""

import json
import math

import planned
import pytest

from pipeline import cli
from pipeline.saves import artifact
from pipeline.saves.content import Hashes
from stages.measuring import gates, tasks
from stages.measuring import metrics as metrics_module
from stages.measuring.metrics import Measured, compare_models, figure_of, mcnemar, repetition, rouge

HELD = """\
  held: {path: held.jsonl, format: alpaca}
  notes: {path: notes.jsonl, format: text}
  pairs: {path: prefer.jsonl, format: preference}
"""
CHAIN = planned.CHAIN.replace("stages:\n", HELD + "stages:\n")  # what a test adds starts in line 19


@pytest.fixture
def project(project):
    project.write("held.jsonl", '{"instruction": "c", "output": "d"}\n')
    project.write("notes.jsonl", '{"text": "e"}\n')
    return project


# The config


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("{}", "19:3: stage `evaluate`: there is nothing to measure; name held-out `data`, `prompts`, or `tasks`"),
        ("{data: hold}", "19:20: stage `evaluate`: no data `hold` is declared; did you mean `held`?"),
        ("{data: [held, nots]}", "19:27: stage `evaluate`: no data `nots` is declared; did you mean `notes`?"),
        ("{data: held, compare: [stf]}", "19:36: stage `evaluate`: `stf` is no stage above that leaves a model; did "),
        ("{data: held, compare: [sft, sft]}", "19:41: stage `evaluate`: `sft` is here twice"),
        ("{data: held, compare: [base]}", "19:36: stage `evaluate`: `base` is the `model:` at the top, and there is n"),
        ("{data: held, compare: {sft: dpo}}", "19:35: stage `evaluate`: `compare` is a list of stages above, such as"),
        ("{data: held, compare: []}", "19:3: stage `evaluate` has no model to evaluate; set `model:` at the top, or"),
        (
            "{prompts: notes}",
            "19:23: stage `evaluate`: `notes` has format `text`; prompts are of `alpaca`, `prompt_com",
        ),
        ("{prompts: [a, 3]}", "19:23: stage `evaluate`: a prompt is `3`; it wants text"),
        (
            "{prompts: {held: 1}}",
            "19:23: stage `evaluate`: `prompts` is a name of declared data, or a list of questions",
        ),
        ("{data: held, generation: {temperature: 0.7}}", "19:26: stage `evaluate`: `temperature` is not used without"),
        (
            "{data: held, generation: {max_tokens: 7}}",
            "19:39: stage `evaluate` has no setting `max_tokens`; did you mea",
        ),
        (
            "{data: held, harness: {include_path: no}}",
            "19:50: stage `evaluate`: there is no folder `no`; it holds task",
        ),
        ("{data: held, model: $sft}", "19:26: stage `evaluate` has no setting `model`"),
    ],
)
def test_a_mistake_has_its_place(project, written, problem):
    code, shown = project.validate(CHAIN + f"  evaluate: {written}\n")
    assert code == 2
    assert problem in shown


@pytest.mark.parametrize(
    ("gate", "problem"),
    [
        ("{metric: perplexty, data: held, max: 3}", "there is no metric `perplexty`; did you mean `perplexity`?"),
        ("{metric: perplexity, data: helt, max: 3}", "nothing is measured on `helt`; did you mean `held`?"),
        ("{metric: perplexity, max: 3}", "`perplexity` is measured on `held` and `notes`; say which with `data:`"),
        ("{metric: bleu-4, data: notes, min: 3}", "`bleu-4` is not measured on `notes`, but on `held`"),
        (
            "{metric: reward_margin, min: 3, stage: spt}",
            "`spt` is not among the models that are compared; did you mean",
        ),
        (
            "{metric: rouge-l, max_decrease: 1, versus: mrge}",
            "`mrge` is not among the models that are compared; did you",
        ),
        (
            "{metric: bleu-4, versus: merge, stage: merge, max_increase: 1}",
            "`merge` is judged against itself; name ano",
        ),
        (
            "{metric: bleu-4, stage: sft, max_increase: 1}",
            "`sft` is the first model that is compared; name the other on",
        ),
        ("{metric: bleu-4}", "a gate needs a bound: `max_increase`, `max_decrease`, `min`, `max`"),
        ("{metric: bleu-4, min: 1, versus: sft}", "`versus` is for `max_increase` and `max_decrease`; add one of them"),
        ("{metric: bleu-4, max_increase: lots}", "`max_increase` is `lots`; it wants a percentage such as `6%`, or a"),
        ("{metric: bleu-4, minimum: 1}", "has no setting `minimum`; did you mean `min`?"),
    ],
)
def test_a_gate_that_cannot_work_is_found_while_planning(project, gate, problem):
    settings = "compare: [sft, merge, quantize], data: [held, notes, pairs], prompts: held"
    code, shown = project.validate(CHAIN + f"  evaluate: {{{settings}, gates: [\n    {gate}]}}\n")
    assert code == 2
    assert "x.yaml:20:" in shown
    assert problem in shown


def test_all_models_are_compared_unless_named_and_the_stage_below_starts_from_the_one_above(project):
    text = CHAIN.replace("  quantize:", "  evaluate: {data: held}\n  quantize:")
    steps = project.plan(text)
    folders = {name: step.produces for name, step in steps.items()}
    assert steps["evaluate"].inputs.compared == {name: folders[name] for name in ("init", "pt", "sft", "dpo", "merge")}
    assert steps["quantize"].inputs.model == folders["merge"]
    assert folders["evaluate"] == []
    top = project.model(template="{{ messages }}{{ eos_token }}").replace("stages:\n", HELD + "stages:\n")
    steps = project.plan(top + "  sft: {data: consult, lora: {r: 4}}\n  evaluate: {data: notes}\n")
    assert steps["evaluate"].inputs.compared == {"base": ["m"], "sft": steps["sft"].produces}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("sft.trainer.learning_rate=1e-3", True),
        ("evaluate.max_prompts=3", True),
        ("evaluate.compare=[merge, sft]", True),
        ("evaluate.gates=[{metric: perplexity, max: 9}]", False),
        ("pt.trainer={learning_rate: 1e-3}", True),
        ("quantize.bits=8", False),
    ],
)
def test_what_evaluates_again(project, change, again):
    text = CHAIN + "  evaluate: {compare: [sft, merge], data: held}\n"
    before, after = project.plan(text), project.plan(text, change)
    assert (before["evaluate"].fingerprint != after["evaluate"].fingerprint) == again


def test_a_task_of_ones_own_counts_with_its_data(project):
    project.write("tasks/exam.yaml", "task: exam\nmetric_list:\n  - metric: acc\n")
    project.write("tasks/exam.jsonl", "{}\n")
    text = CHAIN + "  evaluate: {tasks: [exam], harness: {include_path: tasks}, gates: [{metric: acc, min: 0.5}]}\n"
    before = project.plan(text)["evaluate"].fingerprint
    project.write("tasks/exam.jsonl", '{"question": 1}\n')
    assert project.plan(text)["evaluate"].fingerprint != before
    assert "no task `exma`; did you mean `exam`?" in project.validate(text.replace("[exam]", "[exma]"))[1]
    assert (
        "there is no metric `ac`; did you mean `acc`"
        in project.validate(text.replace("metric: acc,", "metric: ac,"))[1]
    )


def test_the_harness_knows_the_chinese_medical_tasks():
    pytest.importorskip("lm_eval")
    known = tasks.task_names(None)
    assert {"cmmlu_anatomy", "cmmlu_traditional_chinese_medicine", "ceval-valid_physician", "cmmlu"} <= known
    assert tasks.task_metrics("cmmlu_anatomy", None) == ("acc", "acc_norm")


def test_rows_that_were_trained_on_are_told(project):
    note = "note: `evaluate` measures on data `consult`, which `sft` reads too; its figures say little about new rows"
    assert note in project.validate(CHAIN + "  evaluate: {data: consult}\n")[1]
    assert "say little" not in project.validate(CHAIN + "  evaluate: {data: held}\n")[1]


# As a key of another stage


def test_a_stage_with_the_key_is_compared_with_what_it_starts_from(project):
    text = CHAIN.replace("    data: consult\n", "    data: consult\n    evaluate: held\n")
    text = text.replace("  merge:", "  merge: {evaluate: {data: [held, notes], prompts: [a], compare: [sft, merge]}}")
    text += "  hinge: {use: dpo, model: $sft, data: prefer, lora: {r: 4}, evaluate: [pairs]}\n"
    steps = project.plan(text)
    compared = {name: list(step.inputs.compared) for name, step in steps.items() if step.use == "evaluate"}
    assert compared == {
        "sft_evaluate": ["pt", "sft"],
        "merge_evaluate": ["sft", "merge"],
        "hinge_evaluate": ["sft", "hinge"],
    }
    names = list(steps)
    assert names[names.index("sft") + 1] == "sft_evaluate"
    assert steps["dpo"].inputs.model == steps["sft"].produces


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("hold", "16:19: stage `dpo_evaluate`: no data `hold` is declared; did you mean `held`?"),
        ("[held, nots]", "16:26: stage `dpo_evaluate`: no data `nots` is declared; did you mean `notes`?"),
        ("{data: held, gate: 3}", "16:32: stage `dpo_evaluate` has no setting `gate`; did you mean `gates`?"),
        (
            "true",
            "16:19: stage `dpo`: `evaluate` names held-out data, such as `evaluate: consult_held`, or has settings",
        ),
    ],
)
def test_a_mistake_in_the_key_has_its_place(project, written, problem):
    text = CHAIN.replace("  dpo: {", f"  dpo: {{evaluate: {written}, ")
    code, shown = project.validate(text)
    assert code == 2
    assert (problem in shown, shown.count("\n")) == (True, 1)
    assert "has no setting `evaluate`" in project.validate(CHAIN + "  evaluate: {data: held, evaluate: held}\n")[1]


# Gates


TABLE = {
    "models": ["sft", "merge", "quantize"],
    "figures": [
        {"metric": "perplexity", "data": "held", "model": "sft", "value": 20.0, "ci": None, "why": None},
        {"metric": "perplexity", "data": "held", "model": "merge", "value": 20.0, "ci": [19.0, 21.0], "why": None},
        {"metric": "perplexity", "data": "held", "model": "quantize", "value": 21.5, "ci": [20.0, 23.0], "why": None},
        {"metric": "bleu-4", "data": "held", "model": "quantize", "value": None, "ci": None, "why": "no reference"},
    ],
    "comparisons": [
        {"metric": "perplexity", "data": "held", "model": "quantize", "versus": "merge"}
        | {"as": "ratio", "change": 1.075, "ci": [1.05, 1.1], "n": 64}
    ],
}


@pytest.mark.parametrize(
    ("gate", "passed", "text"),
    [
        (
            {"max_increase": "6%"},
            False,
            "perplexity of `quantize` on `held` is 21.5 (95 % CI 20 to 23); `merge` has 20 (95 % CI 19 to 21): "
            "a change of +1.5 (+7.50%), at most 6% increase is allowed (paired, 64 rows: ratio 1.075, 95 % CI 1.05 to "
            "1.1)",
        ),
        ({"max_increase": "8%"}, True, "at most 8% increase"),
        ({"max_increase": 1.5}, True, "at most 1.5 increase"),
        ({"max_increase": 1}, False, "at most 1 increase"),
        ({"max_decrease": "1%"}, True, "at most 1% decrease"),
        (
            {"max_decrease": 1, "stage": "merge", "versus": "quantize"},
            False,
            "a change of -1.5 (-6.98%), at most 1 dec",
        ),
        ({"max": 21.5}, True, "at most 21.5 is allowed"),
        ({"max": 21}, False, "at most 21 is allowed"),
        ({"min": 22}, False, "at least 22 is wanted"),
        ({"metric": "bleu-4", "min": 0}, False, "bleu-4 of `quantize` on `held` could not be computed (no reference)"),
    ],
)
def test_what_a_gate_says(gate, passed, text):
    verdict = gates.judge_gate(gates.Gate(**{"metric": "perplexity", **gate}), TABLE)
    assert verdict.passed == passed
    assert text in verdict.text


GATED = CHAIN.replace(
    "  quantize:", "  evaluate: {data: held, gates: [{metric: perplexity, stage: merge, max: 15}]}\n  quantize:"
)


def test_a_closed_gate_shows_in_the_plan_and_stops_the_run(project, capsys):
    for step in list(project.plan(GATED).values())[:-1]:
        step.part.mkdir(parents=True)
        (step.part / "evaluation.json").write_text(json.dumps(TABLE))
        metrics = {"models": ["merge"], "figures": {"perplexity": {"held": {"merge": 20.0}}}}
        record = {"recipe": dict(step.recipe), "metrics": metrics, "seconds": 1.0, "started": 0.0}
        artifact.finish(step.part, step.folder, record, Hashes(None))
    said = "x.yaml:18:34: perplexity of `merge` on `held` is 20 (95 % CI 19 to 21); at most 15 is allowed"
    assert cli.main(["plan", "x.yaml"]) == 0
    assert f"note: a gate of `evaluate` failed, and `run` stops after it: {said}" in capsys.readouterr().out
    for _ in range(2):
        assert cli.main(["run", "x.yaml"]) == 3
        shown, table = capsys.readouterr()[::-1]
        assert "evaluate, all of it in saves/x/evaluate" in table
        assert shown.startswith("error: gate failed: `evaluate`; nothing after it was run:\n" + said)
        assert "`--ignore-gates`" in shown
    told = json.loads((project.folder / "saves/x/gates.json").read_text())
    assert (told["ignored"], [gate["passed"] for gate in told["gates"]]) == (False, [False])
    bound = "evaluate.gates=[{metric: perplexity, max: 99}]"
    assert cli.main(["run", "x.yaml", "--json", "--until", "evaluate", "--set", bound]) == 0


# Figures


def rows(*values, size=1.0):
    return Measured([(value, size) for value in values])


def test_perplexity_is_that_of_all_tokens_and_not_the_mean_of_rows():
    measured = Measured([(2.0, 1.0), (3.0, 9.0)])
    assert figure_of("perplexity", measured, 1)["value"] == pytest.approx(math.exp(0.5))
    assert figure_of("bits_per_byte", measured, 1)["value"] == pytest.approx(0.5 / math.log(2))


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        (Measured(why="no chat template"), "no chat template"),
        (Measured([None, None]), "no row has a value"),
        (rows(1.0, math.nan), "the model gives NaN or infinite logits"),
        (rows(800.0), "it is above e^700"),
    ],
)
def test_what_cannot_be_computed_says_why(measured, why):
    assert figure_of("perplexity", measured, 1) == pytest.approx(
        {"value": None, "ci": None, "n": pytest.approx(len([row for row in measured.rows if row])), "why": why}
    )
    found = compare_models("perplexity", rows(1.0), measured, 1)
    assert found["change"] is None
    assert found["why"]


def test_an_interval_covers_the_mean_as_often_as_it_says():
    import numpy as np

    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = figure_of("bleu-4", rows(*random.normal(5, 2, 60).tolist()), 7)["ci"]
        covered += low <= 5 <= high
    assert 180 <= covered <= 198  # 95 % of 200, give or take


def test_models_are_compared_on_the_same_rows():
    hard, easy = [3.0, 1.0, 2.0, 4.0] * 10, [2.9, 0.9, 1.9, 3.9] * 10
    found = compare_models("perplexity", rows(*easy), rows(*hard), 1)
    assert found["change"] == pytest.approx(math.exp(-0.1))
    assert found["ci"] == pytest.approx([math.exp(-0.1)] * 2)  # each row is 0.1 better, whichever rows are drawn
    assert (found["as"], found["better"], found["test"]) == ("ratio", 1, "paired bootstrap")
    assert compare_models("perplexity", rows(*hard), rows(*easy), 1)["better"] == 0
    noise = compare_models("bleu-4", rows(*[1.0, 2.0] * 10), rows(*[2.0, 1.0] * 10), 1)
    assert (noise["change"], noise["better"]) == (0.0, None)
    assert compare_models("bleu-4", rows(*easy), rows(*hard), 1)["better"] == 0  # more is better


def test_accuracies_are_compared_by_mcnemar():
    right = Measured([(1.0, 1.0)] * 9 + [(0.0, 1.0)])
    wrong = Measured([(0.0, 1.0)] * 9 + [(1.0, 1.0)])
    found = compare_models("acc", right, wrong, 1)
    assert found["p"] == pytest.approx(2 * (1 + 10) / 2**10)  # b = 9, c = 1
    assert (found["test"], found["better"]) == ("McNemar, exact", 1)
    assert compare_models("acc", right, right, 1)["p"] == 1.0


def test_mcnemar_is_the_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for first, second in ((0, 5), (3, 8), (40, 61), (7, 7)):
        pairs = [(True, False)] * first + [(False, True)] * second + [(True, True)] * 4
        assert mcnemar(pairs) == pytest.approx(stats.binomtest(first, first + second).pvalue)


def test_bleu_and_rouge_are_those_of_the_libraries():
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    pairs = [
        ("感冒了要多喝水，注意休息。", "感冒应多喝水、多休息。"),
        ("去看医生", "发热三天以上请去看医生，不要硬扛。"),
    ]
    for answer, reference in pairs:
        smoothing = SmoothingFunction().method3
        bleu = sentence_bleu([list(reference)], list(answer), smoothing_function=smoothing)
        scores = Rouge().get_scores(" ".join(jieba.cut(answer)), " ".join(jieba.cut(reference)))[0]
        assert metrics_module.bleu(answer, reference) == pytest.approx(100 * bleu, abs=1e-4)
        assert rouge(answer, reference) == pytest.approx(
            {name: 100 * score["f"] for name, score in scores.items()}, abs=1e-4
        )
    # By hand: 4 of 5 characters, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours, no brevity penalty.
    assert metrics_module.bleu("一二三四六", "一二三四五") == pytest.approx(
        100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-4
    )
    assert (metrics_module.bleu("", "一"), rouge("", "一")["rouge-l"]) == (0, 0)


@pytest.mark.parametrize(("ids", "expected"), [([1, 2, 3], None), ([1, 2, 3, 4], 0.0), ([1] * 8, 0.8)])
def test_repetition_is_the_share_of_repeated_fours(ids, expected):
    assert repetition(ids) == expected
