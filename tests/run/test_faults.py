"""A fixed sample of the faults that `make faults` enumerates: kill -9 at one change of a file, and the run done again.

The harness runs in a process of its own, since it forks runs and this one may have started threads.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
STAGES = ["pt", "sft", "dpo", "merge", "quantize"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of each point of the sample."""
    file = tmp_path_factory.mktemp("faults") / "results.jsonl"
    words = [sys.executable, "-m", "tests.faults.harness", "--sample", "--results", str(file)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert file.exists(), done.stderr[-4000:]
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_a_change_of_a_file_ends_as_an_uninterrupted_one_when_run_again(results, stage):
    mine = [result for result in results if result["point"]["stage"] == stage]
    assert [result for result in mine if result["failures"]] == []
    *killed, last = mine
    assert [result["point"] for result in killed if result["fault"] is None] == []
    assert last["fault"] is None  # one point further there is no call left to be killed at


@pytest.mark.parametrize(("stage", "changes"), [("pt", "complete.json"), ("merge", "record.json")])
def test_the_sample_kills_where_it_matters(results, stage, changes):
    faults = [result["fault"] for result in results if result["point"]["stage"] == stage and result["fault"]]
    assert {"create", "write", "fsync"} <= {fault["name"] for fault in faults if changes in fault["path"]}
    assert {result["victim"] for result in results if result["fault"]} == {"runner", "stage"}
