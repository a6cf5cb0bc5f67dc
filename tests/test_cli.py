"""Words on a command line in, an exit code and text out; and none of it waits for torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import artifact, config, plan
from pipeline.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.relative_to(ROOT) for path in ROOT.glob("configs/*.yaml"))
HEAVY = ["torch", "transformers", "trl", "peft", "datasets", "gptqmodel", "accelerate", "optimum", "pandas"]
CONFIG = """\
data:
  books: {path: books.jsonl, format: text}
stages:
  init: {architecture: bloom, data: books}
  pt: {data: books, lora: {r: 8}}
  merge:
"""


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    """A folder with `x.yaml` and its data; returns a way to call: exit code, output, error output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "x.yaml").write_text(CONFIG, encoding="utf-8")

    def call(*words):
        try:
            code = main(words)
        except SystemExit as leave:  # argparse
            code = leave.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def folders():
    planned = plan.build(config.load(Path("x.yaml")), Path("saves"))
    return {step.name: step for step in planned.steps}


def pretend(step):
    """Leave what a run of this step leaves."""
    step.part.mkdir(parents=True)
    (step.part / "model.safetensors").write_bytes(b"weights")
    record = {"recipe": dict(step.recipe), "versions": plan.versions(step.stage.use), "started": 0.0}
    artifact.finish(step.part, step.folder, record)
    artifact.link(step.folder, step.link)


