"""The runner without training: locks as NFS has them, files that a finished run leaves alone, attempts, secrets."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from planned import CHAIN, pretend

from pipeline import secret
from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.errors import Busy, StageFailed
from pipeline.plan.placing import build_plan
from pipeline.run import rehearsal
from pipeline.run.process import Events, Stop, follow
from pipeline.run.rehearsal import Rehearsals
from pipeline.run.worker import _alone, _hold
from pipeline.saves.locks import held, locked
from stages.chat.template import template_text
from stages.model.device import VISIBLE
from stages.runtime.events import earlier_attempts, emit

TABLE = {
    "schema": 1,
    "models": ["sft", "merge"],
    "rows": {"held": 1},
    "prompts": {},
    "settings": {},
    "bootstrap": {"resamples": 1, "level": 0.95},
    "figures": [
        {"metric": "perplexity", "data": "held", "model": name, "lower_is_better": True, "value": 9.0, "ci": None}
        | {"n": 1, "why": None}
        for name in ("sft", "merge")
    ],
    "comparisons": [],
}
GATED = (
    CHAIN.partition("  quantize:")[0]
    + """\
  evaluate: {data: held, compare: [sft, merge], gates: [{metric: perplexity, max: 10}]}
"""
)


@pytest.fixture
def done(project):
    """A config with a gate, and everything in it finished."""
    project.write("held.jsonl", '{"text": "c"}\n')
    text = GATED.replace("stages:", "  held: {path: held.jsonl, format: text}\nstages:")
    for name in project.plan(text):
        step = project.plan(text)[name]
        metrics = {"models": ["sft", "merge"], "figures": {"perplexity": {"held": {"sft": 9.0, "merge": 9.0}}}}
        metrics |= {"parameters": 1, "vocab_size": 1, "steps": 1, "adapters": 1}
        pretend(step, seconds=1.0, metrics=metrics)
        if name == "evaluate":
            (step.folder / "evaluation.json").write_text(json.dumps(TABLE), encoding="utf-8")
    return text


def stamps():
    return {str(path): path.lstat().st_mtime_ns for path in Path("saves").rglob("*")}


def test_a_finished_run_with_gates_changes_no_file(project, done):
    assert main(["run", "x.yaml"]) == 0
    assert json.loads(Path("saves/x/gates.json").read_text(encoding="utf-8"))["gates"][0]["passed"]
    before = stamps()
    assert main(["run", "x.yaml"]) == 0
    assert stamps() == before
    assert main(["run", "x.yaml", "--ignore-gates"]) == 0
    assert stamps() != before  # what the file says has changed


def test_the_verdicts_of_gates_that_are_gone_go_too(project, done):
    assert main(["run", "x.yaml"]) == 0
    assert Path("saves/x/gates.json").is_file()
    assert main(["run", "x.yaml", "--until", "init"]) == 0
    assert not Path("saves/x/gates.json").exists()


def test_a_finished_run_with_gates_in_two_stages_changes_no_file(project, done):
    step = project.plan(done + "  second: {use: evaluate, data: held, gates: [{metric: perplexity, max: 10}]}\n")[
        "second"
    ]
    pretend(step, seconds=1.0, metrics={"models": [], "figures": {}})
    (step.folder / "evaluation.json").write_text(json.dumps(TABLE), encoding="utf-8")
    assert main(["run", "x.yaml"]) == 0
    before = stamps()
    assert main(["run", "x.yaml"]) == 0
    assert stamps() == before
    assert len(json.loads(Path("saves/x/gates.json").read_text(encoding="utf-8"))["gates"]) > 1


SETS = """
import pathlib
from pipeline.run import process
process.PRELOAD.clear()
if __name__ == "__main__":
    text = "import pathlib; pathlib.Path('order').write_text(str({f'layers.{n}.q_proj' for n in range(30)}))"
    process.fork(pathlib.Path("log"), exec, text).join()
"""


def test_a_set_has_the_same_order_in_the_stages_of_every_run(tmp_path):
    """PEFT writes the set of target modules as a list into adapter_config.json, whose sha256 is in the record."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    found = []
    for _ in range(2):
        words = [sys.executable, "-c", SETS]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append((tmp_path / "order").read_text())
        (tmp_path / "order").unlink()
    assert found[0] == found[1]


