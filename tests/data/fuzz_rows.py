"""Rows and files broken at random: `python tests/data/fuzz_rows.py 100000 [SEED]`, or `make fuzz`; CI tries thousands.

Whatever a file holds, reading it must end without an internal error and must account for every row. Each case has its
own seed, which a failure names.
"""

import contextlib
import copy
import csv
import gzip
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[2]))

from pydantic import ValidationError

from stages.data import formats
from stages.data.source import Format, Reading, Source, rows_of
from stages.runtime.errors import StageError

SLOW = 5  # seconds for one file
WORDS = ["高血压", "a", "q?", "", " ", "\n", "\0", "\ufeff", "\ud800", "😀", "{{name}}", "{{ 名 }}", "<|im_end|>", "[]"]
WORDS += ['{"name": "f", "arguments": {}}', '{"name": 3}', "{", "null", "true", "0", 'x"y', "a,b;c\td", "x" * 300]
NAMES = ["text", "messages", "role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "tools"]
NAMES += ["reasoning_content", "thinking", "weight", "loss_weight", "train"]
NAMES += ["prompt", "label", "system", "history", "images", "other", "", "type", "parameters", "chosen", "input"]
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
    {"role": "tool", "content": "t"},
    {"role": "assistant", "content": "r"},
]
SAID = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    {"from": "observation", "value": "t"},
    {"from": "gpt", "value": "r"},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
    {
        "role": "assistant",
        "content": [{"type": "reasoning", "value": "k"}, {"type": "tool_call", "value": '{"name": "f"}'}],
        "loss_weight": 0.0,
    },
    {"role": "tool", "content": "t"},
    {"role": "assistant", "content": "r", "reasoning_content": "k", "weight": 1},
]
TOOLS = [{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]
GOOD = {
    "text": [{"text": "一段文字"}],
    "alpaca": [{"instruction": "q", "input": "i", "output": "r", "system": "s", "history": [["a", "b"]]}],
    "prompt_completion": [{"prompt": "q", "completion": "r"}, {"prompt": TALK[:2], "completion": TALK[2:]}],
    "messages": [
        {"messages": TALK, "tools": TOOLS},
        {"messages": PARTS, "tools": TOOLS, "history": [["a", "b"], []]},
        {"messages": json.dumps(TALK), "history": "[]"},
        {"messages": ["问：q", "答：r"]},
    ],
    "sharegpt": [{"conversations": SAID, "tools": json.dumps(TOOLS), "system": "s"}],
    "preference": [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"conversations": SAID[:1], "chosen": SAID[3], "rejected": {"from": "gpt", "value": "other"}},
        {"chosen": TALK, "rejected": [*TALK[:-1], {"role": "assistant", "content": "b"}], "tools": TOOLS},
    ],
    "labelled": [
        {"messages": TALK, "label": True},
        {"prompt": "q", "completion": "r", "label": "false"},
        {"instruction": "q", "output": "r", "label": 0},
    ],
}
ENCODINGS = ["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "gb18030", "big5"]


def anything(dice, depth=0):
    """A random JSON value."""
    choice = dice.randrange(9 if depth < 3 else 6)
    if choice < 3:
        return dice.choice(WORDS)
    if choice < 6:
        return dice.choice([None, True, False, 0, 1, -7, 2.5, float("nan"), 10**30])
    if choice == 6:
        return [anything(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {dice.choice(NAMES): anything(dice, depth + 1) for _ in range(dice.randrange(4))}


def broken(dice, row):
    """The row after a few random changes somewhere inside it."""
    row = copy.deepcopy(row)
    for _ in range(dice.choice([0, 0, 0, 1, 1, 2, 4])):
        place = row
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = dice.choice(keys)
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and dice.random() < 0.7:
                place = inner
                continue
            accident(dice, place, key)
            break
    return row


def accident(dice, place, key):
    choice = dice.randrange(5)
    if choice == 0:
        del place[key]
    elif choice == 1 and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    elif choice == 1:
        place[dice.choice(NAMES)] = place.pop(key)
    elif choice == 2 and isinstance(place, list):
        dice.shuffle(place)
    elif choice == 3:
        place[key] = [place[key]]
    else:
        place[key] = anything(dice)


def written(dice, kind, rows):
    """The bytes of a file that holds the rows."""
    ascii_only = dice.random() < 0.5
    dumped = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if kind == ".jsonl":
        text = "\n".join(dumped)
    elif kind == ".json":
        text = f"[{','.join(dumped)}]"
    elif kind == ".txt":
        text = "\n\n".join(str(row.get("text")) for row in rows)
    else:
        names = list(dict.fromkeys(name for row in rows for name in row)) or ["text"]
        table = io.StringIO()
        writer = csv.writer(table, delimiter=dice.choice(",;\t"))
        writer.writerow(names)
        writer.writerows([row.get(name) for name in names] for row in rows)
        text = table.getvalue()
    return text.encode(dice.choice(ENCODINGS), "backslashreplace")


def damaged(dice, data):
    """The bytes after a few random changes."""
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 3, 20])):
        at = dice.randrange(len(data) + 1)
        choice = dice.randrange(4)
        if choice == 0:
            del data[at : at + dice.choice([1, 2, 50])]
        elif choice == 1:
            data[at:at] = dice.randbytes(dice.choice([1, 2, 9]))
        elif choice == 2:
            data[at:at] = dice.choice([b"\n", b'"', b"{", b"[" * 2000, b"\0", b"\xff\xfe", b"\r", b","])
        else:
            data[at : at + 1] = bytes([dice.randrange(256)])
    return bytes(data)


