"""A job on a real Slurm: sent back into the queue in the middle of a stage, it goes on where it was, and finishes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import slurm

WHY = slurm.missing()
pytestmark = [pytest.mark.train, pytest.mark.skipif(WHY is not None, reason=str(WHY))]

ROOT = Path(__file__).parents[2]
CONFIG = """\
template: med
data:
  books:   {{path: {data}/med_book.jsonl, format: text, max_samples: 40}}
  consult: {{path: {data}/med_qa.json, format: alpaca, max_samples: 60}}
stages:
  init: {{architecture: llama, hidden_size: 64, num_attention_heads: 2, vocab_size: 600, data: [books]}}
  sft:
    data: consult
    eval_size: 0
    trainer: {{learning_rate: 1e-2, max_steps: 60, max_length: 256, per_device_train_batch_size: 4,
              gradient_checkpointing: false, logging_steps: 5, save_steps: 1000}}
"""


def adapter(saves):
    (file,) = saves.glob("sft-*[0-9a-f]/model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_job_that_is_preempted_saves_a_checkpoint_and_ends_as_an_undisturbed_run(tmp_path, monkeypatch):
    """Only the signal makes a checkpoint here, so a second attempt that resumes shows that the first one had saved."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config, saves = tmp_path / "one.yaml", tmp_path / "saves"
    config.write_text(CONFIG.format(data=ROOT / "data"), encoding="utf-8")
    with slurm.cluster() as made:
        job, _ = slurm.submit(made, config, saves)
        slurm.reached(saves, 10)
        made.call("scontrol", "requeue", job)
        assert made.until(job, ("COMPLETED", "FAILED")) == ("COMPLETED", 1, "0:0")
    logs = saves / "one.resolved" / "logs"
    assert os.readlink(logs / "latest") == "attempt_2"
    first, second = ((logs / f"attempt_{number}" / "machine_0.txt").read_text() for number in (1, 2))
    assert "stopped at step" in first
    assert "run the same command again to go on" in first
    assert "sft: starts; goes on at step" in second
    undisturbed = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--saves", str(tmp_path / "other")]
    subprocess.run(undisturbed, check=True, capture_output=True)
    assert adapter(saves) == adapter(tmp_path / "other")
