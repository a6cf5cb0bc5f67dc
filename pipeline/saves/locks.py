"""Locks on the working folder of a stage. The kernel releases them however their holder ends.

On NFS, Linux turns flock into byte-range locks, which need a file that is open for reading and writing.
"""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import Busy
from pipeline.saves import artifact


def held_file(out: Path) -> Path:
    """The file that the processes of a stage lock while they work in `out`."""
    return out.parent / ".locks" / f"{out.name}.worker"


@contextlib.contextmanager
def locked(part: Path, name: str) -> Iterator[None]:
    """Hold the stage `name`, which works in `part`; the kernel releases the lock however this process ends.

    Raises:
        Busy: another run, or a process that a killed one left behind, is at work on it.
    """
    held = held_file(part)
    held.parent.mkdir(parents=True, exist_ok=True)
    with open(held.with_suffix(".runner"), "a+", encoding="utf-8") as file, open(held, "a+", encoding="utf-8") as left:
        if not _lock(file, seconds=0.5):  # `status` and `gc` hold it for a moment
            file.seek(0)
            raise Busy(f"stage `{name}` is being run by another process ({file.read().strip()}); wait for it")
        if not _lock(left, seconds=60):  # on Linux these processes end by themselves, with the fork server
            raise Busy(f"stage `{name}` is still being run by what a killed run left behind; wait, or end it")
        fcntl.flock(left, fcntl.LOCK_UN)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield


def _lock(file: IO[str], seconds: float) -> bool:
    """Take an exclusive lock; False if it is still held after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)


def held(part: Path) -> str | None:
    """The holder of a stage, as `pid 12 on HOST since TIME`; None when nobody works on it."""
    file = held_file(part)
    words = []
    for lock in (file.with_suffix(".runner"), file):
        try:
            mode = "r+" if os.access(lock, os.W_OK) else "r"  # another user may look, too
            with open(lock, mode, encoding="utf-8") as handle:
                words.append(handle.read().strip())
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file releases it
                if lock == file:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the processes of a stage share it
        except FileNotFoundError:
            continue
        except OSError:
            return next(filter(None, words), "by a process that does not say which")
    return None


def reader_file(folder: Path) -> Path:
    """The file that runs lock while one of their stages reads a finished folder."""
    return folder.parent / ".locks" / f"{folder.name}.reader"


@contextlib.contextmanager
def reading(folders: Iterable[Path]) -> Iterator[None]:
    """Hold shared locks on finished folders, so that nobody removes or renames them; others may read them too."""
    with contextlib.ExitStack() as files:
        for folder in folders:
            if artifact.FOLDER.match(folder.name):
                reader_file(folder).parent.mkdir(parents=True, exist_ok=True)
                file = files.enter_context(open(reader_file(folder), "a+", encoding="utf-8"))
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def unread(folder: Path, name: str) -> Iterator[None]:
    """Hold a finished folder so that no run reads it.

    Raises:
        Busy: a stage of another run reads it.
    """
    reader_file(folder).parent.mkdir(parents=True, exist_ok=True)
    with open(reader_file(folder), "a+", encoding="utf-8") as file:
        if not _lock(file, seconds=0.5):
            raise Busy(f"stage `{name}`: `{folder}` is being read by another run, so it cannot be rebuilt; wait for it")
        yield
