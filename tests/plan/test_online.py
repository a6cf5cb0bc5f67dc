"""Models on the Hub in a plan and in a run, against a small Hub on the loopback address."""

from pathlib import Path

import pytest
from fake_hub import FakeHub
from planned import TOP

from pipeline.config.checker import load_config
from pipeline.plan.placing import build_plan

NAME = "org/model"
SMALL = {"config.json", "tokenizer.json", "tokenizer_config.json"}
SFT = "  sft: {data: consult, lora: {r: 8, target_modules: [q_proj]}}\n"
PLAIN = "\n\nThe error"  # nothing that a user sees has it: no traceback


@pytest.fixture
def hub(project, monkeypatch):
    with FakeHub().running() as hub:
        hub.use(monkeypatch, project.folder)
        yield hub


@pytest.fixture
def commit(project, hub):
    """The commit of a small model on the Hub, whose folder is not on this machine."""
    project.model()
    return hub.add(NAME, project.folder / "m")


def config(commit, stages=SFT, name=NAME):
    return f"model: {name}@{commit}\n{TOP}stages:\n{stages}"


def build(project, text, **settings):
    project.write("x.yaml", text)
    return build_plan(load_config(Path("x.yaml")), Path("saves"), **settings)


def weights_fetched(hub):
    """The requests for a whole file of weights."""
    return [span for _, span in hub.asked("GET", r"resolve/.*\.safetensors") if span is None]


def test_without_online_a_plan_asks_the_hub_for_nothing(project, hub, commit):
    planned = build(project, config(commit))
    assert planned.notes[0] == (
        f"`{NAME}@{commit}` is not on this machine; `run` fetches it, until then it is unchecked"
    )
    assert (planned.problems, hub.requests) == ([], [])


def test_online_checks_the_model_and_fetches_no_weights(project, hub, commit):
    text = config(commit, SFT.replace("q_proj", "query_key_value"))
    code, shown = project.validate(text)
    assert code == 0
    code, shown = project.validate(text, "--online")
    assert code == 2
    assert "`query_key_value`" in shown
    assert "q_proj" in shown
    cache = project.folder / "hub-cache"
    assert {path.name for path in cache.rglob("snapshots/*/*")} == SMALL
    assert weights_fetched(hub) == []
    planned = build(project, config(commit), online=True)
    assert planned.problems == []
    assert planned.notes[0] == (
        f"`{NAME}@{commit}` is not on this machine; its config, tokenizer and the shapes of its weights are checked, "
        "and `run` fetches 64 bytes of weights"
    )
