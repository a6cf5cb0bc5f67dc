"""What is read from files of each format: good rows, bad rows, columns, encodings, and the sentences about errors."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError
from readings import problems

from stages.data import encodings
from stages.data import source as source_module
from stages.data.files import HowToRead, parts
from stages.data.source import Reading, Source, rows_of
from stages.runtime.errors import StageError


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content, encoding="utf-8"):
    """A file of text, of bytes, or of rows, one JSON object a line."""
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    data = content if isinstance(content, bytes) else content.encode(encoding)
    Path(name).write_bytes(data)
    return name


def read_file(path, encoding=None):
    found = parts(Path(path), HowToRead(encoding), [].append)
    return [row for part in found for row in part.rows()]


def of(path, kind="text", **more):
    return Source(path=path, format=kind, **more)


def say(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def old(*turns):
    """The same messages under ShareGPT's names."""
    names = {"s": "system", "u": "human", "a": "gpt", "f": "function_call"}
    return [{"from": names[turn[0]], "value": turn[2:]} for turn in turns]


HI = say("u:hi", "a:hello")
PAIR = {"prompt": say("u:hi"), "chosen": say("a:good"), "rejected": say("a:bad")}

GOOD = [
    ("text", {"text": " 文 "}, {"text": " 文 "}),
    ("alpaca", {"instruction": "hi", "output": "hello"}, {"messages": HI}),
    ("alpaca", {"instruction": "hi", "input": None, "output": "hello", "history": None}, {"messages": HI}),
    ("alpaca", {"instruction": "hi", "input": " ", "output": "hello", "system": ""}, {"messages": HI}),
    (
        "alpaca",
        {"instruction": "hi", "input": "x", "output": "o", "system": "be", "history": [["q", "r"]]},
        {"messages": say("s:be", "u:q", "a:r", "u:hi\nx", "a:o")},
    ),
    ("prompt_completion", {"prompt": "hi", "completion": "hello"}, {"messages": HI}),
    (
        "prompt_completion",
        {"prompt": say("s:be", "u:hi"), "completion": say("a:hello")},
        {"messages": say("s:be", "u:hi", "a:hello")},
    ),
    (
        "prompt_completion",
        {"prompt": "hi", "completion": "hello", "system": "be"},
        {"messages": say("s:be", "u:hi", "a:hello")},
    ),
    ("messages", {"messages": HI}, {"messages": HI}),
    ("messages", {"messages": say("s: ", *("u:hi", "a:hello")), "tools": "[]"}, {"messages": HI}),
    ("messages", {"messages": [{"role": "system", "content": None}, *HI]}, {"messages": HI}),
    (
        "sharegpt",
        {"conversations": old("s:be", "u:hi", "a:hello")},
        {"messages": say("s:be", "u:hi", "a:hello")},
    ),
    (
        "sharegpt",
        {"conversations": old("u:hi", "a:hello"), "system": "be", "messages": "other"},
        {"messages": say("s:be", "u:hi", "a:hello")},
    ),
    ("preference", {"prompt": "hi", "chosen": "good", "rejected": "bad"}, PAIR),
    ("preference", {"prompt": say("u:hi"), "chosen": say("a:good"), "rejected": old("a:bad")[0]}, PAIR),
    (
        "preference",
        {"instruction": "hi", "input": "x", "system": "be", "chosen": "good", "rejected": "bad"},
        PAIR | {"prompt": say("s:be", "u:hi\nx")},
    ),
    (
        "preference",
        {"conversations": old("u:hi"), "chosen": old("a:good")[0], "rejected": old("a:bad")[0]},
        PAIR,
    ),
    ("preference", {"chosen": say("u:hi", "a:good"), "rejected": say("u:hi", "a:bad")}, PAIR),
    ("preference", {"prompt": "hi", "chosen": say("u:hi", "a:good"), "rejected": say("u:hi", "a:bad")}, PAIR),
    (
        "preference",
        {
            "prompt": "hi",
            "chosen": say("u:a", "a:b", "u:hi", "a:good"),
            "rejected": say("u:a", "a:b", "u:hi", "a:bad"),
        },
        PAIR | {"prompt": say("u:a", "a:b", "u:hi")},
    ),
]


