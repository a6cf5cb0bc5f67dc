"""The cache of the hashes of files is never older than the files."""

import hashlib
import json
import os

import pytest

from stages.runtime import hashes as hashes_module
from stages.runtime.hashes import Hashes


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def stamp(path):
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def inode(path):
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"content")
    return path


def cache_of(path, entry):
    cache = path.with_name("hashes.json")
    cache.write_text(json.dumps({inode(path): entry}), encoding="utf-8")
    return cache


def test_a_hash_is_taken_from_the_cache_while_nothing_about_the_file_changes(data):
    assert Hashes(cache_of(data, [*stamp(data), "known"])).one(data) == "known"


@pytest.mark.parametrize("moved", range(3), ids=["size", "modification time", "change time"])
def test_a_hash_is_computed_again_when_one_thing_about_the_file_changed(data, moved):
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


def test_another_file_of_the_same_name_is_read(data):
    cache = cache_of(data, [*stamp(data), "known"])
    data.rename(data.with_name("kept"))
    data.write_bytes(b"other..")
    hashes = Hashes(cache)
    assert (hashes.one(data), hashes.one(data.with_name("kept"))) == (sha256(b"other.."), sha256(b"content"))


def test_a_renamed_folder_is_not_read_again(data, tmp_path):
    (tmp_path / "one").mkdir()
    data = data.rename(tmp_path / "one" / "data.jsonl")
    cache = cache_of(data, [*stamp(data), "known"]).rename(tmp_path / "hashes.json")
    (tmp_path / "one").rename(tmp_path / "two")
    assert Hashes(cache).one(tmp_path / "two" / "data.jsonl") == "known"


@pytest.mark.parametrize(("later", "kept"), [(0, False), (1, True)])
def test_only_a_file_read_after_the_clock_of_the_file_system_moved_on_is_cached(data, later, kept):
    cache = data.with_name("saves") / "hashes.json"
    hashes = Hashes(cache)
    hashes.one(data, clock=data.stat().st_ctime_ns + later)
    hashes.save()
    assert cache.exists() == kept
    if kept:
        assert json.loads(cache.read_text(encoding="utf-8")) == {inode(data): [*stamp(data), sha256(b"content")]}


@pytest.mark.parametrize(("age", "kept"), [(2_000_000_000, False), (2_000_000_001, True)])
def test_without_such_a_clock_a_file_must_be_two_seconds_old(data, monkeypatch, age, kept):
    monkeypatch.setattr(hashes_module.time, "time_ns", lambda: data.stat().st_ctime_ns + age)
    hashes = Hashes(data.with_name("hashes.json"))
    hashes.one(data)
    assert hashes.changed == kept


@pytest.mark.parametrize(("later", "kept"), [(0, False), (1, True)])
def test_a_file_older_than_the_cache_file_is_cached(data, monkeypatch, later, kept):
    hashes = Hashes(cache_of(data, [*stamp(data), "known"]))
    hashes.known, hashes.clock = {}, data.stat().st_ctime_ns + later
    hashes.one(data)
    assert hashes.changed == kept


def test_a_file_from_the_future_is_not_cached(data, monkeypatch):
    """The clock was set back after the file was written."""
    monkeypatch.setattr(hashes_module.time, "time_ns", lambda: data.stat().st_ctime_ns - 10**12)
    hashes = Hashes(data.with_name("hashes.json"))
    assert hashes.one(data) == sha256(b"content")
    assert not hashes.changed


@pytest.mark.parametrize("torn", ['{"torn', "[1, 2]", "7"])
def test_a_torn_cache_is_ignored(data, torn):
    cache = data.with_name("hashes.json")
    cache.write_text(torn, encoding="utf-8")
    assert Hashes(cache).one(data) == sha256(b"content")


def test_a_cache_that_cannot_be_written_is_ignored(data):
    hashes = Hashes(data / "below a file" / "hashes.json")
    hashes.one(data, clock=data.stat().st_ctime_ns + 1)
    hashes.save()
    assert hashes.changed


def counted(monkeypatch):
    """The files that are read, in their order."""
    read = []

    def sha256(path):
        read.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(hashes_module, "sha256", sha256)
    return read


def test_each_byte_is_read_once_in_a_run_however_many_stages_ask(data, monkeypatch):
    os.utime(data)
    clock = data.stat().st_ctime_ns + 1
    first = Hashes(data.with_name("hashes.json"))
    first.one(data, clock=clock)
    first.save()
    read = counted(monkeypatch)
    for stage in range(3):  # of the run that has read it already
        assert first.one(data, read=True) == sha256(b"content"), stage
    assert read == []
    second = Hashes(data.with_name("hashes.json"))  # of the next run
    assert second.one(data) == sha256(b"content")
    assert read == []
    for _ in range(3):
        second.one(data, read=True, clock=clock)
    assert read == ["data.jsonl"]
    data.write_bytes(b"CONTENT")
    assert second.one(data, read=True) == sha256(b"CONTENT")
    assert read == ["data.jsonl"] * 2
