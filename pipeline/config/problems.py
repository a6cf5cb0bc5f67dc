"""What is wrong with a config: each problem is one sentence with its place and the nearest right word."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.config import settings
from pipeline.config.document import Document, Key
from pipeline.config.library_names import MOVED
from stages.runtime.errors import nearest

M = TypeVar("M", bound=BaseModel)


class Problems:
    """Collects the problems of one document."""

    def __init__(self, document: Document) -> None:
        self.document, self.found = document, list(document.problems)

    def at(self, place: str, text: str) -> None:
        """Note a problem at `file:line:column`."""
        self.found.append(f"{place}: {text}")

    def at_key(self, key: Key, text: str) -> None:
        """Note a problem with a key, or with a key that is missing there."""
        self.at(self.document.key_place(key), text)

    def at_value(self, key: Key, text: str) -> None:
        """Note a problem with the value of a key."""
        self.at(self.document.value_place(key), text)

    def validated(
        self,
        kind: type[M],
        raw: Any,
        key: Key,
        label: str,
        *,
        skip: Collection[str] = (),
        libraries: Mapping[str, str] | None = None,
    ) -> M | None:
        """`raw` as a pydantic model; None when it is wrong, and the problems are noted.

        `skip` names the keys whose problems are noted already; `libraries` is `Stage.settings`.
        """
        if not isinstance(raw, dict):
            self.at_value(key, f"{label} is `{settings.shown(raw)}`; it wants a mapping")
            return None
        try:
            return kind.model_validate(raw, strict=True)
        except ValidationError as error:
            for found in error.errors():
                if not found["loc"] or found["loc"][0] not in skip:
                    self._note(found, kind, key, label, libraries or {})
            return None

    def _note(self, found: Any, kind: type[BaseModel], key: Key, label: str, libraries: Mapping[str, str]) -> None:
        location = tuple(part for part in found["loc"] if isinstance(part, str | int))
        where, word = (*key, *location), str(location[-1]) if location else ""
        if found["type"] == "extra_forbidden":
            hint = nearest(word, _fields(kind, location))
            if len(location) == 1:
                hint = _library_setting(libraries, word) or _closest(hint, libraries, word)
            self.at_key(where, f"{label} has no setting `{word}`{hint}")
        elif found["type"] == "missing":
            self.at_key(where, f"{label} needs `{'.'.join(map(str, location))}`")
        elif found["type"] == "value_error":
            report = self.at_value if isinstance(where[-1], int) else self.at_key
            report(where, f"{label}: {found['ctx']['error']}")
        else:
            hint = ""
            if found["type"] == "literal_error":
                hint = nearest(str(found["input"]), re.findall(r"'([^']+)'", found["ctx"]["expected"]))
            clause = hint or f"; it wants {_wanted(found)}"
            self.at_value(where, f"{label}: `{word}` is `{settings.shown(found['input'])}`{clause}")


def _library_setting(libraries: Mapping[str, str], word: str) -> str | None:
    """Where a word belongs that is a setting of a library, or the name that another tool has for one."""
    for prefix, reference in libraries.items():
        if word in settings.settings(reference):
            return f"; it belongs under `{prefix}:`"
        moved = MOVED.get(reference.rpartition(":")[2], {}).get(word)
        if moved is not None:
            return f"; it is now {moved}" + (f" under `{prefix}:`" if re.fullmatch("`[a-z_]+`", moved) else "")
    return None


def _closest(own: str, libraries: Mapping[str, str], word: str) -> str:
    """The clause about the stage's own settings, unless only a setting of a library is near the word."""
    for prefix, reference in libraries.items() if not own.startswith("; did you mean") else ():
        theirs = nearest(word, settings.settings(reference))
        if theirs.startswith("; did you mean"):
            return f"{theirs.removesuffix('?')} under `{prefix}:`?"
    return own


def _fields(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The fields that a misspelt key could have meant: those of the model around it."""
    for part in location[:-1]:
        annotation: Any = kind.model_fields[str(part)].annotation if part in kind.model_fields else None
        annotation = get_args(annotation)[0] if get_origin(annotation) is list else annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            kind = annotation
    return list(kind.model_fields)


def _wanted(found: Any) -> str:
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
    kinds |= {"list": "a list", "dict": "a mapping", "model": "a mapping"}
    for word, text in kinds.items():
        if found["type"].startswith(f"{word}_") and "pattern" not in found["type"]:
            return text
    if found["type"] == "string_pattern_mismatch":
        return f"text that matches `{found['ctx']['pattern']}`"
    message = str(found["msg"]).removeprefix("Input should be ")
    return f"a number {message}" if found["type"].startswith(("greater", "less")) else message[0].lower() + message[1:]


def in_order(problems: Sequence[str]) -> list[str]:
    """By line, as a reader of the file meets them; each once."""

    def line(problem: str) -> tuple[int, int]:
        match = re.search(r":(\d+):(\d+): ", problem)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    return sorted(dict.fromkeys(problems), key=line)