def test_no_command_that_only_looks_imports_a_training_library(project):
    code = f"""
import json, sys
from pipeline.cli import main

found = {{}}
for words in (["--help"], ["status"], ["status", "x.yaml", "--json"], ["validate", "x.yaml"], ["plan", "x.yaml"]):
    try:
        code = main(words)
    except SystemExit as leave:
        code = leave.code
    found[" ".join(words)] = [code, [name for name in {HEAVY} if name in sys.modules]]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    commands = ["--help", "status", "status x.yaml --json", "validate x.yaml", "plan x.yaml"]
    assert found == {command: [0, []] for command in commands}


def test_help_names_every_command(project):
    code, out, err = project("--help")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "] == [
        "run",
        "plan",
        "validate",
        "status",
    ]


@pytest.mark.parametrize("words", [[], ["trian", "x.yaml"], ["plan"], ["plan", "x.yaml", "--sets", "a=1"]])
def test_a_wrong_command_line_is_exit_code_2(project, words):
    code, out, err = project(*words)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pipeline")


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_that_is_shipped_validates_and_plans(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    saves = ["--saves", str(tmp_path)]
    assert main(["validate", str(path), *saves]) == 0
    assert capsys.readouterr().out.endswith("; no problem found\n")
    assert main(["plan", str(path), *saves, "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["stage"] for step in steps] == [stage.name for stage in config.load(path).stages]


def test_there_are_configs():
    assert Path("configs/tiny.yaml") in CONFIGS


def test_validate_says_what_was_found(project):
    found = "x.yaml: 3 stages (init → pt → merge); books 1 rows; no problem found\n"
    assert project("validate", "x.yaml") == (0, found, "")
    found = "x.yaml: 2 stages (init → pt); books 1 rows; no problem found\n"
    assert project("validate", "x.yaml", "--until", "pt") == (0, found, "")


def test_validate_writes_json(project):
    code, out, err = project("validate", "x.yaml", "--json")
    assert (code, json.loads(out), err) == (
        0,
        {"stages": ["init", "pt", "merge"], "rows": {"books": 1}, "notes": []},
        "",
    )


def test_plan_shows_each_stage_what_will_happen_why_and_where(project):
    steps = folders()
    pretend(steps["init"])
    code, out, err = project("plan", "x.yaml")
    assert (code, err) == (0, "")
    assert [line.split("  ") for line in squeezed(out)] == [
        ["stage", "plan", "why", "folder"],
        ["init", "done", "nothing it depends on has changed", str(steps["init"].folder)],
        ["pt", "will run", "has not run yet", str(steps["pt"].folder)],
        ["merge", "will run", "has not run yet", str(steps["merge"].folder)],
    ]


def squeezed(table):
    """The lines of a table with two spaces between its columns."""
    return [re.sub(" {2,}", "  ", line.strip()) for line in table.splitlines()]


def test_plan_writes_json(project):
    steps = folders()
    code, out, err = project("plan", "x.yaml", "--json", "--until", "pt")
    found = json.loads(out)
    assert (code, err, found["rows"], found["notes"]) == (0, "", {"books": 1}, [])
    assert found["steps"] == [
        {
            "stage": name,
            "use": name,
            "state": "run",
            "why": "has not run yet",
            "folder": str(steps[name].folder),
            "fingerprint": steps[name].fingerprint,
            "recipe": dict(steps[name].recipe),
            "inputs": dict(steps[name].inputs),
        }
        for name in ("init", "pt")
    ]
    assert found["steps"][1]["inputs"] == {"model": steps["init"].fingerprint}


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x.yaml", "--until", "mrege"], "--until mrege: there is no such stage; did you mean `merge`?\n"),
        (
            ["x.yaml", "--until", "zzz"],
            "--until zzz: there is no such stage; there is `init`, `merge`, `pt`\n",
        ),
        (["y.yaml"], "y.yaml: cannot be read (No such file or directory); there is `x.yaml`\n"),
        (["."], ".: cannot be read (Is a directory); there is `x.yaml`\n"),
        (["x.yaml", "--set", "pt"], "--set pt: write it as `--set key.path=value`\n"),
        (
            ["x.yaml", "--set", "pt.data=bookz", "--set", "pt.lora.ranks=8"],
            "--set pt.data: stage `pt`: no data `bookz` is declared; did you mean `books`?\n"
            "--set pt.lora.ranks: stage `pt`: LoraConfig has no setting `ranks`\n"
            "2 problems; nothing was run\n",
        ),
        (
            ["x.yaml", "--saves", "books.jsonl"],
            "books.jsonl: cannot be written; choose another folder with `--saves DIR`\n",
        ),
    ],
)
def test_a_mistake_ends_every_command_with_exit_code_2_and_no_traceback(project, command, words, expected):
    assert project(command, *words) == (2, "", expected)


def test_a_folder_without_yaml_files_offers_none(project, tmp_path):
    expected = "no/x.yaml: cannot be read (No such file or directory)\n"
    assert project("plan", "no/x.yaml") == (2, "", expected)


@pytest.mark.parametrize("saves", ["saves", "no/such/folder"])
def test_status_of_nothing_says_how_to_begin(project, saves):
    expected = f"nothing in {saves} yet; `pipeline run CONFIG` fills it\n"
    assert project("status", "--saves", saves) == (0, expected, "")
    assert project("status", "--saves", saves, "--json") == (0, "[]\n", "")


def test_status_shows_what_is_done_damaged_and_unfinished(project):
    steps = folders()
    for name in ("init", "pt"):
        pretend(steps[name])
    (steps["pt"].folder / "model.safetensors").unlink()
    steps["merge"].part.mkdir()
    code, out, err = project("status", "--json")
    rows = [(row["config"], row["stage"], row["state"], row["folder"]) for row in json.loads(out)]
    assert (code, err) == (0, "")
    assert rows == [
        ("x", "init", "done", str(steps["init"].folder.resolve())),
        ("x", "pt", "damaged or gone", str(steps["pt"].folder.resolve())),
        ("", "merge", "unfinished", str(steps["merge"].part)),
    ]
    code, out, err = project("status", "x.yaml", "--json")
    assert [row["stage"] for row in json.loads(out)] == ["init", "pt"]
    code, out, err = project("status")
    assert [line.split("  ")[0] for line in squeezed(out)] == ["config", "x", "x", "merge"]


def test_an_interrupted_command_is_exit_code_75(project, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", interrupted)
    assert project("plan", "x.yaml") == (75, "", "interrupted\n")
