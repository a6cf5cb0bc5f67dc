"""Two machines, which are network namespaces, train as one does; when one is killed, both end, and go on later.

`benchmarks/machines.py` tries the other ways to lose a machine.
"""

import signal
import subprocess
import sys

import pytest

from tests.run import namespaces
from tests.run.namespaces import ROOT, adapter, ended, every, gone, last_words, machines, reached, start, write_config

WHY = namespaces.missing()
pytestmark = [pytest.mark.train, pytest.mark.skipif(WHY is not None, reason=str(WHY))]


def test_a_machine_is_killed_and_the_next_run_ends_as_one_machine_would(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config, saves = write_config(tmp_path), tmp_path / "saves"
    with machines(2) as made:
        runs = [start(one, made[0], config, saves) for one in made]
        reached(saves, 5)
        every(made[1], signal.SIGKILL)
        codes, _ = ended(runs)
        assert codes == [75, -signal.SIGKILL]
        assert last_words(config, made[0]) == (
            "machine 1 (machine-b) ended without a word at stage `sft`; "
            "run the same command on every machine again to go on"
        )
        assert gone(made[0])
        codes, _ = ended([start(one, made[0], config, saves) for one in made])
        assert codes == [0, 0]
        shown = [(tmp_path / f"{one.host}.txt").read_text(encoding="utf-8") for one in made]
        assert "sft: starts; goes on at step 3 of 12\n" in shown[0] or "goes on at step 6 of 12\n" in shown[0]
        for text in shown:  # machine 0 has the prepared rows, and each of them shows the training
            assert text.count("sft: 12 steps, batch 2 × 1 accumulation × 2 processes = 4 rows a step") == 2
            assert "sft: step 12/12" in text
    together = adapter(saves)
    alone = ["--set", "launch={processes: 2}"]
    words = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--saves", str(tmp_path / "alone")]
    done = subprocess.run([*words, *alone], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert adapter(tmp_path / "alone") == together
