"""The rows of JSON files in every form, with the place of each, and how much of a file is in memory."""

import json
import tracemalloc

import pytest
from readings import problems

from stages.data import json_rows
from stages.data.source import Reading, Source

ROWS = [{"text": "一"}, {"text": "line\nbreak, {brace} [bracket]"}, {"text": "三", "more": [{"a": 1}, {"b": []}]}]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(name, content, **settings):
    """The texts read, their places, the problems, and the notes."""
    with open(name, "w", encoding="utf-8", newline="") as file:
        file.write(content)
    reading = Reading(Source(path=name, format="text", **settings))
    rows = list(reading.rows())
    return [row["text"] for _, row in rows], [place for place, _ in rows], reading.problems, reading.notes


TEXTS = [row["text"] for row in ROWS]
FORMS = {
    "one a line": ("\n".join(json.dumps(row) for row in ROWS), ["x:1", "x:2", "x:3"]),
    "over several lines": ("\n".join(json.dumps(row, indent=2) for row in ROWS), ["x:1", "x:4", "x:7"]),
    "with blank lines": ("\n\n" + "\n \n".join(json.dumps(row, indent=1) for row in ROWS), ["x:3", "x:7", "x:11"]),
    "an array": (json.dumps(ROWS), ["x: row 1", "x: row 2", "x: row 3"]),
    "an array over lines": (json.dumps(ROWS, indent=1), ["x: row 1", "x: row 2", "x: row 3"]),
    "a wrapper": (json.dumps({"info": {"n": [1]}, "data": ROWS, "tags": ["a"], "none": []}), None),
    "a wrapper over lines": (
        json.dumps({"version": 1.5, "data": ROWS, "to": None}, indent=4, ensure_ascii=False),
        None,
    ),
}


@pytest.mark.parametrize("piece", [7, 40, 2**20])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n \n"])
def test_rows_are_the_same_in_every_form(name, form, piece, end, monkeypatch):
    monkeypatch.setattr(json_rows, "_PIECE", piece)
    content, places = FORMS[form]
    wrapped = places is None
    places = places or ["x: row 1", "x: row 2", "x: row 3"]
    note = [f"the rows of `{name}` are the list under its key `data`"] if wrapped else []
    assert read(name, content + end) == (TEXTS, [place.replace("x", name, 1) for place in places], [], note)


def test_one_object_is_one_row():
    assert read("x.json", json.dumps(ROWS[2], indent=1))[0] == ["三"]
    assert read("x.json", json.dumps({"more": ROWS, "text": "一"}))[0] == ["一"]  # a row may hold a list of objects


def test_the_key_of_the_rows():
    several = json.dumps({"train": ROWS, "images": [{"id": 1}], "none": [], "n": 3}, indent=1)
    assert read("x.json", several)[2:] == (
        ["`x.json` holds a list of objects under each of `train`, `images`; name the one to read, as `rows: train`"],
        [],
    )
    assert read("x.json", several, rows="train")[0] == TEXTS
    assert read("x.json", several, rows="trian")[2] == [
        "`x.json` has no key `trian`, which `rows:` names; did you mean `train`?"
    ]
    assert read("x.json", several, rows="n")[2] == [
        "`x.json` holds a number under `n`, which `rows:` names; name a list"
    ]
    assert read("x.jsonl", FORMS["one a line"][0], rows="data")[2] == [
        "`x.jsonl` has no key `data`, which `rows:` names; the file is not one object"
    ]
    assert read("x.csv", "text\na\n", rows="data")[2] == [
        "`rows: data` names a key of a JSON file, and `x.csv` is none; remove `rows:`"
    ]


def test_a_mistake_in_a_large_object_is_one_message():
    lines = json.dumps({"data": [{"text": f"{number}"} for number in range(3000)]}, indent=1).split("\n")
    lines[5001] = lines[5001].replace(":", "")
    found = read("x.json", "\n".join(lines))
    assert found[0] == []
    assert len(found[2]) == 1
    assert found[2][0] == "x.json:1: not valid JSON (Expecting ':' delimiter at line 5002, column 11)"


@pytest.mark.parametrize("piece", [11, 2**20])
def test_a_broken_line_costs_no_other_row(piece, monkeypatch):
    monkeypatch.setattr(json_rows, "_PIECE", piece)
    lines = [
        '{"text": "a"}',
        '{"text": "cut',
        '{"text": "b"}',
        '{"text": "cut",',
        '{"text": "c"}',
        '{"text": "d"},',
        "]",
    ]
    lines += ['{"text": "e"}', '{"text":', ' "over lines"}', '{"text": [1,', "2]}", '{"text": "f"}']
    with open("x.jsonl", "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    reading = Reading(Source(path="x.jsonl", format="text", max_dropped=0.9))
    rows = [(place, row["text"]) for place, row in reading.rows()]
    assert rows == [
        *[("x.jsonl:1", "a"), ("x.jsonl:3", "b"), ("x.jsonl:5", "c"), ("x.jsonl:8", "e")],
        *[("x.jsonl:9", "over lines"), ("x.jsonl:13", "f")],
    ]
    assert reading.first_bad == [
        "x.jsonl:2: not valid JSON (Unterminated string starting at column 10)",
        "x.jsonl:4: not valid JSON (Expecting property name enclosed in double quotes at column 16)",
        "x.jsonl:6: not valid JSON (Extra data at column 14) — and 1 more bad row",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n {"text" 1}]', "x.json:2: not valid JSON (Expecting ':' delimiter at column 10)"),
        ('[{"text": "a"},\n {"text": "b"', "x.json:2: not valid JSON (Expecting ',' delimiter at column 14)"),
        ('[{"text": "a"}', "x.json:1: not valid JSON (Expecting ',' delimiter at column 15)"),
        ('[{"text": "a"}\n]\n\n {}', "x.json:4: not valid JSON (Extra data at column 2)"),
        ('[{"text": "a"}, tru]', "x.json:1: not valid JSON (Expecting value at column 17)"),
        ('[{"text": "a"}, "\\ud83d\\u00]', "x.json:1: not valid JSON (Invalid \\uXXXX escape at column 25)"),
        ('{"data": [{"text": "a"}]', "x.json:1: not valid JSON (Expecting ',' delimiter at column 25)"),
    ],
)
@pytest.mark.parametrize("piece", [3, 2**20])
def test_where_a_file_is_broken(content, message, piece, monkeypatch):
    monkeypatch.setattr(json_rows, "_PIECE", piece)
    assert read("x.json", content)[2] == [message]


@pytest.mark.parametrize("form", ["lines", "array", "wrapper"])
def test_a_file_is_never_whole_in_memory(form):
    """Twenty megabytes, read with two."""
    rows = [{"text": "字" * 2000} for _ in range(10_000)]
    with open("x.json", "w", encoding="utf-8") as file:
        if form == "lines":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            json.dump(rows if form == "array" else {"data": rows}, file, ensure_ascii=False, indent=1)
    del rows
    source = Source(path="x.json", format="text")
    problems(Source(path="x.json", format="text", max_samples=1))  # imports what is needed
    tracemalloc.start()
    reading = Reading(source)
    count = sum(1 for _ in reading.rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 16e6  # bytes; the text of the file alone takes 40 MB in memory