def source(dice, path, form):
    """Random settings to read a file with."""
    settings = {}
    if dice.random() < 0.1:
        module = formats.module(form)
        settings["columns"] = {dice.choice([*module.NEEDED, *module.OPTIONAL]): dice.choice(NAMES)}
    if dice.random() < 0.1:
        settings["roles"] = {"user": dice.choice(["user", "assistant", "x"]), "assistant": "gpt"}
    if dice.random() < 0.2:
        settings["turns"] = "merge"
    if dice.random() < 0.05:
        settings["message_keys"] = {"role": "from", "content": "content"}
    if dice.random() < 0.3:
        settings["fill"] = dice.choice([{}, {"name": "小医"}, {"name": "{{name}}", "名": "x"}])
    if dice.random() < 0.1:
        settings["max_samples"] = dice.randrange(1, 4)
    if dice.random() < 0.1:
        settings["encoding"] = dice.choice(["utf-8", "gb18030", "latin-1", "utf-16"])
    return Source(path=str(path), format=form, **settings)


def case(seed, folder):
    """Write a file, read it, and check the counts, which are returned for the tally."""
    dice = random.Random(seed)
    form = dice.choice(sorted(get_args(Format)))
    kind = dice.choice([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".txt"])
    rows = [broken(dice, dice.choice(GOOD[form])) for _ in range(dice.randrange(1, 5))]
    data = written(dice, kind, rows)
    intact = dice.random() < 0.75
    data = data if intact else damaged(dice, data)
    packed = dice.random() < 0.1
    path = folder / f"x{kind}{'.gz' * packed}"
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    try:
        reading = Reading(source(dice, path, form))
    except ValidationError:
        return Counter(files=1, settings_refused=1)
    begun = time.monotonic()
    kept = [row for _, row in reading.rows()]
    assert time.monotonic() - begun < SLOW, "too slow"
    check(reading, kept)
    if intact and kind in (".jsonl", ".json") and not reading.source.encoding:
        count = min(len(rows), reading.source.max_samples or len(rows))
        words = ("not utf", "not valid JSON", "is not ")
        stopped = [line for line in reading.problems if any(word in line for word in words)]
        inside = any("are the list under its key" in note for note in reading.notes)
        assert reading.read == count or stopped or inside, f"read {reading.read} of {count} rows"
    path.unlink()
    return Counter(files=1, refused=bool(reading.problems), read=reading.read, kept=len(kept), bad=reading.bad)


def check(reading, kept):
    """Every row is accounted for, problems are short lines, and `rows_of` agrees."""
    assert reading.read == len(kept) + reading.bad, f"read {reading.read}, kept {len(kept)}, bad {reading.bad}"
    assert reading.problems or not reading.bad, "bad rows without a problem"
    assert reading.problems or kept, "no row was kept, without a problem"
    assert len(reading.problems) <= 4
    for line in reading.problems:
        assert "\n" not in line, "a problem is one line"
        assert len(line) < 1500
    for row in kept:
        json.dumps(row, ensure_ascii=False, allow_nan=True).encode()
        shape(row)
    raised = None
    try:
        again = rows_of(reading.source)
    except StageError as error:
        raised = str(error)
    assert (raised is None) == (not reading.problems), "`Reading.problems` and `rows_of` disagree"
    assert raised is not None or json.dumps(again) == json.dumps(kept)


def shape(row):
    """A kept row can be trained on."""
    if "text" in row:
        assert row["text"].strip()
        return
    for said in (row.get("messages") or row["prompt"] + row.get("chosen", row.get("completion")),):
        assert said[-1]["role"] == "assistant"
        assert "weight" not in said[-1], "the last answer is trained on"
        assert any(turn["role"] == "user" for turn in said)
        for turn in said:
            assert turn["role"] in ("system", "user", "assistant", "tool")
            assert isinstance(turn["content"], str)
            assert "weight" not in turn or (turn["role"], turn["weight"]) == ("assistant", 0)
            assert "reasoning_content" not in turn or (
                turn["role"] == "assistant" and turn["reasoning_content"].strip()
            )
            assert turn["content"].strip() or turn.get("tool_calls") or turn["role"] == "tool"
            for call in turn.get("tool_calls", []):
                assert isinstance(call["function"]["arguments"], dict)
    for tool in row.get("tools", []):
        assert isinstance(tool["function"]["parameters"], dict)
    assert "label" not in row or row["label"] in (True, False)


def run(count, seed=0):
    """Try so many files. Raises AssertionError with the seed of a file that fails."""
    tally = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for number in range(seed, seed + count):
            try:
                tally += case(number, Path(folder))
            except Exception as error:
                raise AssertionError(f"seed {number}: {type(error).__name__}: {error}") from error
    return tally


if __name__ == "__main__":
    begun = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):
        found = run(*map(int, sys.argv[1:] or ["100000"]))
        print({**found, "seconds": round(time.monotonic() - begun)})
