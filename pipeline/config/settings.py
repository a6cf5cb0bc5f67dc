"""Checks a name and a value under `trainer:`, `lora:` or `gptq:` against the installed library.

The source of the library is read as text, which takes 0.1 seconds; importing trl takes ten.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pipeline.config.document import scalar
from pipeline.config.library_names import ELSEWHERE, HIDDEN, MANAGED, MOVED
from pipeline.errors import ConfigError
from stages.runtime.errors import nearest


@dataclass(frozen=True)
class Setting:
    """One field of a library's config class, as written in its source."""

    name: str
    annotation: str
    default: str
    choices: tuple[object, ...]
    home: Path
    """The file it is written in: where the names of its annotation are looked up."""


_IMPORT = re.compile(r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import[ \t]+(?:\(([^)]*)\)|([^(\n]+))", re.M)
_NEXT = re.compile(r"^[^\s#)\]}]", re.M)
_METHOD = re.compile(r"^    (?:@|def )", re.M)
_FIELD = re.compile(r"^    \w+ *:", re.M)


@cache
def settings(reference: str) -> dict[str, Setting]:
    """The settings of a class such as `trl.trainer.sft_config:SFTConfig`, in their order."""
    module, _, name = reference.partition(":")
    file = _module(Path(), module)
    found = _collect(file, name) if file else {}
    if not found:
        top = module.partition(".")[0]
        raise ConfigError([f"`{top}` is not installed, or has no `{name}`; `pip install -e .` brings it"])
    return found


@cache
def _collect(file: Path, name: str) -> dict[str, Setting]:
    """The fields of the bases of a class, then its own; none for a class that cannot be found."""
    block, home = _find(file, name)
    if not block:
        return {}
    node = ast.parse(block).body[0]
    assert isinstance(node, ast.ClassDef)
    fields: dict[str, Setting] = {}
    for base in reversed(node.bases):
        fields |= _collect(home, ast.unparse(base))
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            fields.pop(line.target.id, None)
            fields |= _field(line.target.id, line, home)
    return fields


def _field(name: str, line: ast.AnnAssign, home: Path) -> dict[str, Setting]:
    """One field by its name; empty for a field that the caller cannot set."""
    annotation, options = ast.unparse(line.annotation), _options(line.value)
    init = options.get("init", ast.Constant(True))
    if name.startswith("_") or "ClassVar" in annotation or ast.unparse(init) == "False":
        return {}
    default = options.get("default", options.get("default_factory"))
    text = ast.unparse(default) if default else ""
    return {name: Setting(name, annotation, text, _choices(options.get("metadata")), home)}


def _options(value: ast.expr | None) -> dict[str, ast.expr]:
    """`field(default=8, metadata=…)` and plain `= 8`, as one shape."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        return {word.arg: word.value for word in value.keywords if word.arg}
    return {"default": value} if value else {}


def _choices(metadata: ast.expr | None) -> tuple[object, ...]:
    """The literal list under `choices`; a list made by code, such as `levels.keys()`, is ignored."""
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                return tuple(ast.literal_eval(value))
    return ()


@cache
def _find(file: Path, name: str) -> tuple[str, Path]:
    """The text of a class and its file, through up to five `from … import` lines; or an empty text."""
    for _ in range(6):
        text = _read(file)
        if head := re.search(rf"^class {re.escape(name)}\b", text, re.M):
            end = _NEXT.search(text, head.end())
            return _head(text[head.start() : end.start() if end else None]), file
        source = _imported(file, text, name)
        if source is None:
            break
        file, name = source
    return "", file


def _head(block: str) -> str:
    """The text of a class without its methods, unless fields follow them; parsing takes half of all the time."""
    method = _METHOD.search(block)
    return block[: method.start()] if method and not _FIELD.search(block, method.end()) else block


def _imported(file: Path, text: str, name: str) -> tuple[Path, str] | None:
    """The file that an `import` line takes a name from, and the name there."""
    for module, several, one in _IMPORT.findall(text):
        for part in re.sub(r"#.*", "", several or one).split(","):
            words = part.split()
            if words and words[-1] == name and (source := _module(file, module)):
                return source, words[0]
    return None


def _module(file: Path, dotted: str) -> Path | None:
    """The file of a module. `find_spec` sees only the top package: for an inner one it imports the outer."""
    names = dotted.lstrip(".")
    if dots := len(dotted) - len(names):
        path = file.parents[dots - 1].joinpath(*filter(None, names.split(".")))
    else:
        top, *inner = names.split(".")
        spec = find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0], *inner)
    return next((p for p in (path.with_name(path.name + ".py"), path / "__init__.py") if p.is_file()), None)


@cache
def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


_PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number (int)"),
    "float": ((int, float), "a number (float)"),
    "str": ((str,), "text (str)"),
    "dict": ((dict,), "a mapping"),
    "list": ((list, tuple), "a list"),
    "tuple": ((list, tuple), "a list"),
    "set": ((list, tuple, set), "a list"),
    "none": ((type(None),), "null"),
}


def problem(reference: str, name: str, value: object) -> str | None:
    """One clause that says what is wrong with a setting and what to write, or None."""
    owner, known = reference.partition(":")[2], settings(reference)
    if clause := _managed(owner, name, value):
        return clause
    if name in known:
        return _misfit(owner, known[name], value)
    moved = MOVED.get(owner, {})
    head = f"`{name}` is not a setting of {owner}" if name in moved else f"{owner} has no setting `{name}`"
    return head + nearest(name, known, moved)


def _managed(owner: str, name: str, value: object) -> str | None:
    if owner == "GPTQConfig" and name in ("method", "format") and value != "gptq":
        return f"`{name}` is `{shown(value)}`; quantize writes the `gptq` format only"
    reason = MANAGED.get(owner, {}).get(name)
    return f"`{name}` {reason}" if reason else None


def _misfit(owner: str, setting: Setting, value: object) -> str | None:
    """Check the type, then the choices, as the library declares them."""
    if value is None and setting.default == "None":
        return None
    node = ast.parse(setting.annotation, mode="eval").body
    words = _words(node, setting.home)
    # DPOConfig turns one loss into a list itself.
    listed = [value] if setting.name == "loss_type" and isinstance(value, str) else value
    if not _fits(node, value, setting.home) and not _fits(node, listed, setting.home):
        if isinstance(value, str) and words:
            return _no_choice(owner, setting.name, value, words)
        bare = scalar(value) if isinstance(value, str) else value
        quoted = isinstance(bare, int | float) and _fits(node, bare, setting.home)
        way = "; remove the quotes" if quoted else ""
        return f"`{setting.name}` is `{shown(value)}`; {owner} wants {_wants(node, setting.home)}{way}"
    choices = setting.choices or _hidden(owner, setting.name)
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if choices and item is not None and str(item) not in map(str, choices):
            return _no_choice(owner, setting.name, item, choices)
    return None


def _no_choice(owner: str, name: str, value: object, choices: tuple[object, ...]) -> str:
    word = shown(value)
    if (place := ELSEWHERE.get(f"{owner}.{name}", {}).get(word)) is not None:
        return f"`{name}` has no choice `{word}` of {owner}; {place}"
    return f"`{name}` has no choice `{word}` of {owner}{nearest(word, map(shown, choices))}"


@cache
def _hidden(owner: str, name: str) -> tuple[str, ...]:
    """Choices that a library states only in its code; none if they are no longer at this place."""
    module, pattern, beside = HIDDEN.get(f"{owner}.{name}") or HIDDEN.get(name) or ("", "", ())
    file = _module(Path(), module) if module else None
    found = re.findall(pattern, _read(file), re.M) if file else []
    return (*found, *beside) if found else ()


def _fits(node: ast.expr, value: object, home: Path) -> bool:
    return any(_fits_one(part, value, home) for part in _parts(node, home))


def _fits_one(part: ast.expr, value: object, home: Path) -> bool:
    """Types that YAML cannot write, such as `torch.dtype`, accept any value here; the library checks them."""
    plain = _PLAIN.get(_name(part))
    if plain is None:
        words = _own_words(part, home)
        return not words or any(_is(word, value) for word in words)
    if not isinstance(value, plain[0]) or (isinstance(value, bool) and bool not in plain[0]):
        return False
    inner = _inner(part)
    if not inner or not isinstance(value, (list, tuple)):
        return True
    return all(any(_fits(node, item, home) for node in inner) for item in value)


def _is(word: object, value: object) -> bool:
    """`pissa_niter_[number of iters]` is how peft writes `pissa_niter_16`."""
    if isinstance(word, str) and isinstance(value, str) and "[" in word:
        return value.startswith(word.partition("[")[0])
    return word == value and type(word) is type(value)


def _parts(node: ast.expr, home: Path) -> list[ast.expr]:
    """The members of a union. `SchedulerType | str` counts as SchedulerType: the library converts the text."""
    parts = list(_flat(node))
    if any(_name(part) not in _PLAIN and _enum(part, home) for part in parts):
        return [part for part in parts if _name(part) != "str"]
    return parts


def _flat(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.BinOp):
        yield from (*_flat(node.left), *_flat(node.right))
    elif isinstance(node, ast.Subscript) and _name(node) in ("optional", "union"):
        for part in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            yield from _flat(part)
        if _name(node) == "optional":
            yield ast.Constant(None)
    else:
        yield node


def _name(part: ast.expr) -> str:
    """`list` for `List[str]` and `typing.List` alike."""
    return ast.unparse(part.value if isinstance(part, ast.Subscript) else part).rpartition(".")[2].lower()


def _inner(part: ast.expr) -> list[ast.expr]:
    """The types of a list's items; those of a mapping are left to the library."""
    if not isinstance(part, ast.Subscript) or _name(part) == "dict":
        return []
    items = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
    return [item for item in items if not (isinstance(item, ast.Constant) and item.value is ...)]


def _words(node: ast.expr, home: Path) -> tuple[object, ...]:
    """The choices an annotation itself lists."""
    return tuple(word for part in _parts(node, home) for word in _own_words(part, home))


def _own_words(part: ast.expr, home: Path) -> tuple[object, ...]:
    if _name(part) == "literal":
        return tuple(ast.literal_eval(item) for item in _inner(part))
    return () if _name(part) in _PLAIN else _enum(part, home)


def _enum(part: ast.expr, home: Path) -> tuple[str, ...]:
    """The values of an enum's members, from its source."""
    block, _ = _find(home, part.id) if isinstance(part, ast.Name) else ("", home)
    if not re.match(r"class \w+\([^)]*Enum\)", block):
        return ()
    return tuple(re.findall(r"""^    [A-Z]\w* = ["']([^"'\n]+)["']""", block, re.M))


def _wants(node: ast.expr, home: Path) -> str:
    parts = [part for part in _parts(node, home) if _name(part) != "none"]
    parts.sort(key=lambda part: bool(_inner(part)))  # "text or a list of text", not the other way round
    return " or ".join(dict.fromkeys(_want(part, home) for part in parts))


def _want(part: ast.expr, home: Path) -> str:
    if _name(part) not in _PLAIN:
        return " or ".join(f"`{shown(word)}`" for word in _own_words(part, home))
    word = _PLAIN[_name(part)][1]
    inner = _inner(part)
    return f"{word}, each item {_wants(inner[0], home)}" if word == "a list" and len(inner) == 1 else word


def shown(value: object) -> str:
    """A value as the user may have written it, on one line; with quotes where text would be another value without."""
    plain = isinstance(value, str) and value.strip() and "\n" not in value and scalar(value) == value
    text = str(value) if plain else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"


# The same as JSON Schema

_JSON = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "dict": "object", "none": "null"}