def test_verdicts_that_a_kill_cut_inside_of_a_character_are_written_again(project, done):
    project.write("医疗/x.yaml", done)  # its path is in every verdict
    assert main(["run", "医疗/x.yaml"]) == 0
    file = Path("saves/x/gates.json")
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index("医".encode()) + 1])
    assert main(["run", "医疗/x.yaml"]) == 0
    assert file.read_bytes() == whole


def test_a_closed_gate_shows_the_evaluations_up_to_it_and_not_what_is_left_of_those_below(project, done, capsys):
    text = done.replace("max: 10", "max: 1") + "  second: {use: evaluate, data: held, compare: [sft]}\n"
    step = project.plan(text)["second"]
    pretend(step, seconds=1.0, metrics={})
    (step.folder / "model.safetensors").unlink()  # it is damaged, and its figures are gone
    assert main(["run", "x.yaml"]) == 3
    shown = capsys.readouterr()
    assert shown.err.startswith("error: gate failed: `evaluate`; nothing after it was run:\n")
    assert "evaluate, all of it in saves/x/evaluate" in shown.out
    assert "second, all of it" not in shown.out


# Locks


@pytest.fixture
def nfs(monkeypatch):
    """flock as Linux does it on NFS: a lock on bytes, which needs a file that is open for reading and writing."""
    monkeypatch.setattr(fcntl, "flock", fcntl.lockf)


def test_locks_work_where_they_are_locks_on_bytes(nfs, tmp_path):
    part = tmp_path / "sft-0123456789ab.part"
    with locked(part, "sft"):
        file = _hold(part)
        assert held(part) is None  # this process itself holds them: byte-range locks belong to a process
        file.close()
    code = "import sys; from pathlib import Path; from pipeline.saves.locks import held; print(held(Path(sys.argv[1])))"
    patched = f"import fcntl; fcntl.flock = fcntl.lockf; {code}"
    with locked(part, "sft"):
        seen = subprocess.run([sys.executable, "-c", patched, str(part)], capture_output=True, text=True, check=True)
    assert seen.stdout.startswith(f"pid {os.getpid()} on ")


def test_a_stage_that_is_held_is_not_taken(tmp_path):
    part = tmp_path / "sft-0123456789ab.part"
    code = """
import sys, time
from pathlib import Path
from pipeline.saves.locks import locked
with locked(Path(sys.argv[1]), "sft"):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code, str(part)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(Busy, match=f"^stage `sft` is being run by another process \\(pid {other.pid} on "),
        locked(part, "sft"),
    ):
        pass
    other.kill()
    other.wait()
    with locked(part, "sft"):
        assert held(part) is not None


def test_another_user_sees_who_holds_a_stage(tmp_path):
    """Who may read the folder and not write to it."""
    code = """
import os, sys
from pathlib import Path
from pipeline.saves import locks
real = open
def refusing(file, mode="r", **more):
    if "+" in mode:
        raise PermissionError(13, "Permission denied", str(file))
    return real(file, mode, **more)
