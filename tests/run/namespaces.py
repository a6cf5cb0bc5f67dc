"""Machines in one: network namespaces with an address each, on a bridge of their own; made and removed by root.

By hand: `.venv/bin/python tests/run/namespaces.py 2 -- pipeline run CONFIG --set launch.machines=2` runs a command on
each of two machines, with NODE_RANK, MASTER_ADDR and MASTER_PORT as a cluster sets them, and removes them afterwards.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PORT = 29500
ROOT = Path(__file__).parents[2]


def missing():
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "`ip` or `unshare` is not installed"
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "delete", name)
    return None if made else "network namespaces cannot be made here"


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machine:
    """A network namespace; programs in it see its address and a host name of its own."""

    def __init__(self, rank, prefix):
        self.rank, self.name, self.host = rank, f"{prefix}m{rank}", f"machine-{'abcdefgh'[rank]}"
        self.link, self.address = f"{prefix}v{rank}", f"10.213.77.{rank + 1}"

    def command(self, *words):
        """The words with which a command runs in it."""
        inside = f'hostname {self.host} && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", inside, "sh", *map(str, words)]

    def start(self, *words, **more):
        """Start a program in it; the keyword arguments are those of Popen. `env` adds variables to the environment."""
        env = {**os.environ, **more.pop("env", {})}
        return subprocess.Popen(self.command(*words), env=env, **more)

    def processes(self):
        """The ids of all processes in it."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(word) for word in found.stdout.split()]

    def unplug(self):
        """Take its network away; its processes do not notice."""
        ip("link", "set", self.link, "down")


@contextlib.contextmanager
def machines(count):
    """Some machines that reach each other."""
    prefix = f"p{os.getpid() % 100000}"
    bridge, made = f"{prefix}b", [Machine(rank, prefix) for rank in range(count)]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for machine in made:
            ip("netns", "add", machine.name)
            ip("link", "add", machine.link, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            ip("link", "set", machine.link, "master", bridge, "up")
            for words in (
                ("address", "add", f"{machine.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", machine.name, *words)
        yield made
    finally:
        for machine in made:
            for pid in machine.processes() if Path("/run/netns", machine.name).exists() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            for words in (("netns", "delete", machine.name), ("link", "delete", machine.link)):
                subprocess.run(["ip", *words], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True, check=False)


# The tiny chain on two machines

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


def write_config(folder, steps=12, timeout="60s"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "two.yaml"
    path.write_text(CONFIG.format(data=ROOT / "data", steps=steps, timeout=timeout), encoding="utf-8")
    return path


def start(machine, leader, config, saves, *words):
    """Start the run on one of the machines; its output goes to a file beside the config."""
    where = {"MASTER_ADDR": leader.address, "MASTER_PORT": str(PORT), "NODE_RANK": str(machine.rank)}
    with open(config.parent / f"{machine.host}.txt", "ab") as out:
        command = [sys.executable, "-m", "pipeline.cli", "run", config, "--saves", saves, *words]
        return machine.start(*command, env=where | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, stdout=out, stderr=out)


def reached(saves, step, seconds=300):
    """Wait until the training has reached a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for file in saves.glob("*.part/events.jsonl"):
            with contextlib.suppress(ValueError):
                events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                if any(event["kind"] == "step" and event["step"] >= step for event in events):
                    return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached")


def ended(started, seconds=200):
    """The exit codes of runs, and the seconds until the last one ended."""
    began = time.monotonic()
    codes = [one.wait(max(1, seconds - (time.monotonic() - began))) for one in started]
    return codes, time.monotonic() - began


def last_words(config, machine):
    text = (config.parent / f"{machine.host}.txt").read_text(encoding="utf-8")
    return text.strip().splitlines()[-1]


def adapter(saves):
    (file,) = saves.glob("sft-*[0-9a-f]/adapter_model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def every(machine, number):
    for pid in machine.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def gone(machine, seconds=20):
    """Whether all processes of a machine end; the kernel kills those whose parent has ended one after the other."""
    end = time.monotonic() + seconds
    while machine.processes() and time.monotonic() < end:
        time.sleep(0.1)
    return not machine.processes()


def main(count, words):
    with machines(count) as made:
        where = {"MASTER_ADDR": made[0].address, "MASTER_PORT": str(PORT)}
        started = [one.start(*words, env={**where, "NODE_RANK": str(one.rank)}) for one in made]
        codes = [one.wait() for one in started]
        print("exit codes:", *codes)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[3:]))
