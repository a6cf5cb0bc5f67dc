"""Whole runs through the command line: what is done twice, what survives a kill, what a failure says."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.saves import artifact
from pipeline.views import charts

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
CONFIG = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 40}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 60}}
  prefer:  {{path: {data}/med_prefer.jsonl, format: preference, max_samples: 24}}
stages:
  init: {{architecture: {architecture}, hidden_size: 64, num_attention_heads: 2, vocab_size: 600, data: [books]}}
  pt:
    data: books
    eval_size: 4
    trainer: {{learning_rate: 1e-2, max_steps: 6, max_length: 64, per_device_train_batch_size: 4,
              gradient_checkpointing: false, logging_steps: 2}}
  sft:
    data: consult
    eval_size: 6
    lora: {{r: 4}}
    trainer: {{learning_rate: 1e-2, max_steps: 12, max_length: 256, per_device_train_batch_size: 4,
              gradient_checkpointing: false, logging_steps: 2, save_steps: 3}}
  dpo:
    data: prefer
    eval_size: 4
    lora: {{r: 4}}
    trainer: {{learning_rate: 1e-3, max_steps: 4, max_length: 256, per_device_train_batch_size: 2,
              gradient_checkpointing: false, logging_steps: 2}}
  merge:
  quantize: {{group_size: 32, calibration: {{data: consult, samples: 16, max_length: 64}}}}
"""


def write_config(folder: Path, architecture: str = "llama") -> Path:
    path = folder / "small.yaml"
    path.write_text(CONFIG.format(data=ROOT / "data", architecture=architecture), encoding="utf-8")
    return path


def run(config: Path, saves: Path, *words: str) -> int:
    return cli.main(["run", str(config), "--saves", str(saves), *words])


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def record(saves: Path, stage: str) -> dict:
    return artifact.read((saves / "small" / stage).resolve())


def content(saves: Path, stage: str) -> dict:
    """The sha256 of every file, but for an adapter's config, which names the folder of its base."""
    files = record(saves, stage)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "adapter_config.json"}


def alive(pid: int) -> bool:
    """Does the process still run? One that nobody waited for stays as a zombie (Z)."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


CANARIES = {"HF_TOKEN": "hf_canary-one", "WANDB_API_KEY": "canary-two", "MY_SECRET": "canary-three"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished chain, run with secrets in the environment: its config and its saves."""
    folder = tmp_path_factory.mktemp("chain")
    config = write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CANARIES.items():
            patch.setenv(name, value)
        assert run(config, folder / "saves") == 0
    return config, folder / "saves"


@pytest.fixture
def chain(finished, tmp_path):
    """A copy of the finished chain to break."""
    config, saves = finished
    shutil.copy(config, tmp_path / "small.yaml")
    shutil.copytree(saves, tmp_path / "saves", symlinks=True)
    return tmp_path / "small.yaml", tmp_path / "saves"


def when_event(saves: Path, kind: str, step: int, act) -> threading.Thread:
    """Call `act(part folder, first pid)` once the running stage tells of `kind` at `step` or later."""

    def watch() -> None:
        for _ in range(3000):
            for file in saves.glob("*.part/events.jsonl"):
                events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                if any(event["kind"] == kind and event.get("step", 0) >= step for event in events):
                    act(file.parent, next(event["pid"] for event in events if event["kind"] == "start"))
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_finished_run_runs_nothing_again_and_changes_no_file(finished, capsys):
    config, saves = finished
    before = stamps(saves)
    assert run(config, saves) == 0
    assert stamps(saves) == before
    assert capsys.readouterr().out.count("was done already") == 6


def test_every_artifact_has_a_record_of_every_file_and_no_pickle(finished):
    _, saves = finished
    for stage in ("init", "pt", "sft", "dpo", "merge", "quantize"):
        folder = (saves / "small" / stage).resolve()
        files = {path.name for path in folder.iterdir()} - artifact.NOT_CONTENT
        assert files == set(record(saves, stage)["files"])
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_secrets_of_the_environment_are_in_no_file(finished):
    _, saves = finished
    files = [path for path in saves.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len([path for path in files if path.name in ("log.txt", "events.jsonl", "spec.json")]) >= 12
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in CANARIES.items() if value.encode() in content], path