locks.open, os.access = refusing, lambda path, mode: mode != os.W_OK
print(locks.held(Path(sys.argv[1])))
"""
    part = tmp_path / "sft-0123456789ab.part"
    seen = []
    with locked(part, "sft"):
        seen.append(subprocess.check_output([sys.executable, "-c", code, str(part)], text=True))
    seen.append(subprocess.check_output([sys.executable, "-c", code, str(part)], text=True))
    assert seen[0].startswith(f"pid {os.getpid()} on ")
    assert seen[1] == "None\n"


# Rehearsals


def test_runs_that_rehearse_at_the_same_time_leave_each_other_alone(project, monkeypatch):
    base = project.model()
    project.write("x.yaml", f"{base}  pt: {{data: books}}\n  sft: {{data: consult}}\n")
    places = []

    def follow(step, view, stop, out, start):
        assert held(step.part) is not None
        places.append(out.name)
        if len(places) == 1:
            rehearse()  # a run of the same config: this one is at work on the stage
            rehearse("sft.trainer.learning_rate=1e-3")
        assert (out / "spec.json").is_file()

    def rehearse(*assignments):
        planned = build_plan(load_config(Path("x.yaml"), assignments), Path("saves"))
        Rehearsals(planned, SimpleNamespace(event=lambda *_: None), stop=None).below(planned.steps[0])

    Path("saves").mkdir()
    monkeypatch.setattr(rehearsal, "follow", follow)
    rehearse()
    assert len(set(places)) == len(places) == 2
    assert not list(Path("saves").glob("*.rehearsal"))


def test_what_a_failed_rehearsal_left_is_removed_by_gc_and_not_while_it_is_at_work(project):
    sft = project.plan()["sft"]
    folder = Path(f"{sft.folder}.rehearsal")
    folder.mkdir(parents=True)
    with locked(sft.part, "sft"):
        assert main(["gc", "--yes"]) == 0
        assert folder.exists()
    assert main(["gc", "--yes"]) == 0
    assert not folder.exists()


# Processes


def test_a_stage_ends_when_its_progress_cannot_be_shown(tmp_path):
    """As in `pipeline run x.yaml | head`: nobody would finish its work, and the runner would wait for it."""
    child = SimpleNamespace(
        pid=1, alive=True, is_alive=lambda: child.alive, wait=lambda seconds: emit(tmp_path, "step")
    )
    child.kill = lambda: vars(child).update(alive=False)
    pipe = os.pipe()
    os.close(pipe[0])
    view = SimpleNamespace(event=lambda step, event: os.write(pipe[1], b"x"))
    with pytest.raises(BrokenPipeError):
        follow(None, view, Stop(), tmp_path, lambda: child)
    assert not child.alive


@pytest.mark.parametrize(("made", "way"), [([], ""), (["checkpoints"], " to go on from its last checkpoint")])
def test_a_stage_that_died_without_a_checkpoint_is_not_said_to_have_one(tmp_path, made, way):
    for name in made:
        (tmp_path / name).mkdir()
    child = SimpleNamespace(pid=1, is_alive=lambda: False, exit_code=lambda: -11)
    with pytest.raises(StageFailed) as error:
        follow(SimpleNamespace(name="sft"), SimpleNamespace(event=print), Stop(), tmp_path, lambda: child)
    assert str(error.value) == (
        "stage `sft` was ended by signal 11 SIGSEGV (a crash in native code); "
        f"its log is {tmp_path}/log.txt; run again{way}"
    )


@pytest.mark.parametrize(
    ("given", "seen"), [({}, "0"), ({"CUDA": "2,3"}, "2"), ({"CUDA": ""}, ""), ({"HIP": "1,2"}, "1")]
)
@pytest.mark.parametrize("use", ["pt", "sft", "dpo", "kto", "reward"])
def test_a_training_stage_in_one_process_sees_the_first_gpu_that_it_may_use(monkeypatch, use, given, seen):
    assert visible(monkeypatch, use, given) == dict.fromkeys(given or ["CUDA"], seen)


@pytest.mark.parametrize("given", [{}, {"CUDA": "2,3"}, {"HIP": "1,2"}])
@pytest.mark.parametrize("use", ["evaluate", "quantize", "merge", "select"])
def test_other_stages_see_all_gpus_that_they_may_use(monkeypatch, use, given):
    assert visible(monkeypatch, use, given) == given


def visible(monkeypatch, use, given):
    for name in VISIBLE:
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
    _alone(use)
    return {name.partition("_")[0]: os.environ[name] for name in VISIBLE if name in os.environ}


def test_secrets_are_masked_in_what_a_stage_or_its_rehearsal_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "canary-five")

    def start():
        (tmp_path / "log.txt").write_text("canary-five", encoding="utf-8")
        emit(tmp_path, "error", text="no canary-five", traceback=None)
        return SimpleNamespace(is_alive=lambda: False, exit_code=lambda: 1)

    with pytest.raises(StageFailed, match=r"^stage `sft`: no <MY_SECRET>"):
        follow(SimpleNamespace(name="sft"), SimpleNamespace(event=lambda *_: None), Stop(), tmp_path, start)
    assert not [path for path in tmp_path.iterdir() if b"canary" in path.read_bytes()]


def test_a_library_that_cannot_be_imported_is_told(tmp_path):
    code = """
import sys
from pathlib import Path
from pipeline.errors import StageFailed
from pipeline.run import process
process.PRELOAD[:], process.has_gpu = ["broken"], lambda: False
try:
    process.fork(Path(sys.argv[1]), print)
except StageFailed as error:
    print(error)
