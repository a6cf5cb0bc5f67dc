"""What is in files, remembered from run to run: the sha256 of a file, and a digest of each row of a data file."""

import contextlib
import hashlib
import json
import os
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.data.row import Row
from stages.data.source import READER_VERSION, Source, has_tools, inspect_rows
from stages.runtime.files import sha256

HASHES = ".hashes.json"
ROWS = ".rows"
KEPT = 20_000  # hashes that are remembered
REST_NS = 2_000_000_000  # the coarsest clock of a file system in use (FAT)


class Hashes:
    """sha256 of files, in parallel; known ones come from a cache file.

    A file is known by device and inode, so a renamed folder is not read again. A cached hash is used only when size,
    modification time and change time are all the same: the change time moves with every write and cannot be set
    back. It is kept only when the file system's clock had moved on before the file was read, since a second write
    could otherwise fall into the same tick.
    """

    def __init__(self, cache: Path | None) -> None:
        self.cache, self.lock, self.changed = cache, threading.Lock(), False
        self.known: dict[str, list[Any]] = {}
        self.device, self.clock = -1, 0
        if cache is not None and cache.is_file():
            stat = cache.stat()  # when this was written, the clock of its file system stood at its change time
            self.device, self.clock = stat.st_dev, stat.st_ctime_ns
            with contextlib.suppress(ValueError, TypeError):  # a torn one is as good as none
                self.known = dict(json.loads(cache.read_text(encoding="utf-8")))

    def of(self, files: Iterable[Path], *, clock: int | None = None, read: bool = False) -> list[str]:
        """The hash of each file, in order; the arguments are those of `one`."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(lambda path: self.one(path, clock=clock, read=read), files))

    def one(self, path: Path, *, clock: int | None = None, read: bool = False) -> str:
        """The hash of a file. `read` reads it in any case, since a disk can rot without a change of times.

        To be remembered, the file must be older than `clock`, the change time in ns of a file written later on the
        same file system, or older than the cache file, or have rested for two seconds.
        """
        before = path.stat()
        key, stamp = f"{before.st_dev}:{before.st_ino}", _stamp(before)
        entry = self.known.get(key)
        if not read and entry is not None and entry[:3] == stamp:
            return str(entry[3])
        now = max(clock or 0, self.ticked(before.st_dev))
        digest = sha256(path)
        if entry is not None and entry != [*stamp, digest]:
            with self.lock:
                self.known.pop(key, None)
                self.changed = True
        if before.st_ctime_ns < now and _stamp(path.stat()) == stamp and entry != [*stamp, digest]:
            with self.lock:
                self.known[key], self.changed = [*stamp, digest], True
        return digest

    def ticked(self, device: int) -> int:
        """A time in ns that the clock of a file system has certainly passed."""
        return max(time.time_ns() - REST_NS, self.clock if device == self.device else 0)

    def save(self) -> None:
        """Write the cache if anything was learnt; one that cannot be written is done without."""
        if self.cache is not None and self.changed:
            newest = dict(list(self.known.items())[-KEPT:])
            self.changed = not _write(self.cache, json.dumps(newest).encode())


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _write(path: Path, content: bytes) -> bool:
    """Replace a file that can be made again; False when there is no room or no right."""
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


def clear_torn(saves: Path) -> None:
    """Delete what a process left that was killed while it wrote; one that is writing now will do without."""
    for path in (*saves.glob(f"{HASHES}.*"), *(saves / ROWS).glob("*.[0-9]*")):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Look:
    """What a first look at the rows of a data set found."""

    rows: int
    bad: int
    first: list[str]
    """The first bad rows, which will be left out; one line each."""
    tools: bool
    """Does any row hold tools or their calls?"""
    problems: list[str]
    """What stops the run."""


class Rows:
    """The rows of data files, by their content: a file that was read and found good is not parsed again.

    Each row leaves 8 bytes of BLAKE2b, so that a changed file can be told by the rows that changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def look(self, source: Source, digest: str, kind: str = "") -> "Look":
        """What reading the files comes to, from memory when nothing stops the run; `kind` is `_rows.kind` of them."""
        settings = source.model_dump(mode="json", exclude={"path", "clean", "others"})
        file = self.folder / _key({**settings, **({"kind": kind} if kind else {}), "sha256": digest})
        about = file.with_name(f"{file.name}-about.json")
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Look(**json.loads(about.read_text(encoding="utf-8")))
        found, tools = bytearray(), False

        def keep(row: Row) -> None:
            nonlocal tools
            found.extend(_digest(row))
            tools = tools or has_tools(row)

        done = inspect_rows(source, keep=keep)
        look = Look(done.read, done.bad, done.first, tools, done.problems)
        if not done.problems and _write(file, bytes(found)):
            _write(about, json.dumps(asdict(look), ensure_ascii=False).encode())
        return look

    def difference(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        """What changed between two contents (a source's settings and `sha256`), as ` (2 rows)`; empty when unknown."""
        before, after = self._counted(old), self._counted(new)
        if before is None or after is None:
            return ""
        removed, added = (before - after).total(), (after - before).total()
        if removed == added:
            return f" ({_counting(added)})" if added else " (the same rows, written or ordered differently)"
        parts = [f"{_counting(count)} {word}" for count, word in ((added, "added"), (removed, "removed")) if count]
        return f" ({', '.join(parts)})"

    def _counted(self, content: Mapping[str, Any]) -> Counter[int] | None:
        read = {key: value for key, value in content.items() if key not in ("clean", "compared_with")}
        try:
            return Counter(array("Q", (self.folder / _key(read)).read_bytes()))
        except (OSError, ValueError):
            return None


def _counting(rows: int) -> str:
    return f"{rows:,} row{'s' if rows != 1 else ''}"


def _key(content: Mapping[str, Any]) -> str:
    text = json.dumps({**content, "reader": READER_VERSION}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(json.dumps(row, ensure_ascii=False).encode(), digest_size=8).digest()