def test_a_secret_that_would_be_handed_on_with_the_model_stops_the_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_canary-one")
    config, saves = write_config(tmp_path), tmp_path / "saves"
    template = (ROOT / "stages/chat/templates/med.jinja").read_text(encoding="utf-8")
    (tmp_path / "mine.jinja").write_text("{#- hf_canary-one -#}" + template, encoding="utf-8")
    assert run(config, saves, "--until", "init", "--set", f"template={tmp_path}/mine.jinja") == 2
    assert capsys.readouterr().err == (
        f"{config}:7:9: stage `init`: its settings hold the value of the environment variable HF_TOKEN; take it out, "
        "or `unset HF_TOKEN` if it is not a secret\n"
    )
    assert not saves.exists() or not list(saves.glob("init-*"))


def test_a_secret_in_a_row_that_is_handed_on_stops_the_stage(chain, monkeypatch, capsys):
    monkeypatch.setenv("MY_SECRET", "canary-four")
    config, saves = chain
    (config.parent / "rows.jsonl").write_text('{"text": "canary-four"}\n', encoding="utf-8")
    more = ["--set", f"data.more={{path: {config.parent}/rows.jsonl, format: text}}"]
    chosen = "{data: more, method: k_center, keep: 1, model: $init}"
    assert run(config, saves, *more, "--set", f"stages.select={chosen}") == 1
    (part,) = saves.glob("select-*.part")
    assert capsys.readouterr().err.startswith(
        f"error: stage `select`: `{part}/rows.jsonl` holds the value of the environment variable MY_SECRET; take it "
        "out of the data or the settings, or `unset MY_SECRET` if it is not a secret, and run again\n"
    )


def test_training_lowers_the_held_out_loss_and_the_reference_is_proved(finished):
    _, saves = finished
    for stage in ("pt", "sft"):
        metrics = record(saves, stage)["metrics"]
        assert metrics["eval_loss"] < metrics["eval_loss_before"]
    metrics = record(saves, "dpo")["metrics"]
    assert metrics["margin_at_start"] == 0
    assert metrics["loss_at_start"] == pytest.approx(0.693147, abs=1e-5)
    assert record(saves, "merge")["metrics"]["layer_difference"] <= 1e-5


@pytest.mark.parametrize("stage", ["merge", "quantize"])
def test_a_finished_model_has_a_card_that_the_hub_can_read_and_that_is_hashed(finished, stage):
    from huggingface_hub import ModelCard

    config, saves = finished
    card = ModelCard.load((saves / "small" / stage / "README.md").resolve())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert set(card.data.tags) >= {"pt", "sft", "dpo"}
    assert f"| sft | held-out loss | {record(saves, 'sft')['metrics']['eval_loss_before']:.4g} |" in card.text
    assert str(config.parent) not in card.content
    assert str(ROOT) not in card.content
    assert "README.md" in record(saves, stage)["files"]


def test_the_four_bit_folder_answers_with_three_lines_of_plain_transformers(finished):
    _, saves = finished
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig\n"
        "plain = GPTQConfig(bits=4, backend='torch')\n"  # else a CPU kernel is compiled for minutes
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=plain)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': '感冒'}], add_generation_prompt=True,"
        " return_tensors='pt', return_dict=True)\n"
        "print(tokenizer.decode(ids['input_ids'][0]))\n"
        "print(model.generate(**ids, max_new_tokens=4).shape[1] - ids['input_ids'].shape[1])\n"
    )
    folder = str((saves / "small" / "quantize").resolve())
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "下面是一个问题，运用医学知识来正确回答提问。\n### 问题:\n感冒\n### 回答:\n" in done.stdout
    assert 1 <= int(done.stdout.strip().splitlines()[-1]) <= 4


