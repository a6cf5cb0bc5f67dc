"""SHA-256 of files, remembered from run to run in a cache file."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stages.runtime.files import sha256

HASHES = ".hashes.json"
KEPT = 20_000  # the most hashes in the cache file
COARSEST_TICK_NS = 2_000_000_000  # of the clock of a file system in use (FAT)


class Hashes:
    """SHA-256 of files, in parallel, with a cache file.

    The cache knows a file by device and inode, so a renamed folder is not read again. A cached hash is used only if
    size, modification time and change time are all the same: every write moves the change time, and no program can set
    it back. A hash is cached only if the file system's clock had moved on before the file was read, because otherwise
    a second write could have the same change time.
    """

    def __init__(self, cache: Path | None) -> None:
        self.cache, self.lock, self.changed = cache, threading.Lock(), False
        self.known: dict[str, list[Any]] = {}
        self.read: dict[str, list[Any]] = {}
        """The entries of `known` whose files this process has read."""
        self.device, self.clock = -1, 0
        if cache is not None and cache.is_file():
            stat = cache.stat()  # the clock of its file system has passed its change time
            self.device, self.clock = stat.st_dev, stat.st_ctime_ns
            with contextlib.suppress(ValueError, TypeError):  # a torn cache is ignored
                self.known = dict(json.loads(cache.read_text(encoding="utf-8")))

    def of(self, files: Iterable[Path], *, clock: int | None = None, read: bool = False) -> list[str]:
        """The hash of each file, in order. The arguments are those of `one`."""
        files = list(files)
        if len(files) < 2:  # threads take longer than most files
            return [self.one(path, clock=clock, read=read) for path in files]
        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(lambda path: self.one(path, clock=clock, read=read), files))

    def one(self, path: Path, *, clock: int | None = None, read: bool = False) -> str:
        """The hash of a file.

        Content can rot on the disk without a new change time. So with `read` a hash is taken from the cache only if
        this process has read the file: every byte is read once in a run, and not before each stage.

        A hash is cached only if the change time of its file is older than `clock` (in ns: the change time of a file
        that was written later on the same file system), older than the cache file, or older than two seconds.
        """
        before = path.stat()
        key, stamp = f"{before.st_dev}:{before.st_ino}", _stamp(before)
        entry = self.known.get(key)
        if entry is not None and entry[:3] == stamp and (not read or self.read.get(key) == entry):
            return str(entry[3])
        now = max(clock or 0, self._passed(before.st_dev))
        digest = sha256(path)
        if entry is not None and entry != [*stamp, digest]:
            with self.lock:
                self.known.pop(key, None)
                self.changed = True
        if before.st_ctime_ns < now and _stamp(path.stat()) == stamp:
            with self.lock:
                self.changed = self.changed or entry != [*stamp, digest]
                self.known[key] = self.read[key] = [*stamp, digest]
        return digest

    def _passed(self, device: int) -> int:
        """A time in ns that the clock of a file system has passed for certain."""
        return max(time.time_ns() - COARSEST_TICK_NS, self.clock if device == self.device else 0)

    def save(self) -> None:
        """Write the cache if it changed; a failed write is ignored."""
        if self.cache is not None and self.changed:
            newest = dict(list(self.known.items())[-KEPT:])
            self.changed = not write_cache(self.cache, json.dumps(newest).encode())


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def write_cache(path: Path, content: bytes) -> bool:
    """Replace a cache file; False when it cannot be written."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        return False
    return True
