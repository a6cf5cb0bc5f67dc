"""`pipeline push`, against a small Hub on the loopback address."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from fake_hub import READER, TOKENIZER
from planned import CHAIN, TOP

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.plan.fingerprint import installed_versions
from pipeline.plan.placing import build_plan
from pipeline.saves import artifact
from pipeline.saves.links import link
from stages.runtime.hashes import HASHES, Hashes

ROOT = Path(__file__).parents[2]
NAME = "org/mine"
COMMIT = "c" * 40
CARD = "---\nlibrary_name: transformers\n---\n\n# x: merge\n\nA model.\n"
MERGED = {"README.md": CARD, "config.json": '{"model_type": "llama"}', "model.safetensors": "weights"}
SFT = f"model: org/base@{COMMIT}\n{TOP}stages:\n  sft: {{data: consult, lora: {{r: 8}}}}\n"
SENT = "; `push` sends no file again that has arrived"


@pytest.fixture
def push(project):
    """Push a stage; returns the exit code and what was printed."""

    def run(*words, stage="merge", to=NAME):
        code = main(["push", "x.yaml", "--to", to, "--stage", stage, *words])
        shown = project.capsys.readouterr()
        return code, shown.out + shown.err

    return run


def finish(project, text, **content):
    """Leave what a run of stages leaves: for each stage its files, its record and its link."""
    project.write("x.yaml", text)
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    assert planned.problems == []
    for step in planned.steps:
        if step.name in content:
            for name, file in content[step.name].items():
                project.write(f"{step.part}/{name}", file)
            record = {
                "stage": step.name,
                "recipe": dict(step.recipe),
                "versions": installed_versions(step.use),
                "started": 0.0,
                "metrics": {},
            }
            artifact.finish(step.part, step.folder, record, Hashes(None))
            (step.folder / "log.txt").write_text("a line", encoding="utf-8")
            link(step.folder, step.link)
    return {step.name: step.folder for step in planned.steps}


@pytest.fixture
def merged(project):
    """The folder of a finished `merge` stage."""
    whole = {name: {"model.safetensors": "x"} for name in ("init", "pt", "sft", "dpo")}
    return finish(project, CHAIN, **whole, merge=MERGED)["merge"]


def test_without_yes_files_are_listed_and_nothing_is_uploaded(hub, push, merged):
    assert push() == (
        0,
        "card        x: merge\n"
        "repository  org/mine (will be made, public)\n"
        "  new       57 bytes  README.md\n"
        "  new       23 bytes  config.json\n"
        "  new        7 bytes  model.safetensors\n"
        "nothing was uploaded (3 files, 87 bytes); `--yes` uploads\n",
    )
    assert hub.repositories == {}
    assert {method for method, _, _ in hub.requests} == {"GET"}


def test_the_files_arrive_as_they_are_and_a_second_push_sends_nothing(hub, push, merged):
    code, shown = push("--yes", "--private")
    sha = hub.repositories[NAME].branches["main"]
    assert (code, shown.splitlines()[-1]) == (0, f"uploaded 3 files, 87 bytes: {hub.address}/{NAME}/commit/{sha}")
    there = hub.repositories[NAME].files()
    record = json.loads((merged / "record.json").read_text(encoding="utf-8"))
    assert {name: sha256(there[name]).hexdigest() for name in MERGED} == {
        name: record["files"][name]["sha256"] for name in MERGED
    }
    assert there.keys() == {*MERGED, ".gitattributes"}  # neither the record nor the log
    assert hub.repositories[NAME].private
    hub.requests.clear()
    code, shown = push("--yes")
    assert (code, shown.splitlines()[1:]) == (
        0,
        [
            "repository  org/mine (exists, private)",
            "  same      57 bytes  README.md",
            "  same      23 bytes  config.json",
            "  same       7 bytes  model.safetensors",
            "nothing to upload: org/mine has all of it",
        ],
    )
    assert {method for method, _, _ in hub.requests} == {"GET"}
    assert hub.repositories[NAME].branches["main"] == sha


def test_only_what_changed_is_sent_and_what_a_program_would_load_with_it_is_deleted(hub, push, merged, project):
    old = {"README.md": CARD, "config.json": "{}", "model.safetensors": "weights", "notes.txt": "mine"}
    for name, content in {**old, "adapter_config.json": "{}", "onnx/config.json": "{}"}.items():
        project.write(f"old/{name}", content)
    hub.add(NAME, project.folder / "old")
    code, shown = push("--yes", "--json")
    assert code == 0
    found = json.loads(shown)
    assert {file["path"]: file["state"] for file in found["files"]} == {
        "README.md": "same",
        "config.json": "changed",
        "model.safetensors": "same",
    }
    assert found["removed"] == ["adapter_config.json"]
    assert found["commit"].startswith(f"{hub.address}/{NAME}/commit/")
    there = hub.repositories[NAME].files()
    assert there.keys() == {*MERGED, "notes.txt", "onnx/config.json"}
    assert there["config.json"] == b'{"model_type": "llama"}'
    assert hub.asked("PUT") == []


def test_a_branch_is_made_and_the_main_one_stays(hub, push, merged, project):
    project.write("old/notes.txt", "mine")
    first = hub.add(NAME, project.folder / "old")
    code, shown = push("--yes", "--revision", "v2")
    assert code == 0
    assert shown.splitlines()[1] == "repository  org/mine (exists, public, branch `v2` (new))"
    assert hub.repositories[NAME].branches["main"] == first
    assert hub.repositories[NAME].files("v2").keys() == {*MERGED, "notes.txt"}
    assert push("--revision", "v2")[1].splitlines()[-1] == "nothing to upload: org/mine has all of it"


def test_an_adapter_names_its_base_on_the_hub_and_no_path_of_this_machine(hub, push, project):
    local = "/home/someone/.cache/huggingface/hub/models--org--base/snapshots/" + COMMIT
    config = {"peft_type": "LORA", "base_model_name_or_path": local, "revision": None, "r": 8}
    files = {"adapter_config.json": json.dumps(config), "adapter_model.safetensors": "lora"}
    finish(project, SFT, sft=files)
    assert push("--yes", stage="sft")[0] == 0
    there = hub.repositories[NAME].files()
    assert json.loads(there["adapter_config.json"]) == {
        **config,
        "base_model_name_or_path": "org/base",
        "revision": COMMIT,
    }
    assert there["adapter_model.safetensors"] == b"lora"
    card = there["README.md"].decode()
    for line in ("base_model: org/base", "base_model_relation: adapter", "library_name: peft", "# x: sft"):
        assert f"{line}\n" in card
    assert not [name for name, content in there.items() if b"/home/someone" in content]


def test_other_paths_in_json_files_become_their_last_part(hub, push, project):
    whole = {name: {"model.safetensors": "x"} for name in ("init", "pt", "sft", "dpo")}
    config = {"model_type": "llama", "_name_or_path": "/home/someone/models/mine", "a": ["/", "a/b", 1]}
    finish(project, CHAIN, **whole, merge={**MERGED, "config.json": json.dumps(config)})
    assert push("--yes")[0] == 0
    there = json.loads(hub.repositories[NAME].files()["config.json"])
    assert there == {**config, "_name_or_path": "mine"}
    assert push("--yes")[1].splitlines()[-1] == "nothing to upload: org/mine has all of it"


def test_an_adapter_on_a_base_that_nobody_can_load_is_refused(hub, push, merged):
    assert push("--yes", stage="sft") == (
        2,
        "x.yaml: stage `sft` is an adapter on other adapters, which nobody can load from the Hub; "
        "push `--stage merge`\n",
    )
    assert hub.requests == []


def test_an_adapter_on_a_folder_is_refused(hub, push, project):
    project.model()
    project.write("m/tokenizer.json", json.dumps(TOKENIZER))
    text = SFT.replace(f"org/base@{COMMIT}", "m").replace("r: 8", "r: 8, target_modules: [q_proj]")
    finish(project, text, sft={"adapter_config.json": "{}"})
    assert push("--yes", stage="sft") == (
        2,
        "x.yaml: stage `sft` is an adapter on `m`, which nobody can load from the Hub; "
        "add a `merge` stage below it, and push that one\n",
    )


def test_a_stage_that_is_not_finished_is_refused(hub, push, project):
    finish(project, CHAIN, init={"model.safetensors": "x"})
    assert push("--yes") == (
        2,
        "x.yaml: stage `merge` is not finished (has not run yet); `pipeline run x.yaml --until merge` makes its "
        "model\n",
    )
    assert hub.requests == []


def test_a_file_that_rotted_on_the_disk_is_not_uploaded(hub, push, merged, project):
    """The content differs, size and times do not: a plan trusts its hashes then, and a push reads every byte."""
    file = merged / "model.safetensors"
    file.write_bytes(b"WEIGHTS")
    stat = file.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256(b"weights").hexdigest()]
    project.write(f"saves/{HASHES}", json.dumps({f"{stat.st_dev}:{stat.st_ino}": stamp}))
    assert push("--yes") == (
        1,
        f"error: stage `merge`: `{merged}` is damaged (`model.safetensors` has changed); nothing was uploaded; "
        "`pipeline run x.yaml --until merge` makes it again\n",
    )
    assert push("--yes")[0] == 2  # the plan knows of it now
    assert hub.requests == []


def test_a_secret_in_a_file_is_refused(hub, push, merged, monkeypatch):
    monkeypatch.setenv("MY_SECRET", 'model_type": "llama')
    assert push("--yes") == (
        1,
        f"error: stage `merge`: `{merged}/config.json` holds the value of the environment variable MY_SECRET; take "
        "it out of the data or the settings, or `unset MY_SECRET` if it is not a secret, and run again\n",
    )
    assert hub.requests == []


def test_the_token_comes_from_the_environment_alone(hub, push, merged, project, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    project.write("no-token", "hf_a-token-that-may-write")  # where `hf auth login` keeps it
    assert push("--yes") == (
        2,
        "HF_TOKEN is not set; `push` needs a token with the right to write, in that variable alone\n",
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (READER, "(the account of HF_TOKEN has no right to do this); use a token with that right" + SENT),
        (
            "hf_an-old-token",
            "(HF_TOKEN is not a valid token); make a token in the settings of the Hub, and set HF_TOKEN to it",
        ),
    ],
)
def test_a_token_without_the_right_is_one_sentence(hub, push, merged, project, monkeypatch, token, text):
    project.write("old/notes.txt", "mine")
    hub.add(NAME, project.folder / "old")
    monkeypatch.setenv("HF_TOKEN", token)
    code, shown = push("--yes")
    assert (code, shown.splitlines()[-1]) == (1, f"error: the Hub does not take `{NAME}` {text}")
    assert "Traceback" not in shown
    assert hub.repositories[NAME].files().keys() == {"notes.txt"}


def test_no_connection_is_one_sentence(hub, push, merged, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, shown = push("--yes")
    assert (code, shown) == (
        1,
        f"error: the Hub does not take `{NAME}` ([Errno 111] Connection refused); check name, commit, access and "
        "network\n",
    )


def test_private_is_not_silently_ignored(hub, push, merged, project):
    project.write("old/notes.txt", "mine")
    hub.add(NAME, project.folder / "old")
    assert push("--yes", "--private") == (
        2,
        f"--private: `{NAME}` exists and is public; make it private in its settings, or leave it out\n",
    )


@pytest.mark.parametrize(
    ("to", "words", "text"),
    [
        ("mine", [], "--to mine: is not a repository; write it as `org/name`, and a branch as `--revision BRANCH`"),
        (
            "org/mine@v2",
            [],
            "--to org/mine@v2: is not a repository; write it as `org/name`, and a branch as `--revision BRANCH`",
        ),
        (
            NAME,
            ["--revision", COMMIT],
            f"--revision {COMMIT}: is a commit, and files are added to a branch; name a branch",
        ),
    ],
)
def test_what_names_no_repository_or_branch_is_refused(hub, push, to, words, text):
    assert push(*words, to=to) == (2, f"{text}\n")


def test_at_a_terminal_it_asks(hub, push, merged, monkeypatch):
    answers = iter(["", "no", "y"])
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda text: next(answers))
    for _ in range(2):
        assert push()[1].splitlines()[-1] == "nothing was uploaded (3 files, 87 bytes); `--yes` uploads"
    assert hub.repositories == {}
    assert push()[1].splitlines()[-1].startswith("uploaded 3 files, 87 bytes: ")


def test_a_push_that_broke_off_goes_on_where_it_was(hub, push, merged):
    """The weights arrived, the commit did not: they are not sent a second time."""
    content = (merged / "model.safetensors").read_bytes()
    hub.objects[sha256(content).hexdigest()] = content
    assert push("--yes")[0] == 0
    assert hub.asked("PUT") == []
    assert hub.repositories[NAME].files()["model.safetensors"] == content


def test_the_folder_is_held_while_it_is_uploaded(hub, push, merged, monkeypatch):
    """`gc` and `run --fresh` leave a folder in place that someone reads."""
    from pipeline.errors import Busy
    from pipeline.saves.locks import unread

    seen = []

    def agree(_):
        with pytest.raises(Busy), unread(merged.resolve(), "merge"):
            seen.append("removed")
        return "y"

    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", agree)
    assert push()[0] == 0
    assert seen == []


def test_the_program_itself_prints_the_list_alone(hub, push, merged, project):
    """A process of its own, with HF_ENDPOINT as a user sets it."""
    words = [sys.executable, "-m", "pipeline.cli", "push", "x.yaml", "--stage", "merge", "--to", NAME, "--yes"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    sha = hub.repositories[NAME].branches["main"]
    assert done.stdout.splitlines()[-1] == f"uploaded 3 files, 87 bytes: {hub.address}/{NAME}/commit/{sha}"


LOAD = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

commit, adapter, merged = sys.argv[1:]
ids = torch.tensor([[5, 6, 7, 8]])
with torch.no_grad():
    base = AutoModelForCausalLM.from_pretrained("org/base", revision=commit)(ids).logits
    adapter = AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits
    whole = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
torch.testing.assert_close(adapter, whole, atol=1e-5, rtol=1e-5)
print("the same as before" if torch.allclose(base, whole, atol=1e-3) else "trained, and the same")
"""


