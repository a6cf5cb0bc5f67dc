"""Work in several processes: the order of the results, and the end of every process with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.runtime.errors import StageError
from stages.runtime.processes import in_fork, parallel_map


def test_few_items_need_no_other_process():
    assert list(parallel_map(lambda _: os.getpid(), range(3), 2, few=3)) == [os.getpid()] * 3
    assert os.getpid() not in list(parallel_map(lambda _: os.getpid(), range(4), 2, few=3))
    assert list(parallel_map(lambda item: item * 2, range(50), 2)) == [2 * item for item in range(50)]


def test_items_are_taken_only_as_they_are_needed():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    assert next(parallel_map(lambda item: item, items(), 2)) == 0
    assert len(taken) < 10


def test_a_killed_process_counts_as_out_of_memory():
    with pytest.raises(MemoryError, match=r"^a process was killed, as the kernel does when memory runs out$"):
        list(parallel_map(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


def test_processes_end_with_their_parent(tmp_path):
    code = (
        "import os, sys, time\nfrom stages.runtime.processes import parallel_map\n"
        "def work(item):\n    open(f'{sys.argv[1]}/{os.getpid()}', 'w').close()\n    time.sleep(600)\n"
        "list(parallel_map(work, range(8), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    while len(children := [int(file.name) for file in tmp_path.iterdir()]) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{child}").exists() and _runs(child) for child in children):
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_what_a_forked_process_sets_is_gone_afterwards(monkeypatch):
    state = {"opened": False}

    def work():
        state["opened"] = True
        os.environ["OPENED"] = "1"
        return os.getpid()

    assert in_fork(work) != os.getpid()
    assert (state["opened"], os.environ.get("OPENED")) == (False, None)


def test_an_error_of_a_forked_process_is_raised_here():
    def refuse():
        raise StageError("no")

    with pytest.raises(StageError, match=r"^no$"):
        in_fork(refuse)
    with pytest.raises(MemoryError, match=r"^a process was killed"):
        in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_process_whose_parent_ended_before_it_could_ask_ends_at_once():
    program = "from stages.runtime.processes import end_with_parent; end_with_parent({parent}); print('works')"
    for parent, said in ((os.getpid(), "works\n"), (os.getppid(), "")):
        words = [sys.executable, "-c", program.format(parent=parent)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0 if said else 1, said)
