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
STAGES = ["pt", "sft", "dpo", "merge", "quantize", "add_tokens", "reward", "select", "kto", "evaluate"]
CASES = [*STAGES, "sft+rows", "rehearsal"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of each point of the sample."""
    file = tmp_path_factory.mktemp("faults") / "results.jsonl"
    words = [sys.executable, "-m", "tests.faults.harness", "--sample", "--results", str(file)]
    words += ["--stages", ",".join(CASES)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert file.exists(), done.stderr[-4000:]
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("stage", CASES)
def test_a_run_killed_at_a_change_of_a_file_ends_as_an_uninterrupted_one_when_run_again(results, stage):
    mine = [result for result in results if result["point"]["stage"] == stage]
    assert [result for result in mine if result["failures"]] == []
    assert any(result["fault"] for result in mine)


@pytest.mark.parametrize("stage", ["pt", "reward", "select", "kto", "evaluate"])
def test_one_point_after_the_last_call_of_a_stage_nothing_is_killed(results, stage):
    *killed, last = [result for result in results if result["point"]["stage"] == stage]
    assert [result["point"] for result in killed if result["fault"] is None] == []
    assert last["fault"] is None


@pytest.mark.parametrize("changes", ["complete.json", "record.json"])
def test_the_sample_kills_where_a_checkpoint_and_a_folder_begin_to_count(results, changes):
    faults = [result["fault"] for result in results if result["point"]["stage"] == "pt" and result["fault"]]
    assert {"create", "write", "fsync"} <= {fault["name"] for fault in faults if changes in fault["path"]}


@pytest.mark.parametrize("stage", ["reward", "select", "kto", "evaluate"])
def test_the_sample_kills_at_each_kind_of_call(results, stage):
    killed = [result for result in results if result["point"]["stage"] == stage and result["fault"]]
    names = {"create", "write", "truncate", "mkdir", "rename", "link", "chmod", "fsync", "utime", "delete"}
    assert names <= {result["fault"]["name"] for result in killed}
    assert {"create", "write"} <= {result["fault"]["name"] for result in killed if result["victim"] == "stage"}
    assert any(result["torn"] for result in killed)


def test_the_sample_kills_where_the_verdicts_of_gates_are_written(results):
    at = [result for result in results if result["fault"] and result["fault"]["path"].endswith("gates.json")]
    assert {result["fault"]["name"] for result in at} == {"create", "write"}
    assert any(result["torn"] for result in at)


def test_the_sample_kills_runners_stages_and_rehearsals(results):
    killed = [result for result in results if result["fault"]]
    assert {result["victim"] for result in killed} == {"runner", "stage"}
    rehearsed = [result for result in killed if result["point"]["stage"] == "rehearsal"]
    assert {".rehearsal" in result["fault"]["path"] for result in rehearsed} == {True}
