"""Two machines that lose each other, in every way that can be made with network namespaces. Needs root.

    .venv/bin/python benchmarks/machines.py [WAY…]

Each way: the tiny chain starts on two machines; in the middle of `sft` something happens to one of them; both exit
codes, the last line of each and the seconds until both had ended are printed; then the same command runs on both again,
and the adapter is compared with that of an undisturbed run.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from subprocess import Popen

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.run import namespaces  # noqa: E402 - the folder of the tests is no package of the installation
from tests.run.namespaces import Machine  # noqa: E402

CONFIG = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 40}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 60}}
stages:
  init: {{architecture: llama, hidden_size: 64, num_attention_heads: 2, vocab_size: 600, data: [books]}}
  sft:
    data: consult
    eval_size: 6
    lora: {{r: 4}}
    trainer: {{learning_rate: 1e-2, max_steps: {steps}, max_length: 256, per_device_train_batch_size: 4,
              gradient_checkpointing: false, logging_steps: 2, save_steps: 3}}
launch: {{machines: 2, timeout: {timeout}}}
"""


def write_config(folder: Path, steps: int = 12, timeout: str = "60s") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "two.yaml"
    path.write_text(CONFIG.format(data=ROOT / "data", steps=steps, timeout=timeout), encoding="utf-8")
    return path


def start(machine: Machine, leader: Machine, config: Path, saves: Path, *words: str) -> Popen[bytes]:
    """Start the run on one of the machines; its output goes to a file beside the config."""
    where = {"MASTER_ADDR": leader.address, "MASTER_PORT": str(namespaces.PORT), "NODE_RANK": str(machine.rank)}
    with open(config.parent / f"{machine.host}.txt", "ab") as out:
        command = [sys.executable, "-m", "pipeline.cli", "run", config, "--saves", saves, *words]
        return machine.start(*command, env=where | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, stdout=out, stderr=out)


def reached(saves: Path, step: int, seconds: float = 300) -> None:
    """Wait until the training has reached a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for file in saves.glob("sft-*.part/events.jsonl"):
            with contextlib.suppress(ValueError):
                events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                if any(event["kind"] == "step" and event["step"] >= step for event in events):
                    return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached")


def ended(started: list[Popen[bytes]], seconds: float = 200) -> tuple[list[int], float]:
    """The exit codes of runs, and the seconds until the last one ended."""
    began = time.monotonic()
    codes = [one.wait(max(1, seconds - (time.monotonic() - began))) for one in started]
    return codes, time.monotonic() - began


def last_words(config: Path, machine: Machine) -> str:
    text = (config.parent / f"{machine.host}.txt").read_text(encoding="utf-8")
    return text.strip().splitlines()[-1]


def adapter(saves: Path) -> str:
    (file,) = saves.glob("sft-*[0-9a-f]/adapter_model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def every(machine: Machine, number: int) -> None:
    for pid in machine.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


WAYS = {
    "machine 1 is killed": lambda made: every(made[1], signal.SIGKILL),
    "machine 0 is killed": lambda made: every(made[0], signal.SIGKILL),
    "SIGTERM to every process of both": lambda made: [every(one, signal.SIGTERM) for one in made],
    "SIGTERM to the run of machine 1": lambda made: os.kill(runner(made[1]), signal.SIGTERM),
    "one worker of machine 1 is killed": lambda made: os.kill(worker(made[1]), signal.SIGKILL),
    "machine 1 is unplugged": lambda made: made[1].unplug(),
}


def runner(machine: Machine) -> int:
    return next(pid for pid in machine.processes() if b"pipeline.cli" in Path(f"/proc/{pid}/cmdline").read_bytes())


def worker(machine: Machine) -> int:
    words = [(pid, Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in machine.processes()]
    return next(pid for pid, line in words if b"pipeline.run.worker" in line and b"run.launch" not in line)


def main(chosen: list[str]) -> None:
    folder = Path(tempfile.mkdtemp())
    with namespaces.machines(2) as made:
        config = write_config(folder / "undisturbed")
        codes, seconds = ended([start(one, made[0], config, folder / "undisturbed" / "saves") for one in made])
        right = adapter(folder / "undisturbed" / "saves")
        print(f"undisturbed: exit codes {codes}, {right[:12]}")
    for number, (way, act) in enumerate(WAYS.items()):
        if chosen and str(number) not in chosen:
            continue
        with namespaces.machines(2) as made:
            config = write_config(folder / str(number))
            saves = folder / str(number) / "saves"
            runs = [start(one, made[0], config, saves) for one in made]
            reached(saves, 5)
            act(made)
            codes, seconds = ended(runs)
            time.sleep(1)
            left = [Path(f"/proc/{pid}/cmdline").read_text() for one in made for pid in one.processes()]
            print(f"{number} {way}: exit codes {codes} after {seconds:.0f} s, {len(left)} processes left", *left)
            print(*(f"    {one.host}: {last_words(config, one)}" for one in made), sep="\n")
        with namespaces.machines(2) as made:
            codes, seconds = ended([start(one, made[0], config, saves) for one in made])
            same = "the same adapter" if adapter(saves) == right else "ANOTHER ADAPTER"
            print(f"    again: exit codes {codes}, {same}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
