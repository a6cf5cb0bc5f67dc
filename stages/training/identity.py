"""The identity of prepared rows: a key from the content of their files, and the names of files in their account."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.data.drawing import Draw
from stages.data.source import Source, data_files, file_types
from stages.runtime.hashes import HASHES, Hashes


def key(recipe: dict[str, Any], draw: Draw, saves: Path) -> str:
    """The key of the rows of a draw: 16 hex digits.

    It depends on the content of the files and not on their paths. Hashes are taken from the cache in `saves`, because
    the run has hashed every file before the stage started, and each process of a stage needs the key.

    Args:
        recipe: everything besides files that decides what the rows become, with `Draw.as_json` in it.
    """
    hashes = Hashes(saves / HASHES)
    parts = {
        "data": [_content(source, hashes) for source in draw.sources],
        "eval_data": [_content(source, hashes) for source in draw.eval_data],
    }
    text = json.dumps({**recipe, **parts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _content(source: Source, hashes: Hashes) -> dict[str, Any]:
    files = data_files(source)
    return {
        **source.model_dump(mode="json", exclude={"path", "others"}),
        "files": hashes.of(files),
        "types": file_types(files),
        "others": {name: _content(other, hashes) for name, other in source.others.items()},
    }


def names(draw: Draw) -> list[list[str]]:
    """The path of each data set that is drawn from, followed by the paths of its files."""
    return [[source.path, *map(str, data_files(source))] for source in draw.sources]


def rename(data: Sequence[dict[str, Any]], before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> None:
    """Name files as they are called now in the account of rows that were prepared before.

    Args:
        data: the account of each data set, in order. It is changed.
        before: the `names` when the rows were prepared.
        now: the `names` of today.
    """
    for entry, old, new in zip(data, before, now, strict=True):
        entry["path"] = new[0]
        called = dict(zip(old[1:], new[1:], strict=True))
        for lost in entry["dropped"].values():
            lost["first"] = [_renamed(text, called) for text in lost["first"]]


def _renamed(text: str, called: Mapping[str, str]) -> str:
    """The text with each place in a file, such as `old.jsonl:12`, under the new name of the file."""
    files = "|".join(map(re.escape, sorted(called, key=len, reverse=True)))
    return re.sub(rf"(?<!\S)({files})(?=:)", lambda found: called[found[1]], text)
