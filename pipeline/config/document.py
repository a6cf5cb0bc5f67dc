"""YAML text in, plain values with the line and column of each out.

PyYAML composes the nodes; values are read by the core schema of YAML 1.2, so `5e-5` is a number and `no` is a
word. Refused, each with its place: duplicate keys, tabs, tags, aliases beyond a budget, deep nesting.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError
from stages.runtime.errors import nearest

MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # counted after aliases are expanded: ten lines of aliases can mean a billion values
MAX_DEPTH = 32

Key = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]{1,99}$|0x[0-9a-fA-F]+$|0o[0-7]+$")  # Python refuses to read thousands of digits
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_VARIABLE = re.compile(r"\$\{[^{}\s]+\}")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **dict.fromkeys([".inf", "+.inf", ".Inf", ".INF"], float("inf")),
    **dict.fromkeys(["-.inf", "-.Inf", "-.INF"], float("-inf")),
    **dict.fromkeys([".nan", ".NaN", ".NAN"], float("nan")),
}


class _Loader(yaml.SafeLoader):
    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """PyYAML calls this for values without a tag, so a node that has a tag got it from the user."""
        return ""


@dataclass
class Document:
    """The values of a YAML file, with the place of each key (`keys`) and of each value (`values`)."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[Key, str] = field(default_factory=dict)
    values: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def key_place(self, key: Key) -> str:
        """`file:line:column` of the key, or of the nearest key around it."""
        while key and key not in self.keys:
            key = key[:-1]
        return self.keys.get(key, f"{self.name}:1:1")

    def value_place(self, key: Key) -> str:
        """`file:line:column` of the value, or of the nearest key around it."""
        return self.values.get(key) or self.key_place(key)

    def move(self, old: Key, new: Key) -> None:
        """Give the places below one key to another key as well."""
        for places in (self.keys, self.values):
            found = {key: place for key, place in places.items() if key[: len(old)] == old}
            places.update({new + key[len(old) :]: place for key, place in found.items()})

    def drop_extensions(self) -> None:
        """Forget keys at the top such as `x-shared`, which hold anchors for the rest of the file."""
        self.data = {key: value for key, value in self.data.items() if not key.startswith("x-")}

    def refuse_variables(self) -> None:
        """Note values such as `${HOME}`, which other programs replace by a variable of the environment."""
        for key, value in _texts(self.data, ()):
            if found := _VARIABLE.search(value):
                path = ".".join(map(str, key[1:] if key[:1] == ("stages",) else key))
                why = f"`{found[0]}` is not replaced, because the file says all that runs"
                way = f"write the value, or give it with `--set {path}=…`"
                self.problems.append(f"{self.value_place(key)}: {why}; {way}")

    def set(self, assignment: str) -> None:
        """Apply one `--set key.path=value`; the value is read as YAML.

        Raises:
            ConfigError: `=` is missing, or the path runs through a value that is not a mapping.
        """
        path, equals, text = assignment.partition("=")
        words: list[str] = path.strip().split(".")
        if not equals or not all(words):
            raise ConfigError([f"--set {assignment}: write it as `--set key.path=value`"])
        stages = self.data.get("stages")
        if words[0] not in self.data and isinstance(stages, dict):
            _refuse_misspelt(path, words, stages)
            words[:0] = ["stages"] if words[0] in stages else []
        value = parse(text, f"--set {path}", wants_mapping=False)
        if value.problems:
            raise ConfigError(value.problems)
        target: Any = self.data
        for depth, word in enumerate(words[:-1]):
            if target.get(word) is None:
                target[word] = {}
            target = target[word]
            if not isinstance(target, dict):
                raise ConfigError([f"--set {path}: `{'.'.join(words[: depth + 1])}` is not a mapping"])
        target[words[-1]] = value.data
        for depth in range(1, len(words) + 1):
            self.keys.setdefault(tuple(words[:depth]), f"--set {path}")
        self.keys[tuple(words)] = self.values[tuple(words)] = f"--set {path}"


def _refuse_misspelt(path: str, words: list[str], stages: dict[str, Any]) -> None:
    """Refuse `sftt.trainer.max_steps`: a setting of a stage whose name is only near to that of a stage.

    Raises:
        ConfigError: with the path that was meant.
    """
    near = nearest(words[0], map(str, stages)) if words[1:] and words[0] not in stages else ""
    if near.startswith("; did you mean"):
        meant = ".".join([near.split("`")[1], *words[1:]])
        raise ConfigError([f"--set {path}: there is no stage `{words[0]}` here; did you mean `{meant}`?"])


