"""How a plan sees data that is more than one file: fingerprints, data sets on the Hub, rows with tools."""

import json
from pathlib import Path

import pytest
from planned import INIT, TOP

from pipeline.config.checker import load_config
from pipeline.errors import StageFailed
from pipeline.plan.placing import build_plan
from pipeline.plan.step import check_unchanged

COMMIT = "b" * 40
TWO = INIT.replace("path: books.jsonl", "path: books")


def same(project, before):
    return project.plan(TWO)["init"].fingerprint == before.fingerprint


@pytest.fixture
def books(project):
    project.write("books/a.jsonl", '{"text": "a"}\n')
    project.write("books/b.jsonl", '{"text": "b"}\n')
    return project


def test_the_content_of_every_file_counts(books):
    before = books.plan(TWO)["init"]
    assert set(before.files) == {"books/a.jsonl", "books/b.jsonl"}
    assert same(books, before)
    books.write("books/b.jsonl", '{"text": "c"}\n')
    assert not same(books, before)
    books.write("books/b.jsonl", '{"text": "b"}\n')
    assert same(books, before)
    books.write("books/c.txt", "c")
    assert not same(books, before)


def test_names_count_for_the_order_only(books):
    before = books.plan(TWO)["init"]
    Path("books/b.jsonl").rename("books/z.jsonl")
    assert same(books, before)
    Path("books/z.jsonl").rename("books/0.jsonl")
    assert not same(books, before)


def test_a_folder_of_one_file_is_that_file(project):
    before = project.plan(INIT)["init"]
    project.write("books/a.jsonl", Path("books.jsonl").read_bytes())
    assert same(project, before)


def test_a_file_that_changes_while_the_run_goes_on(books):
    books.write("x.yaml", TWO)
    planned = build_plan(load_config(Path("x.yaml")), Path("saves"))
    books.write("books/b.jsonl", '{"text": "other"}\n')
    with pytest.raises(StageFailed, match=r"^stage `init`: `books/b.jsonl` changed while the run was going on"):
        check_unchanged(planned.steps[0], planned.hashes)


# The Hub

HUB = INIT.replace("{path: books.jsonl", f"{{path: org/set@{COMMIT}, split: train")


@pytest.fixture
def hub(project, monkeypatch):
    """A data set on the Hub; fetched once it was asked for."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot(name, *, local_files_only=False, **_):
        folder = project.folder / "cache"
        if not local_files_only:
            asked.append(name)
            project.write("cache/train.jsonl", '{"text": "a"}\n{"text": ""}\n')
        if not folder.is_dir():
            raise LocalEntryNotFoundError("not here")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def build(project, text, **settings):
    project.write("x.yaml", text)
    return build_plan(load_config(Path("x.yaml")), Path("saves"), **settings)


def test_a_plan_does_not_download_and_a_run_does(project, hub):
    before = build(project, HUB)
    assert (hub, before.problems, before.rows) == ([], [], {})
    assert before.notes == [
        f"`org/set@{COMMIT}` is not on this machine; `run` fetches it, until then its rows are unchecked"
    ]
    after = build(project, HUB, fetch=True)
    assert (set(hub), after.notes, after.rows) == ({"org/set"}, [], {"books": 2})
    assert [problem.split("`books`: ")[1] for problem in after.problems] == [
        f"{project.folder}/cache/train.jsonl:2: `text` is empty; fill it in or remove the row"
    ]
    assert after.steps[0].fingerprint == before.steps[0].fingerprint
    assert list(after.steps[0].files) == [f"{project.folder}/cache/train.jsonl"]


def test_another_commit_is_other_data(project, hub):
    one, other = (build(project, text).steps[0] for text in (HUB, HUB.replace("b" * 40, "c" * 40)))
    assert one.fingerprint != other.fingerprint


def test_why_a_data_set_cannot_be_fetched(project, hub, monkeypatch):
    def down(name, **_):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", down)
    assert build(project, HUB, fetch=True).problems == [
        f"x.yaml:3:3: data `books`: the Hub does not hand out the data set `org/set@{COMMIT}` (no route to host); "
        "check name, commit, access and network"
    ]


# Tools

ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALLS = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
LOST = "the tools, tool calls, the arguments of tool calls"
CHAT = TOP.replace("path: consult.jsonl, format: alpaca", "path: chat.jsonl, format: messages")
CHAT += "stages:\n  init: {architecture: bloom, data: consult}\n  sft: {data: consult}\n"


@pytest.mark.parametrize(
    ("row", "template", "refused"),
    [
        ({"messages": [ASK, ANSWER], "tools": [{"name": "f"}]}, "med", True),
        ({"messages": [ASK, CALLS]}, "alpaca_zh", True),
        ({"messages": [ASK, ANSWER, {"role": "tool", "content": "c"}, ANSWER]}, "plain", True),
        ({"messages": [ASK, ANSWER], "tools": []}, "med", False),
        ({"messages": [ASK, CALLS], "tools": [{"name": "f"}]}, "chatml", False),
        ({"messages": [ASK, CALLS], "tools": [{"name": "f"}]}, "llama3", False),
        ({"messages": [ASK, CALLS], "tools": [{"name": "f"}]}, "qwen", False),
    ],
)
def test_rows_with_tools_need_a_template_that_writes_them(project, row, template, refused):
    project.write("chat.jsonl", json.dumps(row))
    for _ in range(2):  # the second time the rows are not read again
        assert (
            build(project, CHAT.replace("template: med", f"template: {template}")).problems
            == [
                f"x.yaml:1:11: stage `sft`: data `consult` holds tool calls, and the template does not write {LOST}; "
                "choose `template: chatml`, `llama3` or `qwen`, or remove rows with tools"
            ]
            * refused
        )


def test_a_template_that_raises_at_a_tool(project):
    project.write("chat.jsonl", json.dumps({"messages": [ASK, CALLS]}))
    own = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    project.write("own.jinja", own + "{{ m.content }}{{ eos_token }}{% endfor %}")
    assert build(project, CHAT.replace("template: med", "template: own.jinja")).problems == [
        "x.yaml:1:11: stage `sft`: data `consult` holds tool calls, and the template cannot render tool calls "
        "(no tools); choose `template: chatml`, `llama3` or `qwen`, or remove rows with tools"
    ]
