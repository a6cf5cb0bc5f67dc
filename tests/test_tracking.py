"""Every stage of a run reports under one name, and what the user has set stays."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from planned import CHAIN

from pipeline import config, plan, tracking

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
    planned = plan.build(config.load(Path("x.yaml")), Path("saves"))
    return {step.name: plan.begin(step, planned) for step in planned.steps}


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


@pytest.mark.parametrize("report_to", ["wandb", ["tensorboard", "wandb"], "all"])
def test_a_tracker_that_is_used_ends_its_run_and_may_fail(report_to, monkeypatch, capsys):
    ended = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: ended.append("wandb")))
    tracking.finish({"config": {"trainer": {"report_to": report_to}}})
    assert ended == ["wandb"]

    def lost():
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lost))
    tracking.finish({"config": {"trainer": {"report_to": report_to}}})
    assert "ConnectionError: no network" in capsys.readouterr().err


def test_a_tracker_that_is_only_installed_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace())
    for trainer in ({}, {"report_to": "none"}, {"report_to": []}, {"report_to": ["wandb"]}):
        tracking.finish({"config": {"trainer": trainer}})
    tracking.finish({"config": {"shard_size": "2GB"}})
