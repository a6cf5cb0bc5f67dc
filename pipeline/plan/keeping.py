"""Which folders in `saves` are still needed: by the configs as they are written, by the last run of each config, and by
running stages. When in doubt, a folder is needed."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.checker import load_config
from pipeline.errors import ConfigError, NewerRecord
from pipeline.plan.placing import build_plan
from pipeline.saves import artifact
from pipeline.saves.links import belongs, last_run
from pipeline.saves.locks import held


@dataclass
class Needed:
    """The needed folders, by name."""

    names: set[str] = field(default_factory=set)
    doubts: list[str] = field(default_factory=list)
    """Why not all of them are known; then no finished or unfinished folder may be removed."""


def needed_folders(saves: Path) -> Needed:
    """Plan every known config as it is written, and collect what it and the last runs refer to.

    A config is known when it was run into `saves`, or when it is beside one that was: it may have been renamed.
    """
    needed = Needed()
    folders = [folder for folder in saves.glob("*") if folder.is_dir() and not folder.is_symlink()]
    owners = {links: owner for links in folders if (owner := belongs(links)) is not None}
    wanted = set[str]()
    for links in folders:
        owner = owners.get(links)
        if owner is None or owner.exists():
            wanted |= set(last_run(links)) | {link.resolve().name for link in links.iterdir() if link.is_symlink()}
    for owner in owners.values():
        if owner.exists():
            wanted |= set(_as_written(owner, saves, needed.doubts))
    beside = {path for owner in owners.values() for path in owner.parent.glob("*.y*ml")}
    known = {owner.resolve() for owner in owners.values()}
    for path in sorted(beside):
        if path.resolve() not in known:
            wanted |= set(_as_written(path, saves, []))
    named = {links.name for links in owners}
    for part in saves.glob("*.part"):
        config = (artifact.begun(part) or {}).get("of")
        if held(part) is not None or (config is not None and config not in named):
            wanted.add(part.name)
    needed.names = _with_sources(saves, wanted)
    return needed


def _as_written(config: Path, saves: Path, doubts: list[str]) -> Iterator[str]:
    """The folders of a config without anything from the command line."""
    try:
        plan = build_plan(load_config(config), saves)
    except ConfigError as error:
        doubts.append(f"`{config}` cannot be read ({error.problems[0]})")
        return
    if plan.problems:
        doubts.append(f"`{config}` cannot be planned ({plan.problems[0]})")
    for step in plan.steps:
        yield from (step.folder.name, step.part.name)
        if step.state != "done":  # unfinished work with other settings, which the user may go back to
            yield from (part.name for part in step.left)


def _with_sources(saves: Path, names: Iterable[str]) -> set[str]:
    """The folders of these names, and all folders that they were built from."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _sources(saves / name)
    return found


def _sources(folder: Path) -> list[str]:
    """Names of the folders in `saves` that a finished or unfinished stage reads."""
    with contextlib.suppress(NewerRecord):
        record, spec = artifact.read(folder) or {}, artifact.begun(folder) or {}
        models = [*(record.get("model") or []), *(spec.get("inputs", {}).get("model") or [])]
        return [Path(model).name for model in models] + [*record.get("stands_on", []), *spec.get("stands_on", [])]
    return []