"""
    (tmp_path / "broken.py").write_text("raise OSError('libcudart.so: cannot open')", encoding="utf-8")
    paths = {"PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))}
    command = [sys.executable, "-c", code, str(tmp_path / "log.txt")]
    told = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths}, check=True).stdout
    assert told == f"the training libraries cannot be imported; {tmp_path}/log.txt ends with the reason\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("OSError: libcudart.so: cannot open\n")


# Attempts


def test_events_of_earlier_attempts_are_history(tmp_path):
    for kind in ("start", "step", "interrupted"):
        emit(tmp_path, kind, memory={"host": 7, "gpu": None} if kind == "interrupted" else None)
    events = Events(tmp_path / "events.jsonl")
    assert (events.new(), events.last) == ([], {})
    emit(tmp_path, "start")
    emit(tmp_path, "done", memory={"host": 5, "gpu": None})
    assert [event["kind"] for event in events.new()] == ["start", "done"]


def test_attempts_add_up(tmp_path):
    lines = [
        {"kind": "start", "time": 100.0},
        {"kind": "log", "time": 130.0},
        {"kind": "interrupted", "time": 131.0, "memory": {"host": 9, "gpu": None}},
        {"kind": "start", "time": 1000.0},
        {"kind": "step", "time": 1007.5},  # killed: it says nothing of its memory
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    before = earlier_attempts(tmp_path)
    assert (before.count, before.began, before.seconds) == (2, 100.0, 38.5)
    assert before.most_memory({"host": 5, "gpu": 3}) == {"host": 9, "gpu": 3}
    assert earlier_attempts(tmp_path / "none").most_memory({"host": 5, "gpu": None}) == {"host": 5, "gpu": None}


# Secrets


def test_a_longer_secret_is_masked_before_one_that_it_begins_with(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "canary-12")
    monkeypatch.setenv("B_TOKEN", "canary-12345")
    assert secret.mask("x canary-12345 y canary-12") == "x <B_TOKEN> y <A_TOKEN>"


@pytest.mark.parametrize("value", ["<|im_end|>", "</assistant>", "[END_OF_TURN]"])
def test_a_token_of_a_template_is_not_a_secret(monkeypatch, value):
    monkeypatch.setenv("EOS_TOKEN", value)
    assert secret.values() == {}


def test_a_secret_in_settings_or_tokenizer_is_found_before_anything_is_spent(project, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "canary-1234")
    text = (
        project.model(template="{#- canary-1234 -#}" + template_text("med"))
        + "  sft: {data: consult, trainer: {run_name: a}}\n"
    )
    code, shown = project.validate(text.replace("template: med\n", ""))
    assert code == 2
    way = "take it out, or `unset MY_SECRET` if it is not a secret"
    told = f"holds the value of the environment variable MY_SECRET; {way}"
    assert f"stage `sft`: the chat template of `m` {told}\n" in shown
    code, shown = project.validate(
        f"{CHAIN.replace('{architecture: bloom', '{template: plain, architecture: bloom')}".replace(
            "lora: {r: 8}\n    trainer", "lora: {r: 8, rank_pattern: {canary-1234: 2}}\n    trainer"
        )
    )
    assert (code, "its settings hold the value of the environment variable MY_SECRET" in shown) == (2, True)


# Processes


def test_a_file_of_the_user_does_not_take_the_place_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "stages.py").write_text("raise SystemExit('the wrong stages')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    from stages.runtime.processes import in_fresh_process

    with pytest.raises(RuntimeError) as caught:
        in_fresh_process("stages.measuring.quality", {"model": str(tmp_path)})
    assert "the wrong stages" not in str(caught.value)


SLOW = """
import os, sys, time
from stages.runtime.processes import answer_request
def respond(request):
    open(request["model"], "w").write(str(os.getpid()))
    time.sleep(600)
answer_request(respond)
"""


def test_a_fresh_process_ends_with_the_one_that_started_it(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    code = (
        "import sys; from stages.runtime import processes; processes.in_fresh_process('slow', {'model': sys.argv[1]})"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))),
    }
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], env=environment)
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text(encoding="utf-8"):
        assert parent.poll() is None
        time.sleep(0.05)
    child = Path("/proc", (tmp_path / "pid").read_text(encoding="utf-8"), "stat")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while child.exists() and "Z" not in child.read_text(encoding="utf-8").rpartition(")")[2].split()[0]:
        time.sleep(0.05)