def json_type(owner: str, setting: Setting) -> dict[str, object]:
    """The JSON Schema of the values that `problem` accepts for a setting."""
    node = ast.parse(setting.annotation, mode="eval").body
    options = [_json_option(part, setting.home) for part in _parts(node, setting.home)]
    choices = setting.choices or _hidden(owner, setting.name)
    if choices:
        one: dict[str, object] = {"enum": [*choices]}
        lists = any(option.get("type") == "array" for option in options)
        options = [one, {"type": "array", "items": one}] if lists or setting.name == "loss_type" else [one]
    if setting.default == "None" or any(option.get("type") == "null" for option in options):
        options = [option for option in options if option.get("type") != "null"] + [{"type": "null"}]
    if {} in options:  # a type that YAML cannot write: the library checks it
        return {}
    return options[0] if len(options) == 1 else {"anyOf": options}


def _json_option(part: ast.expr, home: Path) -> dict[str, object]:
    """The schema of one member of a union; empty for any value."""
    name = _name(part)
    if name in ("list", "tuple", "set"):
        inner = [_json_option(one, home) for node in _inner(part) for one in _parts(node, home)]
        return {"type": "array", **({"items": {"anyOf": inner}} if inner and {} not in inner else {})}
    if name in _JSON:
        return {"type": _JSON[name]}
    words = _own_words(part, home)
    open_ended = [word.partition("[")[0] for word in words if isinstance(word, str) and "[" in word]
    if open_ended:
        return {"anyOf": [{"enum": list(words)}, *({"type": "string", "pattern": f"^{start}"} for start in open_ended)]}
    return {"enum": list(words)} if words else {}
