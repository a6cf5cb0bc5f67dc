"""How a plan sees data that is more than one file: fingerprints, data sets on the Hub, rows with tools."""

import json
from pathlib import Path

import pytest
from planned import INIT, TOP

from pipeline.cli import main
from pipeline.config.checker import load_config
from pipeline.errors import StageFailed
from pipeline.plan.placing import build_plan
from pipeline.plan.step import check_unchanged

COMMIT = "b" * 40
TWO = INIT.replace("path: books.jsonl", "path: books")


def test_what_nothing_reads_is_a_note(project):
    row = {"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}], "id": 7}
    project.write("chats.jsonl", json.dumps(row) + "\n" + json.dumps(row) + "\n")
    text = (
        INIT.replace("  prefer:", "  chats: {path: chats.jsonl, format: messages}\n  prefer:")
        + "  sft: {data: chats}\n"
    )
    notes = (
        "note: data `chats`: columns that nothing reads: `id`\n"
        "note: data `chats`: keys of messages that nothing reads: `name`\n"
    )
    for _ in range(2):  # the second time from what was kept of the first reading
        code, shown = project.validate(text)
        assert (code, notes in shown) == (0, True)
    assert main(["data", "x.yaml", "chats"]) == 0
    shown = project.capsys.readouterr().out
    assert "  columns that nothing reads: `id`\n  keys of messages that nothing reads: `name`\n" in shown


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
TOOLS = "choose `template: chatml`, `llama3` or `qwen`, or remove rows with tools"
CHAT = TOP.replace("path: consult.jsonl, format: alpaca", "path: chat.jsonl, format: messages")
CHAT += "stages:\n  init: {architecture: bloom, data: consult}\n  sft: {data: consult}\n"


@pytest.mark.parametrize(
    ("row", "template", "lost"),
    [
        ({"messages": [ASK, ANSWER], "tools": [{"name": "f"}]}, "med", "the tools"),
        ({"messages": [ASK, CALLS]}, "alpaca_zh", "tool calls, the arguments of tool calls"),
        (
            {"messages": [ASK, CALLS], "tools": [{"name": "f"}]},
            "plain",
            "the tools, tool calls, the arguments of tool calls",
        ),
        ({"messages": [ASK, ANSWER], "tools": []}, "med", None),
        ({"messages": [ASK, CALLS], "tools": [{"name": "f"}]}, "chatml", None),
        ({"messages": [ASK, CALLS], "tools": [{"name": "f"}]}, "llama3", None),
        ({"messages": [ASK, CALLS], "tools": [{"name": "f"}]}, "qwen", None),
    ],
)
def test_rows_with_tools_need_a_template_that_writes_them(project, row, template, lost):
    project.write("chat.jsonl", json.dumps(row))
    expected = [
        "x.yaml:1:11: stage `sft`: the chat template cannot be used for 1 of 1 rows of data `consult`, which is "
        f"more than `max_dropped` 0.01 of them: chat.jsonl:1: the template does not write {lost}; {TOOLS}"
    ]
    for _ in range(2):  # the second time the rows are not read again
        assert build(project, CHAT.replace("template: med", f"template: {template}")).problems == expected * bool(lost)


# Rows that a template cannot be used for

PLAIN = {"messages": [ASK, ANSWER]}
WITH_SYSTEM = {"messages": [{"role": "system", "content": "c"}, ASK, ANSWER]}
THOUGHT = {"role": "assistant", "content": "<think>\nd\n</think>\n\nb"}
EARLIER = {"messages": [ASK, THOUGHT, ASK, THOUGHT]}
# As Gemma's: a system turn is refused, and roles must alternate.
NO_SYSTEM = (
    "{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\\n') }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
)
# As Qwen3's: only the answer after the last question keeps its thought.
NO_EARLIER_THOUGHT = (
    "{%- for m in messages -%}"
    "{%- set words = m.content if loop.last else m.content.split('</think>')[-1].lstrip('\\n') -%}"
    "{{ m.role + ': ' + words + (eos_token if m.role == 'assistant' else '\\n') }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
)
REFUSED = {
    "a system turn": (
        NO_SYSTEM,
        WITH_SYSTEM,
        "the chat template cannot render the roles system, user, assistant: System role not supported",
    ),
    "a thought in an earlier turn": (
        NO_EARLIER_THOUGHT,
        EARLIER,
        "the chat template leaves out or changes the thought of message 2; give that message `weight: 0`, so that only "
        "later answers are trained",
    ),
}


@pytest.mark.parametrize(("template", "row", "why"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_the_template_refuses_is_a_bad_row(project, template, row, why):
    project.write("own.jinja", template)
    text = CHAT.replace("template: med", "template: own.jinja")
    project.write("chat.jsonl", "\n".join(map(json.dumps, [PLAIN, row, PLAIN, row])))
    found = "stage `sft`: the chat template cannot be used for 2 of 4 rows of data `consult`, which"
    places = f"chat.jsonl:2, chat.jsonl:4: {why}"
    assert build(project, text).problems == [
        f"x.yaml:1:11: {found} is more than `max_dropped` 0.01 of them: {places}; choose another `template:`"
    ]
    planned = build(project, text.replace("format: messages", "format: messages, max_dropped: 0.5"))
    assert planned.problems == []
    assert planned.notes == [f"{found} are dropped: {places}"]
    project.write("chat.jsonl", json.dumps(row))
    (problem,) = build(project, text.replace("format: messages", "format: messages, max_dropped: 1")).problems
    assert f"cannot be used for 1 of 1 rows of data `consult`, so none is left: chat.jsonl:1: {why}; choose" in problem


def test_rows_are_tried_with_the_template_of_their_stage_only(project):
    """The tokenizer is trained on them too, without any template."""
    project.write("own.jinja", NO_SYSTEM)
    project.write("chat.jsonl", json.dumps(WITH_SYSTEM))
    text = CHAT.replace(
        "  sft: {data: consult}", "  sft: {data: consult, template: own.jinja}\n  again: {use: sft, data: consult}"
    )
    (problem,) = build(project, text).problems
    assert problem.startswith("x.yaml:8:34: stage `sft`: the chat template cannot be used for 1 of 1 rows of data")


def test_an_answer_that_is_not_trained_on_may_lose_its_thought(project):
    project.write("own.jinja", NO_EARLIER_THOUGHT)
    project.write("chat.jsonl", json.dumps({"messages": [ASK, {**THOUGHT, "weight": 0}, ASK, THOUGHT]}))
    planned = build(project, CHAT.replace("template: med", "template: own.jinja"))
    assert (planned.problems, planned.notes) == ([], [])


def test_the_words_before_the_answers_of_a_pair_are_not_trained_on(project):
    project.write("own.jinja", NO_EARLIER_THOUGHT)
    pair = {"prompt": [ASK, THOUGHT, ASK], "chosen": [THOUGHT], "rejected": [ANSWER]}
    project.write("prefer.jsonl", json.dumps(pair))
    text = TOP.replace("template: med", "template: own.jinja")
    text += "stages:\n  init: {architecture: bloom, data: books}\n  dpo: {data: prefer}\n"
    assert build(project, text).problems == []


MARK = "{%- if messages[0].role == 'system' -%}{{ '<|system|>' }}{%- endif -%}{#- <|end|> -#}"


def test_a_token_counts_where_the_template_writes_it_for_the_rows(project):
    """Neither in a comment nor in a branch that no row reaches."""
    own = MARK + NO_EARLIER_THOUGHT
    text = project.model(template=own).replace("template: med\n", "")
    text = (
        text.replace("path: consult.jsonl, format: alpaca", "path: chat.jsonl, format: messages")
        + "  sft: {data: consult}\n"
    )
    project.write("chat.jsonl", json.dumps(PLAIN))
    assert build(project, text).problems == []
    project.write("chat.jsonl", json.dumps(WITH_SYSTEM))
    assert build(project, text).problems == [
        "x.yaml:7:3: stage `sft`: the template writes `<|system|>`, which the tokenizer of `m` does not know as one "
        'token; write `add_tokens: ["<|system|>"]` at the top, or choose `med`, `alpaca_zh` or `plain`, which end a '
        "turn with the model's own eos_token"
    ]


def test_a_plan_tells_of_the_date_that_a_template_writes(project):
    text = CHAT.replace("template: med", "template: own.jinja") + "  again: {use: sft, data: consult}\n"
    project.write("chat.jsonl", json.dumps(PLAIN))
    project.write("own.jinja", "{{- 'Today: ' + strftime_now('%Y') -}}" + NO_EARLIER_THOUGHT)
    planned = build(project, text)
    assert planned.problems == []
    assert planned.notes == [
        "the chat template writes the date of the day; it is fixed to 26 July 2024, in training and in the template "
        "that is saved"
    ]
    project.write("own.jinja", "{{- strftime_now('%Y' if messages else '%m') -}}" + NO_EARLIER_THOUGHT)
    assert build(project, CHAT.replace("template: med", "template: own.jinja")).problems == [
        "x.yaml:1:11: stage `sft`: the chat template writes the date of the day with `strftime_now`, in a form that is "
        "not written out in the call, so it cannot be fixed; write a date in place of the call"
    ]
