"""The links of a config in `saves/<config>/`, and which config file they belong to."""

import json
import os
from collections.abc import Sequence
from pathlib import Path


def link(folder: Path, name: Path) -> None:
    """Make `name` a relative link to the folder; a link that is right already is not touched."""
    target = os.path.relpath(folder, name.parent)
    if name.is_symlink() and os.readlink(name) == target:
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    fresh = name.with_name(f".{name.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(name)


LAST_RUN = ".run.json"  # beside the links: the folders of the last run
BELONGS = ".config.json"  # beside the links: the config file that owns them


def belongs(links: Path) -> Path | None:
    """The config file that owns a folder of links, or None when it is not known."""
    try:
        known = json.loads((links / BELONGS).read_text(encoding="utf-8"))
        beside = Path(os.path.relpath(os.path.normpath(links.resolve() / known["config"])))
        before = Path(known.get("absolute") or beside)  # the place of the config before `saves` was moved
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return before if before.exists() and not beside.exists() else beside


def same_file(one: Path, other: Path) -> bool:
    """Whether both paths exist and are the same file."""
    return other.exists() and one.samefile(other)


def claim(links: Path, owner: Path) -> None:
    """Record which config owns this links folder."""
    if (known := belongs(links)) is not None and same_file(known, owner):
        return
    links.mkdir(parents=True, exist_ok=True)
    config = os.path.relpath(owner.resolve(), links.resolve())
    content = {"config": config, "absolute": str(owner.resolve())}
    (links / BELONGS).write_text(json.dumps(content), encoding="utf-8")


def not_the_owner(links: Path, config: Path) -> str | None:
    """What is wrong with looking for the run of a config in a folder of links; None if it is the folder's owner."""
    owner = belongs(links)
    if owner is None or not owner.exists() or same_file(owner, config):
        return None
    way = "run it into a folder of its own with `--saves DIR`"
    return f"{config}: `{links}` holds the run of `{owner}`, a config of the same name; {way}"


def note_run(links: Path, folders: Sequence[str]) -> None:
    """Note the names of the folders of a run that begins, so that `gc` keeps them; the same names are not rewritten."""
    if last_run(links) != list(folders):
        links.mkdir(parents=True, exist_ok=True)
        (links / LAST_RUN).write_text(json.dumps(list(folders)), encoding="utf-8")


def last_run(links: Path) -> list[str]:
    """The names of the folders of the last run of a config, finished or not."""
    try:
        names = json.loads((links / LAST_RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
