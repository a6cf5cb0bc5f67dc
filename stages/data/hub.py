"""Data sets on the Hub: a name with its commit in, the data files of one subset and split out.

Only data files are fetched, and no code of a data set is run. The files of a subset and a split are those that the
data set's card declares; without a card they follow from the files' names, as in the `datasets` library.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.data.compressed import COMPRESSED
from stages.data.files import BINARY, FILE_TYPES, is_data, is_saved_metadata
from stages.runtime.errors import StageError, nearest
from stages.runtime.hub import failures, refusal

NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)@(?P<commit>[0-9a-f]{40})$")
UNPINNED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]*)?$")
CARD = "README.md"
SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}\b")
SPLITS = {  # split → words in the names of its files
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class NotFetched(StageError):
    """A data set on the Hub is not on this machine yet."""


def is_name(path: str) -> bool:
    """Whether a path is `org/name@commit`, with all 40 hex digits of the commit, and not a file on this machine."""
    return bool(NAME.match(path)) and not Path(path).exists()


def locate(path: str, subset: str | None, split: str, *, download: bool) -> list[Path]:
    """The data files of a split, sorted.

    Raises:
        NotFetched: the files are not on this machine, and `download` is False.
        StageError: the Hub cannot be reached or does not know the data set, or there is no such subset or split.
    """
    card = _snapshot(path, [CARD], download=download)
    prefix, declared = _declared(path, _configs(card), subset, split)
    asked = [form for pattern in declared or [] for form in (pattern, pattern.replace("**/", ""))]
    packed = {kind: ("",) if kind in BINARY else ("", *COMPRESSED) for kind in FILE_TYPES}
    by_type = [f"{prefix}*{kind}{suffix}" for kind, suffixes in packed.items() for suffix in suffixes]
    folder = _snapshot(path, asked or by_type, download=download)
    wanted = [_regex(pattern) for pattern in declared or [f"{prefix}**"]]
    files = (file for file in folder.rglob("*") if is_data(file) and not is_saved_metadata(file))
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    names = [name for name in names if any(pattern.fullmatch(name) for pattern in wanted)]
    if not names and not download:
        raise _not_fetched(path)
    chosen = names if declared or not names else _of_split(path, names, prefix, split)
    if not chosen:
        raise StageError(f"the data set `{path}` holds no {', '.join(FILE_TYPES)} files of `split: {split}`")
    return [folder / name for name in chosen]


def _snapshot(path: str, patterns: Sequence[str], *, download: bool) -> Path:
    """The folder on this machine that holds the files of the data set that match."""
    from huggingface_hub import snapshot_download

    parts = NAME.match(path)
    assert parts is not None
    wanted = {"repo_type": "dataset", "revision": parts["commit"], "allow_patterns": [*patterns]}
    refused: BaseException | None = None
    if download:  # first, because a snapshot on this machine may lack files that no earlier call asked for
        try:
            return Path(snapshot_download(parts["name"], **wanted))
        except failures() as error:
            refused = error
    try:
        return Path(snapshot_download(parts["name"], **wanted, local_files_only=True))
    except OSError:
        if refused is None:
            raise _not_fetched(path) from None
        raise StageError(f"the Hub does not hand out the data set `{path}` {refusal(refused)}") from None


def _not_fetched(path: str) -> NotFetched:
    return NotFetched(f"the data set `{path}` is not on this machine; `pipeline run` fetches it")


def _configs(folder: Path) -> list[dict[str, Any]]:
    """The subsets that the card declares; none where it cannot be read."""
    import yaml

    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        declared = yaml.safe_load(head[1]) if head else {}
    except (OSError, ValueError, yaml.YAMLError):
        return []
    configs = declared.get("configs") if isinstance(declared, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _declared(
    path: str, configs: Sequence[dict[str, Any]], subset: str | None, split: str
) -> tuple[str, list[str] | None]:
    """The folder of a subset, such as `en/`, and the card's patterns for the split; None where the card has none.

    Where the card declares no subsets, a subset is a folder.

    Raises:
        StageError: the card does not declare the subset or the split, or `subset` is needed to choose one.
    """
    named = {str(config.get("config_name", "default")): config for config in configs}
    if not named:
        return (f"{subset}/" if subset else ""), None
    if subset is None:
        marked = [name for name, config in named.items() if config.get("default") or name == "default"]
        if not marked and len(named) > 1:
            raise StageError(f"the data set `{path}` has several subsets; add `subset:`{nearest('', named)}")
        subset = (marked or list(named))[0]
    if subset not in named:
        raise StageError(f"the data set `{path}` has no subset `{subset}`{nearest(subset, named)}")
    folder, files = str(named[subset].get("data_dir") or "").strip("/"), named[subset].get("data_files")
    if files is None:
        return (f"{folder}/" if folder else ""), None
    splits: dict[str, list[str]] = {}
    for name, patterns in _by_split(files):
        splits.setdefault(name, []).extend(map(str, patterns if isinstance(patterns, list) else [patterns]))
    if split not in splits:
        raise StageError(f"the data set `{path}` has no split `{split}`{nearest(split, splits)}")
    return "", splits[split]


def _by_split(files: Any) -> Iterator[tuple[str, Any]]:
    """Each split with its patterns. A card has patterns alone, split → patterns, or `split` and `path` together."""
    for entry in files if isinstance(files, list) else [files]:
        if not isinstance(entry, dict):
            yield "train", entry
        elif "path" in entry:
            yield str(entry.get("split", "train")), entry["path"]
        else:
            yield from ((str(name), patterns) for name, patterns in entry.items())


def _regex(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern: `*` matches within a folder, `**` across folders."""
    forms = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return re.compile("".join(forms.get(part) or (part if part[:1] == "[" else re.escape(part)) for part in parts))


def _of_split(path: str, names: Sequence[str], prefix: str, split: str) -> list[str]:
    """The files of a split by their names; every file belongs to `train` when no name contains a split.

    `Dataset.save_to_disk` names its files `data-00000-of-00002.arrow`, and `data` is no split then.
    """
    splits = {name: _split_of(name.removeprefix(prefix)) for name in names}
    if split not in splits.values() and not {*splits.values()} - {None, "data"}:
        splits = dict.fromkeys(names, "train")
    if split not in splits.values():
        raise StageError(
            f"the data set `{path}` has no split `{split}`{nearest(split, {name for name in splits.values() if name})}"
        )
    return [name for name in names if splits[name] == split]


def _split_of(name: str) -> str | None:
    """The split in a file's name, such as `data/train_sft-00000-of-00003.parquet`, `dev.jsonl` or `test/a.csv`."""
    if shard := SHARD.match(Path(name).name):
        return shard["split"]
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, forms in SPLITS.items() if words & {*forms}), None)
