"""Tasks of lm-evaluation-harness: their names and metrics without importing it, and a model's figures in them.

A task is a YAML file, either in the installed harness or in the folder `include_path`.
"""

import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from stages.measuring.metrics import Measured
from stages.runtime.errors import Problem, StageError, nearest

NAME = re.compile(r"^[\"']?(?:task|group|tag)[\"']?:[ \t]*[\"']?([\w.-]+)", re.MULTILINE)
METRIC = re.compile(r"^[ \t]*-?[ \t]*\{?[ \t]*[\"']?metric[\"']?:[ \t]*[\"']?(\w+)", re.MULTILINE)
INCLUDE = re.compile(r"^[\"']?include[\"']?:[ \t]*[\"']?([\w./-]+)", re.MULTILINE)


class Harness(Protocol):
    """The settings of a stage that are read here."""

    @property
    def include_path(self) -> str | None: ...
    @property
    def num_fewshot(self) -> int | None: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def apply_chat_template(self) -> bool: ...
    @property
    def batch_size(self) -> int: ...


def check_tasks(tasks: Sequence[str], harness: Harness) -> list[Problem]:
    """Problems if the harness is not installed, or if neither it nor the folder has a task."""
    if harness.include_path is not None and not Path(harness.include_path).is_dir():
        return [("harness.include_path", f"there is no folder `{harness.include_path}`; it holds tasks as YAML files")]
    if not tasks:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        return [("tasks", "tasks need lm-evaluation-harness; install it with `pip install lm_eval`, or remove `tasks`")]
    known = task_names(harness.include_path)
    return [
        ("tasks", f"there is no task `{task}`{nearest(task, known)}")
        for task in tasks
        if task not in known and task not in (known := task_names(harness.include_path) | task_names(None))
    ]


def task_names(include_path: str | None) -> frozenset[str]:
    """Names of the tasks, groups and tags in a folder; without a folder, of those in the installed harness."""
    return _names(_folder(include_path)) if include_path is not None else _installed_names()


def task_metrics(task: str, include_path: str | None) -> tuple[str, ...]:
    """The metrics that a task's file, or a file that it includes, names; empty if they are not known."""
    if include_path is not None and (found := _metrics_of(task, _folder(include_path))):
        return found
    return _installed_metrics(task)


def _folder(path: str) -> list[Path]:
    """The YAML files in a folder and below it."""
    return sorted(Path(path).rglob("*.yaml"))


def _installed() -> list[Path]:
    spec = importlib.util.find_spec("lm_eval")
    folders = (spec.submodule_search_locations or []) if spec else []
    return [path for folder in folders for path in _folder(str(Path(folder, "tasks")))]


@cache  # fourteen thousand files
def _installed_names() -> frozenset[str]:
    return _names(_installed())


@cache
def _installed_metrics(task: str) -> tuple[str, ...]:
    return _metrics_of(task, _installed())


def _names(files: Sequence[Path]) -> frozenset[str]:
    return frozenset(name for path in files for name in NAME.findall(_text(path)))


def _metrics_of(task: str, files: Sequence[Path]) -> tuple[str, ...]:
    for path in files:
        if task in NAME.findall(text := _text(path)):
            found = METRIC.findall(text)
            while not found and (included := INCLUDE.search(text)) and (path.parent / included[1]).is_file():
                text = _text(path := path.parent / included[1])
                found = METRIC.findall(text)
            return tuple(dict.fromkeys(found))
    return ()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def task_files(include_path: str | None) -> list[Path]:
    """All files in the folder of tasks, with the data of the tasks."""
    return sorted(path for path in Path(include_path).rglob("*") if path.is_file()) if include_path else []


def measure_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], harness: Harness, seed: int
) -> dict[tuple[str, str], Measured]:
    """Run tasks of the harness on a model.

    Returns:
        (metric, task) → the value of each document; for a group also those of each of its tasks, and the group's own
        values are those of all its tasks together.

    Raises:
        StageError: the harness cannot run the tasks, as when their data is not on this machine.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    own = all(task in task_names(harness.include_path) for task in tasks)
    try:
        results = lm_eval.simple_evaluate(
            HFLM(model, tokenizer=tokenizer, batch_size=harness.batch_size),
            tasks=list(tasks),
            task_manager=_manager(harness.include_path, own=own),
            num_fewshot=harness.num_fewshot,
            limit=harness.limit,
            apply_chat_template=harness.apply_chat_template,
            bootstrap_iters=0,  # intervals are computed in stages/measuring/metrics.py, in one way for all figures
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise StageError(
            f"lm-evaluation-harness cannot run {', '.join(f'`{task}`' for task in tasks)} ({first}); a stage has no "
            "network, so fetch their data beforehand, or give tasks with local files in `harness.include_path`"
        ) from error
    values = {task: _values(samples) for task, samples in results["samples"].items()}
    for group in results.get("groups", {}):
        values[group] = _pooled([values[task] for task in _leaves(group, results["group_subtasks"]) if task in values])
    found: dict[tuple[str, str], Measured] = {}
    for task, figures in results["results"].items():
        for key, figure in figures.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else key
                found[name, task] = _measured(figure, values.get(task, {}).get(key))
    return found


@cache
def _manager(include_path: str | None, *, own: bool) -> Any:
    """The harness's index of tasks; `own`: of the folder alone, since the harness has many thousands."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=not own)


Values = dict[str, list[Any]]


def _values(samples: Sequence[dict[str, Any]]) -> Values:
    """`metric,filter` → the value of each document, in the order of the documents."""
    found: Values = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        for metric in sample["metrics"]:
            found.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return found


def _pooled(parts: Sequence[Values]) -> Values:
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: [value for part in parts for value in part.get(key, [])] for key in keys}


def _leaves(group: str, below: dict[str, list[str]]) -> Iterator[str]:
    """The tasks of a group and of the groups in it; the harness lists every task as a group without members."""
    for name in below.get(group) or []:
        yield from _leaves(name, below) if below.get(name) else (name,)


def _measured(figure: Any, values: Sequence[Any] | None) -> Measured:
    """The values of the documents if their mean is the harness's figure; if not (as F1), the figure alone."""
    if not isinstance(figure, int | float):
        return Measured(why=f"the harness gives `{figure}`")
    numbers = [float(value) for value in values or () if isinstance(value, bool | int | float)]
    complete = values is not None and len(numbers) == len(values) > 0
    if complete and math.isclose(sum(numbers) / len(numbers), figure, rel_tol=1e-9, abs_tol=1e-12):
        return Measured([(value, 1.0) for value in numbers])
    return Measured([None] * len(values or ()), value=float(figure))
