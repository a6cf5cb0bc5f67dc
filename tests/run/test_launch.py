"""Several processes on one machine: the same losses as one process, whole artifacts, exact resume, one death.

`benchmarks/launch.py` runs the whole table of strategies; here are few runs, since each starts two processes that
import everything.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.plan import launching
from pipeline.saves import artifact
from stages.model.facts import read_header
from stages.runtime.events import read_events

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
CONFIG = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 40}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 30}}
  prefer:  {{path: {data}/med_prefer.jsonl, format: preference, max_samples: 24}}
stages:
  init: {{architecture: llama, hidden_size: 32, num_attention_heads: 2, vocab_size: 400, data: [books]}}
  pt:
    data: books
    eval_size: 4
    trainer: {{learning_rate: 1e-3, max_steps: 4, max_length: 64, per_device_train_batch_size: 4,
              gradient_accumulation_steps: 2, gradient_checkpointing: false, logging_steps: 1, save_steps: 2}}
  sft:
    data: consult
    eval_size: 4
    lora: {{r: 4}}
    trainer: {{learning_rate: 1e-3, max_steps: 6, max_length: 256, per_device_train_batch_size: 4,
              gradient_checkpointing: false, logging_steps: 1, save_steps: 2}}
  dpo:
    data: prefer
    eval_size: 4
    lora: {{r: 4}}
    trainer: {{learning_rate: 1e-3, max_steps: 2, max_length: 256, per_device_train_batch_size: 2,
              precompute_ref_log_probs: false, gradient_checkpointing: false, logging_steps: 1}}
"""
ZERO = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def run(saves: Path, *words: str) -> int:
    return cli.main(["run", str(saves.parent / "two.yaml"), "--saves", str(saves), *words])


def launch(*stages: str, strategy: str = "ddp") -> list[str]:
    """The words that let some stages run in two processes."""
    return [
        word
        for stage in stages
        for setting in ("processes=2", f"strategy={strategy}")
        for word in ("--set", f"{stage}.launch.{setting}")
    ]


def folder(saves: Path, stage: str) -> Path:
    return (saves / "two" / stage).resolve()


def losses(place: Path) -> list[float]:
    """The losses of the steps, in their order."""
    return [event["loss"] for event in read_events(place) if event["kind"] == "log" and "loss" in event]


def shapes(place: Path, name: str) -> dict[str, tuple[int, ...]]:
    return read_header(place / name)[0]


def sha256(place: Path, name: str) -> str:
    return artifact.read(place)["files"][name]["sha256"]


def when(saves: Path, step: int, act) -> threading.Thread:
    """Call `act(pid of the first process)` once the running stage has logged a step."""

    def watch() -> None:
        for _ in range(6000):
            for file in saves.glob("*.part/events.jsonl"):
                events = list(read_events(file.parent))
                starts = [event["pid"] for event in events if event["kind"] == "start"]
                if starts and any(event["kind"] == "log" and event.get("step", 0) >= step for event in events):
                    act(starts[-1])
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def group(pid: int) -> list[int]:
    """The processes that have the same parent as `pid`: those of its group."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return sorted(other for other, parent in found.items() if parent == found[pid])


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds; one that nobody waited for stays as a zombie (Z)."""
    for _ in range(500):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The saves of a chain that one process has run."""
    place = tmp_path_factory.mktemp("launch")
    (place / "two.yaml").write_text(CONFIG.format(data=ROOT / "data"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert run(place / "saves") == 0
    return place / "saves"


def copied(saves: Path, place: Path) -> Path:
    """A copy of a config and of its saves."""
    shutil.copy(saves.parent / "two.yaml", place)
    shutil.copytree(saves, place / "saves", symlinks=True)
    return place / "saves"


@pytest.fixture
def saves(alone, tmp_path, monkeypatch):
    """A copy of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return copied(alone, tmp_path)


