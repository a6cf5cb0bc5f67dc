"""Rows of each format beyond those of test_source.py: tools, labels, names of the file's own, placeholders."""

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError
from readings import problems, read_all

from stages.data import formats
from stages.data.source import Format, Reading, Source, rows_of

SHARED = Path(__file__).parents[3] / "shared" / "data" / "LLaMA-Factory"
ASK, ANSWER = {"role": "user", "content": "天气？"}, {"role": "assistant", "content": "晴。"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "京"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
OUTPUT = {"role": "tool", "content": "晴"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
BARE = TOOL["function"]
TALK = {"messages": [ASK, CALLS, OUTPUT, ANSWER], "tools": [TOOL]}
CALL_FORM = '`{"name": …, "arguments": {…}}`'
TOOL_FORM = '`{"name": …, "description": …, "parameters": {…}}`'


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def source(row, kind, **settings):
    """A file of one row."""
    Path("x.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    return Source(path="x.jsonl", format=kind, **settings)


def of(row, kind, **settings):
    return rows_of(source(row, kind, **settings))[0]


def refusal(row, kind, **settings):
    count, found = problems(source(row, kind, **settings))
    assert (count, len(found)) == (1, 1)
    return found[0].removeprefix("x.jsonl:1: ")


def text(value):
    return json.dumps(value, ensure_ascii=False)


LABEL = "it must be true for a good answer or false for a bad one"
TURNS = "after an optional system message user and assistant take turns"
ADD = "add the answer, or remove the row"
MERGE = "`turns: merge` joins messages of one role"


def test_every_format_is_a_module():
    modules = Path(formats.__file__).parent.glob("[!_]*.py")
    assert sorted(get_args(Format)) == sorted(path.stem for path in modules)


# Tools


def talk(*turns):
    return {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": text([BARE])}


SHAREGPT = talk(
    ("human", "天气？"),
    ("function_call", text({"name": "weather", "arguments": {"city": "京"}})),
    ("observation", "晴"),
    ("gpt", "晴。"),
)
OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "京"}'}}
OPENAI = [
    {"role": "user", "content": [{"type": "text", "text": "天"}, {"type": "text", "text": "气？"}]},
    {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "晴"},
    {**ANSWER, "tool_calls": []},
]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (SHAREGPT, "sharegpt"),
        ({**SHAREGPT, "tools": [TOOL]}, "sharegpt"),
        ({**SHAREGPT, "tools": [text(BARE)]}, "sharegpt"),
        ({"messages": OPENAI, "tools": [TOOL]}, "messages"),
        (TALK, "messages"),
        ({"messages": [ASK, {**ANSWER, "content": "", "function_call": OPENAI_CALL["function"]},
                       {"role": "function", "name": "weather", "content": "晴"}, ANSWER], "tools": [BARE]}, "messages"),
        ({"prompt": [ASK], "completion": [CALLS, OUTPUT, ANSWER], "tools": [TOOL]}, "prompt_completion"),
    ],
)  # fmt: skip
def test_tool_calls_have_one_form(row, kind):
    assert of(row, kind) == TALK


def test_words_beside_a_call_are_kept():
    assert of({"messages": [ASK, {**CALLS, "content": "我查一下。"}]}, "messages")["messages"][1] == {
        **CALLS,
        "content": "我查一下。",
    }


def test_several_calls_and_several_results():
    both = text([{"name": "a", "arguments": {}}, {"name": "b", "arguments": "{}"}])
    row = talk(("human", "q"), ("function_call", both), ("observation", ""), ("observation", "2"), ("gpt", "r"))
    said = of(row, "sharegpt")["messages"]
    assert [call["function"] for call in said[1]["tool_calls"]] == [
        {"name": "a", "arguments": {}},
        {"name": "b", "arguments": {}},
    ]
    assert said[2:4] == [{"role": "tool", "content": ""}, {"role": "tool", "content": "2"}]


def test_outputs_stand_in_the_order_of_the_calls_that_they_name():
    def call(name):
        return {"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}}

    def answer(name):
        return {"role": "tool", "tool_call_id": name, "content": f"output of {name}"}

    first, second = {"tool_calls": [call("a"), call("b")]}, {"tool_calls": [call("c")]}
    said = [ASK, {**CALLS, **first}, {**CALLS, **second}, answer("c"), answer("b"), answer("a"), ANSWER]
    reading, (row,) = read_all(source({"messages": said}, "messages"))
    assert [message["content"] for message in row["messages"][2:5]] == ["output of a", "output of b", "output of c"]
    assert [one["function"]["name"] for one in row["messages"][1]["tool_calls"]] == ["a", "b", "c"]
    assert reading.unread == []
    assert "tool_call_id" not in text(row)
    assert '"id"' not in text(row)
    said = [ASK, {**CALLS, **first}, answer("a"), answer("x"), ANSWER]
    assert refusal({"messages": said}, "messages") == "message 4 of `messages` answers the call `x`, which is not made"


def test_the_output_of_a_tool_may_be_an_object():
    said = [ASK, CALLS, {"role": "tool", "content": {"天": [1, None]}}, ANSWER]
    assert of({"messages": said}, "messages")["messages"][2]["content"] == '{"天": [1, null]}'


@pytest.mark.parametrize("nothing", [None, "", " ", "[]", []])
def test_no_tools_are_no_tools(nothing):
    assert of({"messages": [ASK, ANSWER], "tools": nothing}, "messages") == {"messages": [ASK, ANSWER]}


def test_a_tool_without_parameters_gets_an_empty_schema():
    made = of({"messages": [ASK, ANSWER], "tools": [{"name": "now", "description": None}]}, "messages")
    assert made["tools"][0]["function"] == {"name": "now", "parameters": {"type": "object", "properties": {}}}


def called(value):
    return talk(("human", "q"), ("function_call", value))


def with_call(call):
    return {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": call}]}


def tools(value):
    return {"messages": [ASK, ANSWER], "tools": value}


MESSAGE = "message 2 of `conversations`"
RESULT = "a tool call is followed by the tool's output"
BAD_TOOLS = [
    (
        called("weather(京)"),
        f"{MESSAGE} is a tool call that is not valid JSON (Expecting value at character 1); it must be {CALL_FORM}",
    ),
    (
        called('{"name": "f", "arguments": {"x": NaN}}'),
        f"{MESSAGE} is a tool call that is not valid JSON (JSON has no NaN); it must be {CALL_FORM}",
    ),
    (
        called("[" * 5000),
        f"{MESSAGE} is a tool call that is not valid JSON (nested too deeply); it must be {CALL_FORM}",
    ),
    (called('"f"'), f"{MESSAGE} is a tool call that is text; it must be {CALL_FORM}"),
    (called("[]"), f"{MESSAGE} is a tool call without a call; it must be {CALL_FORM}"),
    (called("{}"), f"{MESSAGE} is a tool call without `name`; it must be {CALL_FORM}"),
    (called(None), f"{MESSAGE} is a tool call that is null; it must be {CALL_FORM}"),
    (
        called('{"name": "f", "arguments": [1]}'),
        f"{MESSAGE} calls `f` with arguments that are a list; it must be {CALL_FORM}",
    ),
    (
        called('{"name": "f", "arguments": "x"}'),
        f"{MESSAGE} calls `f` with arguments, whose text is not valid JSON (Expecting value at character 1); "
        f"it must be {CALL_FORM}",
    ),
    (
        called('{"name": "f", "arguments": {"x": "\\ud800"}}'),
        f"{MESSAGE} holds half a character (a lone surrogate); write the whole character",
    ),
    (
        talk(("human", "q"), ("function_call", '{"name": "f"}'), ("human", "q")),
        f"message 3 of `conversations` is from the user, not the tool; {RESULT}",
    ),
    (
        talk(("human", "q"), ("observation", "x"), ("gpt", "r")),
        "message 2 of `conversations` is from the tool, not the assistant; after an optional system message user and "
        "assistant take turns",
    ),
    (
        talk(("human", "q"), ("function_call", '{"name": "f"}'), ("observation", "x")),
        f"`conversations` must end with a message from the assistant, not from the tool; {ADD}",
    ),
    (
        talk(("human", "q"), ("function_call", '{"name": "f"}'), ("observation", "x"), ("human", "q")),
        "message 4 of `conversations` is from the user, not the assistant; a tool's output is followed by the "
        "assistant",
    ),
    (
        talk(("human", "q"), ("function_call", '{"name": "f"}'), ("observation", None), ("gpt", "r")),
        "message 3 of `conversations` is null; it must be text",
    ),
]
BAD_OPENAI = [
    (
        {"messages": [{**ASK, "tool_calls": [CALL]}, ANSWER]},
        "message 1 of `messages` is a tool call from the user; only the assistant calls tools",
    ),
    (with_call("f"), f"message 2 of `messages` is a tool call that is not valid JSON (Expecting value at character 1); "
     f"it must be {CALL_FORM}"),
    (with_call([7]), f"message 2 of `messages` is a tool call that is a number; it must be {CALL_FORM}"),
    (tools("weather"), "`tools` is text that is not valid JSON (Expecting value at character 1); "
     f"it must be a list of {TOOL_FORM}"),
    (tools(TOOL), f"`tools` is an object; it must be a list of {TOOL_FORM}"),
    (tools("{}"), f"`tools` is an object; it must be a list of {TOOL_FORM}"),
    (tools(["weather"]), "tool 1 of `tools` is text that is not valid JSON (Expecting value at character 1); "
     f"it must be {TOOL_FORM}"),
    (tools([TOOL, 5]), f"tool 2 of `tools` is a number; it must be {TOOL_FORM}"),
    (tools([{"name": ""}]), f"tool 1 of `tools` has no `name`; it must be {TOOL_FORM}"),
    (tools([{"type": "search", "name": "x"}]),
     "tool 1 of `tools` has the type `search`; only a `function` can be called"),
    (tools([{"name": "x", "parameters": [1]}]),
     "the `parameters` of tool 1 of `tools` are a list; they must be a JSON schema, which is an object"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
     "message 1 of `messages` holds `image_url`; only text can be trained on"),
    ({"messages": [ASK, ANSWER], "images": ["a.png"]}, "the row has `images`; only text can be trained on"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [("sharegpt", *case) for case in BAD_TOOLS] + [("messages", *case) for case in BAD_OPENAI],
)
def test_bad_tools(kind, row, message):
    assert refusal(row, kind) == message


def test_a_table_s_filler_nulls_are_no_arguments():
    """A Parquet file gives every object every key of all rows."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "东八"}}}
    chats = [[ASK, CALLS, OUTPUT, ANSWER], [ASK, {**CALLS, "tool_calls": [other]}, OUTPUT, ANSWER]]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat} for chat in chats]), "x.parquet")
    found = rows_of(Source(path="x.parquet", format="messages"))
    assert [row["messages"][1]["tool_calls"] for row in found] == [[CALL], [other]]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public files are not here")
def test_all_of_a_public_file_of_tool_calls():
    reading, kept = read_all(Source(path=str(SHARED / "glaive_toolcall_zh_demo.json"), format="sharegpt"))
    assert (reading.read, reading.bad, reading.problems) == (300, 0, [])
    calls = [call for row in kept for said in row["messages"] for call in said.get("tool_calls", [])]
    assert (len(calls), sum("tools" in row for row in kept)) == (216, 200)


# Answers that are missing

ABSENT = "the row has no `{}`; {} rows need {} (map other names with `columns:`)"
ASKED = {"role": "user", "content": "q"}
EMPTY = "is empty; fill it in or remove the row"
# Format, a row without its answer, the answer's column; then the message for null, for blanks and for no such column.
ANSWERS = [
    ("text", {}, "text", "`text` is null; it must be text", f"`text` {EMPTY}",
     ABSENT.format("text", "text", "`text`")),
    ("alpaca", {"instruction": "q"}, "output", "`output` is null; it must be text", f"`output` {EMPTY}",
     ABSENT.format("output", "alpaca", "`instruction` and `output`")),
    ("prompt_completion", {"prompt": "q"}, "completion", "`completion` is null; it must be text",
     f"`completion` {EMPTY}", ABSENT.format("completion", "prompt_completion", "`prompt` and `completion`")),
    ("messages", {}, "messages", "`messages` is null; it must be a list of messages",
     "`messages` is text; it must be a list of messages", ABSENT.format("messages", "messages", "`messages`")),
    ("sharegpt", {}, "conversations", "`conversations` is null; it must be a list of messages",
     "`conversations` is text; it must be a list of messages",
     ABSENT.format("conversations", "sharegpt", "`conversations`")),
    ("preference", {"prompt": "q", "rejected": "r"}, "chosen", "`chosen` is null; it must be text",
     f"`chosen` {EMPTY}", ABSENT.format("chosen", "preference", "`chosen` and `rejected`")),
    ("labelled", {"prompt": "q", "completion": "r"}, "label", f"`label` is null; {LABEL}",
     f"`label` is empty; {LABEL}", ABSENT.format("label", "labelled", "`label`")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "name", "null", "blank", "absent"), ANSWERS, ids=[row[0] for row in ANSWERS])
def test_an_answer_that_is_missing(kind, row, name, null, blank, absent):
    good = {**row, name: {"messages": [ASKED, ANSWER], "sharegpt": [ASKED, ANSWER], "labelled": True}.get(kind, "a")}
    rows = [good, {**row, name: None}, {**row, name: " "}, row]
    Path("x.jsonl").write_text("\n".join(map(text, rows)), encoding="utf-8")
    reading, kept = read_all(Source(path="x.jsonl", format=kind))
    assert (reading.read, reading.bad, len(kept)) == (4, 3, 1)
    assert reading.problems == [f"x.jsonl:{line}: {why}" for line, why in enumerate([null, blank, absent], 2)]


@pytest.mark.parametrize("kind", ["messages", "sharegpt"])
def test_turns_that_are_out_of_order(kind):
    name = "messages" if kind == "messages" else "conversations"
    for said, message in [
        ([ASKED, ASKED, ANSWER], f"message 2 of `{name}` is from the user, not the assistant; {TURNS}; {MERGE}"),
        ([ASKED, ANSWER, ANSWER], f"message 3 of `{name}` is from the assistant, not the user; {TURNS}; {MERGE}"),
        ([ANSWER, ASKED, ANSWER], f"message 1 of `{name}` is from the assistant, not the user; {TURNS}; with "
         "`turns: merge` it stays in the prompt, outside the loss"),
        ([ANSWER], f"message 1 of `{name}` is from the assistant, not the user; {TURNS}; for text without a question "
         f"use `format: text` with `columns: {{text: {name}}}`"),
        ([ASKED], f"`{name}` must end with a message from the assistant, not from the user; {ADD}"),
        ([ASKED, {**ANSWER, "role": "bot"}], f"message 2 of `{name}` has the role `bot`; it must be `system`, `user`, "
         "`assistant` or `tool` (map other names with `roles:`)"),
        ([ASKED, {**ANSWER, "content": None}], f"message 2 of `{name}` is null; it must be text"),
        ([ASKED, {**ANSWER, "content": ""}], f"message 2 of `{name}` {EMPTY}"),
    ]:  # fmt: skip
        assert refusal({name: said}, kind) == message


# Rows of other tools, and rows one step away

V1 = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "value": "be"}], "loss_weight": 0.0},
        {"role": "user", "content": [{"type": "text", "value": "天气？"}], "loss_weight": 0.0},
        {
            "role": "assistant",
            "content": [
                {"type": "reasoning", "value": "查。"},
                {"type": "text", "value": "好。"},
                {"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "京"}}'},
            ],
            "loss_weight": 0.0,
        },
        {"role": "tool", "content": [{"type": "text", "value": "晴"}], "loss_weight": 0.0},
        {"role": "assistant", "content": [{"type": "text", "value": "晴。"}], "loss_weight": 1.0},
    ],
    "tools": text([BARE]),
}


def test_the_newest_form_of_llama_factory():
    called = {"role": "assistant", "content": "好。", "reasoning_content": "查。", "tool_calls": [CALL], "weight": 0}
    system = {"role": "system", "content": "be"}
    assert of(V1, "messages") == {"messages": [system, ASK, called, OUTPUT, ANSWER], "tools": [TOOL]}


def test_a_table_has_messages_as_json_text():
    import csv

    said = [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]
    with open("x.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["messages", "history"], [text(said), ""], [text([ASK, ANSWER]), '[["一", "二"]]']])
    found = rows_of(Source(path="x.csv", format="messages"))
    earlier = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
    assert found == [{"messages": said}, {"messages": [*earlier, ASK, ANSWER]}]


def test_a_table_has_pairs_as_json_text():
    row = {**PAIR, "prompt": text([ASK]), "chosen": text([ANSWER]), "rejected": text(PAIR["rejected"])}
    assert of(row, "preference") == PAIR


@pytest.mark.parametrize("words", ['[{"a": 1}]', '{"role": "user"}', "[1]", "[", '["a"]'])
def test_text_that_is_json_but_no_messages_is_text(words):
    assert of({"prompt": words, "completion": words}, "prompt_completion")["messages"] == [
        {"role": "user", "content": words},
        {"role": "assistant", "content": words},
    ]


def test_a_parquet_file_has_the_same_keys_in_every_message():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    said = [ASK, {**ANSWER, "reasoning_content": "想", "weight": 0}, ASK, {**ANSWER, "weight": 1}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": said}]), "x.parquet")
    reading, (row,) = read_all(Source(path="x.parquet", format="messages"))
    assert row["messages"] == [*said[:3], ANSWER]
    assert reading.unread == []


@pytest.mark.parametrize(
    "content",
    [
        text([ASK, ANSWER]),
        text([ASK, ANSWER]) + "\n",
        text([ASK, ANSWER]) + "\n\n" + text(["天气？", "晴。"]) + "\n",
        text(["问：天气？", "答： 晴。"]),
    ],
)
def test_a_line_may_be_a_conversation(content):
    Path("x.jsonl").write_text(content, encoding="utf-8")
    found = rows_of(Source(path="x.jsonl", format="messages"))
    assert found == [{"messages": [ASK, ANSWER]}] * len([*filter(None, content.split("\n"))])
    assert rows_of(Source(path="x.jsonl", format="sharegpt")) == found


def test_a_json_file_may_hold_conversations_as_lists():
    Path("x.json").write_text(text([[ASK, ANSWER], ["天气？", "晴。"]]), encoding="utf-8")
    assert rows_of(Source(path="x.json", format="messages")) == [{"messages": [ASK, ANSWER]}] * 2
    Path("x.json").write_text(text([ASK, ANSWER]), encoding="utf-8")
    assert problems(Source(path="x.json", format="messages")) == (
        2,
        ["`x.json`: each row is one message; put those of a conversation into one row, as a list"],
    )


def test_a_pair_of_llama_factory_over_several_lines():
    row = {"chosen_messages": [ASK, ANSWER], "rejected_messages": [ASK, PAIR["rejected"][0]]}
    Path("x.json").write_text(json.dumps(row, indent=1, ensure_ascii=False), encoding="utf-8")
    assert rows_of(Source(path="x.json", format="preference")) == [PAIR]


def test_a_pair_of_openai_keeps_its_tools_and_says_what_nothing_reads():
    given = {"messages": [ASK], "tools": [TOOL], "parallel_tool_calls": True, "seed": 1}
    row = {"input": given, "preferred_output": [ANSWER], "non_preferred_output": PAIR["rejected"]}
    Path("x.jsonl").write_text(text(row) + "\n", encoding="utf-8")
    reading = Reading(Source(path="x.jsonl", format="preference"))
    assert [found for _, found in reading.kept()] == [{**PAIR, "tools": [TOOL]}]
    assert reading.unread == ["keys of messages that nothing reads: `input.seed`"]


def test_the_speakers_of_a_list_of_texts_need_not_take_turns():
    message = f"message 2 of `conversations` is from the user, not the assistant; {TURNS}; {MERGE}"
    row = {"conversations": ["问：头疼。", "问:怎么办？", "答：休息。"]}
    assert refusal(row, "sharegpt") == message
    assert of(row, "sharegpt", turns="merge")["messages"] == [
        {"role": "user", "content": "头疼。\n怎么办？"},
        {"role": "assistant", "content": "休息。"},
    ]


def test_a_row_under_the_file_s_own_names():
    keys = {"reasoning_content": "cot", "weight": "learn", "tool_calls": "acts"}
    said = [ASK, {**CALLS, "tool_calls": None, "acts": [CALL], "learn": False}, OUTPUT, {**ANSWER, "cot": "想"}]
    made = of({"messages": said}, "messages", message_keys=keys)["messages"]
    assert made == [ASK, {**CALLS, "weight": 0}, OUTPUT, {**ANSWER, "reasoning_content": "想"}]


def test_a_column_may_hold_the_thought_of_an_answer():
    row = {"Question": "q", "Complex_CoT": " 想\n", "Response": "答"}
    columns = {"instruction": "Question", "reasoning_content": "Complex_CoT", "output": "Response"}
    assert of(row, "alpaca", columns=columns)["messages"][1] == {
        "role": "assistant",
        "content": "答",
        "reasoning_content": "想",
    }


@pytest.mark.parametrize("kind", ["alpaca", "prompt_completion", "messages", "preference", "labelled"])
def test_no_format_reads_a_row_with_images(kind):
    row = {"instruction": "q", "output": "r", "prompt": "q", "completion": "r", "messages": [ASK, ANSWER]}
    row |= {"chosen": "a", "rejected": "b", "label": True, "images": ["a.png"]}
    assert refusal(row, kind) == "the row has `images`; only text can be trained on"


@pytest.mark.parametrize("kind", ["messages", "sharegpt"])
def test_an_answer_begins_with_its_words_in_every_format(kind):
    name = "messages" if kind == "messages" else "conversations"
    (_, answer) = of({name: [ASK, {**ANSWER, "content": " \n晴。\n"}]}, kind)["messages"]
    assert answer == ANSWER == of({"instruction": "q", "output": " \n晴。\n"}, "alpaca")["messages"][1]


# What nothing reads


def unread(rows, kind, **settings):
    Path("x.jsonl").write_text("\n".join(map(text, rows)), encoding="utf-8")
    reading, _ = read_all(Source(path="x.jsonl", format=kind, **settings))
    assert reading.problems == []
    return reading.unread


def test_columns_that_nothing_reads_are_named_once():
    rows = [{"instruction": "q", "output": "r", "input": "", "source": "web", "note": None}] * 2
    rows += [{"instruction": "q", "output": "r", "id": 7, "source": "book", "tags": []}]
    assert unread(rows, "alpaca") == ["columns that nothing reads: `source`, `id`"]
    assert unread(rows, "text", columns={"text": "source"}) == [
        "columns that nothing reads: `instruction`, `output`, `id`"
    ]
    many = {"text": "t", **{f"c{n}": n + 1 for n in range(14)}}
    assert unread([many], "text")[0].endswith("`c10`, `c11` and 2 more")


def test_keys_of_messages_that_nothing_reads_are_named_once():
    said = [{**ASK, "name": "a", "weight": 0}, {**ANSWER, "refusal": None, "audio_id": "b", "weight": 1}]
    assert unread([{"messages": said, "id": 1}] * 2, "messages") == [
        "columns that nothing reads: `id`",
        "keys of messages that nothing reads: `name`, `audio_id`",
    ]


# Preference and labels

PAIR = {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "雨。"}]}


def test_a_pair_may_differ_in_its_calls():
    other = {**CALLS, "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]}
    row = {"prompt": [ASK], "chosen": [CALLS], "rejected": [other], "tools": [TOOL]}
    assert of(row, "preference") == row
    message = "`chosen` and `rejected` are the same; a pair must differ to teach anything"
    assert refusal({**row, "rejected": [CALLS]}, "preference") == message


def test_a_pair_may_answer_the_output_of_a_tool():
    row = {**PAIR, "prompt": [ASK, CALLS, OUTPUT]}
    assert of(row, "preference") == row


GOOD = {"prompt": [ASK], "completion": [ANSWER], "label": True}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [ASK, ANSWER], "label": True}, GOOD),
        ({"messages": [ASK, ANSWER], "prompt": "other", "label": True}, GOOD),
        ({"conversations": [{"from": "human", "value": "天气？"}, {"from": "gpt", "value": "晴。"}], "label": 1}, GOOD),
        ({"prompt": "天气？", "completion": "晴。", "label": "False"}, {**GOOD, "label": False}),
        ({"instruction": "天气？", "input": "", "output": "晴。", "label": 0}, {**GOOD, "label": False}),
        ({"messages": [ASK, CALLS, OUTPUT, ANSWER], "tools": [TOOL], "label": False},
         {"prompt": [ASK, CALLS, OUTPUT], "completion": [ANSWER], "label": False, "tools": [TOOL]}),
    ],
)  # fmt: skip
def test_labelled(row, expected):
    assert of(row, "labelled") == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASK, ANSWER], "label": None}, f"`label` is null; {LABEL}"),
        ({"messages": [ASK, ANSWER], "label": ""}, f"`label` is empty; {LABEL}"),
        ({"messages": [ASK, ANSWER], "label": "good"}, f"`label` is `good`; {LABEL}"),
        ({"messages": [ASK, ANSWER], "label": 2}, f"`label` is a number; {LABEL}"),
        ({"messages": [ASK, ANSWER], "label": [True]}, f"`label` is a list; {LABEL}"),
        ({"messages": [ASK], "label": True},
         f"`messages` must end with a message from the assistant, not from the user; {ADD}"),
        ({"prompt": "q", "completion": None, "label": True},
         "the row has no answer; give `messages`, `conversations`, `prompt` and `completion`, or `instruction` and "
         "`output`"),
    ],
)  # fmt: skip
def test_bad_labels(row, message):
    assert refusal(row, "labelled") == message


def test_a_table_has_labels_as_text():
    Path("x.csv").write_text("prompt,completion,label\nq,r,true\nq,r,0\n", encoding="utf-8")
    found = rows_of(Source(path="x.csv", format="labelled"))
    assert [row["label"] for row in found] == [True, False]


# Names of the file's own


def test_roles_and_keys_of_the_file_s_own():
    said = [("sys", "be"), ("prompter", "q"), ("bot", "r"), ("user", "q"), ("bot", "r")]
    row = {"conversation": [{"speaker": who, "text": what} for who, what in said]}
    made = of(
        row,
        "messages",
        columns={"messages": "conversation"},
        roles={"system": "sys", "user": "prompter", "assistant": "bot"},
        message_keys={"role": "speaker", "content": "text"},
    )
    assert [turn["role"] for turn in made["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in made["messages"]] == ["be", "q", "r", "q", "r"]


def test_roles_may_be_swapped():
    row = {"messages": [{"role": "assistant", "content": "q"}, {"role": "user", "content": "r"}]}
    made = of(row, "messages", roles={"user": "assistant", "assistant": "user"})
    assert [turn["role"] for turn in made["messages"]] == ["user", "assistant"]


def test_calls_and_results_of_the_file_s_own():
    row = talk(("human", "q"), ("act", '{"name": "f"}'), ("env", "x"), ("gpt", "r"))
    made = of(row, "sharegpt", roles={"function_call": "act", "tool": "env"})
    assert [turn["role"] for turn in made["messages"]] == ["user", "assistant", "tool", "assistant"]


OURS = "is not one of ours"
THEIRS = "maps our names to the file's, and"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roles": {"human": "user"}},
         f"`roles` {THEIRS} `human` {OURS}; there is `assistant`, `function_call`, `system`, `tool`, `user`"),
        ({"roles": {"user": "x", "system": "x"}},
         "`roles` names `x` twice; a role of the file can be only one of our roles"),
        ({"message_keys": {"from": "x"}}, f"`message_keys` {THEIRS} `from` {OURS}; there is `content`, "
         "`reasoning_content`, `role`, `tool_call_id`, `tool_calls`, `weight`"),
        ({"columns": {"images": "images"}},
         "`columns` maps `images`, and images, video and audio are not supported; only text is"),
        ({"split": "train"},
         "`subset` and `split` are for a data set on the Hub, `org/name@commit`; name a file here"),
    ],
)  # fmt: skip
def test_wrong_names(settings, message):
    with pytest.raises(ValidationError) as error:
        Source(path="x.jsonl", format="messages", **settings)
    assert [problem["msg"] for problem in error.value.errors()] == [f"Value error, {message}"]


def test_settings_that_are_not_used_leave_no_trace():
    plain = Source(path="x.jsonl", format="text")
    assert plain.model_dump() == {
        "path": "x.jsonl",
        "format": "text",
        "columns": {},
        "encoding": None,
        "max_samples": None,
    }
    filled = Source(path="x.jsonl", format="text", fill={}, roles={"user": "x"})
    assert Source.model_validate(filled.model_dump()) == filled


# Placeholders

ME = {"instruction": "你是谁？", "output": "我是 {{name}}，{{ author }} 的助手。"}


def test_placeholders_are_filled():
    row = {**ME, "history": [["{{name}}?", "是"]], "other": "{{x}}"}
    made = of(row, "alpaca", fill={"name": "小医", "author": "某某"})
    assert [turn["content"] for turn in made["messages"]] == ["小医?", "是", "你是谁？", "我是 小医，某某 的助手。"]


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (None, "`x.jsonl`: 1 of 1 rows hold `{{author}}`, which a model would learn to say; fill it in with "
         "`fill: {author: …, name: …}`, or keep it with `fill: {}`"),
        ({"name": "小医"}, "`{{author}}` is a placeholder that `fill:` does not name; there is `name`"),
        ({"name": "小医", "auther": "某某"},
         "`{{author}}` is a placeholder that `fill:` does not name; did you mean `auther`?"),
        ({"name": "a", "author": "b", "nama": "c"},
         "`x.jsonl`: no row holds `{{nama}}`, which `fill:` gives; did you mean `name`?"),
    ],
)  # fmt: skip
def test_placeholders_that_are_left(fill, message):
    assert refusal(ME, "alpaca", fill=fill) == message


def test_placeholders_may_be_kept():
    assert of(ME, "alpaca", fill={})["messages"][1]["content"] == ME["output"]


def test_a_few_rows_may_speak_of_templates():
    lines = [{"text": "写作 {{ user }}"}] + [{"text": "文"}] * 10
    Path("x.jsonl").write_text("\n".join(map(text, lines)), encoding="utf-8")
    assert problems(Source(path="x.jsonl", format="text")) == (11, [])


@pytest.mark.parametrize("words", ["{{}}", "{{1}}", "{ {name} }", "{{a.b}}", r"\frac{{\rm a}}{b}", "{{% if %}}"])
def test_other_braces_are_text(words):
    assert of({"text": words}, "text") == {"text": words}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public files are not here")
def test_a_public_file_with_placeholders():
    path = str(SHARED / "identity.json")
    kept = rows_of(Source(path=path, format="alpaca", fill={"name": "小医", "author": "Stagewise"}))
    assert len(kept) == 91
    assert "{{" not in text(kept)
    assert problems(Source(path=path, format="alpaca")) == (
        91,
        [
            f"`{path}`: 77 of 91 rows hold `{{{{name}}}}`, which a model would learn to say; fill it in with "
            "`fill: {name: …, author: …}`, or keep it with `fill: {}`"
        ],
    )
