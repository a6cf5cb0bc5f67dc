"""A finished folder: its record is written last, and it counts only as long as its files are whole."""

import hashlib
import json
import os

import pytest

from pipeline import artifact
from pipeline.artifact import Hashes, finish, link, read


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
    finish(part, finished, {"stage": "sft"})
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


def test_the_record_is_written_after_every_file_is_hashed_and_before_the_folder_gets_its_name(part, monkeypatch):
    seen = []
    hash_one, sync = Hashes.one, artifact._sync

    def one(self, path):
        seen.append(("hash", (part / "record.json").exists()))
        return hash_one(self, path)

    def synced(path):
        seen.append(("sync", path.name, (part / "record.json").exists()))
        sync(path)

    monkeypatch.setattr(Hashes, "one", one)
    monkeypatch.setattr(artifact, "_sync", synced)
    files = sorted(path for path in part.rglob("*") if path.is_file() and path.name not in artifact.NOT_CONTENT)
    finish(part, part.with_name("sft-1"), {})
    assert seen == [
        *[("sync", path.name, False) for path in files],
        ("hash", False),
        ("hash", False),
        ("sync", "sft-1.part", True),
        ("sync", part.parent.name, False),
    ]


def test_a_folder_is_not_finished_when_hashing_fails(part, monkeypatch):
    def one(self, path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Hashes, "one", one)
    with pytest.raises(OSError, match="Input/output error"):
        finish(part, part.with_name("sft-1"), {})
    assert read(part) is None
    assert not part.with_name("sft-1").exists()


def missing(folder):
    (folder / "a.safetensors").unlink()


def longer(folder):
    (folder / "a.safetensors").write_bytes(b"weights!")


def empty(folder):
    (folder / "deep/b.json").write_bytes(b"")


def no_record(folder):
    (folder / "record.json").unlink()


def torn_record(folder):
    record = folder / "record.json"
    record.write_bytes(record.read_bytes()[:-2])


def record_of_another_kind(folder):
    (folder / "record.json").write_text("[1]", encoding="utf-8")


def record_of_a_later_version(folder):
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    (folder / "record.json").write_text(json.dumps({**record, "schema": 2}), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [missing, longer, empty, no_record, torn_record, record_of_another_kind, record_of_a_later_version],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_folder_has_no_record(folder, damage):
    damage(folder)
    assert read(folder) is None


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


def stamp(path):
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"content")
    return path


def cache_of(path, entry):
    cache = path.with_name("hashes.json")
    cache.write_text(json.dumps({str(path): entry}), encoding="utf-8")
    return cache


def test_a_hash_is_taken_from_the_cache_while_nothing_about_the_file_moved(data):
    assert Hashes(cache_of(data, [*stamp(data), "known"])).one(data) == "known"


@pytest.mark.parametrize("moved", range(4), ids=["size", "modification time", "change time", "inode"])
def test_a_hash_is_made_anew_when_one_thing_about_the_file_moved(data, moved):
    old = stamp(data)
    old[moved] -= 1
    assert Hashes(cache_of(data, [*old, "known"])).one(data) == sha256(b"content")


def test_an_edit_of_equal_size_and_modification_time_is_seen(data):
    before = data.stat()
    hashes = Hashes(data.with_name("hashes.json"))
    assert hashes.of([data, data]) == [sha256(b"content")] * 2
    data.write_bytes(b"CONTENT")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (data.stat().st_size, data.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert hashes.one(data) == sha256(b"CONTENT")


@pytest.mark.parametrize(("age", "kept"), [(2_000_000_000, False), (2_000_000_001, True)])
def test_only_a_file_that_rested_two_seconds_is_remembered(data, monkeypatch, age, kept):
    monkeypatch.setattr(artifact, "_age_ns", lambda stat: age)
    cache = data.with_name("saves") / "hashes.json"
    hashes = Hashes(cache)
    hashes.one(data)
    hashes.save()
    assert cache.exists() == kept
    if kept:
        assert json.loads(cache.read_text(encoding="utf-8")) == {str(data): [*stamp(data), sha256(b"content")]}


def test_a_torn_cache_is_as_good_as_none(data):
    cache = data.with_name("hashes.json")
    cache.write_text('{"torn', encoding="utf-8")
    assert Hashes(cache).one(data) == sha256(b"content")


def test_a_cache_that_cannot_be_written_is_done_without(data, monkeypatch):
    monkeypatch.setattr(artifact, "_age_ns", lambda stat: 10**10)
    hashes = Hashes(data / "below a file" / "hashes.json")
    hashes.one(data)
    hashes.save()
    assert hashes.changed
