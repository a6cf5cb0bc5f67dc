"""The tables of docs/formats.md: every row in them is written to a file, read, and compared with the page."""

import gzip
import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from readings import read_all

from stages.data import formats
from stages.data.source import Format, Source

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
SAID = re.compile(r'(\w+)\(("(?:[^"\\]|\\.)*"|null)\)')
GROWN = re.compile(r"(.)×(\d+)")
BYTE = re.compile(r"\\x[0-9a-f]{2}|\\[nrt]")
PLAIN = {"\\n": b"\n", "\\r": b"\r", "\\t": b"\t"}


def tables():
    """Each table of the page: its section, the example of a config above it, its columns, and its rows."""
    section, settings, columns = "", None, None
    block = []
    for line in PAGE.splitlines():
        if line.startswith("## "):
            section, settings = line[3:], None
        elif line == "```" and block:
            ((_, settings),) = yaml.safe_load("\n".join(block))["data"].items()
            block = []
        elif block or line == "```yaml":
            block.append("" if line == "```yaml" else line)
        elif not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = [cell.strip() for cell in line.strip("|").split("|")]
        elif not line.startswith("|---"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            yield section, settings, columns, cells


def rows(*columns, section=None):
    found = [
        (there, settings, cells)
        for there, settings, head, cells in tables()
        if head == list(columns) and section in (None, there)
    ]
    assert found
    return found


def code(cell):
    assert cell.startswith("`"), cell
    assert cell.endswith("`"), cell
    return cell[1:-1]


def spelled(row, section):
    """The row as a file has it."""
    who, what = ("from", "value") if section == "sharegpt" else ("role", "content")
    row = SAID.sub(lambda found: f'{{"{who}": "{found[1]}", "{what}": {found[2]}}}', row)
    return GROWN.sub(lambda found: found[1] * int(found[2]), row)


def first_row(section):
    """A row of this format that is kept."""
    return spelled(code(rows("kept", "read as", section=section)[0][2][0]), section)


def shown(row):
    """A normalised row on one line, as the page shows it."""
    if "text" in row:
        parts = [row["text"]]
    else:
        parts = [said(message) for key in ("prompt", "messages") for message in row.get(key, ())]
    parts += [f"{key} {said(message)}" for key in ("chosen", "rejected") for message in row.get(key, ())]
    if "label" in row:
        parts += [said(row["completion"][0]), "good" if row["label"] else "bad"]
    if "tools" in row:
        parts.append("tools: " + ", ".join(tool["function"]["name"] for tool in row["tools"]))
    line = " · ".join(parts).replace("\n", "⏎").replace("\0", "␀")
    return re.sub(r"(.)\1{999,}", lambda found: f"{found[1]}×{len(found[0])}", line)


def said(message):
    calls = (call["function"] for call in message.get("tool_calls", ()))
    calls = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    thought = [f"({message['reasoning_content']})"] if "reasoning_content" in message else []
    words = [*thought, *[message["content"]] * bool(message["content"]), *calls]
    return f"{message['role']}: {' '.join(words)}" + " (weight 0)" * ("weight" in message)


def content(cell, encoding="utf-8"):
    """The bytes of a cell, in which `\\n`, `\\r`, `\\t` and `\\x` with two hex digits are escapes."""
    parts, end = [], 0
    for found in BYTE.finditer(cell):
        parts.append(cell[end : found.start()].encode(encoding))
        parts.append(PLAIN.get(found[0]) or bytes.fromhex(found[0][2:]))
        end = found.end()
    return b"".join([*parts, cell[end:].encode(encoding)])


def read(source):
    """The rows that are kept, and the problems as one line."""
    reading, kept = read_all(source)
    assert reading.read == len(kept) + reading.bad
    return kept, "; ".join(reading.problems)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def second(section, settings, row):
    """The kept rows after the first, and the problems, of a file with a good row and then this row.

    The file is read with the settings of the section's example.
    """
    good = spelled(code(next(cells[0] for there, its, cells in rows("kept", "read as") if its == settings)), section)
    Path("x.jsonl").write_text(f"{good}\n{spelled(row, section)}\n", encoding="utf-8")
    kept, problems = read(Source(**{**settings, "path": "x.jsonl", "max_dropped": 0}))
    return kept[1:], problems


@pytest.mark.parametrize(("section", "settings", "cells"), rows("kept", "read as"))
def test_a_row_that_is_kept(section, settings, cells):
    assert settings["format"] == section
    (kept,), problems = second(section, settings, code(cells[0]))
    assert (shown(kept), problems) == (code(cells[1]), "")


@pytest.mark.parametrize(("section", "settings", "cells"), rows("skipped", "the reason shown"))
def test_a_row_that_is_left_out(section, settings, cells):
    assert second(section, settings, code(cells[0])) == ([], f"x.jsonl:2: {cells[1]}")


@pytest.mark.parametrize("kind", get_args(Format))
@pytest.mark.parametrize("cells", [cells for *_, cells in rows("`x.jsonl` holds", "rows read", "the message")])
def test_what_holds_for_every_format(kind, cells):
    row = first_row(kind)
    Path("x.jsonl").write_bytes(
        content(GROWN.sub(lambda found: "ROW\n" * int(found[2]), code(cells[0])).replace("ROW", row))
    )
    kept, problems = read(Source(path="x.jsonl", format=kind, max_dropped=0))
    assert (len(kept), problems) == (int(cells[1]), cells[2])


@pytest.mark.parametrize(
    "cells", [cells for *_, cells in rows("file", "encoding", "holds", "texts read", "the message")]
)
def test_files(cells):
    name, encoding, held, texts, expected = cells
    data = content(code(held), encoding) if held else b""
    Path(code(name)).write_bytes(gzip.compress(data) if code(name).endswith(".gz") else data)
    kept, problems = read(Source(path=code(name), format="text", max_dropped=0))
    assert ([shown(row) for row in kept], problems) == (re.findall(r"`(.*?)`", texts), expected)


@pytest.mark.parametrize("cells", [cells for *_, cells in rows("`path`", "reads", "or the message")])
def test_paths(cells):
    files = re.search(r"Of a folder with (.*), each with one text", PAGE)[1]
    for name in re.findall(r"`(.*?)`", files):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps({"text": name}) if name.endswith(".jsonl") else name, encoding="utf-8")
    kept, problems = read(Source(path=code(cells[0]), format="text"))
    assert ([row["text"] for row in kept], problems) == (re.findall(r"`(.*?)`", cells[1]), cells[2])


@pytest.mark.parametrize("kind", get_args(Format))
def test_every_format_has_its_columns_and_tables(kind):
    form = formats.module(kind)
    names = [", ".join(f"`{name}`" for name in columns) or "none" for columns in (form.NEEDED, form.OPTIONAL)]
    assert f"## {kind}\n\nNeeded: {names[0]}. Optional: {names[1]}.\n" in PAGE
    for head in (("kept", "read as"), ("skipped", "the reason shown")):
        assert len(rows(*head, section=kind)) > 1


def test_every_example_of_a_config_is_one():
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        for settings in yaml.safe_load(block)["data"].values():
            Source(**settings)