def test_a_changed_setting_runs_its_stage_and_those_below_it(chain, capsys):
    config, saves = chain
    assert run(config, saves, "--until", "dpo", "--set", "dpo.trainer.learning_rate=2e-3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "dpo: starts; because `trainer.learning_rate` 0.001 → 0.002 (--set dpo.trainer.learning_rate)" in lines
    assert sum("was done already" in line for line in lines) == 3


def test_a_killed_stage_leaves_the_runner_alive_and_the_next_run_ends_with_the_same_weights(chain, capsys):
    config, saves = chain
    expected = record(saves, "sft")["files"]["adapter_model.safetensors"]["sha256"]
    shutil.rmtree((saves / "small" / "sft").resolve())
    killed = []

    def kill(part: Path, pid: int) -> None:
        while not list(part.glob("checkpoints/*/complete.json")):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        killed.append(part)

    watcher = when_event(saves, "step", 1, kill)
    assert run(config, saves, "--until", "sft") == 1
    watcher.join()
    (part,) = killed
    assert capsys.readouterr().err == (
        "error: stage `sft` was ended by signal 9 SIGKILL (kill -9, or the system ran out of memory); it takes at "
        "least 620.5 kB of memory, and activations come on top; if memory ran out, halve "
        "`trainer.per_device_train_batch_size`, which is 4, and double `gradient_accumulation_steps`, or set "
        "`trainer.gradient_checkpointing: true`, or set `quantized_base: nf4`, or lower `trainer.max_length`, which is "
        f"256; its log is {part}/log.txt; run again to go on from its last checkpoint\n"
    )
    assert run(config, saves, "--until", "sft") == 0
    assert "sft: starts; goes on at step" in capsys.readouterr().out
    assert record(saves, "sft")["files"]["adapter_model.safetensors"]["sha256"] == expected


def test_a_killed_runner_takes_its_stage_with_it_and_the_next_run_ends_with_the_same_weights(chain):
    config, saves = chain
    expected = record(saves, "sft")["files"]["adapter_model.safetensors"]["sha256"]
    shutil.rmtree((saves / "small" / "sft").resolve())
    words = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--saves", str(saves), "--until", "sft"]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pids = []

    def kill(part: Path, pid: int) -> None:
        pids.append(pid)
        first.kill()

    when_event(saves, "log", 4, kill).join()
    assert first.wait() == -signal.SIGKILL
    (pid,) = pids
    while alive(pid):
        time.sleep(0.05)
    (part,) = saves.glob("sft-*.part")
    assert '"kind": "done"' not in (part / "events.jsonl").read_text(encoding="utf-8")  # it did not end by itself
    assert run(config, saves, "--until", "sft") == 0
    assert record(saves, "sft")["files"]["adapter_model.safetensors"]["sha256"] == expected


def test_ctrl_c_stops_at_the_next_step_and_the_next_run_goes_on(chain, capsys):
    config, saves = chain
    expected = record(saves, "sft")["files"]["adapter_model.safetensors"]["sha256"]
    shutil.rmtree((saves / "small" / "sft").resolve())
    watcher = when_event(saves, "log", 2, lambda part, pid: os.kill(os.getpid(), signal.SIGINT))
    assert run(config, saves, "--until", "sft") == 75
    watcher.join()
    error = capsys.readouterr().err
    assert error.startswith("stage `sft` stopped at step ")
    assert error.endswith(" of 12; run the same command again to go on\n")
    assert not (saves / "small" / "sft").exists()
    assert run(config, saves, "--until", "sft") == 0
    assert "sft: starts; goes on at step" in capsys.readouterr().out
    assert record(saves, "sft")["files"]["adapter_model.safetensors"]["sha256"] == expected


def test_a_resumed_stage_keeps_its_history(chain, capsys, tmp_path):
    """Its curves begin at the first step, and its time and memory are those of both attempts."""
    config, saves = chain
    whole = charts.history((saves / "small" / "sft").resolve())
    shutil.rmtree((saves / "small" / "sft").resolve())
    watcher = when_event(saves, "log", 8, lambda part, pid: os.kill(os.getpid(), signal.SIGTERM))
    assert run(config, saves, "--until", "sft") == 75  # often after step 9, of which no figure is logged
    watcher.join()
    (part,) = saves.glob("sft-*.part")
    first = [json.loads(line) for line in (part / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert run(config, saves, "--until", "sft") == 0
    folder = (saves / "small" / "sft").resolve()
    second = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert second[: len(first)] == first
    assert [event["kind"] for event in second].count("start") == 2
    figures = [{key: row[key] for key in ("step", "loss") if key in row} for row in charts.history(folder)]
    assert figures == [{key: row[key] for key in ("step", "loss") if key in row} for row in whole]
    done = record(saves, "sft")
    assert (done["attempts"], done["started"]) == (2, first[0]["time"])
    assert done["seconds"] >= (first[-1]["time"] - first[0]["time"]) + (second[-1]["time"] - second[len(first)]["time"])
    assert done["memory"]["host"] >= first[-1]["memory"]["host"]
    assert cli.main(["report", str(config), "--saves", str(saves), "--until", "sft", "--curves", str(tmp_path)]) == 0
    lines = (tmp_path / "sft" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines[1:]][-6:] == ["2", "4", "6", "8", "10", "12"]


def test_a_terminal_that_closes_stops_the_run_like_sigterm(chain):
    """An ssh connection that breaks sends SIGHUP to every process of the terminal; nohup ignores it."""
    config, saves = chain
    expected = record(saves, "sft")["files"]["adapter_model.safetensors"]["sha256"]
    shutil.rmtree((saves / "small" / "sft").resolve())
    words = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--saves", str(saves), "--until", "sft"]
    ours, theirs = os.openpty()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    own = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # noqa: E731 - makes it the terminal of the new session
    first = subprocess.Popen(words, cwd=ROOT, preexec_fn=own, **terminal)
    os.close(theirs)
    reader = threading.Thread(target=read_all, args=(ours,))
    reader.start()
    pids = []

    def close(part: Path, pid: int) -> None:
        pids.append(pid)
        os.killpg(first.pid, signal.SIGHUP)

    when_event(saves, "log", 4, close).join()
    assert first.wait(60) == 75
    reader.join()
    assert not alive(pids[0])
    (part,) = saves.glob("sft-*.part")
    assert list(part.glob("checkpoints/*/complete.json"))
    assert run(config, saves, "--until", "sft") == 0
    assert record(saves, "sft")["files"]["adapter_model.safetensors"]["sha256"] == expected


def read_all(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # what reading a terminal gives once nobody writes to it
        while os.read(descriptor, 65536):
            pass
    os.close(descriptor)


def test_two_processes_agree_on_a_damaged_checkpoint(chain, capsys):
    config, saves = chain
    two = ["--until", "sft", "--set", "sft.launch.processes=2", "--set", "sft.trainer.save_steps=1"]
    watcher = when_event(saves, "log", 4, lambda part, pid: os.kill(os.getpid(), signal.SIGINT))
    assert run(config, saves, *two) == 75
    watcher.join()
    (part,) = saves.glob("sft-*.part")
    newest = max(part.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    with open(newest / "adapter_model.safetensors", "ab") as file:
        file.write(b"x")
    capsys.readouterr()
    assert run(config, saves, *two) == 0
    out = capsys.readouterr().out
    said = f"sft: {newest.name} is damaged (adapter_model.safetensors has changed); it is kept as corrupt-{newest.name}"
    assert out.count(said) == 1


def test_a_stage_that_cannot_go_on_says_which_why_and_where_its_log_is(chain, capsys):
    config, saves = chain
    assert run(config, saves, "--until", "sft", "--set", "sft.trainer.max_length=8") == 1
    error = capsys.readouterr().err
    (part,) = saves.glob("sft-*.part")
    assert error == (
        f"error: stage `sft`: all 54 rows lose their answer at `max_length` 8; raise it\nits log is {part}/log.txt\n"
    )
    assert (part / "log.txt").is_file()


def test_a_fault_of_ours_shows_its_traceback_and_leaves_the_runner_alive(chain, capsys):
    config, saves = chain
    unforeseen = "sft.trainer.neftune_noise_alpha=-1"
    assert run(config, saves, "--until", "sft", "--set", unforeseen) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: stage `sft`: failed with an internal error; please report this:\nTraceback (most recent call last):\n"
    )
    assert "uniform_" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_the_run_ends_at_the_final_question(chain, number):
    config, saves = chain
    command = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--saves", str(saves)]
    runner = subprocess.Popen([*command, "--set", "question=why?"], cwd=ROOT, stdout=subprocess.DEVNULL)
    child = next(pid for _ in range(6000) for pid in grandchildren(runner.pid) if cpu_seconds(pid) > 0.5)
    os.kill(child, signal.SIGSTOP)  # it cannot end by itself
    runner.send_signal(number)
    assert runner.wait(60) == (75 if number == signal.SIGINT else -number)
    assert any(not alive(child) or time.sleep(0.02) for _ in range(500))


def grandchildren(pid: int) -> list[int]:
    """The processes whose parent's parent is `pid`; waits a little."""
    time.sleep(0.01)
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return [process for process, parent in parents.items() if parents.get(parent) == pid]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def flip_a_bit(path: Path) -> None:
    """In the middle of the file; size and modification time stay."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_damaged_artifact_is_made_anew_and_never_used(chain, capsys):
    config, saves = chain
    before = {name: content(saves, name) for name in ("init", "pt", "sft")}
    damaged = (saves / "small" / "pt").resolve()
    flip_a_bit(damaged / "model.safetensors")
    shutil.rmtree((saves / "small" / "sft").resolve())
    assert run(config, saves, "--until", "sft") == 0
    out = capsys.readouterr().out
    assert "pt: starts; its folder is damaged (`model.safetensors` has changed); it is rebuilt\n" in out
    assert {name: content(saves, name) for name in before} == before
    assert damaged.with_name(f"{damaged.name}.old-1").is_dir()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGSEGV, "was ended by signal 11 SIGSEGV (a crash in native code)"),
        (
            signal.SIGKILL,
            "was ended by signal 9 SIGKILL (kill -9, or the system ran out of memory); it takes at least 620.5 kB of "
            "memory, and activations come on top; if memory ran out, halve `trainer.per_device_train_batch_size`, "
            "which is 2, and double `gradient_accumulation_steps`, or set `trainer.gradient_checkpointing: true`, or "
            "set `quantized_base: nf4`, or lower `trainer.max_length`, which is 256",
        ),
    ],
)
def test_a_stage_that_dies_is_told_apart_and_goes_on(chain, capsys, number, text):
    config, saves = chain
    expected = content(saves, "dpo")
    shutil.rmtree((saves / "small" / "dpo").resolve())
    watcher = when_event(saves, "log", 2, lambda part, pid: os.kill(pid, number))
    assert run(config, saves, "--until", "dpo") == 1
    watcher.join()
    (part,) = saves.glob("dpo-*.part")
    assert capsys.readouterr().err == (
        f"error: stage `dpo` {text}; its log is {part}/log.txt; run again to go on from its last checkpoint\n"
    )
    assert run(config, saves, "--until", "dpo") == 0
    assert content(saves, "dpo") == expected


def test_a_second_signal_leaves_at_once(chain, capsys):
    config, saves = chain
    pids = []

    def twice(part: Path, pid: int) -> None:
        pids.append(pid)
        os.kill(pid, signal.SIGSTOP)  # it cannot stop by itself any more
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = when_event(saves, "start", 0, twice)
    assert run(config, saves, "--until", "sft", "--set", "sft.trainer.max_steps=9000") == 75
    watcher.join()
    assert not alive(*pids)
    assert "stage `sft` stopped; run the same command again to go on" in capsys.readouterr().err


def test_unfinished_work_is_not_left_for_other_settings_without_a_word(chain, capsys):
    config, saves = chain
    expected = content(saves, "sft")
    shutil.rmtree((saves / "small" / "sft").resolve())
    watcher = when_event(saves, "log", 4, lambda part, pid: os.kill(pid, signal.SIGKILL))
    assert run(config, saves, "--until", "sft") == 1
    watcher.join()
    capsys.readouterr()
    lower = ("--until", "sft", "--set", "sft.trainer.learning_rate=5e-3")
    assert run(config, saves, *lower) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"{config}: stage `sft` was stopped at step 3 of 12, and now `trainer.learning_rate` 0.01 → "
    )
    assert error.endswith("Undo that to go on from there, or start over with `--fresh sft`\n")
    assert run(config, saves, *lower, "--fresh", "sft") == 0
    assert content(saves, "sft") != expected
    assert run(config, saves, "--until", "sft") == 0
    assert "sft: starts; goes on at step 3 of 12" in capsys.readouterr().out
    assert content(saves, "sft") == expected


def test_a_second_run_of_the_same_stage_is_refused(chain, capsys):
    config, saves = chain
    shutil.rmtree((saves / "small" / "sft").resolve())
    codes = []

    def second(part: Path, pid: int) -> None:
        words = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--saves", str(saves), "--until", "sft"]
        os.kill(pid, signal.SIGSTOP)  # it is not done before the other has looked
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
        os.kill(pid, signal.SIGCONT)
        codes.append((done.returncode, done.stderr))

    watcher = when_event(saves, "start", 0, second)
    assert run(config, saves, "--until", "sft") == 0
    watcher.join()
    ((code, error),) = codes
    assert code == 1
    assert error.startswith(f"error: stage `sft` is being run by another process (pid {os.getpid()} on ")
    assert error.endswith("); wait for it\n")


def test_a_full_disk_is_foreseen_or_named_and_the_run_goes_on_once_there_is_room(chain, tmp_path, capsys):
    config, _ = chain
    disk = tmp_path / "disk"
    disk.mkdir()
    small = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if small.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        assert run(config, disk / "saves", "--until", "init") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{disk}/saves: stage `init` takes at least 481.3 kB of disk, and ")
        # What is foreseen are the weights; the tokenizer beside them fills the rest.
        subprocess.run(["mount", "-o", "remount,size=540k", str(disk)], check=True)
        assert run(config, disk / "saves", "--until", "init") == 1
        error = capsys.readouterr().err
        assert "stage `init`: the disk is full; free space and run again, what was finished is kept\n" in error
        assert not list((disk / "saves").glob("init-*[!t]"))
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert run(config, disk / "saves", "--until", "init") == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_out_of_memory_names_the_stage_and_what_to_set(tmp_path):
    config = write_config(tmp_path)
    gigabytes = 8 * 2**30
    words = ["run", str(config), "--saves", str(tmp_path / "saves"), "--until", "init"]
    big = ["--set", "init.hidden_size=8192", "--set", "init.num_hidden_layers=4"]
    done = subprocess.run(
        ["prlimit", f"--as={gigabytes}", sys.executable, "-m", "pipeline.cli", *words, *big],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    told, least, log = done.stderr.splitlines()
    assert told.startswith("error: stage `init`: out of memory; lower `hidden_size` or `num_hidden_layers`")
    assert least == "it takes at least 10.8 GB of memory"
    assert log.endswith("/log.txt")


QLORA = """\
template: med
data:
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 20}}
stages:
  init: {{architecture: llama, hidden_size: 64, num_attention_heads: 2, vocab_size: 600, data: [consult]}}
  sft: {{data: consult, lora: {{r: 4}}, quantized_base: nf4, trainer: {{max_steps: 2, max_length: 128}}}}
  merge:
"""


def test_an_adapter_on_a_quantized_base_is_merged_by_a_run_that_trains_none(tmp_path):
    """Such a run sets bitsandbytes aside, which the fold needs."""
    pytest.importorskip("bitsandbytes")
    whole, alone, saves = tmp_path / "whole.yaml", tmp_path / "alone.yaml", tmp_path / "saves"
    whole.write_text(QLORA.format(data=ROOT / "data"), encoding="utf-8")
    assert run(whole, saves) == 0
    adapter = (saves / "whole" / "sft").resolve()
    alone.write_text(f"model: {adapter}\nstages:\n  merge:\n", encoding="utf-8")
    assert run(alone, saves) == 0
    merged = [artifact.read((saves / name / "merge").resolve())["files"] for name in ("whole", "alone")]
    assert merged[0]["model.safetensors"] == merged[1]["model.safetensors"]