@pytest.mark.parametrize(("kind", "row", "expected"), GOOD)
def test_good(kind, row, expected):
    path = write("x.jsonl", [row])
    assert rows_of(of(path, kind)) == [expected]
    assert problems(of(path, kind)) == (1, [])


TURNS = "after an optional system message user and assistant take turns"
MERGE = "`turns: merge` joins messages of one role"
ADD = "add the answer, or remove the row"
CALL = '`{"name": …, "arguments": {…}}`'
TOOL = '`{"name": …, "description": …, "parameters": {…}}`'
BAD = [
    ("text", {"text": None}, "`text` is null; it must be text"),
    ("text", {"text": " \n"}, "`text` is empty; fill it in or remove the row"),
    (
        "text",
        {"text": "\0\ud800"},
        "`text` holds half a character (a lone surrogate); write the whole character",
    ),
    ("alpaca", {"instruction": "a", "output": 5}, "`output` is a number; it must be text"),
    ("alpaca", {"instruction": "", "output": "b"}, "`instruction` is empty; fill it in or remove the row"),
    ("alpaca", {"instruction": "a", "output": "b", "input": [5]}, "`input` is a list; it must be text"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["q"]]},
        "`history` must be a list of question and answer pairs",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": 7},
        "`history` must be a list of question and answer pairs",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["q", None]]},
        "pair 1 of `history` is null; it must be text",
    ),
    (
        "prompt_completion",
        {"prompt": "a", "completion": True},
        "`completion` is true or false; it must be text",
    ),
    (
        "prompt_completion",
        {"prompt": HI, "completion": "b"},
        "`prompt` must end with a message from the user, not from the assistant",
    ),
    (
        "prompt_completion",
        {"prompt": "a", "completion": HI},
        f"message 2 of `prompt` and `completion` is from the user, not the assistant; {TURNS}; {MERGE}",
    ),
    ("messages", {"messages": "hi"}, "`messages` is text; it must be a list of messages"),
    ("messages", {"messages": []}, "`messages` is an empty list; it must be a list of messages"),
    (
        "messages",
        {"messages": [HI[0], "hi"]},
        "message 2 of `messages` is text; it must be an object with `role` and `content`",
    ),
    (
        "messages",
        {"messages": [{"content": "x"}]},
        "message 1 of `messages` has no `role`; it must be an object with `role` and `content` "
        "(map other names with `message_keys:`)",
    ),
    (
        "messages",
        {"messages": [{"role": "bot\nx", "content": "x"}]},
        "message 1 of `messages` has the role `bot x`; it must be `system`, `user`, `assistant` or `tool` "
        "(map other names with `roles:`)",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "a part of message 1 of `messages` is null; it must be text",
    ),
    (
        "messages",
        {"messages": say("u:hi", "a: ")},
        "message 2 of `messages` is empty; fill it in or remove the row",
    ),
    (
        "messages",
        {"messages": say("u:hi", "u:hi")},
        f"message 2 of `messages` is from the user, not the assistant; {TURNS}; {MERGE}",
    ),
    (
        "messages",
        {"messages": say("u:hi", "s:be", "a:x")},
        f"message 2 of `messages` is from the system, not the assistant; {TURNS}",
    ),
    (
        "messages",
        {"messages": say("u:hi")},
        f"`messages` must end with a message from the assistant, not from the user; {ADD}",
    ),
    (
        "messages",
        {"messages": say("s:be")},
        f"`messages` must end with a message from the assistant, not from the system; {ADD}",
    ),
    (
        "messages",
        {"messages": [HI[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        f"message 2 of `messages` is a tool call without `name`; it must be {CALL}",
    ),
    (
        "sharegpt",
        {"conversations": old("u:hi", "f:x")},
        "message 2 of `conversations` is a tool call that is not valid JSON (Expecting value at character 1); "
        f"it must be {CALL}",
    ),
    (
        "sharegpt",
        {"conversations": old("u:hi", "a:x"), "tools": '[{"description": "f"}]'},
        f"tool 1 of `tools` has no `name`; it must be {TOOL}",
    ),
    (
        "sharegpt",
        {"conversations": old("s:be", "u:hi", "a:x"), "system": "be"},
        "`system` and the first message are both system prompts; keep one",
    ),
    (
        "preference",
        {"prompt": "hi", "chosen": "same", "rejected": "same "},
        "`chosen` and `rejected` are the same; a pair must differ to teach anything",
    ),
    (
        "preference",
        {"chosen": "good", "rejected": "bad"},
        "the row has no prompt; give `prompt`, `instruction` or `conversations`",
    ),
    (
        "preference",
        {"prompt": "hi", "chosen": old("u:x")[0], "rejected": "bad"},
        "`chosen` is from the user; it must be the assistant's answer",
    ),
    (
        "preference",
        {"chosen": say("u:hi", "a:good"), "rejected": say("u:ho", "a:bad")},
        "`chosen` and `rejected` differ before their last message; only that one may differ",
    ),
    (
        "preference",
        {"prompt": "x", "chosen": say("u:hi", "a:good"), "rejected": "bad"},
        "`chosen` and `rejected` answer another prompt than the row's; keep one of the two",
    ),
    (
        "preference",
        {"conversations": old("u:hi", "a:x"), "chosen": "good", "rejected": "bad"},
        "`conversations` must end with a message from the user, not from the assistant",
    ),
]


@pytest.mark.parametrize(("kind", "row", "message"), BAD)
def test_bad(kind, row, message):
    path = write("x.jsonl", json.dumps(row) + "\n")
    assert problems(of(path, kind)) == (1, [f"x.jsonl:1: {message}"])


def test_the_first_bad_rows_are_raised():
    path = write("x.jsonl", [{"text": "a"}, {"text": ""}, {"text": None}])
    with pytest.raises(StageError) as error:
        rows_of(of(path))
    assert str(error.value) == (
        "x.jsonl:2: `text` is empty; fill it in or remove the row; x.jsonl:3: `text` is null; it must be text"
    )


def test_the_account_of_a_reading_has_every_row():
    texts = ["<b>a</b>", "", "a", None, "b"]
    path = write("x.jsonl", [{"text": text} for text in texts])
    reading = Reading(of(path, max_dropped=0.4, clean=["html", "exact_duplicates"]))
    assert list(reading.kept()) == [("x.jsonl:1", {"text": "a"}), ("x.jsonl:5", {"text": "b"})]
    assert (reading.read, reading.bad, reading.problems) == (5, 2, [])
    bad = [
        "x.jsonl:2: `text` is empty; fill it in or remove the row",
        "x.jsonl:4: `text` is null; it must be text",
    ]
    assert reading.first_bad == bad
    assert asdict(reading.account) == {
        "read": 5,
        "kept": 2,
        "changed": 1,
        "dropped": {
            "bad": {"rows": 2, "first": bad},
            "exact duplicate": {"rows": 1, "first": ["x.jsonl:3, as x.jsonl:1"]},
        },
        "personal_data": {},
        "notes": [],
    }


@pytest.mark.parametrize(("check_after", "kept"), [(None, 10), (3, 2), (5, 4)])
def test_too_many_bad_rows_stop_a_reading_at_its_end_or_earlier(check_after, kept):
    path = write("x.jsonl", [{"text": ""}, *[{"text": "a"}] * 10])
    rows = []
    with pytest.raises(StageError) as error:
        rows.extend(Reading(of(path)).kept(check_after))
    bad = "x.jsonl:1: `text` is empty; fill it in or remove the row"
    assert str(error.value) == (
        f"1 of the first {check_after} rows are bad, and `max_dropped` is 0.01: {bad}" if check_after else bad
    )
    assert len(rows) == kept


def test_rows_are_as_the_file_has_them():
    path = write("x.jsonl", '\n{"ask": 1, "id": 7}\n[1]\n{"ask": 2}\n')
    first, (place, error), last = read_file(path)
    assert first == ("x.jsonl:2", {"ask": 1, "id": 7})
    assert (place, str(error)) == ("x.jsonl:3", "the row is a list, not an object")
    assert last == ("x.jsonl:4", {"ask": 2})


# Columns


def test_columns_may_swap_names():
    path = write("x.jsonl", [{"prompt": "answer", "completion": "question"}])
    source = of(path, "prompt_completion", columns={"prompt": "completion", "completion": "prompt"})
    assert rows_of(source) == [{"messages": say("u:question", "a:answer")}]


def test_a_row_lacks_a_column():
    path = write("x.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a"}])
    assert problems(of(path, "alpaca")) == (
        2,
        [
            "x.jsonl:2: the row has no `output`; alpaca rows need `instruction` and `output` "
            "(map other names with `columns:`)"
        ],
    )


