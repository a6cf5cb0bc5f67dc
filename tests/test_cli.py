"""Words on a command line in, an exit code and text out; and none of it waits for torch."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cli import main
from pipeline.config import checker
from pipeline.config.checker import load_config
from pipeline.plan import step as step_module
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.placing import build_plan
from pipeline.plan.step import Plan
from pipeline.saves import artifact
from pipeline.saves import links as links_module
from pipeline.saves.content import Hashes
from pipeline.saves.links import BELONGS
from pipeline.saves.locks import held_file
from pipeline.views import survey
from stages.training.checkpoint import seal

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
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    return {step.name: step for step in planned.steps}


def pretend(step):
    """Leave what a run of this step leaves."""
    step.part.mkdir(parents=True)
    (step.part / "model.safetensors").write_bytes(b"weights")
    record = {"recipe": dict(step.recipe), "versions": installed_versions(step.stage.use), "started": 0.0}
    artifact.finish(step.part, step.folder, record, Hashes(None))
    links_module.link(step.folder, step.link)


def test_no_command_that_only_looks_imports_a_training_library(project):
    code = f"""
import json, sys
from pipeline.cli import main

found = {{}}
alone = [[name, "x.yaml"] for name in ("validate", "plan", "report")]
for words in (["--help"], ["status"], ["status", "x.yaml", "--json"], *alone):
    try:
        code = main(words)
    except SystemExit as leave:
        code = leave.code
    found[" ".join(words)] = [code, [name for name in {HEAVY} if name in sys.modules]]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    commands = ["--help", "status", "status x.yaml --json", "validate x.yaml", "plan x.yaml", "report x.yaml"]
    assert found == {command: [0, []] for command in commands}


def test_help_names_every_command(project):
    code, out, err = project("--help")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "] == [
        "run",
        "plan",
        "validate",
        "data",
        "status",
        "report",
        "diff",
        "gc",
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
    assert [step["stage"] for step in steps] == [stage.name for stage in load_config(path).stages]


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
    begin(steps["merge"])
    code, out, err = project("status", "--json")
    rows = [(row["config"], row["stage"], row["state"], row["folder"]) for row in json.loads(out)]
    assert (code, err) == (0, "")
    assert rows == [
        ("x", "init", "done", str(steps["init"].folder.resolve())),
        ("x", "pt", "damaged: `model.safetensors` is missing", str(steps["pt"].folder.resolve())),
        ("x", "merge", "stopped before its first checkpoint", str(steps["merge"].part)),
    ]
    shutil.rmtree(steps["pt"].folder)
    code, out, err = project("status", "x.yaml", "--json")
    assert [row["state"] for row in json.loads(out)] == ["done", "gone", "stopped before its first checkpoint"]
    code, out, err = project("status")
    assert [line.split("  ")[:2] for line in squeezed(out) if "  " in line] == [  # a long folder goes on below
        ["config", "stage"],
        ["x", "init"],
        ["x", "pt"],
        ["x", "merge"],
    ]


def begin(step, *, of="x", reached=None):
    """Leave what a run of this step leaves that was killed, with a checkpoint at step `reached` of 12."""
    step.part.mkdir(parents=True)
    spec = {**step_module.begin(step, Plan(load_config(Path("x.yaml")), Path("saves"), Hashes(None))), "of": of}
    (step.part / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    if reached:
        checkpoint = step.part / "checkpoints" / f"checkpoint-{reached}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text('{"max_steps": 12}', encoding="utf-8")
        seal(checkpoint)


@pytest.fixture
def held():
    """Hold the locks of a step as a run does."""
    files = []

    def hold(step, name="runner", kind=fcntl.LOCK_EX):
        path = held_file(step.part)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_suffix(f".{name}"), "w", encoding="utf-8")  # noqa: SIM115
        file.write("pid 12 on a-host since 2026-11-22 10:00:00\n")
        file.flush()
        fcntl.flock(file, kind)
        files.append(file)

    yield hold
    for file in files:
        file.close()


def test_status_tells_running_from_stopped(project, held):
    step = folders()["pt"]
    begin(step, reached=5)

    def state():
        return json.loads(project("status", "--json")[1])[0]["state"]

    assert state() == "stopped, goes on at step 5 of 12"
    held(step)
    assert state() == "running, pid 12 on a-host since 2026-11-22 10:00:00"
    events = ['{"kind": "total", "steps": 12, "step": 5}', '{"kind": "step", "step": 7}', '{"kind": "step", "st']
    (step.part / "events.jsonl").write_text("\n".join(events), encoding="utf-8")
    assert state() == "running, step 7 of 12, pid 12 on a-host since 2026-11-22 10:00:00"


def test_looking_at_a_running_stage_does_not_take_its_lock(project, held):
    step = folders()["pt"]
    begin(step)
    held(step, "worker", fcntl.LOCK_SH)
    assert json.loads(project("status", "--json")[1])[0]["state"].startswith("running, ")
    held(step)  # would wait for ever if `status` had kept it


def gc(project, *words):
    """What `gc` did to each folder, by its name."""
    code, out, err = project("gc", "--json", *words)
    assert (code, err) == (0, "")
    return {Path(row["folder"]).name: (row["why"], row["removed"]) for row in json.loads(out)}


@pytest.fixture
def ran(project):
    """The project after a run of its config."""
    for step in folders().values():
        pretend(step)
    links = Path("saves/x")
    (links / BELONGS).write_text('{"config": "../../x.yaml"}', encoding="utf-8")
    return folders()


def test_gc_leaves_what_a_config_refers_to(project, ran):
    assert gc(project, "--yes") == {}
    assert project("gc") == (0, "everything in saves is in use\n", "")


