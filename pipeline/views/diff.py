"""Two runs in, what differs out: settings, versions, figures and answers, read from what the runs left."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import secret
from pipeline.config.pipeline import folder_name
from pipeline.errors import ConfigError
from pipeline.saves import artifact
from pipeline.views.report import flat
from stages.measuring.table import read_answers
from stages.runtime.errors import nearest

ABSENT = "(none)"
_LONGEST = 100  # characters of a value in the table


@dataclass(frozen=True)
class Line:
    """A value by name in one stage that is not the same in both runs."""

    stage: str
    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Answer:
    """A model's answers to one prompt."""

    stage: str
    data: str
    row: int
    prompt: str
    model: str
    a: str | None
    b: str | None


@dataclass
class Difference:
    """Everything that differs, and how many figures and answers do not."""

    a: str
    b: str
    stages: dict[str, list[str]]
    """Those that only one of the two has, under `a` and `b`."""
    settings: list[Line] = field(default_factory=list)
    versions: list[Line] = field(default_factory=list)
    figures: list[Line] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    same_figures: int = 0
    same_answers: int = 0


def compare(a: str, b: str, saves: Path) -> Difference:
    """Compare what two runs left.

    Raises:
        ConfigError: one of them names no run.
    """
    problems: list[str] = []
    folders = [_links(name, saves, problems) for name in (a, b)]
    if problems:
        raise ConfigError(problems)
    first, second = (_records(folder) for folder in folders)
    only = {"a": [name for name in first if name not in second], "b": [name for name in second if name not in first]}
    found = Difference(a, b, only)
    for stage in (name for name in first if name in second):
        (left, one), (right, other) = first[stage], second[stage]
        found.settings += _lines(stage, one.get("recipe", {}), other.get("recipe", {}))[0]
        found.versions += _lines(stage, one.get("versions", {}), other.get("versions", {}))[0]
        lines, same = _lines(stage, _figures(one), _figures(other))
        found.figures += lines
        found.same_figures += same
        _compare_answers(stage, left, right, found)
    return found


def _links(name: str, saves: Path, problems: list[str]) -> Path:
    """The folder of links of a run: a folder, a config file, or a config's name."""
    given = Path(name)
    folder = given if given.is_dir() else saves / (folder_name(given) if given.suffix in (".yaml", ".yml") else name)
    if not folder.is_dir() or not any(path.is_symlink() for path in folder.iterdir()):
        runs = {path.parent.name for path in saves.glob("*/*") if path.is_symlink()}
        close = nearest(folder.name, runs) or f"; `pipeline run CONFIG --saves {saves}` makes one"
        problems.append(f"{name}: there is no run of this name in {saves}{close}")
    return folder


def _records(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The finished stages in the order they were made."""
    found = {}
    for link in folder.iterdir():
        if link.is_symlink() and (record := artifact.read(link.resolve())) is not None:
            found[link.name] = (link.resolve(), record)
    return dict(sorted(found.items(), key=lambda item: (item[1][1].get("started", 0), item[0])))


def _lines(stage: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[list[Line], int]:
    """What differs, and how much is the same."""
    left, right = flat(one), flat(other)
    names = dict.fromkeys((*left, *right))
    lines = [
        Line(stage, name, left.get(name, ABSENT), right.get(name, ABSENT))
        for name in names
        if (name in left, left.get(name)) != (name in right, right.get(name))
    ]
    return lines, len(names) - len(lines)


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's numbers, the time it took among them."""
    metrics = {key: value for key, value in record.get("metrics", {}).items() if key != "settings"}
    numbers = {key: value for key, value in flat(metrics).items() if isinstance(value, int | float) or value is None}
    return {**numbers, "seconds": record["seconds"]} if "seconds" in record else numbers


def _compare_answers(stage: str, left: Path, right: Path, found: Difference) -> None:
    one, other = _answers(left), _answers(right)
    for key in (key for key in one if key in other):
        if one[key] == other[key]:
            found.same_answers += 1
        else:
            data, row, prompt, model = key
            found.answers.append(Answer(stage, data, row, prompt, model, one[key], other[key]))


def _answers(folder: Path) -> dict[tuple[str, int, str, str], str | None]:
    """Answers by data, row, prompt and model."""
    found = {}
    for one in read_answers(folder):
        prompt = one["prompt"][-1]["content"]
        for model, said in one["answers"].items():
            found[one["data"], one["row"], prompt, model] = said["answer"]
    return found


def text(found: Difference) -> str:
    """The difference for people."""
    lines = [f"A: {found.a}", f"B: {found.b}"]
    lines += [f"only in {side.upper()}: {', '.join(names)}" for side, names in found.stages.items() if names]
    for title, rows, same in (
        ("settings", found.settings, ""),
        ("versions", found.versions, ""),
        ("figures", found.figures, f"; {found.same_figures} are the same"),
    ):
        lines += ["", f"{title}: {len(rows) or 'none'} differ{'' if len(rows) != 1 else 's'}{same}"]
        if rows:
            lines += _table(
                [("stage", "name", "A", "B"), *((row.stage, row.name, *_both(row.a, row.b)) for row in rows)]
            )
    if found.answers or found.same_answers:
        lines += ["", f"answers: {len(found.answers)} of {len(found.answers) + found.same_answers} differ"]
    for one in found.answers:
        lines += [f"  {one.data}, row {one.row}, {one.model}: {_short(one.prompt)}"]
        lines += [f"    A: {_short(one.a)}", f"    B: {_short(one.b)}"]
    return secret.mask("\n".join(lines))


def as_json(found: Difference) -> str:
    """The difference for scripts."""
    return secret.mask(json.dumps(asdict(found), ensure_ascii=False, indent=1))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def _both(a: Any, b: Any) -> tuple[str, str]:
    """Two different values with as many digits as show the difference."""
    for digits in (4, 6, 9):
        both = _short(a, digits), _short(b, digits)
        if both[0] != both[1]:
            return both
    return _short(a, 17), _short(b, 17)


def _short(value: Any, digits: int = 4) -> str:
    """A value on one line."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    word = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    word = " ".join(word.split())
    return word if len(word) <= _LONGEST else f"{word[: _LONGEST - 1]}…"
