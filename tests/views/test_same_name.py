"""Two configs of one name, and two models of one name: `diff` and `status` do not take one for the other."""

from pathlib import Path

from planned import pretend

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.plan.placing import build_plan
from pipeline.saves.links import claim


def run(config, saves):
    """Leave what a run leaves."""
    plan = build_plan(load_config(Path(config)), Path(saves))
    assert plan.problems == []
    claim(Path(saves) / plan.pipeline.name, Path(config))
    for step in plan.steps:
        pretend(step, inputs=dict(step.identities), metrics={})


def shown(project, *words):
    code = main(list(words))
    out = project.capsys.readouterr()
    return code, out.out, out.err


def test_a_base_model_that_differs_in_one_bit_is_a_difference(project):
    text = project.model("one") + "  sft: {data: consult, lora: {r: 2}}\n"
    project.write("a.yaml", text)
    project.model("other")
    weights = bytearray(Path("other/model.safetensors").read_bytes())
    weights[-1] ^= 1
    Path("other/model.safetensors").write_bytes(weights)
    project.write("b.yaml", text.replace("model: one", "model: other"))
    run("a.yaml", "saves")
    run("b.yaml", "saves")
    code, out, _ = shown(project, "diff", "a.yaml", "b.yaml")
    assert code == 0
    assert "settings: 1 differs\n" in out
    assert "sft    model  folder:" in out
    assert "settings: none differ\n" in shown(project, "diff", "a.yaml", "a")[1]


def test_a_config_in_another_folder_is_another_config(project):
    text = project.model("m") + "  sft: {data: consult, lora: {r: 2}}\n"
    project.write("g.yaml", text)
    project.write("other/g.yaml", text)
    run("g.yaml", "saves")
    problem = (
        "other/g.yaml: `saves/g` holds the run of `g.yaml`, a config of the same name; run it into a folder of its own "
        "with `--saves DIR`\n"
    )
    assert shown(project, "diff", "g.yaml", "other/g.yaml") == (2, "", problem)
    assert shown(project, "status", "other/g.yaml") == (2, "", problem)
    assert shown(project, "status", "g.yaml")[0] == 0


def test_a_folder_of_the_user_called_like_a_run_is_not_taken_for_it(project):
    project.write("g.yaml", project.model("m") + "  sft: {data: consult, lora: {r: 2}}\n")
    project.write("g/notes.txt", "")
    run("g.yaml", "saves")
    assert shown(project, "diff", "g", "saves/g")[0] == 0
