"""Files: their hashes, and how they survive a power cut."""

import hashlib
import os
from pathlib import Path

from stages.runtime.errors import StageError

_POINTER = b"version https://git-lfs.github.com/spec/"  # begins the file that Git LFS leaves in place of a large one


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_pointer(path: Path) -> None:
    """Check that a file is the file itself, and not a pointer of Git LFS to a file that was not fetched.

    Raises:
        StageError: it is a pointer.
    """
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise StageError(f"`{path}` is a Git LFS pointer, not the file; run `git lfs pull` in its folder")
