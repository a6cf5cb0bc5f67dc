"""Two machines that lose each other, in every way that can be made with network namespaces. Needs root.

    .venv/bin/python benchmarks/machines.py [WAY…]

Each way: the tiny chain starts on two machines; in the middle of `sft` something happens to one of them; both exit
codes, the last line of each and the seconds until both had ended are printed; then the same command runs on both again,
and the adapter is compared with that of an undisturbed run.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.run.namespaces import (  # noqa: E402 - the folder of the tests is no package of the installation
    Machine,
    adapter,
    ended,
    every,
    gone,
    last_words,
    machines,
    reached,
    start,
    write_config,
)

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
    with machines(2) as made:
        config = write_config(folder / "undisturbed")
        codes, seconds = ended([start(one, made[0], config, folder / "undisturbed" / "saves") for one in made])
        right = adapter(folder / "undisturbed" / "saves")
        print(f"undisturbed: exit codes {codes}, {right[:12]}")
    for number, (way, act) in enumerate(WAYS.items()):
        if chosen and str(number) not in chosen:
            continue
        with machines(2) as made:
            config = write_config(folder / str(number))
            saves = folder / str(number) / "saves"
            runs = [start(one, made[0], config, saves) for one in made]
            reached(saves, 5)
            act(made)
            codes, seconds = ended(runs)
            gone(made[0], 5), gone(made[1], 5)
            left = [Path(f"/proc/{pid}/cmdline").read_text() for one in made for pid in one.processes()]
            print(f"{number} {way}: exit codes {codes} after {seconds:.0f} s, {len(left)} processes left", *left)
            print(*(f"    {one.host}: {last_words(config, one)}" for one in made), sep="\n")
        with machines(2) as made:
            codes, seconds = ended([start(one, made[0], config, saves) for one in made])
            same = "the same adapter" if adapter(saves) == right else "ANOTHER ADAPTER"
            print(f"    again: exit codes {codes}, {same}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
