"""Two finished runs in, their differences out: settings, versions, figures and answers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import secret
from pipeline.config.pipeline import folder_name
from pipeline.errors import ConfigError
from pipeline.saves import artifact
from pipeline.saves.links import not_the_owner
from pipeline.views.controls import without_controls
from pipeline.views.report import flatten
from stages.measuring.table import read_answers
from stages.runtime.errors import nearest

ABSENT = "(none)"
_LONGEST = 100  # characters of a value that are shown


@dataclass(frozen=True)
class ValueDifference:
    """A named value of a stage that differs between the two runs."""

    stage: str
    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class AnswerDifference:
    """The answers that a model of each run gave to the same prompt, if they differ."""

    stage: str
    data: str
    row: int
    prompt: str
    model: str
    a: str | None
    b: str | None


@dataclass
class Difference:
    """Everything that differs between two runs, and how many figures and answers are the same."""

    a: str
    b: str
    stages: dict[str, list[str]]
    """The stages that only one of the two runs has, under `a` and `b`."""
    settings: list[ValueDifference] = field(default_factory=list)
    versions: list[ValueDifference] = field(default_factory=list)
    figures: list[ValueDifference] = field(default_factory=list)
    answers: list[AnswerDifference] = field(default_factory=list)
    same_figures: int = 0
    same_answers: int = 0


def compare(a: str, b: str, saves: Path) -> Difference:
    """Compare two finished runs; each is a folder of links, a config file, or the name of a config.

    Raises:
        ConfigError: there is no run of the name `a` or `b` in `saves`.
    """
    problems: list[str] = []
    folders = [_links_folder(name, saves, problems) for name in (a, b)]
    if problems:
        raise ConfigError(problems)
    first, second = (_records(folder) for folder in folders)
    only = {"a": [name for name in first if name not in second], "b": [name for name in second if name not in first]}
    difference = Difference(a, b, only)
    for stage in (name for name in first if name in second):
        (folder_a, record_a), (folder_b, record_b) = first[stage], second[stage]
        difference.settings += _compare_values(stage, _settings(record_a), _settings(record_b))[0]
        difference.versions += _compare_values(stage, record_a.get("versions", {}), record_b.get("versions", {}))[0]
        figures, same = _compare_values(stage, _figures(record_a), _figures(record_b))
        difference.figures += figures
        difference.same_figures += same
        _compare_answers(stage, folder_a, folder_b, difference)
    return difference


def _links_folder(name: str, saves: Path, problems: list[str]) -> Path:
    """The folder of links of a run; a problem is added if it has no links."""
    given = Path(name)
    named = saves / (folder_name(given) if given.suffix in (".yaml", ".yml") else name)
    folder = given if _has_links(given) else named  # any other folder may be called like a run
    if given.is_file() and (text := not_the_owner(folder, given)) is not None:
        problems.append(text)
        return folder
    if not _has_links(folder):
        runs = {path.parent.name for path in saves.glob("*/*") if path.is_symlink()}
        close = nearest(folder.name, runs) or f"; `pipeline run CONFIG --saves {saves}` makes one"
        problems.append(f"{name}: there is no run of this name in {saves}{close}")
    return folder


def _has_links(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_symlink() for path in folder.iterdir())


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, and the models that no stage made: a hash of their files, or a name on the Hub with its commit."""
    models = {
        f"model `{name}`" if name != "model" else "model": known
        for name, known in record.get("inputs", {}).items()
        if str(known).startswith(("folder:", "hub:"))
    }
    return {**record.get("recipe", {}), **models}


