"""What `gc` must keep: what any known config as written, the last run of each, or a running stage refers to."""

import subprocess
import sys
from pathlib import Path

import pytest
from planned import CHAIN, STAGES, pretend

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.errors import Busy
from pipeline.plan.keeping import needed_folders
from pipeline.plan.placing import build_plan
from pipeline.saves.links import claim, link, note_run
from pipeline.saves.locks import locked, reading, unread

TRIAL = "sft.trainer.learning_rate=2e-5"
SAVES = Path("saves")


def ran(name, *assignments):
    """Leave what a finished run of a config leaves; the steps by name."""
    plan = build_plan(load_config(Path(name), assignments), SAVES)
    claim(SAVES / plan.pipeline.name, Path(name))
    note_run(SAVES / plan.pipeline.name, [name for step in plan.steps for name in (step.folder.name, step.part.name)])
    for step in plan.steps:
        if step.state != "done":
            pretend(step)
        else:
            link(step.folder, step.link)
    return {step.name: step for step in build_plan(load_config(Path(name), assignments), SAVES).steps}


def states(name, *assignments):
    plan = build_plan(load_config(Path(name), assignments), SAVES)
    return {step.name: step.state for step in plan.steps}


DONE = dict.fromkeys(STAGES, "done")


@pytest.fixture
def written(project):
    project.write("x.yaml", CHAIN)
    ran("x.yaml")
    return project


def test_a_trial_does_not_cost_the_config_its_work(written):
    """`run`, `run --set …`, `gc --yes`: both are done still, since the trial is the last run."""
    ran("x.yaml", TRIAL)
    assert main(["gc", "--yes"]) == 0
    assert states("x.yaml") == states("x.yaml", TRIAL) == DONE


def test_an_older_trial_is_a_leftover(written, capsys):
    trial = ran("x.yaml", TRIAL)
    ran("x.yaml")
    assert main(["gc", "--yes"]) == 0
    assert states("x.yaml") == DONE
    assert not trial["sft"].folder.exists()
    assert f"{trial['sft'].folder}" in capsys.readouterr().out


def test_a_config_that_was_renamed_keeps_its_work(written):
    Path("x.yaml").rename("y.yaml")
    assert main(["gc", "--yes"]) == 0
    assert states("y.yaml") == DONE
    assert not Path("saves/x").exists()  # its links belong to a file that is gone


def test_the_trial_of_another_config_costs_nothing(written):
    written.write("other.yaml", CHAIN.replace("lora: {r: 8}}\n  merge", "lora: {r: 4}}\n  merge"))
    ran("other.yaml")
    ran("other.yaml", TRIAL)
    assert main(["gc", "--yes"]) == 0
    assert states("x.yaml") == states("other.yaml") == states("other.yaml", TRIAL) == DONE


def test_a_config_that_cannot_be_read_is_a_doubt_and_nothing_finished_goes(written, capsys):
    trial = ran("x.yaml", TRIAL)
    ran("x.yaml")
    Path("x.yaml").write_text(CHAIN + "  nonsense: {}\n", encoding="utf-8")
    needed = needed_folders(SAVES)
    assert needed.doubts[0].startswith("`x.yaml` cannot be read (x.yaml:")
    assert main(["gc", "--yes"]) == 0
    assert trial["sft"].folder.exists()
    assert "`x.yaml` cannot be read" in capsys.readouterr().out
    Path("x.yaml").write_text(CHAIN, encoding="utf-8")
    assert states("x.yaml") == DONE


def test_unfinished_work_of_a_trial_is_listed_unless_it_is_the_last_run(written):
    trial = {step.name: step for step in build_plan(load_config(Path("x.yaml"), [TRIAL]), SAVES).steps}["sft"]
    trial.part.mkdir()
    (trial.part / "spec.json").write_text('{"of": "x", "stage": "sft"}', encoding="utf-8")
    note_run(SAVES / "x", [trial.folder.name, trial.part.name])
    assert main(["gc", "--yes"]) == 0
    assert trial.part.exists()
    ran("x.yaml")
    assert main(["gc", "--yes"]) == 0
    assert not trial.part.exists()


def test_what_a_running_stage_works_in_and_reads_stays(written):
    trial = ran("x.yaml", TRIAL)
    ran("x.yaml")
    with reading([trial["merge"].folder]):
        assert main(["gc", "--yes"]) == 0
        assert trial["merge"].folder.exists()
        assert not trial["dpo"].folder.exists()
    with locked(trial["sft"].part, "sft"):
        trial["sft"].part.mkdir()
        assert main(["gc", "--yes"]) == 0
        assert trial["sft"].part.exists()
    assert not trial["merge"].folder.exists()


def test_a_folder_that_is_read_is_not_renamed(written):
    folder = ran("x.yaml")["sft"].folder
    code = """
import sys, time
from pathlib import Path
from pipeline.saves.locks import reading
with reading([Path(sys.argv[1])]):
    print("reads", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "reads\n"
    told = f"stage `sft`: `{folder}` is being read by another run, so it cannot be rebuilt; wait for it"
    with pytest.raises(Busy) as caught, unread(folder, "sft"):
        pass
    assert str(caught.value) == told
    other.kill()
    other.wait()
    with unread(folder, "sft"):
        pass