@pytest.mark.train
def test_a_run_from_the_hub_and_its_adapter_pushed_give_the_merged_model(hub, push, project, tiny):
    """A model is downloaded, trained and merged; others load the adapter from the Hub and get the same logits."""
    commit = hub.add("org/base", tiny("llama"))
    trainer = "{max_steps: 2, learning_rate: 1e-2, max_length: 64, save_strategy: 'no'}"
    stages = f"stages:\n  sft: {{data: consult, lora: {{r: 4}}, trainer: {trainer}}}\n  merge:\n"
    project.write("x.yaml", f"model: org/base@{commit}\n{TOP}{stages}")
    assert main(["run", "x.yaml"]) == 0
    assert main(["run", "x.yaml"]) == 0  # nothing is to be done, and the weights are there
    assert len(hub.asked("GET", "org/base/resolve/.*safetensors")) == 1
    project.capsys.readouterr()
    assert push("--yes", stage="sft")[0] == 0
    assert push("--yes", stage="merge", to="org/merged")[0] == 0
    words = [sys.executable, "-c", LOAD, commit, NAME, "org/merged"]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }  # the run was made in this process: it is offline
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["trained, and the same"]), done.stderr


def test_a_folder_is_named_by_its_config_and_stage(project, merged, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    plain = tmp_path / "plain"
    plain.mkdir()
    said = {
        merged: "is a folder; name the config that made it, with `--stage merge`",
        plain: "is a folder that no stage made; `push` uploads a stage of a config, and `hf upload ORG/NAME` any "
        "folder",
    }
    for folder, text in said.items():
        assert main(["push", str(folder), "--to", NAME]) == 2
        assert project.capsys.readouterr().err == f"{folder}: {text}\n"
