"""What `plan` and `status` say of stages that are done, stopped, running or gone, and what `run` says last."""

import fcntl
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from planned import INIT, pretend
from rich.console import Console

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.plan.placing import build_plan
from pipeline.plan.step import begin
from pipeline.saves.links import claim
from pipeline.saves.locks import held_file
from pipeline.views import tables
from stages.training.checkpoint import seal

CONFIG = INIT + "  pt: {data: books, lora: {r: 8}}\n  merge:\n"
FIGURES = {"init": {"parameters": 659200, "vocab_size": 2048}, "pt": {"eval_loss_before": 3.5, "eval_loss": 2.25}}


@pytest.fixture
def steps(project):
    project.write("x.yaml", CONFIG)
    claim(Path("saves/x"), Path("x.yaml"))
    return placed()


def placed(*assignments):
    return planned(*assignments)[1]


def planned(*assignments):
    plan = build_plan(load_config(Path("x.yaml"), assignments), Path("saves"))
    return plan, {step.name: step for step in plan.steps}


def start(name, *assignments, reached=None):
    """Leave what a killed run of this stage leaves, with a checkpoint at step `reached` of 12."""
    plan, steps = planned(*assignments)
    step = steps[name]
    step.part.mkdir(parents=True)
    (step.part / "spec.json").write_text(json.dumps(begin(step, plan)), encoding="utf-8")
    if reached:
        checkpoint = step.part / "checkpoints" / f"checkpoint-{reached}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text('{"max_steps": 12}', encoding="utf-8")
        seal(checkpoint)
    return step


def call(project, *words):
    code = main(list(words))
    shown = project.capsys.readouterr()
    return code, shown.out, shown.err


def reasons(project, *words):
    return {
        step["stage"]: step["why"] for step in json.loads(call(project, "plan", "x.yaml", "--json", *words)[1])["steps"]
    }


def test_a_stage_that_was_killed_before_its_first_checkpoint_has_run(project, steps):
    start("pt")
    assert reasons(project) == {
        "init": "has not run yet",
        "pt": "did not finish, and left no checkpoint to go on from",
        "merge": "has not run yet",
    }


def test_a_folder_that_was_deleted_is_gone(project, steps):
    pretend(steps["init"])
    pretend(steps["pt"])
    shutil.rmtree(steps["pt"].folder)
    assert reasons(project)["pt"] == f"its folder `{steps['pt'].folder}` is gone"
    other = reasons(project, "--set", "pt.lora.r=4")["pt"]
    assert other == f"the folder of its last run, `{steps['pt'].folder}`, is gone"


def test_a_stage_that_runs_now_is_said_to(project, steps):
    step = start("pt", reached=5)
    assert reasons(project)["pt"] == "goes on at step 5 of 12"
    lock = held_file(step.part).with_suffix(".runner")
    lock.parent.mkdir(exist_ok=True)
    with open(lock, "w", encoding="utf-8") as file:
        file.write("pid 12 on a-host since 2026-11-22 10:00:00\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert reasons(project)["pt"] == "is being run by another process (pid 12 on a-host since 2026-11-22 10:00:00)"


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_plan_that_run_would_refuse_shows_its_table_and_ends_with_exit_code_2(project, steps, words):
    start("pt", reached=5)
    code, out, err = call(project, "plan", "x.yaml", "--set", "pt.lora.r=4", *words)
    assert code == 2
    assert "refused" in out
    assert err.startswith("x.yaml: stage `pt` was stopped at step 5 of 12, and now `lora.r` 8 → 4")
    assert "start over with `--fresh pt`" in err


def test_status_has_the_order_of_the_pipeline_key_figures_and_the_options_of_a_trial(project, steps):
    for name in ("pt", "init"):
        pretend(steps[name], use=name, metrics=FIGURES[name])
    start("pt", "pt.lora.r=4")
    code, out, err = call(project, "status", "--json")
    assert (code, err) == (0, "")
    assert [(row["stage"], row["state"], row["figure"]) for row in json.loads(out)] == [
        ("init", "done", "0.66M parameters, 2048 tokens"),
        ("pt", "done", "held-out loss 3.500 → 2.250"),
        ("pt", "stopped before its first checkpoint, with --set pt.lora.r", ""),
    ]
    assert "key figure" in call(project, "status")[1]


def printed(words, monkeypatch, called):
    monkeypatch.setattr(sys, "argv", [str(called)])
    out = Console(file=io.StringIO(), width=60)
    tables.print_next(out, words, has_model=True)
    return out.file.getvalue()


def test_a_run_ends_with_the_next_commands_as_they_are_typed(project, monkeypatch):
    Path("bin").mkdir()
    program = Path("bin/pipeline")
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    assert printed(["my x.yaml", "--saves", "out"], monkeypatch, program.resolve()) == (
        "\nnext:\n"
        "  bin/pipeline chat 'my x.yaml' --saves out    # talk to the model\n"
        "  bin/pipeline report 'my x.yaml' --saves out  # figures, curves and answers as one page\n"
        "  bin/pipeline serve 'my x.yaml' --saves out   # an API, and a page for people\n"
    )
    monkeypatch.setenv("PATH", str(program.parent.resolve()))
    assert "  pipeline chat x.yaml    # talk" in printed(["x.yaml"], monkeypatch, program.resolve())