@pytest.fixture(scope="module")
def shared(alone, tmp_path_factory):
    """The saves of the chain with some stages in two processes."""

    def made(*words: str) -> Path:
        place = copied(alone, tmp_path_factory.mktemp("shared"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            assert run(place, *words) == 0
        return place

    return made


@pytest.fixture(scope="module")
def ddp(shared):
    return shared(*launch("sft", "dpo"))


@pytest.fixture(scope="module")
def zero3(shared):
    return shared(*launch("pt", "sft", "dpo", strategy="zero3"))


def test_two_processes_train_to_the_losses_of_one_with_the_same_rows_a_step(alone, ddp):
    """Also with held-out rows, which are measured before training: accelerate must share the model all the same."""
    for stage in ("sft", "dpo"):
        one, two = folder(alone, stage), folder(ddp, stage)
        assert one != two
        assert losses(two) == pytest.approx(losses(one), abs=1e-4)
        name = "adapter_model.safetensors"
        assert shapes(two, name) == shapes(one, name)
        before, after = (artifact.read(place)["metrics"] for place in (one, two))
        for figure in ("eval_loss_before", "eval_loss"):
            assert after[figure] == pytest.approx(before[figure], abs=1e-4)
        assert [after[name] for name in ("batch", "accumulation", "processes")] == [before["batch"] // 2, 1, 2]
    recipe = artifact.read(folder(ddp, "sft"))["recipe"]
    assert recipe["launch"] == {"processes": 2, "strategy": "ddp", "offload": None, "machines": 1}
    settings = json.loads((folder(ddp, "sft") / "launch.json").read_text(encoding="utf-8"))
    assert (settings["num_processes"], settings["num_machines"]) == (2, 1)
    assert "launch.json" in artifact.read(folder(ddp, "sft"))["files"]


@ZERO
def test_zero_3_leaves_whole_models_and_adapters_and_the_losses_of_one_process(alone, zero3):
    for stage, name in (("pt", "model.safetensors"), ("sft", "adapter_model.safetensors")):
        one, three = folder(alone, stage), folder(zero3, stage)
        assert losses(three) == pytest.approx(losses(one), abs=1e-4)
        assert shapes(three, name) == shapes(one, name)
        assert all(all(shape) for shape in shapes(three, name).values())
    assert losses(folder(zero3, "dpo"))[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses(folder(zero3, "dpo")) == pytest.approx(losses(folder(alone, "dpo")), abs=1e-4)
    deepspeed = json.loads((folder(zero3, "sft") / "deepspeed.json").read_text(encoding="utf-8"))
    assert deepspeed["zero_optimization"]["stage"] == 3


@ZERO
def test_zero_2_trains_to_the_losses_of_one_process(alone, saves):
    words = ["--until", "pt", *launch("pt", strategy="zero2")]
    assert run(saves, *words) == 0
    assert losses(folder(saves, "pt")) == pytest.approx(losses(folder(alone, "pt")), abs=1e-4)


@ZERO
def test_zero_3_goes_on_exactly_after_kill_9_of_the_first_process(zero3, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    saves = copied(zero3, tmp_path)
    words = ["--until", "sft", *launch("pt", "sft", strategy="zero3")]
    expected = sha256(folder(saves, "sft"), "adapter_model.safetensors")
    shutil.rmtree(folder(saves, "sft"))
    watcher = when(saves, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert run(saves, *words) == 1
    watcher.join()
    (part,) = saves.glob("sft-*.part")
    names = {str(path.relative_to(path.parents[1])) for path in part.glob("checkpoints/checkpoint-2/*/*")}
    sealed = json.loads((part / "checkpoints" / "checkpoint-2" / "complete.json").read_text(encoding="utf-8"))
    assert names <= set(sealed)
    assert sum("optim_states" in name for name in names) == 2  # of both processes
    capsys.readouterr()
    assert run(saves, *words) == 0
    assert "sft: starts; goes on at step 2 of 6" in capsys.readouterr().out
    assert sha256(folder(saves, "sft"), "adapter_model.safetensors") == expected


def test_one_process_that_dies_ends_the_others_and_is_named_and_the_next_run_goes_on(ddp, saves, capsys):
    pids: list[int] = []

    def kill_the_second(pid: int) -> None:
        pids.extend(group(pid))
        os.kill(next(other for other in pids if other != pid), signal.SIGKILL)

    watcher = when(saves, 3, kill_the_second)
    began = time.monotonic()
    assert run(saves, "--until", "sft", *launch("sft")) == 1
    watcher.join()
    out, error = capsys.readouterr()
    assert "sft: 6 steps, batch 2 × 1 accumulation × 2 processes = 4 rows a step\n" in out
    assert error.startswith(
        "error: stage `sft`: process 1 of 2, counted from 0, was ended by signal 9 SIGKILL (kill -9, or the system ran "
        "out of memory); it takes at least "
    )
    assert error.endswith("/log.txt; run again to go on from its last checkpoint\n")
    assert error.count("\n") == 1
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
    assert time.monotonic() - began < 120
    assert run(saves, "--until", "sft", *launch("sft")) == 0
    name = "adapter_model.safetensors"
    assert sha256(folder(saves, "sft"), name) == sha256(folder(ddp, "sft"), name)


def test_fsdp_2_that_accelerate_silently_makes_ddp_is_an_error(saves, capsys, monkeypatch):
    monkeypatch.setattr(launching, "gpus", lambda: 2)  # let it through the plan
    assert run(saves, "--until", "sft", *launch("sft", strategy="fsdp2")) == 1
    (part,) = saves.glob("sft-*.part")
    assert capsys.readouterr().err == (
        "error: stage `sft`: `launch` asks for PyTorch's FSDP2, and accelerate made it PyTorch's "
        f"DistributedDataParallel; use another `strategy`\nits log is {part}/log.txt\n"
    )
