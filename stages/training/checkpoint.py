"""Checkpoints that can be trusted: a checkpoint counts once its `complete.json` names the sha256 of every file.

transformers writes `checkpoint-N` file by file under its final name and later picks the highest number, whole or
not. Here the list of hashes is written last and verified before a checkpoint is used.
"""

import json
import os
import shutil
from pathlib import Path

from stages.runtime.files import sha256, sync

MARK = "complete.json"


def seal(checkpoint: Path) -> None:
    """Write the hashes of a checkpoint's files, last and durably; drop the one pickle nobody needs."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)  # holds the Hub token in clear
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())  # DeepSpeed has a folder in it
    for path in [*files, *(path for path in checkpoint.rglob("*") if path.is_dir())]:
        sync(path)  # older checkpoints are deleted once this one counts, so it must outlast a power cut
    hashes = {str(path.relative_to(checkpoint)): sha256(path) for path in files}
    part = checkpoint / f"{MARK}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(hashes, file)
        file.flush()
        os.fsync(file.fileno())
    part.rename(checkpoint / MARK)
    sync(checkpoint)
    sync(checkpoint.parent)


def rotate(folder: Path, keep: int, best: str | None) -> None:
    """Delete all but the newest `keep` sealed checkpoints; the best one stays."""
    for old in sealed(folder)[:-keep] if keep else []:
        if best is None or Path(best).name != old.name:
            shutil.rmtree(old)


def sealed(folder: Path) -> list[Path]:
    """The sealed checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / MARK).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def reached_step(folder: Path) -> str | None:
    """How far the newest sealed checkpoint is, as `400 of 1200`; None without one. It is not verified here."""
    found = sealed(folder)
    if not found:
        return None
    step = found[-1].name.split("-")[1]
    try:
        total = json.loads((found[-1] / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: the stage will see it and use the one before
        return step
    return f"{step} of {total}"


def newest_whole(folder: Path, *, with_best: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match their hashes, and a sentence for each that was set aside.

    `with_best`: the best checkpoint until then, which will be loaded at the end, must be whole as well.
    """
    notes: list[str] = []
    for checkpoint in reversed(sealed(folder)):
        damage = _damage(checkpoint) or (_damage_of_best(checkpoint) if with_best else None)
        if damage is None:
            return checkpoint, notes
        aside = checkpoint.with_name(f"corrupt-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        notes.append(f"{checkpoint.name} is damaged ({damage}); it is kept as {aside.name}, the one before is used")
    return None, notes


def _damage_of_best(checkpoint: Path) -> str | None:
    """What is wrong with the checkpoint that transformers would load at the end, safetensors without a checksum."""
    best = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
    if best is None or Path(best).name == checkpoint.name:
        return None
    damage = _damage(checkpoint.with_name(Path(best).name))
    return f"the best one until then, {Path(best).name}: {damage}" if damage else None


def _damage(checkpoint: Path) -> str | None:
    try:
        hashes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it is gone"
    except ValueError:
        return f"{MARK} is torn"
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != expected:
            return f"{name} has changed"
    return None
