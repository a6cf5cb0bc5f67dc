"""Rows to calibrate with and rows to measure on: how they are drawn, and that no row is both."""

import json

import pytest

from stages.data.spool import Spooled
from stages.measuring.calibration import Calibration, _shuffled, calibration_rows, split
from stages.model.folder import load_tokenizer


def test_rows_to_measure_on_are_never_calibrated_with():
    rows = [[number] for number in range(300)]
    for count in (16, 17, 100, 150, 192, 300):
        held_out, calibration = split(rows[:count], 128, 7)
        assert 8 <= len(held_out) <= 64
        assert 8 <= len(calibration) <= 128
        assert not [row for row in held_out if row in calibration]
    assert [len(part) for part in split(rows, 128, 7)] == [64, 128]
    assert [len(part) for part in split(rows[:12], 4, 7)] == [8, 4]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.train
def test_calibration_mixes_its_data_in_shares(tiny, tmp_path):
    folder = tiny("llama")
    tokenizer = load_tokenizer([str(folder)])
    talks = ({"instruction": f"第{number}天应该注意什么？", "output": "多喝水。"} for number in range(120))
    consult = {"path": write(tmp_path / "talks.jsonl", talks), "format": "alpaca"}
    texts = ({"text": f"general number {number}"} for number in range(30))
    general = {"path": write(tmp_path / "general.jsonl", texts), "format": "text"}

    def shares(**more):
        wanted = Calibration(data={"sources": [consult, general], **more}, samples=16, max_length=80)
        rows = calibration_rows(wanted, lambda source: source, folder, 7)
        drawn, held_out, calibration = ([tokenizer.decode(ids) for ids in part] for part in (rows, *split(rows, 16, 7)))
        assert len(set(drawn)) == len(drawn)
        assert any("general" in text for text in held_out)
        assert any("general" in text for text in calibration)
        return ["general" in text for text in drawn]

    even = shares()
    assert len(even) == 16 + 64
    assert sum(even[:10]) == 5
    assert sum(even) == 30  # there are no more of them, so the others fill in
    assert [sum(shares(weights=[3, 1])[:count]) for count in (4, 40, 80)] == [1, 10, 20]


def test_rows_that_are_not_drawn_are_not_in_memory(tmp_path):
    """Ten megabytes of rows: their order is that of a shuffled list, and no more than a few are held."""
    import random
    import tracemalloc

    rows = [{"text": f"{number} " + "a" * 1000} for number in range(10_000)]
    expected = list(rows)
    random.Random("7:0").shuffle(expected)
    made = (dict(row) for row in rows)
    tracemalloc.start()
    with Spooled(made, tmp_path) as spooled:
        drawn = [row for row, _ in zip(_shuffled(spooled, "7:0"), range(300), strict=False)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(spooled) == 10_000
        assert [spooled[0], spooled[9999]] == [rows[0], rows[9999]]
    assert drawn == expected[:300]
    assert peak < 9e6 + 2e6  # bytes: what is kept in memory before the file takes over, and 300 rows
    assert not list(tmp_path.iterdir())
