"""The links of a config in `saves/<config>/`, and which config file they belong to."""

import json
import os
from pathlib import Path


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


BELONGS = ".config.json"  # beside the links of a config: which file they are of


def belongs(links: Path) -> Path | None:
    """The config file that a folder of links was made for, or None when that is not known."""
    try:
        known = json.loads((links / BELONGS).read_text(encoding="utf-8"))
        beside = Path(os.path.relpath(os.path.normpath(links.resolve() / known["config"])))
        before = Path(known.get("absolute") or beside)  # where it was before `saves` was moved
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return before if before.exists() and not beside.exists() else beside


def same_file(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def claim(links: Path, owner: Path) -> None:
    """Record which config owns this links folder."""
    if (known := belongs(links)) is not None and same_file(known, owner):
        return
    links.mkdir(parents=True, exist_ok=True)
    config = os.path.relpath(owner.resolve(), links.resolve())
    content = {"config": config, "absolute": str(owner.resolve())}
    (links / BELONGS).write_text(json.dumps(content), encoding="utf-8")