CSV = "department,ask,answers\n内科,高血压,党参\n"
LACKING = [
    (
        {"instruction": "ask"},
        [
            "`x.csv`: no column `output`; the file has `department`, `ask`, `answers`; "
            "map it with `columns: {output: …}`"
        ],
    ),
    (
        {"instruction": "ask", "output": "answer"},
        ["`x.csv`: no column `answer`, which `columns:` gives for `output`; did you mean `answers`?"],
    ),
    (
        {"instruction": "ask", "output": "answers", "system": "x"},
        ["`x.csv`: no column `x`, which `columns:` gives for `system`; the file has `department`, `ask`, `answers`"],
    ),
]


@pytest.mark.parametrize(("columns", "expected"), LACKING)
def test_no_row_has_a_column(columns, expected):
    path = write("x.csv", CSV)
    assert problems(of(path, "alpaca", columns=columns, max_samples=1)) == (1, expected)


def test_the_nearest_column_is_named():
    path = write("x.json", '[{"texts": "a"}, {"texts": "b"}]')
    message = "`x.json`: no column `text`; did you mean `texts`? Map it with `columns: {text: …}`"
    assert problems(of(path)) == (2, [message])


def test_a_rare_column_may_come_after_the_first_rows():
    path = write("x.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "who": "s"}])
    source = of(path, "alpaca", columns={"system": "who"}, max_samples=1)
    assert problems(source) == (1, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": {"ask": "instruction"}},
            "`columns` maps our names to the file's, and `ask` is not one of ours; "
            "there is `history`, `input`, `instruction`, `output`, `reasoning_content`, `system`, `tools`",
        ),
        (
            {"columns": {"ouput": "x"}},
            "`columns` maps our names to the file's, and `ouput` is not one of ours; did you mean `output`?",
        ),
        (
            {"columns": {"system": "output"}},
            "`columns` maps `system` to the file's `output`, so no column is left for `output`; map `output` too",
        ),
        ({"encoding": "gbkk"}, "there is no encoding `gbkk`; try `gb18030`, `big5` or `utf-16`"),
        ({"encoding": "base64"}, "there is no encoding `base64`; try `gb18030`, `big5` or `utf-16`"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValidationError) as error:
        of("x.csv", "alpaca", **settings)
    assert [problem["msg"] for problem in error.value.errors()] == [f"Value error, {message}"]


# Files


def test_documents():
    path = write("x.txt", "\r\n  一\r\n  二\r\n \t\r\n\r\n三\u2028四\0")
    assert read_file(path) == [
        ("x.txt:2", {"text": "一\n  二"}),
        ("x.txt:6", {"text": "三\u2028四\0"}),
    ]


def test_plain_text_has_no_questions():
    path = write("x.txt", "a")
    assert problems(of(path, "alpaca")) == (
        0,
        ["`x.txt` is plain text, which has no alpaca rows; use `format: text`"],
    )


def test_json_array():
    path = write("x.json", '[{"text": "a"},\n "b", {"text": 3}]')
    assert problems(of(path)) == (
        3,
        [
            "x.json: row 2: the row is text, not an object",
            "x.json: row 3: `text` is a number; it must be text",
        ],
    )


def test_json_may_be_an_object_a_line():
    assert rows_of(of(write("x.json", '\n{"text": "a"}\n\n{"text": "b"}'))) == [{"text": "a"}, {"text": "b"}]


JSON = "not valid JSON"
COMMA = "the row has 3 fields where the header has 2; put a field that holds a comma in double quotes"
QUOTE = 'inside a quoted field write `"` as `""`'


@pytest.mark.parametrize(
    ("name", "content", "count", "message"),
    [
        ("x.jsonl", '{"text": "b" 1}\n', 1, f"x.jsonl:1: {JSON} (Expecting ',' delimiter at column 14)"),
        ("x.jsonl", '{"text": "a"\n', 1, f"x.jsonl:1: {JSON} (Expecting ',' delimiter at column 13)"),
        ("x.jsonl", '{"text": "\0"}', 1, f"x.jsonl:1: {JSON} (Invalid control character at column 11)"),
        ("x.jsonl", "[" * 100_000, 0, f"x.jsonl:1: {JSON} (nested too deeply)"),
        ("x.jsonl", "9" * 5000, 1, f"x.jsonl:1: {JSON} (a number has too many digits)"),
        (
            "x.json",
            '[{"text": "a"},\n{"text" 1}]',
            1,
            f"x.json:2: {JSON} (Expecting ':' delimiter at column 9)",
        ),
        ("x.json", "7", 0, "`x.json` holds a number, not an array of objects"),
        ("x.json", " ", 0, "`x.json` holds no rows"),
        ("x.json", "[]", 0, "`x.json` holds no rows"),
        ("x.jsonl", "\n\n", 0, "`x.jsonl` holds no rows"),
        ("x.csv", "", 0, "`x.csv` holds no rows"),
        ("x.csv", "text\n", 0, "`x.csv` holds no rows"),
        ("x.csv", "text,text\na,b\n", 0, "x.csv:1: the header names `text` twice; rename one"),
        ("x.csv", "text,n\na,1\na,b,c\n", 2, f"x.csv:3: {COMMA}"),
        (
            "x.csv",
            'text,n\n"a\nb",1\n"a"b,1\nc,2\n',
            3,
            f"x.csv:4: not valid CSV (',' expected after '\"'); {QUOTE}",
        ),
        ("x.csv", 'text,n\na,1\nb,"2\nc,3\n', 2, f"x.csv:3: not valid CSV (unexpected end of data); {QUOTE}"),
        ("x.csv", 'text,"n\na,1\n', 0, f"x.csv:1: not valid CSV (unexpected end of data); {QUOTE}"),
        (
            "x.yaml",
            "",
            0,
            "`x.yaml` must be a .txt, .json, .jsonl, .csv, .tsv, .parquet or .arrow file; "
            "all but the last two may be compressed as .gz, .bz2, .xz, .zst or .zip",
        ),
    ],
)
def test_broken_files(name, content, count, message):
    assert problems(of(write(name, content))) == (count, [message])


def test_csv():
    path = write("x.csv", ' text ,n\r\n"a, ""b""\r\nc",1\r\n\r\n,\r\nd\0,2\r\n')
    assert read_file(path) == [
        ("x.csv:2", {"text": 'a, "b"\r\nc', "n": "1"}),
        ("x.csv:6", {"text": "d\0", "n": "2"}),
    ]


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.txt"])
def test_a_long_line(name):
    long = "长" * 1_000_000
    content = {"x.csv": f"text\n{long}\n", "x.jsonl": [{"text": long}], "x.txt": long}[name]
    assert rows_of(of(write(name, content))) == [{"text": long}]


def test_parquet():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chats = [{"chat": HI}, {"chat": HI[:1]}, {"chat": None}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), "x.parquet")
    source = of("x.parquet", "messages", columns={"messages": "chat"})
    assert rows_of(source.model_copy(update={"max_samples": 1})) == [{"messages": HI}]
    assert problems(source) == (
        3,
        [
            f"x.parquet: row 2: `messages` must end with a message from the assistant, not from the user; {ADD}",
            "x.parquet: row 3: `messages` is null; it must be a list of messages",
        ],
    )
    assert problems(of("x.parquet", "messages")) == (
        3,
        ["`x.parquet`: no column `messages`; the file has `chat`; map it with `columns: {messages: …}`"],
    )


