"""The finished folder of a stage and its record. `record.json` is written last: a folder without it is not finished."""

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pipeline.errors import NewerRecord
from stages.runtime.files import sync
from stages.runtime.hashes import Hashes

RECORD = "record.json"
SCHEMA = 1
NOT_FINITE = "not_finite"
"""The key for the places of null in a record where a figure is `nan`, `inf` or `-inf`; `read` puts them back."""
NOT_CONTENT = {RECORD, "log.txt", "events.jsonl"}  # about the stage itself; later stages do not read these
SPEC = "spec.json"  # settings and inputs that a stage was begun with
CHECKPOINTS = "checkpoints"
TO_GO_ON = (SPEC, CHECKPOINTS, "before.json")  # what an unfinished stage resumes from
UMASK = os.umask(0)
os.umask(UMASK)  # the one way to read it
FOLDER = re.compile(r"(?P<use>[a-z][a-z0-9_]*)-[0-9a-f]{12}(?P<end>\.part|\.rehearsal|\.old-\d+|\.part\.old-\d+|)\Z")


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a finished folder, or None when it has none that can be read.

    Raises:
        NewerRecord: a later version of this project wrote it.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        schema, files = record["schema"], record["files"]
        for path, word in record.pop(NOT_FINITE, []):
            *above, last = path
            reduce(getitem, above, record)[last] = float(word)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if isinstance(schema, int) and schema > SCHEMA:
        raise NewerRecord(
            f"`{folder / RECORD}` was written by a later version (schema {schema}; this one knows {SCHEMA}); "
            "update, or use another folder with `--saves DIR`"
        )
    return record if schema == SCHEMA and isinstance(files, dict) else None


def begun(part: Path) -> dict[str, Any] | None:
    """The spec that an unfinished folder was begun with, or None when it cannot be read."""
    try:
        spec = json.loads((part / SPEC).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return spec if isinstance(spec, dict) else None


def damage(folder: Path, record: Mapping[str, Any], hashes: Hashes, *, thorough: bool = False) -> str | None:
    """What is wrong with the files of a finished folder, or None; `thorough` reads all that this run did not."""
    files: dict[str, Mapping[str, Any]] = record["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"`{name}` is missing"
        if path.stat().st_size != entry["size"]:
            return f"`{name}` has {path.stat().st_size:,} bytes instead of {entry['size']:,}"
    clock = (folder / RECORD).stat().st_ctime_ns  # it was written after them
    found = hashes.of([folder / name for name in files], clock=clock, read=thorough)
    changed = [name for name, digest in zip(files, found, strict=True) if files[name]["sha256"] != digest]
    return f"`{changed[0]}` has changed" if changed else None


def finish(part: Path, folder: Path, record: dict[str, Any], hashes: Hashes) -> None:
    """Sync every file to disk, then write the record with their hashes, then give the folder its final name.

    What the stage could have gone on from is deleted last, when it is not needed any more.
    """
    files = sorted(path for path in part.rglob("*") if path.is_file() and _is_content(path.relative_to(part)))
    for path in files:
        path.chmod(0o666 & ~UMASK)  # safetensors writes 0600: the server of another user could not read it
    for path in [*files, *(path for path in part.rglob("*") if path.is_dir())]:
        sync(path)
    with open(part / RECORD, "w", encoding="utf-8") as file:
        clock = _clock(file.fileno(), max((path.stat().st_ctime_ns for path in files), default=0))
        record["files"] = {
            str(path.relative_to(part)): {"sha256": digest, "size": path.stat().st_size}
            for path, digest in zip(files, hashes.of(files, clock=clock, read=True), strict=True)
        }
        lost: list[tuple[list[str | int], str]] = []
        written = _finite({"schema": SCHEMA, **record}, [], lost) | ({NOT_FINITE: lost} if lost else {})
        json.dump(written, file, ensure_ascii=False, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    sync(part)
    part.rename(folder)
    sync(folder.parent)
    clear_leftovers(folder)


def _finite(value: Any, path: list[str | int], lost: list[tuple[list[str | int], str]]) -> Any:
    """The value with null for each NaN and infinity, which JSON does not have; `lost` gets their places and words."""
    if isinstance(value, Mapping):
        return {key: _finite(inner, [*path, key], lost) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner, [*path, index], lost) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append((path, str(value)))
        return None
    return value


def _clock(handle: int, newest: int) -> int:
    """The time of the file system in ns, after its clock has passed `newest`; gives up after 0.1 s."""
    for _ in range(20):
        os.utime(handle)
        if os.fstat(handle).st_ctime_ns > newest:
            break
        time.sleep(0.005)
    return os.fstat(handle).st_ctime_ns


def clear_leftovers(folder: Path) -> None:
    """Delete the files that only resuming needs; a kill may have left them in a finished folder."""
    for name in TO_GO_ON:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_content(path: Path) -> bool:
    return path.name not in NOT_CONTENT and path.parts[0] not in TO_GO_ON


def size(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile are not counted."""
    found = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found += path.lstat().st_size
    return found


LOG = "log.txt"
