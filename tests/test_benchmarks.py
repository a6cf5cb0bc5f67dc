"""The benchmarks run, and the ways that they compare give the same numbers: `make bench-smoke`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.train


def bench(name, *arguments):
    """What a benchmark prints; it must end with 0."""
    words = [sys.executable, f"benchmarks/{name}.py", *arguments]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_step_of_ours_and_of_a_bare_trl_script_have_the_same_loss():
    out = bench("steps", "--steps", "2", "--rounds", "1", "--default")
    differences = re.findall(r"^\| (sft|dpo) .*\| ([\d.e+-]+) \|$", out, re.M)
    assert [stage for stage, _ in differences] == ["sft", "dpo"]
    assert all(float(difference) <= 1e-5 for _, difference in differences)


def test_packed_rows_have_the_losses_of_their_documents():
    out = bench("packing", "--only", "hidden64", "--steps", "1", "--rounds", "1", "--lengths", "256")
    (apart, together) = re.findall(r"largest difference: ([\d.e+-]+) \(not kept apart: ([\d.e+-]+)\)", out)[0]
    assert float(apart) < 1e-4 < float(together)


def test_the_chain_runs_and_its_seconds_are_told_apart(tmp_path):
    out = bench("chain", "--steps", "2", "2", "2", "--rounds", "1", "--work", str(tmp_path))
    for what in ("plan and imports, before `pt`", "`sft`: its steps", "`merge`", "after `merge`"):
        assert re.search(rf"^\| {re.escape(what)} \| \d+\.\d\d \|$", out, re.M), out
    assert re.search(r"^\| dpo \| 0\.\d{4} → 0\.\d{4} \| – \|$", out, re.M), out