def test_not_parquet():
    count, found = problems(of(write("x.parquet", "PAR1 no")))
    assert (count, len(found)) == (0, 1)
    assert found[0].startswith("`x.parquet` cannot be read as Parquet (")
    assert "\n" not in found[0]


def test_missing_files(tmp_path):
    write("train.jsonl", [{"text": "a"}])
    (tmp_path / "data").mkdir()
    (tmp_path / "doc").mkdir()
    for path, message in [
        ("trian.jsonl", "`trian.jsonl` does not exist; did you mean `train.jsonl`?"),
        ("trian.csv", "`trian.csv` does not exist; did you mean `train.jsonl`?"),
        ("no.csv", "`no.csv` does not exist; there is `train.jsonl`"),
        ("dato", "`dato` does not exist; did you mean `data`?"),
        ("docs.txt", "`docs.txt` does not exist; there is `train.jsonl`"),
        ("data/x.csv", "`data/x.csv` does not exist; its folder has no data files"),
        ("no/x.csv", "`no/x.csv` does not exist; there is no folder `no`"),
        (
            "data",
            "`data` is a folder without data files; .txt, .json, .jsonl, .csv, .tsv, .parquet or .arrow files are read",
        ),
        ("x" * 300 + ".csv", None),
    ]:
        count, found = problems(of(path))
        assert count == 0
        assert found == [message] if message else len(found) == 1


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.csv"])
def test_max_samples(name):
    texts = ["a", "b", "c"]
    table = [{"text": text} for text in texts]
    content = {
        "x.txt": "a\n\nb\n\nc",
        "x.jsonl": table,
        "x.json": json.dumps(table),
        "x.csv": "text\na\nb\nc",
    }
    path = write(name, content[name])
    assert rows_of(of(path, max_samples=2)) == table[:2]
    assert rows_of(of(path, max_samples=9)) == table


