"""LLaMA-Factory's dataset_info.json: an entry of it in, the settings of a data set out.

As in its `data/parser.py`, `columns` replaces all default columns, and `tags` all default tags.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.tools.convert_parts import Book, shown
from stages.data.files import FILE_TYPES, file_type
from stages.data.placeholders import placeholders
from stages.runtime.errors import nearest

READ = 100_000_000
"""Bytes of the largest data file that is searched for placeholders."""
CommitOf = Callable[[str, str], str | None]
"""`model` or `dataset`, and a name on the Hub → its commit; None where it is not known."""

ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
TAGS |= {"observation_tag": "tool", "function_tag": "function_call"}
# Their role → the names that need no mapping.
USUAL = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt"),
    "system": ("system", "developer"),
    "tool": ("tool", "observation", "function", "tool_response"),
    "function_call": ("function_call", "tool_call"),
}
FORMATS = {
    **{"pt": "text", "sft": "alpaca", "dpo": "preference", "reward": "preference", "kto": "labelled"},
    **{"evaluate": "alpaca", "quantize": "text"},
}
"""The format that a kind of stage reads, where nothing says more."""
KEYS = (
    *("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "formatting", "ranking"),
    *("subset", "split", "folder", "num_samples", "columns", "tags"),
)


class NoData(Exception):
    """An entry that no data set can be made of; the message is a clause."""


@dataclass
class Sets:
    """The data sets that a LLaMA-Factory folder describes."""

    book: Book
    commit_of: CommitOf
    folder: str
    """`dataset_dir`, as it is written into paths."""
    entries: Mapping[str, Any] | None
    """dataset_info.json; None where it was not found."""

    def declared(self, name: str, kind: str, place: str, max_samples: int | None) -> str | None:
        """Our name of a data set, which `book.data` then has; None where there is none, which is noted."""
        try:
            settings = self._settings(name, kind, place)
        except NoData as error:
            self.book.note("not supported", place, f"the data set `{name}`: {error}")
            return None
        least = [one for one in (settings.get("max_samples"), max_samples) if one is not None]
        settings = settings | ({"max_samples": min(least)} if least else {})
        return declare(self.book, name, settings, kind)

    def _settings(self, name: str, kind: str, place: str) -> dict[str, Any]:
        if self.folder == "ONLINE":
            return {"path": pinned(self.book, self.commit_of, "dataset", name, place), "format": FORMATS[kind]}
        if self.entries is None:
            text = f"`{name}`: its path and format are those of most data sets; correct them under `data`"
            self.book.note("to do", place, text)
            return {"path": str(Path(self.folder, f"{name}.json")), "format": FORMATS[kind]}
        if name not in self.entries:
            raise NoData(f"it is not in dataset_info.json{nearest(name, self.entries)}")
        entry = self.entries[name]
        if not isinstance(entry, dict):
            raise NoData("its entry in dataset_info.json is no object")
        for key in entry:
            if key not in KEYS:
                text = f"`{key}` in the entry of `{name}` is no key of dataset_info.json{nearest(key, KEYS)}"
                self.book.note("unknown", place, text)
        settings = self._place(entry, name, place) | form(entry, kind)
        settings |= self._filled(name, settings["path"], place)
        if isinstance(entry.get("num_samples"), int):
            text = f"`num_samples` of `{name}`: the first rows are read, where LLaMA-Factory draws rows at random"
            self.book.note("differs", place, text)
            settings["max_samples"] = entry["num_samples"]
        return settings

    def _filled(self, name: str, path: str, place: str) -> dict[str, Any]:
        """`fill: {}` for a JSON file here whose rows hold placeholders such as `{{name}}`; `plan` reads others."""
        file = Path(path)
        try:
            if file.suffix.lower() != ".json" or file.stat().st_size > READ:
                return {}
            rows = json.loads(file.read_text(encoding="utf-8-sig"))
            found = sorted(placeholders(rows)) if isinstance(rows, list) else []
        except (OSError, ValueError, RecursionError):  # on the Hub, not here, or no JSON
            return {}
        if not found:
            return {}
        filled = ", ".join(f"{word}: …" for word in found)
        text = f"`{name}`: its rows hold `{{{{{found[0]}}}}}`, which LLaMA-Factory trains as it is written"
        self.book.note("to do", place, f"{text}; to fill it in, write `fill: {{{filled}}}` for `fill: {{}}`")
        return {"fill": {}}

    def _place(self, entry: Mapping[str, Any], name: str, place: str) -> dict[str, Any]:
        """Where the rows are."""
        if "hf_hub_url" in entry:
            found = {"path": pinned(self.book, self.commit_of, "dataset", str(entry["hf_hub_url"]), place)}
            parts = {"subset": entry.get("subset") or entry.get("folder"), "split": entry.get("split")}
            return found | {key: value for key, value in parts.items() if value and (key, value) != ("split", "train")}
        if "file_name" in entry and not {"ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"} & entry.keys():
            return {"path": str(Path(self.folder, str(entry["file_name"])))}
        reasons = {
            "script_url": "it is a script, and code of a data set is never run; write its rows into a file",
            "cloud_file_name": "it is in a cloud store; download it and name its files",
            "ms_hub_url": "it is on ModelScope only; download it and name its files",
            "om_hub_url": "it is on Modelers only; download it and name its files",
        }
        raise NoData(next((text for key, text in reasons.items() if key in entry), f"`{name}` names no file"))


def form(entry: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The format of an entry's rows and the file's names for our columns, roles and keys.

    Raises:
        NoData: its rows are not text.
    """
    talk = entry.get("formatting") in ("sharegpt", "openai")
    messages = entry.get("formatting") == "openai" and not entry.get("ranking")
    defaults = {"messages": "conversations"} if talk else ALPACA
    if entry.get("ranking"):
        defaults = {**defaults, "chosen": "chosen", "rejected": "rejected"}
    for word in ("columns", "tags"):
        if not isinstance(entry.get(word) or {}, Mapping):
            raise NoData(f"its `{word}` in dataset_info.json is no object")
    theirs = {key: str(value) for key, value in (entry.get("columns") or defaults).items() if value}
    if media := [key for key in ("images", "videos", "audios") if key in theirs]:
        raise NoData(f"it has {media[0]}, and only text is supported")
    ours = {**ALPACA, "kto_tag": "label", "messages": "messages" if messages else "conversations"}
    if kind == "pt" and not talk:  # LLaMA-Factory pretrains on the prompt
        return {"format": "text", **_mapped("columns", {"text": theirs.get("prompt", "instruction")})}
    name = "sharegpt" if talk else "alpaca"
    if entry.get("ranking"):
        name = "preference"
    elif "kto_tag" in theirs:
        name = "labelled"
    elif messages:
        name = "messages"
    elif not talk and "response" not in theirs:
        return {"format": "text", **_mapped("columns", {"text": theirs.get("prompt", "instruction")})}
    tags = entry.get("tags") or {}
    roles = {ours_: tags[tag] for tag, ours_ in TAGS.items() if tags.get(tag) and tags[tag] not in USUAL[ours_]}
    keys = {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
    usual = keys in ({"role": None, "content": None}, {"role": "from", "content": "value"}) or keys == {
        "role": "role",
        "content": "content",
    }
    return {
        "format": name,
        **_mapped("columns", {ours.get(key, key): column for key, column in theirs.items()}),
        **({"roles": roles} if roles else {}),
        **({} if usual else {"message_keys": {key: value for key, value in keys.items() if value}}),
    }


def _mapped(word: str, names: Mapping[str, str]) -> dict[str, Any]:
    different = {ours: theirs for ours, theirs in names.items() if ours != theirs}
    return {word: different} if different else {}


def declare(book: Book, name: str, settings: dict[str, Any], kind: str) -> str:
    """Add a data set under a name of ours, or find it; other settings under the same name get a new name."""
    plain = re.sub(r"[^a-z0-9_-]+", "_", name.lower().rpartition("/")[2]).strip("_-")
    plain = plain if plain[:1].isalpha() else f"data_{plain}"
    for candidate in (plain[:58], f"{plain[:58]}_{kind}", *(f"{plain[:58]}_{number}" for number in range(2, 100))):
        if book.data.setdefault(candidate, settings) == settings:
            return candidate
    raise ConfigError([f"the data set `{name}` is named with a hundred different settings; name fewer commands"])


def is_local(name: str) -> bool:
    """Whether a data set is a file or a folder and no name on the Hub, whose last part may hold dots."""
    file = file_type(Path(name)) in FILE_TYPES or name.startswith((".", "/", "~")) or name.count("/") > 1
    return file or Path(name).exists()


def pinned(book: Book, commit_of: CommitOf, kind: str, name: str, place: str, revision: str | None = None) -> str:
    """A name on the Hub with its commit; `@COMMIT` and a note where the commit is not known."""
    if isinstance(revision, str) and re.fullmatch("[0-9a-f]{40}", revision):
        return f"{name}@{revision}"
    branch = str(revision or "main")
    commit = commit_of(kind, name) if branch == "main" else None
    if commit is None:
        address = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        head = "HEAD" if branch == "main" else shown(branch)
        book.note("to do", place, f"`{name}`: write its commit for COMMIT; `git ls-remote {address} {head}` shows it")
    return f"{name}@{commit or 'COMMIT'}"


def read_info(
    book: Book, given: Path | None, folder: str, near: Path, place: str
) -> tuple[Mapping[str, Any] | None, str]:
    """dataset_info.json and its folder: the file that the user names, or that of `dataset_dir`, as seen from `near`.

    Without such a file the entries are None, and the folder is `dataset_dir`.

    Raises:
        ConfigError: the file is there and cannot be read.
    """
    starts = [Path(), near, *near.resolve().parents]
    found = next((there for start in starts if (there := start / folder / "dataset_info.json").is_file()), None)
    path = given or found
    if path is None:
        if folder != "ONLINE":
            text = f"`{folder}/dataset_info.json` is not found, which describes the data; name it with `--dataset-info`"
            book.note("to do", place, text)
        return None, folder
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise ConfigError([f"{path}: cannot be read ({reason}); name a dataset_info.json"]) from None
    if not isinstance(entries, dict):
        raise ConfigError([f"{path}: is no object of data sets; name a dataset_info.json"])
    return entries, str(path.parent)
