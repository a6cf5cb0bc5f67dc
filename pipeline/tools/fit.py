"""`plan --fit`: the cheapest settings with which each stage fits into the memory, written into the config."""

import codecs
import contextlib
import difflib
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.document import Key
from pipeline.config.editing import with_settings
from pipeline.errors import ConfigError
from pipeline.plan.step import Plan
from stages.runtime.figures import size_of
from stages.runtime.files import sync


def write_fitting(planned: Plan, assignments: Sequence[str]) -> str:
    """Write the cheapest change of each stage that does not fit into its file; returns the difference as text.

    Comments and spaces stay as they are.

    Raises:
        ConfigError: a stage does not fit whatever is changed, its settings are not in the file alone, or the file
            cannot be written.
    """
    stuck, settings = list[str](), dict[Key, Any]()
    for step in planned.steps:
        found = planned.estimates.get(step.name)
        if found is None or found.memory is None or step.state == "done" or found.verdict != "does not fit":
            continue
        if found.changes:
            settings |= _keys(step.name, found.changes[0].settings)
        else:
            sizes = f"{size_of(found.total)} of memory, and {found.device.name} is what there is"
            stuck.append(f"stage `{step.name}` takes {sizes}; no setting that could be changed makes it fit")
    path = planned.pipeline.path
    if stuck:
        raise ConfigError([f"{path}: {text}" for text in stuck])
    if not settings:
        return "every stage whose memory is known fits; nothing was written\n"
    if assignments:
        raise ConfigError([f"--fit: writes into `{path}`, which lacks what `--set` says; write that there first"])
    content = path.read_bytes()
    before = content.decode("utf-8-sig")
    after = with_settings(before, str(path), settings)
    _replace(path, (codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b"") + after.encode())
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), str(path), str(path), lineterm="", n=1)
    return "\n".join(lines) + "\n"


def _replace(path: Path, content: bytes) -> None:
    """Give a file other content in one step: whatever happens, the file has the old content or the new one.

    Raises:
        ConfigError: it cannot be written.
    """
    file = path.resolve()  # a link stays a link
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        if not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        fresh.write_bytes(content)
        shutil.copymode(file, fresh)
        sync(fresh)
        fresh.replace(file)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written ({error.strerror}), and is as it was"]) from None
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def _keys(stage: str, settings: Mapping[str, Any]) -> dict[Key, Any]:
    return {("stages", stage, *path.split(".")): value for path, value in settings.items()}
