"""Evaluation without a model: what a config may say, where the stage stands in a plan, and a gate that stops a run."""

import json

import planned
import pytest

from pipeline import cli
from pipeline.saves import artifact
from stages import evaluate
from stages.data.source import Reading, Source
from stages.model.inputs import Inputs
from stages.runtime.hashes import Hashes

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


def test_rows_that_were_trained_on_are_told(project):
    note = "note: `evaluate` measures on data `consult`, which `sft` reads too; its figures say little about new rows"
    assert note in project.validate(CHAIN + "  evaluate: {data: consult}\n")[1]
    assert "say little" not in project.validate(CHAIN + "  evaluate: {data: held}\n")[1]


def test_rows_that_cleaning_keeps_out_of_training_are_not_trained_on(project):
    text = CHAIN + "  evaluate: {data: held}\n"
    cleaned = "data.consult.clean=[{contamination: {against: [held]}}]"
    code, shown = project.validate(text, "--set", cleaned)
    assert code == 0
    assert "say little" not in shown


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
    "models": ["merge"],
    "figures": [
        {"metric": "perplexity", "data": "held", "model": "merge", "value": 20.0, "ci": [19.0, 21.0], "why": None}
    ],
    "comparisons": [],
}
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


def test_no_more_rows_are_read_for_prompts_than_are_asked(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"instruction": "{n}", "output": "a"}}\n' for n in range(500)), encoding="utf-8")
    read = []
    good = Reading.good

    def counted(self, rows):
        return good(self, (row for row in rows if read.append(row) is None))

    monkeypatch.setattr(Reading, "good", counted)
    source = Source(path=str(path), format="alpaca")
    config = evaluate.Config(compare=["m"], prompts={"x": source}, max_prompts=3)
    assert [prompt.reference for prompt in evaluate._prompts(config, Inputs())] == ["a"] * 3
    assert len(read) == 4
    read.clear()
    assert len(evaluate._prompts(config.model_copy(update={"max_prompts": None}), Inputs())) == 500
