"""What was found in data files is remembered by their content."""

import hashlib
import json

import pytest

from pipeline.saves import content as content_module
from pipeline.saves.content import Inspection, Inspections
from stages.data import json_rows
from stages.data.source import READER_VERSION, Reading, Source


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_half_written_files_of_killed_processes_are_deleted(tmp_path):
    kept, torn = (
        [".hashes.json", ".rows/ab", ".rows/ab-about.json"],
        [".hashes.json.12", ".rows/ab.7", ".rows/cd.json.81"],
    )
    (tmp_path / ".rows").mkdir()
    for name in kept + torn:
        (tmp_path / name).touch()
    content_module.clear_torn(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == kept


# Rows


def source(path, **settings):
    return Source(path=str(path), format="text", **settings)


@pytest.fixture
def texts(tmp_path):
    """Writes a file of texts, and returns its source and digest."""

    def write(*texts, name="texts.jsonl", bad=False):
        path = tmp_path / name
        lines = [json.dumps({"text": text}) for text in texts] + (["{"] if bad else [])
        path.write_text("\n".join(lines), encoding="utf-8")
        return source(path), sha256(path.read_bytes())

    return write


def key(source, digest):
    return source.model_dump(mode="json", exclude={"path"}) | {"sha256": digest}


def test_good_rows_are_parsed_once_whatever_the_file_is_called(texts, tmp_path, monkeypatch):
    inspections = Inspections(tmp_path / "rows")
    good = Inspection(rows=3, bad=0, first=[], problems=[])
    assert inspections.of(*texts("a", "b", "c")) == good
    again = texts("a", "b", "c", name="moved.jsonl")
    monkeypatch.setattr(content_module, "Reading", lambda *_: pytest.fail("parsed again"))
    assert inspections.of(*again) == good


def test_what_version_3_found_is_read_again_because_pairs_of_openai_are_rows_now(texts, tmp_path, monkeypatch):
    inspections, given, read = Inspections(tmp_path / "rows"), texts("a", "b"), []
    monkeypatch.setattr(content_module, "READER_VERSION", 3)
    inspections.of(*given)
    monkeypatch.setattr(content_module, "READER_VERSION", READER_VERSION)
    monkeypatch.setattr(content_module, "Reading", lambda source, *more: read.append(source) or Reading(source, *more))
    inspections.of(*given)
    assert read[:1] == [given[0]]


def test_other_settings_are_other_rows(texts, tmp_path):
    inspections = Inspections(tmp_path / "rows")
    all_of_it, digest = texts("a", "b", "c")
    assert inspections.of(all_of_it, digest).rows == 3
    assert inspections.of(source(all_of_it.path, max_samples=2), digest).rows == 2


def test_bad_rows_that_stop_the_run_are_found_once_and_reported_every_time(texts, tmp_path, monkeypatch):
    inspections = Inspections(tmp_path / "rows")
    bad = texts("a", bad=True)
    first = inspections.of(*bad)
    assert (first.rows, first.bad, len(first.problems)) == (2, 1, 1)
    monkeypatch.setattr(content_module, "Reading", lambda *_: pytest.fail("parsed again"))
    assert inspections.of(*bad) == first


def test_another_version_of_the_reader_says_what_it_finds_in_its_own_words(texts, tmp_path, monkeypatch):
    inspections = Inspections(tmp_path / "rows")
    given, good = texts("a", bad=True), texts("a", "b", name="good.jsonl")
    old = inspections.of(*given).problems
    inspections.of(*good)
    monkeypatch.setattr(content_module, "_words", lambda: "of another version")
    monkeypatch.setattr(content_module.Reading, "end", lambda self, stopped: setattr(self, "problems", ["new words"]))
    assert inspections.of(*given).problems == ["new words"] != old
    assert inspections.of(*good).problems == []  # nothing was said of its rows, so they are not read again


def test_a_file_that_could_not_be_read_to_its_end_is_read_again(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a"}', encoding="utf-8")
    assert len(Inspections(tmp_path / "rows").of(source(path), "digest").problems) == 1
    assert not list(tmp_path.glob("rows/*"))


def bad_row(number):
    return ['{"text": ""}', "{", "[]", '{"words": "a"}', '{"text": "{{name}}", "more": 1}'][number % 5]


@pytest.mark.parametrize("end", ["", "\n[1]", '\n"x"'])
def test_several_processes_find_what_one_finds(tmp_path, monkeypatch, end):
    """The same counts, the same first bad rows with their lines, the same rows in the same order."""
    lines = [json.dumps({"text": f"text {number}" * (number % 7)}) for number in range(300)]
    for number in range(40, 300, 13):
        lines[number] = bad_row(number)
    lines[120:121] = ['{"text":', "", '"over lines"}']
    path = tmp_path / "x.jsonl"
    path.write_bytes(("\n".join(lines) + end).encode() + b"\n")
    found = []
    for processes, few in ((1, 4), (3, 0)):
        monkeypatch.setattr(content_module, "PROCESSES", processes)
        monkeypatch.setattr(content_module, "usable_cores", lambda: 8)
        monkeypatch.setattr(content_module, "FEW", few)
        monkeypatch.setattr(json_rows, "_PIECE", 2**20 if processes == 1 else 200)
        folder = tmp_path / f"rows-{processes}"
        inspection = Inspections(folder).of(source(path, max_dropped=0.5), "digest")
        (digests,) = (file for file in folder.iterdir() if not file.name.endswith(".json"))
        found.append((inspection, digests.read_bytes()))
    assert found[0] == found[1]
    inspection, digests = found[0]
    assert (inspection.rows, inspection.bad) == (300 + bool(end), 56 + bool(end))
    assert len(digests) == 8 * (inspection.rows - inspection.bad)
    assert [first.split(": ")[0] for first in inspection.first] == [f"{path}:1", f"{path}:8", f"{path}:15"]
    assert inspection.unread == ["columns that nothing reads: `more`"]


def test_an_error_in_the_middle_comes_after_the_bad_rows_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(content_module, "FEW", 0)
    monkeypatch.setattr(content_module, "usable_cores", lambda: 2)
    monkeypatch.setattr(json_rows, "_PIECE", 100)
    monkeypatch.setattr(json_rows, "_DECODED", 50)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{\n" + b'{"text": "a"}\n' * 2000 + b'{"text": "\xff"}\n')
    found = Inspections(tmp_path / "rows").of(source(path, encoding="utf-8"), "digest")
    assert found.rows > 1000
    assert [problem.split(";")[0] for problem in found.problems] == [
        f"{path}:2002: byte 28012 of the file is not utf-8",
    ]
    strict = Inspections(tmp_path / "rows").of(source(path, encoding="utf-8", max_dropped=0), "digest")
    assert [problem.split(": ")[0] for problem in strict.problems] == [f"{path}:1", f"{path}:2002"]


def test_bad_rows_that_may_be_dropped_are_cached_with_the_rest(texts, tmp_path, monkeypatch):
    inspections = Inspections(tmp_path / "rows")
    found, digest = texts("a", bad=True)
    lenient = source(found.path, max_dropped=0.5)
    inspection = inspections.of(lenient, digest)
    assert (inspection.rows, inspection.bad, inspection.problems) == (2, 1, [])
    assert inspection.first[0].startswith(f"{found.path}:2: not valid JSON")
    moved = source(texts("a", bad=True, name="moved.jsonl")[0].path, max_dropped=0.5)
    assert inspections.of(moved, digest).first[0].startswith(f"{moved.path}:2: not valid JSON")
    assert inspections.of(lenient, digest) == inspection
    monkeypatch.setattr(content_module, "Reading", lambda *_: pytest.fail("parsed again"))
    assert inspections.of(lenient, digest) == inspection


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("abc", "abd", " (1 row)"),
        ("abc", "dec", " (2 rows)"),
        ("abc", "abcc", " (1 row added)"),
        ("abc", "c", " (2 rows removed)"),
        ("abc", "bcdef", " (3 rows added, 1 row removed)"),
        ("abc", "cba", " (the same rows, written or ordered differently)"),
    ],
)
def test_the_rows_that_changed_are_counted(texts, tmp_path, before, after, expected):
    inspections = Inspections(tmp_path / "rows")
    keys = []
    for letters in (before, after):
        found = texts(*letters)
        inspections.of(*found)
        keys.append(key(*found))
    assert inspections.difference(*keys) == expected


def test_rows_that_are_not_cached_are_not_counted(texts, tmp_path):
    one, other = texts("a"), texts("b")
    assert Inspections(tmp_path / "rows").difference(key(*one), key(*other)) == ""
