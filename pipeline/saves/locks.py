"""Locks on the working folder of a stage. The kernel releases them however their holder ends.

On NFS, Linux turns flock into byte-range locks of the server, which need a file that is open for reading and writing.
"""

import contextlib
import errno
import fcntl
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import Busy
from pipeline.saves import artifact

HELD = (errno.EAGAIN, errno.EACCES)
"""What the system says of a lock that another process holds."""


def held_file(out: Path) -> Path:
    """The file that the processes of a stage lock while they work in `out`."""
    return out.parent / ".locks" / f"{out.name}.worker"


@contextlib.contextmanager
def locked(part: Path, name: str) -> Iterator[None]:
    """Hold the stage `name`, which works in `part`; the kernel releases the lock however this process ends.

    Raises:
        Busy: another run, or a process that a killed one left behind, is at work on it; or the disk knows no locks.
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
    """Take an exclusive lock; False if it is still held after `seconds`.

    Raises:
        Busy: the disk knows no locks.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in HELD:
                text = f"`{file.name}` cannot be locked ({error.strerror}): its disk knows no locks"
                raise Busy(f"{text}; mount it with locks, or use another one with `--saves DIR`") from None
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
        except OSError as error:
            if error.errno not in HELD:
                continue  # a disk without locks says nothing
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


# Disks that several machines share

OBJECT_STORES = ("gcsfuse", "s3fs", "goofys", "mountpoint-s3", "mount-s3", "rclone", "blobfuse", "blobfuse2", "geesefs")
LOCAL_LOCKS = ("nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock")
"""Options of NFS and Lustre with which a lock holds on one machine alone, or not at all."""
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")
"""How Linux writes a space, a tab, a line end or a backslash in the name of a folder."""


def broken_promise(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Which promise the disk of a folder cannot keep, as a sentence; None if none is known.

    `mounts`: the mounted disks, as Linux lists them.
    """
    kind, options = _disk_of(folder, mounts)
    name = kind.removeprefix("fuse.")
    if name in OBJECT_STORES:
        why = "which has no locks and no renames in one step: a kill can leave half a folder, and two runs can collide"
        return f"`{folder}` is on an object store ({name}), {why}; use a disk, and copy what is finished"
    local = next((option for option in LOCAL_LOCKS if option in options), None)
    if local is not None and (name.startswith("nfs") or name == "lustre"):
        why = "so runs on two machines do not see that they work on the same stage"
        return f"`{folder}` is on {name}, mounted with `{local}`: its locks do not reach other machines, {why}"
    return None


def _disk_of(folder: Path, mounts: Path) -> tuple[str, list[str]]:
    """The kind of the file system that a folder is on, or will be on, and its mount options; empty if not known."""
    folder = folder.resolve()
    best, found = -1, ("", list[str]())
    with contextlib.suppress(OSError):
        for line in mounts.read_bytes().split(b"\n"):
            ours, _, theirs = line.partition(b" - ")
            if not theirs:
                continue
            fields = ours.split(b" ")
            point = os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), fields[4]))
            kind, _, options = os.fsdecode(theirs).partition(" ")
            depth = len(Path(point).parts)
            if depth >= best and folder.is_relative_to(point):  # a later mount hides an earlier one
                best, found = depth, (kind, [*os.fsdecode(fields[5]).split(","), *options.split(" ")[-1].split(",")])
    return found