def test_gc_removes_what_an_edited_config_left_behind(project, ran):
    Path("x.yaml").write_text(CONFIG.replace("r: 8", "r: 4"), encoding="utf-8")
    for name, step in folders().items():
        if name != "init":
            pretend(step)
    why = "no config refers to it"
    expected = {ran[name].folder.name: why for name in ("merge", "pt")}
    assert gc(project) == {name: (why, False) for name, why in expected.items()}
    assert ran["pt"].folder.is_dir()
    assert gc(project, "--yes") == {name: (why, True) for name, why in expected.items()}
    assert not ran["pt"].folder.exists()
    assert all(step.state == "done" for step in folders().values())


def test_gc_removes_all_of_a_config_that_is_gone(project, ran):
    Path("x.yaml").unlink()
    found = gc(project, "--yes")
    assert found.pop("x") == ("links of `x.yaml`, which is gone", True)
    assert found == {step.folder.name: ("no config refers to it", True) for step in ran.values()}
    assert not [path for path in Path("saves").iterdir() if not path.name.startswith(".")]


def test_gc_keeps_what_a_folder_it_keeps_stands_on(project, ran):
    """An adapter is nothing without its base, also when no link points to the base any more."""
    (Path("saves/x") / "init").unlink()
    (Path("saves/x") / "merge").unlink()
    record = json.loads((ran["pt"].folder / "record.json").read_text(encoding="utf-8"))
    record["model"] = ran["pt"].produces
    (ran["pt"].folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert set(gc(project, "--yes")) == {ran["merge"].folder.name}
    assert ran["init"].folder.is_dir()


def test_gc_keeps_unfinished_work_until_it_is_given_up(project):
    steps = folders()
    begin(steps["pt"], reached=5)
    begin(steps["merge"], of=None)
    assert gc(project, "--yes") == {steps["merge"].part.name: ("unfinished, and no config goes on with it", True)}
    assert steps["pt"].part.is_dir()


def test_gc_never_touches_a_running_stage_nor_what_it_starts_from(project, held):
    steps = folders()
    pretend(steps["init"])
    Path("saves/x/init").unlink()
    begin(steps["pt"], of=None)
    held(steps["pt"])
    assert gc(project, "--yes") == {}
    assert steps["pt"].part.is_dir()
    assert steps["init"].folder.is_dir()


def test_gc_does_not_remove_what_a_run_has_just_taken(project, held):
    step = folders()["pt"]
    begin(step, of=None)
    (leftover,) = survey.leftovers(Path("saves"))
    held(step)
    assert not survey.remove(leftover)
    assert step.part.is_dir()


def test_gc_removes_what_was_set_aside(project, ran):
    ran["pt"].folder.rename(ran["pt"].folder.with_name(f"{ran['pt'].folder.name}.old-1"))
    found = gc(project, "--yes")
    assert found == {
        f"{ran['pt'].folder.name}.old-1": ("set aside: it was damaged, or made again with `--fresh`", True)
    }


def test_gc_knows_a_config_through_a_link_to_saves_and_after_saves_moved(project, ran, tmp_path):
    for link in Path("saves/x").iterdir():
        if link.is_symlink():
            assert link.exists()
    (Path("saves/x") / BELONGS).write_text(
        json.dumps({"config": "../../x.yaml", "absolute": str(tmp_path / "x.yaml")}), encoding="utf-8"
    )
    Path("deep/er").mkdir(parents=True)
    Path("saves").rename("deep/er/kept")
    assert gc(project, "--yes", "--saves", "deep/er/kept") == {}
    Path("link").symlink_to(Path("deep/er/kept").resolve())
    assert gc(project, "--yes", "--saves", "link") == {}
    assert (Path("deep/er/kept") / ran["pt"].folder.name).is_dir()


def test_gc_keeps_the_rows_that_an_unfinished_stage_reads(project, ran):
    """They were selected by settings that no config has any more."""
    rows = ran["init"].folder.with_name("select-0123456789ab")
    rows.mkdir()
    begin(ran["merge"], of="x")
    spec = ran["merge"].part / "spec.json"
    spec.write_text(json.dumps({**json.loads(spec.read_text()), "stands_on": [rows.name]}), encoding="utf-8")
    assert gc(project, "--yes") == {}
    shutil.rmtree(ran["merge"].part)
    assert set(gc(project, "--yes")) == {rows.name}


def test_gc_takes_the_end_of_input_for_a_no(project, ran, monkeypatch):
    def ended(question):
        raise EOFError

    Path("x.yaml").unlink()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", ended)
    code, out, err = project("gc")
    assert (code, err) == (0, "")
    assert out.endswith("nothing was removed\n")


def test_gc_leaves_alone_what_it_does_not_know(project, ran):
    (Path("saves") / "notes").mkdir()
    (Path("saves") / "sft-mine").mkdir()
    assert gc(project, "--yes") == {}


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("", False), ("no", False)])
def test_gc_asks_first(project, ran, monkeypatch, answer, removed):
    Path("x.yaml").unlink()
    asked = []
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    code, out, err = project("gc")
    assert (code, err, len(asked)) == (0, "", 1)
    assert asked[0].startswith("remove these 4, ")
    assert asked[0].endswith("? [y/N] ")
    assert ran["pt"].folder.exists() != removed
    assert ("removed 4 of 4, " in out) == removed


def test_gc_removes_nothing_when_nobody_can_be_asked(project, ran):
    Path("x.yaml").unlink()
    code, out, err = project("gc")
    assert (code, err) == (0, "")
    assert out.endswith("`--yes` removes them without asking\nnothing was removed\n")
    assert ran["pt"].folder.is_dir()


def test_an_interrupted_command_is_exit_code_75(project, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(checker, "load_config", interrupted)
    assert project("plan", "x.yaml") == (75, "", "interrupted\n")