def _records(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name of each finished stage → its folder and record, ordered by start time."""
    records = {}
    for link in folder.iterdir():
        if link.is_symlink() and (record := artifact.read(link.resolve())) is not None:
            records[link.name] = (link.resolve(), record)
    return dict(sorted(records.items(), key=lambda item: (item[1][1].get("started", 0), item[0])))


def _compare_values(
    stage: str, values_a: Mapping[str, Any], values_b: Mapping[str, Any]
) -> tuple[list[ValueDifference], int]:
    """The values that differ, and how many are the same."""
    a, b = flatten(values_a), flatten(values_b)
    names = dict.fromkeys((*a, *b))
    differences = [
        ValueDifference(stage, name, a.get(name, ABSENT), b.get(name, ABSENT))
        for name in names
        if (name in a, a.get(name)) != (name in b, b.get(name))
    ]
    return differences, len(names) - len(differences)


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a record: its metrics and the seconds that the stage took."""
    metrics = {key: value for key, value in record.get("metrics", {}).items() if key != "settings"}
    numbers = {key: value for key, value in flatten(metrics).items() if isinstance(value, int | float) or value is None}
    return {**numbers, "seconds": record["seconds"]} if "seconds" in record else numbers


def _compare_answers(stage: str, folder_a: Path, folder_b: Path, difference: Difference) -> None:
    """Add the answers of one stage that both runs have to `difference`."""
    a, b = _answers(folder_a), _answers(folder_b)
    for key in (key for key in a if key in b):
        if a[key] == b[key]:
            difference.same_answers += 1
        else:
            data, row, prompt, model = key
            difference.answers.append(AnswerDifference(stage, data, row, prompt, model, a[key], b[key]))


def _answers(folder: Path) -> dict[tuple[str, int, str, str], str | None]:
    """(data, row, last message of the prompt, model) → the answer."""
    answers = {}
    for entry in read_answers(folder):
        prompt = entry["prompt"][-1]["content"]
        for model, answer in entry["answers"].items():
            answers[entry["data"], entry["row"], prompt, model] = answer["answer"]
    return answers


def as_text(difference: Difference) -> str:
    """The difference for people."""
    lines = [f"A: {difference.a}", f"B: {difference.b}"]
    lines += [f"only in {side.upper()}: {', '.join(names)}" for side, names in difference.stages.items() if names]
    for title, rows, same in (
        ("settings", difference.settings, ""),
        ("versions", difference.versions, ""),
        ("figures", difference.figures, f"; {difference.same_figures} are the same"),
    ):
        lines += ["", f"{title}: {len(rows) or 'none'} differ{'' if len(rows) != 1 else 's'}{same}"]
        if rows:
            lines += _table(
                [("stage", "name", "A", "B"), *((row.stage, row.name, *_both(row.a, row.b)) for row in rows)]
            )
    if answers := len(difference.answers) + difference.same_answers:
        lines += ["", f"answers: {len(difference.answers)} of {answers} differ"]
    for answer in difference.answers:
        lines += [f"  {answer.data}, row {answer.row}, {answer.model}: {_short(answer.prompt)}"]
        lines += [f"    {side}: {text}" for side, text in zip("AB", _both(answer.a, answer.b), strict=True)]
    return secret.mask("\n".join(lines))


def as_json(difference: Difference) -> str:
    """The difference for scripts."""
    return secret.mask(json.dumps(asdict(difference), ensure_ascii=False, indent=1))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def _both(a: Any, b: Any) -> tuple[str, str]:
    """Two different values as text, with enough digits to tell them apart."""
    for digits in (4, 6, 9, 17):
        texts = _short(a, digits), _short(b, digits)
        if texts[0] != texts[1]:
            return texts
    return _from_first_difference(a, b)


def _from_first_difference(a: Any, b: Any) -> tuple[str, str]:
    """Two values that look the same on one short line: with escapes, from shortly before their first difference."""
    whole = [repr(secret.mask(value) if isinstance(value, str) else value) for value in (a, b)]
    same = next((place for place, pair in enumerate(zip(*whole, strict=False)) if pair[0] != pair[1]), 0)
    start = max(0, same - 20)
    shown_a, shown_b = (f"{'…' if start else ''}{text[start : start + _LONGEST]}" for text in whole)
    return shown_a, shown_b


def _short(value: Any, digits: int = 4) -> str:
    """A value on one line of at most `_LONGEST` characters."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = without_controls(" ".join(secret.mask(text).split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