def _texts(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    """Every text below a value, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for word, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, (*key, word))


def read(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        ConfigError: the file is missing, too large or not UTF-8. Problems of the YAML itself are in `.problems`.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror}){_yaml_near(path)}"]) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError([f"{path}: {len(raw):,} bytes are too many for a config; data belongs in files of its own"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: not UTF-8; save the file as UTF-8"]) from None
    return parse(text, str(path))


def _yaml_near(path: Path) -> str:
    """The config that was meant, as a clause; the configs in the same folder where none is near."""
    names = [path.name + end for end in ("", ".yaml", ".yml")]
    meant = [folder / name for folder in (path.parent, path.parent / "configs") for name in names]
    if (found_there := next(filter(Path.is_file, meant), None)) is not None:
        return f"; did you mean `{found_there}`?"
    found = sorted(map(str, filter(_is_config, path.parent.glob("[!.]*.y*ml")))) if path.parent.is_dir() else []
    stems = {Path(name).stem: name for name in found}
    near = nearest(path.stem, stems)
    if near.startswith("; did you mean"):
        return f"; did you mean `{stems[near.split('`')[1]]}`?"
    if not found:
        return ""
    return "; there is " + ", ".join(f"`{name}`" for name in found[:8])


def _is_config(path: Path) -> bool:
    """Whether a YAML file has `stages:` at its top, as a config has and other YAML files have not."""
    try:
        with open(path, "rb") as file:
            return re.search(rb"^(stages|[\"']stages[\"'])\s*:", file.read(MAX_BYTES), re.MULTILINE) is not None
    except OSError:
        return False


def parse(text: str, name: str, *, wants_mapping: bool = True) -> Document:
    """Read YAML text; every problem goes into `.problems`, each with its place."""
    document = Document(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
        value: Any = {} if wants_mapping else None
        document.data = value if node is None else _Reader(document).value(node, ())
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax(name, text, error))
    except yaml.YAMLError as error:
        document.problems.append(f"{name}: not valid YAML ({str(error).splitlines()[0]})")
    except RecursionError:
        document.problems.append(f"{name}: not valid YAML (nested deeper than {MAX_DEPTH} levels)")
    if wants_mapping and not document.problems and not isinstance(document.data, dict):
        document.problems.append(f"{name}:1:1: a config is a mapping such as `stages: …`")
    return document


def _syntax(name: str, text: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f"{name}: not valid YAML ({error.problem})"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    place = f"{name}:{mark.line + 1}:{mark.column + 1}"
    for number in (mark.line, mark.line - 1):
        wide = (
            next((index for index, c in enumerate(lines[number]) if c in "：，"), None)
            if 0 <= number < len(lines)
            else None
        )
        if wide is not None:
            return f"{name}:{number + 1}:{wide + 1}: a full-width `{lines[number][wide]}`; YAML needs `: ` and `, `"
    if "\t" in line[: mark.column + 1]:
        return f"{place}: a tab; YAML is indented with spaces"
    problem = f"{error.context} {error.problem}" if str(error.problem).startswith("but ") else error.problem
    return f"{place}: not valid YAML ({problem})"


class _Reader:
    """Turns nodes into values and notes their places."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0

    def value(self, node: yaml.Node, key: Key) -> Any:
        self.nodes += 1
        place = self._place(node)
        self.document.values[key] = place
        if self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem="more values than a config can hold", problem_mark=node.start_mark)
        if len(key) > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=node.start_mark)
        if node.tag:
            shown = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.document.problems.append(f"{place}: the tag `{shown}` is refused; write a plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, index)) for index, item in enumerate(node.value)]
        if re.search("[\ud800-\udfff]", node.value):
            self.document.problems.append(f"{place}: half a character (a lone surrogate); write the whole character")
        plain = getattr(node, "style", None) is None  # quoted words stay text
        return scalar(node.value) if plain else node.value

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged = [pair for pair in node.value if _is_merge(pair[0])]
        for key_node, value_node in [pair for pair in node.value if pair not in merged]:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag:
                self.document.problems.append(f"{place}: a key is one word")
                continue
            word = key_node.value
            if word in found:
                first = self.document.keys[(*key, word)].rsplit(":", 2)[-2]
                self.document.problems.append(f"{place}: `{word}` is here twice; it is in line {first} already")
                continue
            self.document.keys[(*key, word)] = place
            found[word] = self.value(value_node, (*key, word))
        for key_node, value_node in self._inherited(merged):
            if key_node.value not in found:
                self.document.keys[(*key, key_node.value)] = self._place(key_node)
                found[key_node.value] = self.value(value_node, (*key, key_node.value))
        return found

    def _inherited(self, merged: list[tuple[yaml.Node, yaml.Node]]) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """The keys and values behind `<<: *name`, or behind a list of such mappings, the first ones first."""
        for key_node, node in merged:
            for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
                if not isinstance(part, yaml.MappingNode):
                    place = self._place(key_node)
                    self.document.problems.append(f"{place}: `<<` takes mappings, such as `<<: *name`")
                    continue
                words = [pair for pair in part.value if isinstance(pair[0], yaml.ScalarNode) and not _is_merge(pair[0])]
                yield from words
                yield from self._inherited([pair for pair in part.value if _is_merge(pair[0])])

    def _place(self, node: yaml.Node) -> str:
        return f"{self.document.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _is_merge(node: yaml.Node) -> bool:
    """Whether a key is YAML's `<<`, which takes over the keys of other mappings; in quotes it is a word."""
    return isinstance(node, yaml.ScalarNode) and node.value == "<<" and node.style is None


def scalar(text: str) -> Any:
    """The value of a plain word by the core schema of YAML 1.2, such as 1e-5 for `1e-5`."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _FLOAT.match(text):
        return float(text)
    return text
