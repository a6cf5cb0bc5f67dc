"""The tables of docs/formats.md: every row there is made a file, read, and compared with what the page says."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml

from stages.data import formats
from stages.data.source import Source, inspect_rows

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
    """A row of this format that is kept, for the company of others."""
    return spelled(code(rows("kept", "read as", section=section)[0][2][0]), section)


def shown(row):
    """A row that was read, on one line."""
    told = (
        [row["text"]] if "text" in row else [said(turn) for key in ("prompt", "messages") for turn in row.get(key, ())]
    )
    told += [f"{key} {said(turn)}" for key in ("chosen", "rejected") for turn in row.get(key, ())]
    if "label" in row:
        told += [said(row["completion"][0]), "good" if row["label"] else "bad"]
    if "tools" in row:
        told.append("tools: " + ", ".join(tool["function"]["name"] for tool in row["tools"]))
    line = " · ".join(told).replace("\n", "⏎").replace("\0", "␀")
    return re.sub(r"(.)\1{999,}", lambda found: f"{found[1]}×{len(found[0])}", line)


def said(turn):
    calls = (call["function"] for call in turn.get("tool_calls", ()))
    calls = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return f"{turn['role']}: " + " ".join([turn["content"]] * bool(turn["content"]) + calls)


def content(cell, encoding="utf-8"):
    """The bytes of a cell, in which a backslash stands before `n`, `r`, `t` and the two hex digits of a byte."""
    parts, end = [], 0
    for found in BYTE.finditer(cell):
        parts.append(cell[end : found.start()].encode(encoding))
        parts.append(PLAIN.get(found[0]) or bytes.fromhex(found[0][2:]))
        end = found.end()
    return b"".join([*parts, cell[end:].encode(encoding)])


def read(source):
    """The rows that are kept, and what is said of the others where none may be dropped."""
    kept = []
    done = inspect_rows(source, keep=kept.append)
    assert done.read == len(kept) + done.bad
    return kept, "; ".join(done.problems)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def second(section, settings, row):
    """What becomes of a row that follows a good one, in a file that the section's example reads."""
    good = spelled(code(next(cells[0] for there, its, cells in rows("kept", "read as") if its == settings)), section)
    Path("x.jsonl").write_text(f"{good}\n{spelled(row, section)}\n", encoding="utf-8")
    kept, told = read(Source(**{**settings, "path": "x.jsonl", "max_dropped": 0}))
    return kept[1:], told


@pytest.mark.parametrize(("section", "settings", "cells"), rows("kept", "read as"))
def test_a_row_that_is_kept(section, settings, cells):
    assert settings["format"] == section
    (kept,), told = second(section, settings, code(cells[0]))
    assert (shown(kept), told) == (code(cells[1]), "")


@pytest.mark.parametrize(("section", "settings", "cells"), rows("skipped", "the reason shown"))
def test_a_row_that_is_left_out(section, settings, cells):
    assert second(section, settings, code(cells[0])) == ([], f"x.jsonl:2: {cells[1]}")


@pytest.mark.parametrize("kind", formats.names())
@pytest.mark.parametrize("cells", [cells for *_, cells in rows("`x.jsonl` holds", "rows read", "the message")])
def test_what_holds_for_every_format(kind, cells):
    row = first_row(kind)
    Path("x.jsonl").write_bytes(
        content(GROWN.sub(lambda found: "ROW\n" * int(found[2]), code(cells[0])).replace("ROW", row))
    )
    kept, told = read(Source(path="x.jsonl", format=kind, max_dropped=0))
    assert (len(kept), told) == (int(cells[1]), cells[2])


@pytest.mark.parametrize(
    "cells", [cells for *_, cells in rows("file", "encoding", "holds", "texts read", "the message")]
)
def test_files(cells):
    name, encoding, held, texts, told = cells
    data = content(code(held), encoding) if held else b""
    Path(code(name)).write_bytes(gzip.compress(data) if code(name).endswith(".gz") else data)
    kept, said = read(Source(path=code(name), format="text", max_dropped=0))
    assert ([shown(row) for row in kept], said) == (re.findall(r"`(.*?)`", texts), told)


@pytest.mark.parametrize("cells", [cells for *_, cells in rows("`path`", "reads", "or the message")])
def test_paths(cells):
    there = re.search(r"Of a folder with (.*), each with one text", PAGE)[1]
    for name in re.findall(r"`(.*?)`", there):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps({"text": name}) if name.endswith(".jsonl") else name, encoding="utf-8")
    kept, told = read(Source(path=code(cells[0]), format="text"))
    assert ([row["text"] for row in kept], told) == (re.findall(r"`(.*?)`", cells[1]), cells[2])


@pytest.mark.parametrize("kind", formats.names())
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