def test_only_the_first_bad_rows_are_shown():
    path = write("x.jsonl", [{"text": ""}] * 5)
    count, lines = problems(of(path))
    assert (count, [line.split(":")[1] for line in lines]) == (5, ["1", "2", "3"])
    bad = "2 more bad rows; 5 of 5 rows are bad, and `max_dropped` is 0.01"
    assert lines[2] == f"x.jsonl:3: `text` is empty; fill it in or remove the row — and {bad}"
    path = write("x.jsonl", [{"text": ""}] * 4)
    assert problems(of(path))[1][2].endswith(" — and 1 more bad row; 4 of 4 rows are bad, and `max_dropped` is 0.01")


# Encodings

CHINESE = "我有高血压这两天女婿给我拿了些党参泡水喝，您好高血压可以吃党参吗？"
TEXTS = [
    (CHINESE, "gb18030"),
    ("高血压", "gb18030"),
    (CHINESE, "utf-8"),
    (CHINESE, "utf-8-sig"),
    (CHINESE, "utf-16"),
    ("\ufeff" + CHINESE, "utf-16-be"),
    ("\ufeff" + CHINESE, "gb18030"),
    ("這是一個繁體中文的測試文件，我們希望它能被正確地檢測出來。高血壓患者能吃黨參嗎？", "big5"),
    ("これは日本語のテキストです。文字コードの検出を試しています。", "shift_jis"),
    ("이것은 한국어 텍스트입니다. 문자 인코딩 감지를 시험하고 있습니다.", "euc_kr"),
    ("Le café était très agréable, déjà vu à l’été; où êtes-vous?", "cp1252"),
    ("Это русский текст, мы проверяем определение кодировки файла.", "cp1251"),
]


