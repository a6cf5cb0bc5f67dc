"""A `saves` folder in: the state of every stage out for `status`, and unused folders for `gc`."""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import NewerRecord
from pipeline.plan.keeping import needed_folders
from pipeline.saves import artifact
from pipeline.saves.links import belongs
from pipeline.saves.locks import held, held_file, reader_file
from pipeline.views.correction import stage_kinds
from stages import find, kinds
from stages.runtime.events import read_events
from stages.runtime.hashes import HASHES, Hashes
from stages.training import preparation
from stages.training.checkpoint import reached_step


@dataclass(frozen=True)
class StageStatus:
    """The state of a stage of a config that has a finished or unfinished folder."""

    config: str
    stage: str
    state: str
    since: str
    """When a finished stage was started."""
    figure: str
    """The key figure of a finished stage."""
    folder: Path


@dataclass(frozen=True)
class Leftover:
    """A folder that can be removed, and why."""

    folder: Path
    why: str
    bytes: int


def stage_statuses(saves: Path, config: str | None = None) -> Iterator[StageStatus]:
    """The state of each stage of one config, or of all configs, in the order of the config's stages.

    An unfinished folder follows the finished one of the same stage. Stages that a config no longer has are last.
    """
    hashes = Hashes(saves / HASHES)
    links = [link for link in _links(saves) if config in (None, link.parent.name)]
    found = [_finished_status(link, hashes) for link in links]
    for part in sorted(saves.glob("*.part")):
        spec = artifact.begun(part) or {}
        if artifact.FOLDER.match(part.name) and (config is None or spec.get("of") == config):
            stage = str(spec.get("stage") or part.name.rsplit("-", 1)[0])
            state = _unfinished_state(part) + _with_set(spec)
            found.append(StageStatus(str(spec.get("of") or ""), stage, state, "", "", part))
    order = {name: list(stage_kinds(belongs(saves / name))) for name in {status.config for status in found}}

    def place(status: StageStatus) -> tuple[str, int]:
        stages = order[status.config]
        return status.config, stages.index(status.stage) if status.stage in stages else len(stages)

    yield from sorted(found, key=place)


def _with_set(made: Mapping[str, Any]) -> str:
    """The `--set` options of the run that made or began a folder, as a clause; empty without any."""
    return f", with --set {', '.join(made['set'])}" if made.get("set") else ""


def _links(saves: Path) -> list[Path]:
    folders = [folder for folder in sorted(saves.glob("*")) if folder.is_dir() and not folder.is_symlink()]
    return [link for folder in folders for link in sorted(folder.iterdir()) if link.is_symlink()]


def _finished_status(link: Path, hashes: Hashes) -> StageStatus:
    folder, since, figure = link.resolve(), "", ""
    try:
        record = artifact.read(folder)
    except NewerRecord:
        return StageStatus(link.parent.name, link.name, "made by a later version", "", "", folder)
    if record is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["started"]))
        damage = artifact.damage(folder, record, hashes)
        state = "done" + _with_set(record) if damage is None else f"damaged: {damage}"
        if record.get("metrics") and record.get("use") in kinds():
            figure = find(record["use"]).headline(record["metrics"])
    else:
        state = "damaged: its record cannot be read" if folder.is_dir() else "gone"
    return StageStatus(link.parent.name, link.name, state, since, figure, folder)


def _unfinished_state(part: Path) -> str:
    reached = reached_step(part / "checkpoints")
    if (holder := held(part)) is not None:
        step = _current_step(part)
        return f"running, {f'step {step}, ' if step else ''}{holder}"
    return f"stopped, goes on at step {reached}" if reached else "stopped before its first checkpoint"


def _current_step(part: Path) -> str:
    """The step of a running stage, such as `12 of 400`; empty before the first one."""
    last: dict[str, Any] = {}
    for event in read_events(part):
        last |= {key: event[key] for key in ("step", "steps") if key in event}
    return f"{last['step']} of {last['steps']}" if last.keys() >= {"step", "steps"} else ""


def find_leftovers(saves: Path) -> tuple[list[Leftover], list[str]]:
    """Every folder that no config and no run needs (see `keeping`), and why some of them might be needed after all.

    While there is such a doubt, only folders that were set aside and prepared rows are leftovers. All prepared rows
    are: a stage that needs them prepares them again.
    """
    leftovers = []
    gone = {folder.name: owner for folder in saves.glob("*") if (owner := belongs(folder)) and not owner.exists()}
    needed = needed_folders(saves)
    for folder in sorted(saves.glob("*")):
        match = artifact.FOLDER.match(folder.name)
        if folder.name in gone:
            leftovers.append(Leftover(folder, f"links of `{gone[folder.name]}`, which is gone", artifact.size(folder)))
            continue
        removable = match and not folder.is_symlink() and folder.name not in needed.names
        if match and removable and (not needed.doubts or "old" in match["end"]):
            leftovers.append(Leftover(folder, _why(folder, match["end"]), artifact.size(folder)))
    rows = sorted((saves / preparation.FOLDER).glob("*"))
    prepared = [Leftover(folder, "rows made ready for training", artifact.size(folder)) for folder in rows]
    return [*leftovers, *prepared], needed.doubts


def _why(folder: Path, end: str) -> str:
    if "old" in end:
        return "set aside: it was damaged, or rebuilt with `--fresh`"
    return "unfinished, and no config resumes it" if end else "no config refers to it"


def remove(leftover: Leftover) -> bool:
    """Delete a folder; False if a run has started to work in it meanwhile."""
    with contextlib.ExitStack() as locks:
        for file in _locks(leftover.folder):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = locks.enter_context(open(file, "a+", encoding="utf-8"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        shutil.rmtree(leftover.folder)
    return True


def _locks(folder: Path) -> list[Path]:
    """The files that a run locks while it works in a folder."""
    if folder.parent.name == preparation.FOLDER:
        return [preparation.lock(folder), preparation.reader_lock(folder)]
    match = artifact.FOLDER.match(folder.name)
    file = held_file(folder.with_name(folder.name.removesuffix(match["end"] if match else "") + ".part"))
    return [file.with_suffix(".runner"), file, reader_file(folder)]
