"""The table of what runs again, in docs/reliability.md: every row is tried on a chain that has run."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from planned import CHAIN, ROWS, STAGES, pretend

from pipeline.config.checker import load_config
from pipeline.plan import fingerprint
from pipeline.plan.placing import build_plan
from stages import dpo

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
ASSIGNMENT = re.compile(r"`([a-z0-9_.]+=.+)`\Z")


def table():
    """Each row of the table: the change, an assignment if it is made with one, and the stages that run again."""
    lines = DOCS.read_text(encoding="utf-8").partition("| change |")[2].splitlines()[2:]
    for line in lines[: lines.index("")]:
        change, example, again = (cell.strip() for cell in line.strip("|").split("|"))
        assignment = ASSIGNMENT.match(example)
        yield change, assignment and assignment[1], [] if again == "nothing" else again.split(", ")


def same_size_and_date(name):
    def change(project):
        path = project.folder / name
        stat = path.stat()
        path.write_text(path.read_text(encoding="utf-8").replace('"b"', '"z"'), encoding="utf-8")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    return change


def rewrite(project, old, new):
    assert old in CHAIN
    project.text = CHAIN.replace(old, new)


def move(project):
    rewrite(project, "path: consult.jsonl", "path: old/rows.jsonl")
    (project.folder / "old").mkdir()
    (project.folder / "consult.jsonl").rename(project.folder / "old/rows.jsonl")


def dates(project):
    times = [0, 10**18, 4 * 10**18]
    for number, path in enumerate(sorted(project.folder.rglob("*"))):
        if not path.is_symlink():
            os.utime(path, ns=(times[number % 3],) * 2)


def back(project):
    for rate in ("2e-5", "5e-5"):
        project.text = CHAIN.replace("5e-5", rate)
        for step in project.plan(project.text).values():
            if step.state != "done":
                pretend(step)


def flip(project):
    path = project.plan()["sft"].folder / "model.safetensors"
    path.write_bytes(b"weightr")


def delete(project):
    shutil.rmtree(project.plan()["sft"].folder)


CHANGES = {
    "nothing": lambda project: None,
    "comments, the order of keys, the way a number is written": lambda project: rewrite(
        project, "{learning_rate: 5e-5, logging_steps: 10}", "{logging_steps: 10, learning_rate: 0.00005}  # slowly"
    ),
    "names of the config, of stages and of data": lambda project: rewrite(project, "dpo: {", "align: {use: dpo, "),
    "where a data file is": move,
    "dates of files, in the past or in the future": dates,
    "going back to earlier settings": back,
    "rows of a data file, with equal size and date": same_size_and_date("prefer.jsonl"),
    "rows of a data file that two stages read": same_size_and_date("consult.jsonl"),
    "one bit of a finished folder": flip,
    "a finished folder that is deleted": delete,
}


@pytest.mark.parametrize(("change", "assignment", "again"), list(table()))
def test_what_runs_again(project, monkeypatch, change, assignment, again):
    assert ROWS.keys() == {"books.jsonl", "consult.jsonl", "prefer.jsonl"}
    for step in project.plan().values():
        pretend(step)
    project.text, fresh, name = CHAIN, [], "x.yaml"
    if assignment is None and change.startswith("the version of a library"):
        version = fingerprint._version
        monkeypatch.setattr(fingerprint, "_version", lambda library: "1.17.0" if library == "trl" else version(library))
    elif assignment is None and change.startswith("the version of one of our own"):
        monkeypatch.setattr("stages.dpo.STAGE", replace(dpo.STAGE, version=99))
    elif change == "asking for it":
        fresh = ["pt"]
    elif assignment is None:
        CHANGES[change](project)
        name = "y.yaml" if change.startswith("names") else name
    project.write(name, project.text)
    pipeline = load_config(Path(name), [assignment] if assignment else [])
    planned = build_plan(pipeline, Path("saves"), fresh=fresh)
    assert planned.problems == []
    states = {step.use: step.state for step in planned.steps}
    assert list(states) == STAGES
    assert states == {stage: "run" if stage in again else "done" for stage in STAGES}


def test_the_table_is_whole():
    changes = [change for change, _, _ in table()]
    assert len(changes) == len(set(changes)) == 28
    assert set(CHANGES) < set(changes)
