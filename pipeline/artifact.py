"""A stage's finished folder and its record: `record.json` is written last, so no record means no artifact."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stages._checkpoint import sha256

RECORD = "record.json"
SCHEMA = 1
NOT_CONTENT = {RECORD, "log.txt", "events.jsonl"}  # what a stage says about itself, not what later stages read
TO_GO_ON = ("checkpoints", "before.json")  # what an unfinished training stage goes on from


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a finished folder whose files are all there in the recorded size, else None."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            return None
        whole = all((folder / name).stat().st_size == entry["size"] for name, entry in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def finish(part: Path, folder: Path, record: dict[str, Any]) -> None:
    """Write every file durably, then the record with their hashes, then give the folder its final name.

    What the stage could have gone on from is deleted last, when it is not needed any more.
    """
    files = sorted(path for path in part.rglob("*") if path.is_file() and _is_content(path.relative_to(part)))
    hashes = Hashes(None)
    for path in files:
        _sync(path)
    record["files"] = {
        str(path.relative_to(part)): {"sha256": digest, "size": path.stat().st_size}
        for path, digest in zip(files, hashes.of(files), strict=True)
    }
    with open(part / RECORD, "w", encoding="utf-8") as file:
        json.dump({"schema": SCHEMA, **record}, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(part)
    part.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(folder / TO_GO_ON[0], ignore_errors=True)
    (folder / TO_GO_ON[1]).unlink(missing_ok=True)


def _is_content(path: Path) -> bool:
    return path.name not in NOT_CONTENT and path.parts[0] not in TO_GO_ON


def link(folder: Path, name: Path) -> None:
    """Let `name` point to the folder, relatively; an unchanged link is not touched."""
    target = os.path.relpath(folder, name.parent)
    if name.is_symlink() and os.readlink(name) == target:
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    fresh = name.with_name(f".{name.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(name)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Hashes:
    """sha256 of files, in parallel; known ones come from a cache file.

    A cached hash is used only when size, modification time, change time and inode are all the same: the change
    time moves with every write and cannot be set back. Files that changed in the last two seconds are not cached,
    since a second write could fall into the same tick of the clock.
    """

    def __init__(self, cache: Path | None) -> None:
        self.cache, self.lock, self.changed = cache, threading.Lock(), False
        self.known: dict[str, list[Any]] = {}
        if cache is not None and cache.is_file():
            try:
                self.known = json.loads(cache.read_text(encoding="utf-8"))
            except ValueError:
                self.known = {}

    def of(self, files: Iterable[Path]) -> list[str]:
        """The hash of each file, in order."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(self.one, files))

    def one(self, path: Path) -> str:
        before = path.stat()
        stamp = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
        key = str(path.resolve())
        entry = self.known.get(key)
        if entry is not None and entry[:4] == stamp:
            return str(entry[4])
        digest = sha256(path)
        settled = os.stat(path).st_ctime_ns == before.st_ctime_ns and _age_ns(before) > 2_000_000_000
        if settled:
            with self.lock:
                self.known[key], self.changed = [*stamp, digest], True
        return digest

    def save(self) -> None:
        """Write the cache if anything was learnt; one that cannot be written is done without."""
        if self.cache is None or not self.changed:
            return
        fresh = self.cache.with_suffix(f".{os.getpid()}")
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self.known), encoding="utf-8")
            fresh.replace(self.cache)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()


def _age_ns(stat: os.stat_result) -> int:
    import time

    return time.time_ns() - stat.st_ctime_ns