@pytest.mark.parametrize(("text", "encoding"), TEXTS)
@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.jsonl", "x.json"])
def test_encodings_are_detected(name, text, encoding):
    bare = text.lstrip("\ufeff")
    mark = text[: len(text) - len(bare)]
    field = json.dumps({"text": bare}, ensure_ascii=False)
    content = {"x.txt": bare, "x.csv": f"text\n{bare}\n".replace(",", "，" if "，" in bare else ";")}
    content |= {"x.jsonl": field, "x.json": f"[{field}]"}
    path = write(name, mark + content[name], encoding)
    expected = content["x.csv"].split("\n")[1] if name == "x.csv" else bare
    assert rows_of(of(path)) == [{"text": expected}]


def test_only_the_first_lines_decide(monkeypatch):
    monkeypatch.setattr(encodings, "_SAMPLE", 100)
    path = write("x.jsonl", [{"text": CHINESE}] * 50, "gb18030")
    assert rows_of(of(path)) == [{"text": CHINESE}] * 50
    path = write("x.txt", CHINESE * 50, "gb18030")
    assert rows_of(of(path)) == [{"text": CHINESE * 50}]


def test_the_named_encoding_wins():
    path = write("x.txt", "高血压".encode("gb18030"))
    assert rows_of(of(path, encoding="latin-1")) == [{"text": "¸ßÑªÑ¹"}]


