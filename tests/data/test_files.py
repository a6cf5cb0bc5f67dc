"""The files that a path names, and the rows of each type of file: folders, patterns, tables, .gz files, the Hub."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pyarrow
import pytest
from readings import problems, read_all

from stages.data.compressed import COMPRESSED
from stages.data.source import NotFetched, Source, data_files, rows_of
from stages.runtime.errors import StageError

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def texts(path, **settings):
    return [row["text"] for row in rows_of(Source(path=path, format="text", **settings))]


def refusal(path, kind="text", **settings):
    _, found = problems(Source(path=path, format=kind, **settings))
    assert len(found) == 1
    return found[0]


# Folders and patterns


def test_a_folder_is_every_data_file_in_it_in_the_order_of_names():
    write("d/b.txt", "二\n\n三")
    write("d/a.jsonl", '{"text": "一"}\n')
    write("d/.hidden.txt", "no")
    write("d/notes.md", "no")
    write("d/deep/c.txt", "no")
    assert texts("d") == ["一", "二", "三"]
    assert texts("d", max_samples=2) == ["一", "二"]
    assert data_files(Source(path="d", format="text")) == [Path("d/a.jsonl"), Path("d/b.txt")]


def test_a_pattern():
    for name, text in [("a/1.txt", "1"), ("a/2.txt", "2"), ("a/b/3.txt", "3"), ("a/x.csv", "text\n4")]:
        write(name, text)
    assert texts("a/*.txt") == ["1", "2"]
    assert texts("a/**/*.txt") == ["1", "2", "3"]
    assert texts("a/[12].txt") == ["1", "2"]
    assert refusal("a/*.json") == "no file matches `a/*.json`"


def test_a_file_whose_name_looks_like_a_pattern():
    write("a[1].txt", "1")
    assert texts("a[1].txt") == ["1"]


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write("home/x.txt", "家")
    assert texts("~/x.txt") == ["家"]
    assert refusal("~/y.txt") == "`~/y.txt` does not exist; there is `x.txt`"


def test_places_name_the_file():
    write("d/a.jsonl", '{"text": "一"}\n')
    write("d/b.jsonl", '{"text": ""}\n' * 5)
    assert problems(Source(path="d", format="text")) == (
        6,
        [
            "d/b.jsonl:1: `text` is empty; fill it in or remove the row",
            "d/b.jsonl:2: `text` is empty; fill it in or remove the row",
            "d/b.jsonl:3: `text` is empty; fill it in or remove the row — and 2 more bad rows; 5 of 6 rows are "
            "bad, and `max_dropped` is 0.01",
        ],
    )


def test_plain_text_among_rows_is_not_passed_over():
    write("d/a.jsonl", '{"instruction": "a", "output": "b"}\n')
    write("d/readme.txt", "about")
    assert refusal("d", "alpaca") == (
        "`d/readme.txt` is plain text, which has no alpaca rows; use `format: text`, or a pattern that excludes it"
    )


def test_a_pattern_that_matches_other_files():
    write("d/a.txt", "a")
    write("d/b.log", "b")
    assert refusal("d/*") == (
        "`d/b.log` must be a .txt, .json, .jsonl, .csv, .tsv, .parquet or .arrow file; "
        "all but the last two may be compressed as .gz, .bz2, .xz, .zst or .zip"
    )


def test_a_path_that_is_empty():
    assert refusal("") == refusal(" ") == "`path` is empty; name a file, a folder or a pattern"


# Types of files


@pytest.mark.parametrize(
    ("name", "delimiter"), [("x.csv", ","), ("x.csv", ";"), ("x.csv", "\t"), ("x.tsv", "\t"), ("x.tsv", ",")]
)
def test_how_a_table_is_separated_is_seen_in_its_header(name, delimiter):
    table = [["instruction", "output"], ["a, b; c", 'd\n"e"\tf']]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(table)
    write(name, text.getvalue())
    (row,) = rows_of(Source(path=name, format="alpaca"))
    assert [turn["content"] for turn in row["messages"]] == table[1]


def test_a_field_that_holds_the_separator():
    write("x.csv", "text;n\na;b;1\n")
    assert refusal("x.csv") == (
        "x.csv:2: the row has 3 fields where the header has 2; put a field that holds a semicolon in double quotes"
    )


def packed(content, suffix):
    if suffix == ".zip":
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inside", content)
        return held.getvalue()
    if suffix == ".zst":
        return pyarrow.Codec("zstd").compress(content, asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content)


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.jsonl", "x.json"])
def test_packed_files(name, suffix):
    rows = '{"text": "高血压"}\n'
    content = {"x.txt": "高血压", "x.csv": "text\n高血压\n", "x.jsonl": rows, "x.json": f"[{rows}]"}[name]
    write(f"{name}{suffix}", packed(content.encode("gb18030"), suffix))
    assert texts(f"{name}{suffix}") == ["高血压"]
    write(f"{name}{suffix}", packed(b"\xef\xbb\xbf" + content.encode(), suffix))
    assert texts(f"{name}{suffix}") == ["高血压"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_packed_file_that_is_damaged(suffix):
    whole = packed(os.urandom(20_000), suffix)
    write(f"x.txt{suffix}", whole[:-200])
    start = f"`x.txt{suffix}` is not a complete {suffix} file ("
    assert refusal(f"x.txt{suffix}", encoding="latin-1").startswith(start)
    write(f"x.txt{suffix}", "plain")
    assert refusal(f"x.txt{suffix}").startswith(start)
    assert refusal(f"x.txt{suffix}").endswith("); compress it again")


def test_a_zip_file_of_several_files():
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a.jsonl", "")
        archive.writestr("b.jsonl", "")
    write("x.jsonl.zip", held.getvalue())
    assert refusal("x.jsonl.zip") == ("`x.jsonl.zip` holds 2 files, and a .zip file is read if it holds one; unpack it")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"


@pytest.mark.parametrize("name", ["x.txt", "x.json", "x.jsonl", "x.csv", "x.parquet", "x.arrow", "x.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_no_data(name):
    write(name, POINTER)
    assert refusal(name, "text") == (f"`{name}` is a Git LFS pointer, not the file; run `git lfs pull` in its folder")


# Data sets of `datasets` on the disk


@pytest.fixture
def saved():
    """A folder as `Dataset.save_to_disk` writes it, with two .arrow files and what it keeps next to them."""
    from datasets import Dataset

    Dataset.from_dict({"text": ["一", "二", "三"]}).save_to_disk("d", num_shards=2)
    write("d/cache-1f.arrow", "not listed")
    return Path("d")


def test_a_data_set_that_was_saved_to_disk(saved):
    assert texts("d") == ["一", "二", "三"]
    assert {path.name for path in data_files(Source(path="d", format="text"))} == {
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    }


def test_a_saved_data_set_that_is_not_whole(saved):
    (saved / "data-00001-of-00002.arrow").unlink()
    assert refusal("d") == (
        "`d/data-00001-of-00002.arrow`, which `state.json` lists, does not exist; save the data set again"
    )
    write("d/state.json", "{}")
    assert refusal("d") == "`d/state.json` does not list the data files; save the data set again, as .parquet"


def test_saved_splits():
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["一"]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk("d")
    assert refusal("d") == "`d` holds a data set for each split; name one of `d/test`, `d/train` as `path:`"
    assert texts("d/train") == ["一"]


def test_a_packed_file_that_is_cut_off():
    write("x.txt.gz", gzip.compress(os.urandom(2000))[:-200])
    assert refusal("x.txt.gz", encoding="latin-1").startswith("`x.txt.gz` is not a complete .gz file (")
    write("y.txt.gz", "plain")
    assert refusal("y.txt.gz") == (
        "`y.txt.gz` is not a complete .gz file (Not a gzipped file (b'pl')); compress it again"
    )
    write("z.parquet.gz", "x")
    assert "`z.parquet.gz` must be a" in refusal("z.parquet.gz")


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow(form):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"text": "一"}, {"text": "二"}])
    new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with new("x.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts("x.arrow") == ["一", "二"]
    write("x.arrow", "no")
    assert refusal("x.arrow").startswith("`x.arrow` cannot be read as Arrow (")


def test_an_array_in_a_file_of_lines_is_read():
    write("x.jsonl", '\n[{"text": "a"},\n {"text": "b"}]\n')
    assert texts("x.jsonl") == ["a", "b"]
    write("x.jsonl", '[{"text": "a"}, {"text": "b"}]')
    assert texts("x.jsonl") == ["a", "b"]
    write("x.jsonl", '[{"text": "a"},\n {"text" "b"}]\n')
    assert refusal("x.jsonl") == "x.jsonl:2: not valid JSON (Expecting ':' delimiter at column 10)"


def test_a_list_of_rows_on_a_line():
    write("x.jsonl", '[{"text": "a"}]\n[{"text": "b"}, {"text": "c"}]\n')
    row = "the row is a list of rows, not an object; write one row a line"
    assert problems(Source(path="x.jsonl", format="text")) == (2, [f"x.jsonl:1: {row}", f"x.jsonl:2: {row}"])


# The Hub


class Hub:
    """A `snapshot_download` that copies from a folder in place of the Hub."""

    def __init__(self, remote, cache):
        self.remote, self.cache, self.asked, self.down = remote, cache, [], None

    def __call__(self, name, *, repo_type, revision, allow_patterns, local_files_only=False):
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert (repo_type, revision) == ("dataset", COMMIT)
        folder = self.cache / name.replace("/", "--")
        if local_files_only:
            if not folder.is_dir():
                raise LocalEntryNotFoundError("not here")
            return str(folder)
        if self.down:
            raise self.down
        self.asked.append(allow_patterns)
        data_set = self.remote / name
        for file in data_set.rglob("*"):
            inner = file.relative_to(data_set).as_posix()
            if file.is_file() and any(fnmatch(inner, pattern) for pattern in allow_patterns):
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / inner)
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", made)
    return made


def remote(*names, card=None, data_set="org/set"):
    for name in names:
        write(f"remote/{data_set}/{name}", json.dumps({"text": name}) + "\n")
    if card is not None:
        write(f"remote/{data_set}/README.md", f"---\n{card}\n---\n# About\n")


def of(path="org/set", **settings):
    return Source(path=f"{path}@{COMMIT}", format="text", **settings)


def fetched(source):
    """The texts of a data set, read after it was fetched."""
    files = data_files(source, download=True)
    assert data_files(source) == files
    return [row["text"] for row in rows_of(source)]


def test_a_data_set_is_fetched_only_where_that_is_allowed(hub):
    remote("train.jsonl", "load.py")
    with pytest.raises(NotFetched) as error:
        data_files(of())
    assert str(error.value) == f"the data set `org/set@{COMMIT}` is not on this machine; `pipeline run` fetches it"
    assert hub.asked == []
    assert fetched(of()) == ["train.jsonl"]
    assert [path.name for path in (hub.cache / "org--set").iterdir()] == ["train.jsonl"]


def test_a_data_set_without_an_organisation(hub):
    remote("train.jsonl", data_set="wiki_qa")
    assert fetched(of("wiki_qa")) == ["train.jsonl"]


def test_what_describes_a_data_set_is_not_read_as_its_rows(hub, saved):
    shutil.copytree(saved, "remote/org/set")
    (Path("remote/org/set") / "cache-1f.arrow").unlink()
    assert fetched(of()) == ["一", "二", "三"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_packed_files_are_fetched(hub, suffix):
    write(f"remote/org/set/train.jsonl{suffix}", packed(b'{"text": "a"}\n', suffix))
    assert fetched(of()) == ["a"]


SHARDS = [f"data/{split}-0000{n}-of-00002.jsonl" for split in ("train_sft", "train_gen", "test_sft") for n in (0, 1)]


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        (["a.jsonl", "b/c.jsonl"], {}, ["a.jsonl", "b/c.jsonl"]),
        (["train.jsonl", "test.jsonl", "dev.jsonl"], {}, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl", "dev.jsonl"], {"split": "validation"}, ["dev.jsonl"]),
        (["test/a.jsonl", "training/a.jsonl"], {}, ["training/a.jsonl"]),
        (SHARDS, {"split": "train_sft"}, SHARDS[:2]),
        (["en/a.jsonl", "zh/a.jsonl"], {"subset": "zh"}, ["zh/a.jsonl"]),
        (["train/zh/dev.jsonl", "train/zh/x-train.jsonl"], {"subset": "train/zh"}, ["train/zh/x-train.jsonl"]),
    ],
)
def test_splits_and_subsets_by_the_names_of_files(hub, names, settings, expected):
    remote(*names)
    assert fetched(of(**settings)) == expected


CARD = """\
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train-*}
  - {split: test, path: [en/test.jsonl, en/more/*.jsonl]}
- config_name: zh
  default: true
  data_files: "**/z*.jsonl"
- config_name: de
  data_dir: de
- config_name: fr
  data_files: {train: fr/a.jsonl, dev: fr/b.jsonl}
"""
FILES = ["en/train-1.jsonl", "en/train-2.jsonl", "en/test.jsonl", "en/more/1.jsonl", "en/more/deep/2.jsonl"]
FILES += ["z1.jsonl", "x/z2.jsonl", "de/train.jsonl", "de/test.jsonl", "fr/a.jsonl", "fr/b.jsonl"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"subset": "en"}, ["en/train-1.jsonl", "en/train-2.jsonl"]),
        ({"subset": "en", "split": "test"}, ["en/more/1.jsonl", "en/test.jsonl"]),
        ({}, ["x/z2.jsonl", "z1.jsonl"]),
        ({"subset": "de", "split": "test"}, ["de/test.jsonl"]),
        ({"subset": "fr", "split": "dev"}, ["fr/b.jsonl"]),
    ],
)
def test_splits_and_subsets_by_the_card(hub, settings, expected):
    remote(*FILES, card=CARD)
    assert fetched(of(**settings)) == expected
    there = {file.relative_to(hub.cache / "org--set").as_posix() for file in hub.cache.rglob("*.jsonl")}
    assert there <= {name for name in FILES if name.split("/")[0] == expected[0].split("/")[0]} | {*expected}


@pytest.mark.parametrize(
    ("names", "card", "settings", "message"),
    [
        (FILES, CARD, {"subset": "ez"}, "has no subset `ez`; there is `de`, `en`, `fr`, `zh`"),
        (FILES, CARD, {"subset": "en", "split": "tst"}, "has no split `tst`; did you mean `test`?"),
        (FILES, CARD.replace("  default: true\n", ""), {},
         "has several subsets; add `subset:`; there is `de`, `en`, `fr`, `zh`"),
        (["test.jsonl"], None, {}, "has no split `train`; there is `test`"),
        (["x.bin"], None, {}, "holds no .txt, .json, .jsonl, .csv, .tsv, .parquet, .arrow files of `split: train`"),
        (["x.jsonl"], "configs: [", {"split": "test"}, "has no split `test`; there is `train`"),
    ],
)  # fmt: skip
def test_subsets_and_splits_that_do_not_exist(hub, names, card, settings, message):
    remote(*names, card=card)
    with pytest.raises(StageError) as error:
        data_files(of(**settings), download=True)
    assert str(error.value) == f"the data set `org/set@{COMMIT}` {message}"


def test_the_hub_says_no(hub):
    hub.down = OSError("no route to host\nmore")
    with pytest.raises(StageError) as error:
        data_files(of(), download=True)
    assert str(error.value) == (
        f"the Hub does not hand out the data set `org/set@{COMMIT}` (no route to host); check name, commit, access "
        "and network"
    )


def test_without_network_what_is_here_is_used(hub):
    remote("train.jsonl")
    assert fetched(of()) == ["train.jsonl"]
    hub.down = OSError("no route to host")
    assert fetched(of()) == ["train.jsonl"]


@pytest.mark.parametrize("path", ["org/set", "org/set@main", "org/set@abc"])
def test_a_data_set_without_its_commit(path):
    assert refusal(path) == (
        f"`{path}` does not exist; for a data set on the Hub pin its commit (40 hex digits), as `org/set@COMMIT`"
    )


# Every row is accounted for

WHOLE = "write the whole character"
TABLE = [  # the bytes of a file, the texts that are kept, and the problems
    ("null", b'{"text": null}\n{"text": "a"}', ["a"], ["x.jsonl:1: `text` is null; it must be text"]),
    ("empty", b'{"text": " \\n"}\n{"text": "a"}', ["a"],
     ["x.jsonl:1: `text` is empty; fill it in or remove the row"]),
    ("missing", b'{"txt": "b"}\n{"text": "a"}', ["a"],
     ["x.jsonl:1: the row has no `text`; text rows need `text` (map other names with `columns:`)"]),
    ("half a character", b'{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}', ["😀"],
     [f"x.jsonl:1: `text` holds half a character (a lone surrogate); {WHOLE}"]),
    ("byte order mark", b'\xef\xbb\xbf{"text": "a"}', ["a"], []),
    ("NUL in a text", b'{"text": "a\\u0000b"}', ["a\0b"], []),
    ("NUL in the file", b'{"text": "a"}\n\0\n{"text": "b"}', ["a", "b"],
     ["x.jsonl:2: not valid JSON (Expecting value at column 1)"]),
    ("a long line", b'{"text": "' + b"x" * 2**20 + b'"}', ["x" * 2**20], []),
    ("windows", b'{"text": "a\\r\\n"}\r\n\r\n{"text": "b"}\r\n', ["a\r\n", "b"], []),
    ("no end", b'{"text": "a"}\n{"text": "b', ["a"],
     ["x.jsonl:2: not valid JSON (Unterminated string starting at column 10)"]),
    ("a number", b'7\n{"text": "a"}', ["a"], ["x.jsonl:1: the row is a number, not an object"]),
    ("twice the key", b'{"text": "a", "text": "b"}', ["b"], []),
    ("two encodings", '{"text": "高血压"}\n'.encode() * 9 + '{"text": "感冒"}\n'.encode("gb18030"), [],
     ["x.jsonl:10: byte 208 of the file is not utf-8; fix it, or name the encoding with `encoding:`"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "kept", "refused"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_kept_and_what_is_refused(content, kept, refused):
    write("x.jsonl", content)
    reading, good = read_all(Source(path="x.jsonl", format="text"))
    assert reading.problems == refused
    assert reading.read == len(good) + reading.bad
    assert [row["text"] for row in good] == kept
