"""Every stage of a run reports under one name, and what the user has set stays."""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from planned import CHAIN

from pipeline.config.checker import load_config
from pipeline.plan.placing import build_plan
from pipeline.plan.step import begin
from pipeline.run import tracking

OUT = Path("saves/sft-0123456789ab.part")
VARIABLES = {
    "WANDB_PROJECT": "x",
    "WANDB_RUN_GROUP": "x",
    "MLFLOW_EXPERIMENT_NAME": "x",
    "SWANLAB_PROJECT": "x",
    "TRACKIO_PROJECT": "x",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Nothing set, and nothing left set."""
    for name in (*VARIABLES, "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def specs(project):
    project.write("x.yaml", CHAIN)
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    return {step.name: begin(step, planned) for step in planned.steps}


def test_all_stages_of_a_run_have_one_name(project, specs):
    for name in ("pt", "sft", "dpo"):
        trainer = tracking.group(specs[name], OUT)["trainer"]
        assert (trainer["run_name"], trainer["project"]) == (f"x/{name}", "x")
        assert {variable: os.environ[variable] for variable in VARIABLES} == VARIABLES
    folder = project.folder / f"saves/x/tensorboard/pt-{specs['pt']['fingerprint'][:12]}"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(folder)
    assert tracking.group(specs["merge"], OUT) == specs["merge"]["config"]


def test_what_the_user_has_set_stays(specs, monkeypatch):
    for name in (*VARIABLES, "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "mine")
    specs["sft"]["config"]["trainer"]["run_name"] = "first try"
    trainer = tracking.group(specs["sft"], OUT)["trainer"]
    assert trainer == {"learning_rate": 5e-5, "logging_steps": 10, "run_name": "first try", "project": "mine"}
    assert {os.environ[name] for name in (*VARIABLES, "TENSORBOARD_LOGGING_DIR")} == {"mine"}


def tracker(name, **ends):
    return SimpleNamespace(__name__=name, **ends)


@pytest.mark.parametrize("report_to", ["wandb", ["tensorboard", "wandb"], "all"])
@pytest.mark.parametrize("code", [0, 75])
def test_a_tracker_that_is_used_ends_its_run(report_to, code, monkeypatch):
    ended = []
    monkeypatch.setitem(sys.modules, "wandb", tracker("wandb", finish=lambda exit_code: ended.append(exit_code)))
    tracking.finish({"config": {"trainer": {"report_to": report_to}}}, code)
    assert ended == [code]


def test_a_tracker_that_fails_or_hangs_costs_no_stage(monkeypatch, capsys):
    def lost(**_):
        raise ConnectionError("no network")

    hung, began = threading.Event(), threading.Event()
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    monkeypatch.setitem(sys.modules, "wandb", tracker("wandb", finish=lost))
    monkeypatch.setitem(sys.modules, "swanlab", tracker("swanlab", finish=lambda: (began.set(), hung.wait())))
    tracking.finish({"config": {"trainer": {"report_to": ["wandb", "swanlab"]}}}, 0)
    assert began.is_set()
    assert "ConnectionError: no network" in capsys.readouterr().err
    hung.set()


def test_a_tracker_that_is_only_installed_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", tracker("mlflow"))
    for trainer in ({}, {"report_to": "none"}, {"report_to": []}, {"report_to": ["wandb"]}):
        tracking.finish({"config": {"trainer": trainer}}, 0)
    tracking.finish({"config": {"shard_size": "2GB"}}, 0)