FIX = "fix it, or name the encoding with `encoding:`"


@pytest.mark.parametrize(
    ("content", "encoding", "where"),
    [
        (b"\x81\x8d\x00\xff\xfe\x90", None, "x.txt:1: byte 0 of the file is not utf-8"),
        (b"ab\n\xff\n", "utf-8", "x.txt:2: byte 3 of the file is not utf-8"),
        (
            CHINESE.encode() + b"\n" * 20_000 + b"\xb5x",
            None,
            "x.txt:20001: byte 20099 of the file is not utf-8",
        ),
        (CHINESE.encode()[:-1], None, "x.txt:1: byte 96 of the file is not utf-8"),
        ("a\n".encode("utf-16") + b"\0\xdc\0\0", None, "x.txt:2: byte 6 of the file is not utf-16"),
        (b"abcd", "utf-16", "x.txt:1: byte 0 of the file is not utf-16"),
        (b"a\n\xff\xff", "gbk", "x.txt:2: byte 2 of the file is not gbk"),
    ],
)
def test_undecodable(content, encoding, where):
    path, message = write("x.txt", content), f"{where}; {FIX}"
    assert problems(of(path, encoding=encoding))[1] == [message]
    with pytest.raises(StageError) as error:
        read_file(path, encoding)
    assert str(error.value) == message


def test_a_bad_byte_after_good_rows():
    lines = [json.dumps({"text": "好" * 50}, ensure_ascii=False).encode() for _ in range(3000)]
    lines[2500] = b'{"text": "\xff"}'
    count, found = problems(of(write("x.jsonl", b"\n".join(lines))))
    assert count > 2000
    offset = sum(len(line) + 1 for line in lines[:2500]) + 10
    assert found == [f"x.jsonl:2501: byte {offset} of the file is not utf-8; {FIX}"]


def test_importing_costs_only_pydantic():
    code = "import stages.data.source, sys; print({'pyarrow', 'charset_normalizer', 'torch'} & {*sys.modules})"
    root = Path(source_module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("form", "row", "problem"),
    [
        (
            "messages",
            {"instruction": "a", "output": "b"},
            "no column `messages`; its columns are those of `format: alpaca`",
        ),
        ("alpaca", {"text": "a"}, "no column `instruction`; its columns are those of `format: text`"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"},
            "its rows have `chosen` and `rejected`, which `format: preference` reads",
        ),
    ],
)
def test_rows_of_another_format_name_that_format(tmp_path, monkeypatch, form, row, problem):
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    reading = Reading(Source(path="x.jsonl", format=form))
    assert list(reading.rows()) == []
    assert reading.problems[0] == f"`x.jsonl`: {problem}"


def test_of_many_bad_rows_the_share_and_the_limit_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ['{"text": ""}'] * 3 + ['{"text": "a"}'] * 197
    Path("x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    reading = Reading(Source(path="x.jsonl", format="text"))
    assert len(list(reading.rows())) == 197
    assert reading.problems[2].endswith("; 3 of 200 rows are bad, and `max_dropped` is 0.01")


def test_a_path_with_backslashes_names_the_one_with_slashes():
    reading = Reading(Source(path="data\\x.jsonl", format="text"))
    assert list(reading.rows()) == []
    assert reading.problems == ["`data\\x.jsonl` does not exist; write folders with `/`: `data/x.jsonl`"]
