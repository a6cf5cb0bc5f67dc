"""A job on a real Slurm: sent back into the queue in the middle of a stage, it goes on where it was, and finishes."""

import os
import subprocess
import sys

import pytest

from tests.run.namespaces import adapter, reached, write_config
from tests.tools import slurm

WHY = slurm.missing()
pytestmark = [pytest.mark.train, pytest.mark.skipif(WHY is not None, reason=str(WHY))]


def test_a_job_that_is_preempted_saves_a_checkpoint_and_ends_as_an_undisturbed_run(tmp_path, monkeypatch):
    """Only the signal makes a checkpoint here, so a second attempt that resumes shows that the first one had saved."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config, saves = write_config(tmp_path, steps=60), tmp_path / "saves"
    given = ["--set", "launch={}", "--set", "sft.trainer.save_steps=1000"]
    with slurm.cluster() as made:
        job, _ = slurm.submit(made, config, saves, *given)
        reached(saves, 10)
        made.call("scontrol", "requeue", job)
        assert made.until(job, ("COMPLETED", "FAILED")) == ("COMPLETED", 1, "0:0")
    logs = saves / "two.resolved" / "logs"
    assert os.readlink(logs / "latest") == "attempt_2"
    first, second = ((logs / f"attempt_{number}" / "machine_0.txt").read_text() for number in (1, 2))
    assert "stopped at step" in first
    assert "run the same command again to go on" in first
    assert "sft: starts; goes on at step" in second
    undisturbed = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--saves", str(tmp_path / "other"), *given]
    subprocess.run(undisturbed, check=True, capture_output=True)
    assert adapter(saves) == adapter(tmp_path / "other")
