"""A finished folder: its record is written last, and it counts only as long as its files are whole."""

import hashlib
import json
import math
import os

import pytest

from pipeline.errors import NewerRecord
from pipeline.saves import artifact
from pipeline.saves.artifact import damage, finish, read
from pipeline.saves.links import link
from stages.runtime.hashes import Hashes


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def part(tmp_path):
    """A working folder as a stage leaves it."""
    folder = tmp_path / "sft-1.part"
    (folder / "deep").mkdir(parents=True)
    for name, content in (
        ("a.safetensors", b"weights"),
        ("deep/b.json", b"{}"),
        ("log.txt", b""),
        ("events.jsonl", b""),
    ):
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def folder(part):
    finished = part.with_name("sft-1")
    finish(part, finished, {"stage": "sft"}, Hashes(None))
    return finished


def test_a_finished_folder_has_a_record_of_every_file_that_is_content(part, folder):
    assert not part.exists()
    assert read(folder) == {
        "schema": 1,
        "stage": "sft",
        "files": {
            "a.safetensors": {"sha256": sha256(b"weights"), "size": 7},
            "deep/b.json": {"sha256": sha256(b"{}"), "size": 2},
        },
    }


def test_a_record_is_valid_json_with_every_figure_and_is_read_as_it_was(part):
    """NaN and Infinity are words that Python writes and no standard reader takes."""

    def refuse(word):
        raise AssertionError(word)

    metrics = {"eval_loss": math.nan, "loss": 1.5, "curve": [1.0, math.inf, {"low": -math.inf}], "none": None}
    finished = part.with_name("sft-1")
    finish(part, finished, {"metrics": metrics}, Hashes(None))
    written = json.loads((finished / "record.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert written["metrics"] == {"eval_loss": None, "loss": 1.5, "curve": [1.0, None, {"low": None}], "none": None}
    assert written["not_finite"] == [
        [["metrics", "eval_loss"], "nan"],
        [["metrics", "curve", 1], "inf"],
        [["metrics", "curve", 2, "low"], "-inf"],
    ]
    record = read(finished)
    assert math.isnan(record["metrics"].pop("eval_loss"))
    assert record["metrics"] == {"loss": 1.5, "curve": [1.0, math.inf, {"low": -math.inf}], "none": None}
    assert "not_finite" not in record


def test_the_record_is_written_after_every_file_is_hashed_and_before_the_folder_gets_its_name(part, monkeypatch):
    seen = []
    hash_one, sync = Hashes.one, artifact.sync

    def written():
        record = part / "record.json"
        return record.exists() and record.stat().st_size > 0

    def one(self, path, **how):
        seen.append(("hash", written()))
        return hash_one(self, path, **how)

    def synced(path):
        seen.append(("sync", path.name, written()))
        sync(path)

    monkeypatch.setattr(Hashes, "one", one)
    monkeypatch.setattr(artifact, "sync", synced)
    finish(part, part.with_name("sft-1"), {}, Hashes(None))
    assert seen == [
        ("sync", "a.safetensors", False),
        ("sync", "b.json", False),
        ("sync", "deep", False),
        ("hash", False),
        ("hash", False),
        ("sync", "sft-1.part", True),
        ("sync", part.parent.name, False),
    ]


def test_a_folder_is_not_finished_when_hashing_fails(part, monkeypatch):
    def one(self, path, **how):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Hashes, "one", one)
    with pytest.raises(OSError, match="Input/output error"):
        finish(part, part.with_name("sft-1"), {}, Hashes(None))
    assert read(part) is None
    assert not part.with_name("sft-1").exists()


def missing(folder):
    (folder / "a.safetensors").unlink()


def longer(folder):
    (folder / "a.safetensors").write_bytes(b"weights!")


def empty(folder):
    (folder / "deep/b.json").write_bytes(b"")


def flipped(folder):
    """One bit, the size and the modification time as before."""
    path = folder / "a.safetensors"
    stat = path.stat()
    path.write_bytes(b"weightr")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def no_record(folder):
    (folder / "record.json").unlink()


def torn_record(folder):
    record = folder / "record.json"
    record.write_bytes(record.read_bytes()[:-2])


def record_of_another_kind(folder):
    (folder / "record.json").write_text("[1]", encoding="utf-8")


@pytest.mark.parametrize("harm", [no_record, torn_record, record_of_another_kind], ids=lambda harm: harm.__name__)
def test_a_folder_without_a_whole_record_is_not_finished(folder, harm):
    harm(folder)
    assert read(folder) is None


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (missing, "`a.safetensors` is missing"),
        (longer, "`a.safetensors` has 8 bytes instead of 7"),
        (empty, "`deep/b.json` has 0 bytes instead of 2"),
        (flipped, "`a.safetensors` has changed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_of_a_finished_folder_is_named(folder, harm, expected):
    hashes = Hashes(folder.parent / "hashes.json")
    assert damage(folder, read(folder), hashes) is None
    harm(folder)
    assert damage(folder, read(folder), hashes) == expected


def test_what_finishing_hashed_is_known_without_reading_it_again(part, monkeypatch):
    hashes = Hashes(part.parent / "hashes.json")
    finish(part, part.with_name("sft-1"), {}, hashes)
    monkeypatch.setattr("stages.runtime.hashes.sha256", lambda path: pytest.fail(f"{path} was read again"))
    folder = part.with_name("sft-1")
    assert damage(folder, read(folder), hashes) is None


def test_rot_that_leaves_all_times_alone_is_found_by_reading(folder):
    """A disk that rots moves no time, which a remembered hash of the same stamp stands for here."""
    path = folder / "a.safetensors"
    path.write_bytes(b"WEIGHTS")
    stat = path.stat()
    hashes = Hashes(None)
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    hashes.known[f"{stat.st_dev}:{stat.st_ino}"] = [*stamp, sha256(b"weights")]
    assert damage(folder, read(folder), hashes) is None
    assert damage(folder, read(folder), hashes, thorough=True) == "`a.safetensors` has changed"


def test_a_record_of_a_later_version_is_no_damage(folder):
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    (folder / "record.json").write_text(json.dumps({**record, "schema": 2}), encoding="utf-8")
    with pytest.raises(NewerRecord) as error:
        read(folder)
    assert str(error.value) == (
        f"`{folder}/record.json` was written by a later version (schema 2; this one knows 1); "
        "update, or use another folder with `--saves DIR`"
    )


def test_a_record_of_the_first_release_is_read(tmp_path):
    """As version 0.1 wrote it; a change of the schema must go on reading this, or refuse it with a way out."""
    folder = tmp_path / "merge-0123456789ab"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    digest = sha256(b"{}")
    (folder / "record.json").write_text(
        '{"schema": 1, "stage": "merge", "use": "merge", "fingerprint": "0123456789ab", "recipe": {"verify": true}, '
        '"inputs": {"model": "ab"}, "model": ["saves/merge-0123456789ab"], "metrics": {"adapters": 1}, '
        '"versions": {"trl": "1.16.0"}, "machine": {"host": "h"}, "started": 1.0, "seconds": 2.0, '
        f'"files": {{"config.json": {{"sha256": "{digest}", "size": 2}}}}}}',
        encoding="utf-8",
    )
    assert damage(folder, read(folder), Hashes(None)) is None


def test_a_kill_between_the_last_two_steps_leaves_nothing_behind(folder):
    (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (folder / "before.json").touch()
    artifact.clear_leftovers(folder)
    artifact.clear_leftovers(folder)
    assert {path.name for path in folder.iterdir()} == {
        "a.safetensors",
        "deep",
        "events.jsonl",
        "log.txt",
        "record.json",
    }


def test_what_is_not_there_has_no_record(tmp_path):
    (tmp_path / "file").touch()
    assert read(tmp_path / "nothing") is None
    assert read(tmp_path / "file" / "below") is None


def test_a_log_may_grow_after_the_end(folder):
    (folder / "log.txt").write_text("a late line\n", encoding="utf-8")
    assert read(folder) is not None


def test_a_link_is_relative_and_moves_with_its_parent(folder, tmp_path):
    link(folder, tmp_path / "x" / "sft")
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    assert (moved / "x" / "sft").readlink().as_posix() == "../sft-1"
    assert read(moved / "x" / "sft") is not None


def test_a_link_is_changed_in_one_step_and_left_alone_when_right(folder, tmp_path):
    name, other = tmp_path / "x" / "sft", tmp_path / "sft-2"
    other.mkdir()
    link(other, name)
    link(folder, name)
    assert name.resolve() == folder
    before = name.lstat()
    link(folder, name)
    assert (name.lstat().st_ino, name.lstat().st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
    assert [path.name for path in name.parent.iterdir()] == ["sft"]


def test_files_have_the_rights_that_the_umask_leaves(tmp_path):
    """safetensors writes 0600, and the server of another user, or a container, could not read it."""
    part = tmp_path / "x.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"weights")
    (part / "model.safetensors").chmod(0o600)
    artifact.finish(part, tmp_path / "x", {}, Hashes(None))
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "x/model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
