"""Settings written into the text of a YAML file: everything else, comments and spaces, stays as it is.

A value takes the place of the old one; a new key goes before the first key of its mapping. Afterwards the text is read
again: it must say what it said before, and the new settings.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.config.document import Key, parse, scalar
from pipeline.errors import ConfigError


def with_settings(text: str, name: str, settings: Mapping[Key, Any]) -> str:
    """The text of the YAML file `name` with other settings; the key of each is a path from the top.

    Raises:
        ConfigError: a setting cannot be written there alone, as in a part of the file that other stages share.
    """
    written = text
    for key, value in settings.items():
        written = _with_setting(written, key, value)
        if parse(written, name).data != _set(parse(text, name).data, key, value):
            path = ".".join(map(str, key))
            raise ConfigError([f"{name}: `{path}` is in a part that the file shares; write it yourself"])
        text = written
    return written


def _set(data: Any, key: Key, value: Any) -> Any:
    """A copy of the values of a file with one of them changed."""
    changed = copy.deepcopy(data)
    inner = changed
    for word in key[:-1]:
        if inner.get(word) is None:
            inner[word] = {}
        inner = inner[word]
    inner[key[-1]] = value
    return changed


def _with_setting(text: str, key: Key, value: Any) -> str:
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for depth, word in enumerate(key):
        pair = _pair(node, word)
        if pair is None:
            return _with_pair(text, node, key[depth], _nested(key[depth + 1 :], value))
        outer, node = node, pair[1]
        shared = not outer.start_mark.index <= node.start_mark.index <= outer.end_mark.index
        if shared or (depth + 1 < len(key) and not isinstance(node, yaml.MappingNode)):
            break
    before = text[: node.start_mark.index]
    blank = " " if before.endswith(":") else ""  # an empty value begins right behind the colon
    return before + blank + _flow(_nested(key[depth + 1 :], value)) + text[_end(text, node) :]


def _pair(node: Any, word: Any) -> tuple[Any, Any] | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((pair for pair in pairs if pair[0].value == str(word)), None)


def _end(text: str, node: yaml.Node) -> int:
    """Where a value ends; that of a mapping in lines of its own ends before the white space that follows."""
    return node.start_mark.index + len(text[node.start_mark.index : node.end_mark.index].rstrip())


def _nested(path: Sequence[Any], value: Any) -> Any:
    for word in reversed(path):
        value = {word: value}
    return value


def _with_pair(text: str, node: yaml.MappingNode, word: Any, value: Any) -> str:
    """The text with a key before the first one of a mapping."""
    if node.flow_style:
        at = node.start_mark.index + 1
        return text[:at] + f"{word}: {_flow(value)}" + (", " if node.value else "") + text[at:]
    first = node.value[0][0].start_mark
    line_end = "\r\n" if "\r\n" in text else "\n"
    return text[: first.index] + f"{word}: {_flow(value)}{line_end}{' ' * first.column}" + text[first.index :]


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    plain = isinstance(value, str) and value.isidentifier() and scalar(value) == value
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
