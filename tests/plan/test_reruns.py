"""The tables of what runs again, in docs/reliability.md: every row is tried on a chain that has run."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from planned import CHAIN, INIT, ROWS, TOP, pretend

from pipeline.config.checker import load_config
from pipeline.plan import fingerprint
from pipeline.plan.placing import build_plan
from stages import find

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
ASSIGNMENT = re.compile(r"`([a-z0-9_.]+=.+)`\Z")
JUDGED = (
    "add_tokens: [<turn>]\n"
    + TOP
    + """\
  thumbs: {path: thumbs.jsonl, format: labelled}
  held: {path: held.jsonl, format: text}
  asks: {path: asks.jsonl, format: alpaca}
stages:
  reward: {data: prefer, trainer: {learning_rate: 5e-5}}
  select: {data: consult, method: quality, scorer: $reward, keep: 1}
  sft: {data: $select, lora: {r: 8}}
  kto: {data: thumbs, lora: {r: 8}, trainer: {learning_rate: 5e-5}}
  evaluate:
    compare: [base, kto]
    data: held
    prompts: asks
    gates: [{metric: perplexity, data: held, stage: kto, max: 90}]
"""
)
PERPLEXITY = {"metric": "perplexity", "data": "held", "model": "kto", "value": 85.0, "ci": None}
MEASURED = {"models": ["base", "kto"], "figures": [PERPLEXITY], "comparisons": []}
MODEL = "model: [m, style]\n"


def made(project):
    """A chain that makes its model."""
    assert INIT in CHAIN
    return CHAIN


def judged(project):
    """A chain on a folder and an adapter, with a stage of each kind that the other chain has not."""
    embedding = {"model.embed_tokens.weight": [4, 8], "model.layers.0.self_attn.q_proj.weight": [8, 8]}
    project.model("m", weights=embedding)
    project.adapter("style")
    project.model("judge", architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})
    project.write("thumbs.jsonl", '{"prompt": "a", "completion": "b", "label": true}\n')
    project.write("held.jsonl", '{"text": "b"}\n')
    project.write("asks.jsonl", '{"instruction": "a", "output": "b"}\n')
    return MODEL + JUDGED


CHAINS = (made, judged)


def tables():
    """Each row of the tables: its chain, the change, an example of it, and the stages that run again."""
    parts = DOCS.read_text(encoding="utf-8").split("| change |")[1:]
    for chain, part in zip(CHAINS, parts, strict=True):
        lines = part.splitlines()[2:]
        for line in lines[: lines.index("")]:
            change, example, again = (cell.strip() for cell in line.strip("|").split("|"))
            yield chain, change, example, [] if again == "nothing" else again.split(", ")


def same_size_and_date(name):
    def change(project):
        path = project.folder / name
        stat = path.stat()
        path.write_text(path.read_text(encoding="utf-8").replace('"b"', '"z"'), encoding="utf-8")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    return change


def rewrite(*pairs):
    def change(project):
        for old, new in pairs:
            assert old in project.text
            project.text = project.text.replace(old, new)

    return change


def move(name, place):
    def change(project):
        (project.folder / place).parent.mkdir(exist_ok=True)
        (project.folder / name).rename(project.folder / place)

    return change


def both(*changes):
    def change(project):
        for each in changes:
            each(project)

    return change


def dates(project):
    times = [0, 10**18, 4 * 10**18]
    for number, path in enumerate(sorted(project.folder.rglob("*"))):
        if not path.is_symlink():
            os.utime(path, ns=(times[number % 3],) * 2)


def back(project):
    for rate in ("2e-5", "5e-5"):
        for step in project.plan(CHAIN.replace("5e-5", rate)).values():
            if step.state != "done":
                pretend(step)


def last_byte(name):
    def change(project):
        path = project.folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return change


def finished(stage, change):
    """A change of a finished folder."""

    def changed(project):
        folder = project.plan(project.text)[stage].folder
        change(folder)

    return changed


def flip(folder):
    (folder / "model.safetensors").write_bytes(b"weightr")


SCORER = ("scorer: $reward", "scorer: judge")
CHANGES = {
    made: {
        "nothing": lambda project: None,
        "comments, the order of keys, the way a number is written": rewrite(
            ("{learning_rate: 5e-5, logging_steps: 10}", "{logging_steps: 10, learning_rate: 0.00005}  # slowly")
        ),
        "names of the config, of stages and of data": rewrite(("dpo: {", "align: {use: dpo, ")),
        "where a data file is": both(
            rewrite(("path: consult.jsonl", "path: old/rows.jsonl")), move("consult.jsonl", "old/rows.jsonl")
        ),
        "dates of files, in the past or in the future": dates,
        "going back to earlier settings": back,
        "rows of a data file, with equal size and date": same_size_and_date("prefer.jsonl"),
        "rows of a data file that two stages read": same_size_and_date("consult.jsonl"),
        "one bit of a finished folder": finished("sft", flip),
        "a finished folder that is deleted": finished("sft", shutil.rmtree),
    },
    judged: {
        "nothing": lambda project: None,
        "the name of a reward model or of selected rows": rewrite(
            ("  reward: {", "  judge_of_rows: {use: reward, "),
            ("$reward", "$judge_of_rows"),
            ("  select: {", "  best: {use: select, "),
            ("$select", "$best"),
        ),
        "where the model and its adapter are": both(
            rewrite(("[m, style]", "[old/m, old/style]")), move("m", "old/m"), move("style", "old/style")
        ),
        "the weights below the adapter": last_byte("m/model.safetensors"),
        "the weights of the adapter": last_byte("style/adapter_model.safetensors"),
        "the preference pairs of `reward`": same_size_and_date("prefer.jsonl"),
        "the rows that `select` chooses from": same_size_and_date("consult.jsonl"),
        "the answers of `kto`": same_size_and_date("thumbs.jsonl"),
        "the bound of a gate": rewrite(("max: 90", "max: 80")),
        "the rows that `evaluate` measures on": same_size_and_date("held.jsonl"),
        "the rows that `evaluate` asks": same_size_and_date("asks.jsonl"),
        "the name of a compared model": rewrite(
            ("  kto: {", "  liked: {use: kto, "), ("[base, kto]", "[base, liked]"), ("stage: kto", "stage: liked")
        ),
        "one bit of a finished reward model": finished("reward", flip),
        "selected rows that are deleted": finished("select", shutil.rmtree),
    },
}


@pytest.mark.parametrize(("chain", "change", "example", "again"), list(tables()))
def test_what_runs_again(project, monkeypatch, chain, change, example, again):
    assert ROWS.keys() == {"books.jsonl", "consult.jsonl", "prefer.jsonl"}
    project.text = chain(project)
    stages = []
    for step in project.plan(project.text).values():
        stages.append(step.use)
        pretend(step)
        if step.use == "evaluate":
            (step.folder / "evaluation.json").write_text(json.dumps(MEASURED), encoding="utf-8")
    assignment, fresh, name = ASSIGNMENT.match(example), [], "x.yaml"
    if library := re.match(r"`([a-z_-]+)` \S+ → (\S+)\Z", example):
        known = fingerprint._version
        monkeypatch.setattr(fingerprint, "_version", lambda of: library[2] if of == library[1] else known(of))
    elif version := re.match(r"`version` in `stages/(\w+).py`", example):
        monkeypatch.setattr(f"stages.{version[1]}.STAGE", replace(find(version[1]), version=99))
    elif asked := re.match(r"`--fresh (\w+)`", example):
        fresh = [asked[1]]
    elif not assignment:
        CHANGES[chain][change](project)
        name = "y.yaml" if change.startswith("names") else name
    project.write(name, project.text)
    pipeline = load_config(Path(name), [assignment[1]] if assignment else [])
    planned = build_plan(pipeline, Path("saves"), fresh=fresh)
    assert planned.problems == []
    states = {step.use: step.state for step in planned.steps}
    assert list(states) == stages
    assert states == {stage: "run" if stage in again else "done" for stage in stages}


def test_the_tables_are_whole():
    rows = [(chain, change) for chain, change, _, _ in tables()]
    assert len(rows) == len(set(rows))
    for chain, changes in CHANGES.items():
        assert set(changes) < {change for other, change in rows if other is chain}
    assert [sum(chain is other for other, _ in rows) for chain in CHAINS] == [28, 33]
