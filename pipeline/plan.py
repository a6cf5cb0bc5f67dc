"""A typed pipeline in, its steps out: each with a folder, a fingerprint, and the reason why it will run or not."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pipeline import artifact
from pipeline.config import Pipeline, Stage, in_order
from pipeline.errors import ConfigError, StageError, StageFailed, nearest
from stages import _checkpoint, _model, _rows, _trainer

LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets")
# Settings that change what is logged or kept, never the weights.
NO_RESULT = frozenset(
    {
        *("logging_steps", "logging_strategy", "logging_first_step", "report_to", "run_name", "log_level"),
        *("project", "trackio_space_id", "save_steps", "save_strategy", "save_total_limit"),
        *("dataloader_num_workers", "dataloader_prefetch_factor", "dataset_num_proc"),
        "include_num_input_tokens_seen",
    }
)

CHOOSE_BEST = frozenset({"save_steps", "save_strategy"})

HASHES = ".hashes.json"
State = Literal["done", "resume", "run"]


@dataclass(frozen=True)
class Step:
    """A stage placed in a plan."""

    stage: Stage
    config: BaseModel
    """With its model as folders: the base, then the adapters on it."""
    folder: Path
    link: Path
    fingerprint: str
    recipe: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, str]
    """Path → sha256 of what it reads besides other stages' folders."""
    state: State
    why: str

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def part(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.part")

    @property
    def produces(self) -> list[str]:
        """The model after this step, as folders."""
        before = getattr(self.config, "model", [])
        return [*before, str(self.folder)] if self.stage.leaves_adapter else [str(self.folder)]


@dataclass
class Plan:
    """The steps in order; `notes` are things a reader should know, `problems` what must be mended first."""

    pipeline: Pipeline
    saves: Path
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Model:
    """A model at some place in the chain: its folders, what identifies its content, what is known of it."""

    folders: list[str]
    identity: str
    facts: _model.Facts
    files: Mapping[str, str] = field(default_factory=dict)


def build(pipeline: Pipeline, saves: Path, *, fetch: bool = False, until: str | None = None) -> Plan:
    """Place every stage, up to `until`, and check each; `fetch` allows downloads from the Hub.

    Raises:
        ConfigError: `until` names no stage.
    """
    names = [stage.name for stage in pipeline.stages]
    if until is not None and until not in names:
        raise ConfigError([f"--until {until}: there is no such stage{nearest(until, names)}"])
    plan = Plan(pipeline, saves)
    _check_place(plan)
    hashes = artifact.Hashes(saves / HASHES)
    placer = _Placer(plan, hashes, fetch)
    last = names.index(until) if until is not None else len(names) - 1
    for stage in pipeline.stages[: last + 1]:
        placer.place(stage)
    if plan.steps and any(step.state != "done" for step in plan.steps):
        hashes.save()
    return plan


def _check_place(plan: Plan) -> None:
    """Outputs must be writable before anything is spent."""
    folder = plan.saves
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or _read_only(folder):
        plan.problems.append(f"{plan.saves}: cannot be written; choose another folder with `--saves DIR`")


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


class _Placer:
    def __init__(self, plan: Plan, hashes: artifact.Hashes, fetch: bool) -> None:
        self.plan, self.hashes, self.fetch = plan, hashes, fetch
        self.models: dict[str, _Model] = {}
        self.bases: dict[str, _Model | None] = {}

    def place(self, stage: Stage) -> None:
        model = self.starting(stage)
        self.check(stage, model)
        if stage.model is not None and model is None:
            return  # a problem was noted; what hangs on it cannot be placed
        config = stage.config if model is None else stage.config.model_copy(update={"model": model.folders})
        recipe = self.recipe(stage)
        inputs = {} if model is None else {"model": model.identity}
        content = {"use": stage.use, "recipe": recipe, "inputs": inputs, "versions": versions(stage.use)}
        fingerprint = hashlib.sha256(_canonical(content)).hexdigest()
        folder = self.plan.saves / f"{stage.use}-{fingerprint[:12]}"
        link = self.plan.saves / self.plan.pipeline.name / stage.name
        state, why = self.state(stage, folder, link, content)
        files = {
            source.path: self.hashes.one(Path(source.path)) for source in _sources(stage.config) if _is_file(source)
        }
        files |= model.files if model is not None else {}
        step = Step(stage, config, folder, link, fingerprint, recipe, inputs, files, state, why)
        self.plan.steps.append(step)
        facts = stage.module.facts(stage.config) if model is None else self.facts_after(stage, model.facts)
        self.models[stage.name] = _Model(step.produces, fingerprint, facts)

    def facts_after(self, stage: Stage, facts: _model.Facts) -> _model.Facts:
        after = getattr(stage.module, "facts_after", None)
        template = getattr(stage.config, "template", None) or facts.template
        changed: _model.Facts = after(stage.config, facts) if after else facts
        return replace(changed, source=f"the model of `{stage.name}`", template=template)

    def starting(self, stage: Stage) -> _Model | None:
        if stage.model is None:
            return None
        if stage.model.startswith("$"):
            return self.models.get(stage.model[1:])
        if stage.model not in self.bases:
            self.bases[stage.model] = self.base(stage.model, stage)
        return self.bases[stage.model]

    def base(self, model: str, stage: Stage) -> _Model | None:
        """A model that no stage makes: a folder by the hashes of its files, a Hub model by its pinned revision."""
        try:
            folder = _model.locate(model, download=self.fetch)
            if folder is None:
                self.plan.notes.append(
                    f"`{model}` is not on this machine; `run` fetches it, until then it is unchecked"
                )
                return _Model([model], f"hub:{model}", _model.Facts(f"`{model}`", {}, known=False))
            facts = _model.facts(folder, f"`{model}`")
        except StageError as error:
            self.problem(stage, "model", str(error))
            return None
        if _model.is_hub_name(model):
            return _Model([str(folder)], f"hub:{model}", facts)
        kinds = (".safetensors", ".json", ".jinja", ".model")
        files = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.name not in artifact.NOT_CONTENT)
        content = dict(zip([str(path) for path in files], self.hashes.of(files), strict=True))
        named = {Path(path).name: digest for path, digest in content.items()}
        identity = "folder:" + hashlib.sha256(_canonical(named)).hexdigest()
        return _Model([str(folder)], identity, facts, content)

    def problem(self, stage: Stage, setting: str, text: str) -> None:
        document = self.plan.pipeline.document
        key = ("stages", stage.name, *setting.split(".")) if setting else ("stages", stage.name)
        from_top = setting == "template" or (setting == "model" and not (stage.model or "").startswith("$"))
        if from_top and key not in document.keys and (setting,) in document.keys:
            key = (setting,)
        self.plan.problems.append(f"{document.value_place(key)}: stage `{stage.name}`: {text}")

    def check(self, stage: Stage, model: _Model | None) -> None:
        """What can be known to fail before the first stage starts: the data, and what the stage itself knows."""
        for source in _sources(stage.config):
            self.check_data(source)
        self.check_held_out(stage)
        check = getattr(stage.module, "check", None)
        if check is not None and (model is not None or stage.model is None):
            config = stage.config if model is None else stage.config.model_copy(update={"model": model.folders})
            for setting, text in check(config, model.facts if model else None):
                self.problem(stage, setting, text)

    def check_held_out(self, stage: Stage) -> None:
        """Rows must be left to train on, where their number is known."""
        if isinstance(stage.config, _trainer.TrainingConfig):
            rows = sum(self.plan.rows.get(self.names(source)[0], 0) for source in stage.config.data)
            text = _trainer.too_many_held_out(stage.config.eval_size, rows) if rows else None
            if text is not None:
                self.problem(stage, "eval_size", text)

    def names(self, source: _rows.Source) -> list[str]:
        """What a data source is called in the file."""
        return [name for name, declared in self.plan.pipeline.data.items() if declared == source]

    def check_data(self, source: _rows.Source) -> None:
        names = self.names(source)
        if names[0] in self.plan.rows:
            return
        count, problems = _rows.problems(source)
        self.plan.rows.update(dict.fromkeys(names, count))
        place = self.plan.pipeline.document.key_place(("data", names[0]))
        self.plan.problems += [f"{place}: data `{names[0]}`: {text}" for text in problems]

    def recipe(self, stage: Stage) -> dict[str, Any]:
        """What the stage does, in values that can be compared: settings, and the content of its data by hash."""
        recipe = stage.config.model_dump(mode="json", exclude={"model"})
        if isinstance(recipe.get("trainer"), dict):
            # With the best checkpoint loaded at the end, when to save decides which one that can be.
            ignored = NO_RESULT if not recipe["trainer"].get("load_best_model_at_end") else NO_RESULT - CHOOSE_BEST
            recipe["trainer"] = {key: value for key, value in recipe["trainer"].items() if key not in ignored}
        if stage.launch.processes > 1:
            recipe["processes"] = stage.launch.processes  # the order of rows and of sums depends on it
        recipe.pop("question", None)
        return {key: self.content(value) for key, value in recipe.items()}

    def content(self, value: Any) -> Any:
        """The value with every data file replaced by its hash, so that moving a file changes nothing."""
        if isinstance(value, dict) and {"path", "format"} <= value.keys():
            path = Path(value["path"])
            digest = self.hashes.one(path) if path.is_file() else None
            return {**{key: entry for key, entry in value.items() if key != "path"}, "sha256": digest}
        if isinstance(value, dict):
            return {key: self.content(entry) for key, entry in value.items()}
        return [self.content(entry) for entry in value] if isinstance(value, list) else value

    def state(self, stage: Stage, folder: Path, link: Path, content: Mapping[str, Any]) -> tuple[State, str]:
        if artifact.read(folder) is not None:
            return "done", "nothing it depends on has changed"
        checkpoints = _checkpoint.sealed(folder.with_name(f"{folder.name}.part") / "checkpoints")
        if checkpoints:
            return "resume", f"goes on at step {checkpoints[-1].name.split('-')[1]}"
        record = artifact.read(link.resolve()) if link.is_symlink() else None
        if folder.exists():
            return "run", "its folder is damaged; it is made anew"
        if record is None:
            return "run", "has not run yet"
        source = (stage.model or "")[1:]
        above = next((step for step in self.plan.steps if step.name == source and step.state != "done"), None)
        changes = list(
            _differences({k: record.get(k) for k in ("recipe", "versions")}, content, "", self.place_of(stage))
        )
        if changes:
            return "run", "because " + ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if changes[3:] else "")
        return (
            "run",
            f"because `{above.name}` above it will run" if above else "because the model it starts from changed",
        )

    def place_of(self, stage: Stage) -> Any:
        document = self.plan.pipeline.document

        def place(path: str) -> str:
            words = tuple(path.split("."))
            keys = [key for key in (("stages", stage.name, *words), words) if key in document.keys]
            return f" ({':'.join(document.keys[keys[0]].split(':')[:2])})" if keys else ""

        return place


def check_unchanged(step: Step) -> None:
    """Its data and base model must be what the plan hashed: hours may lie between, and the record speaks of that.

    Raises:
        StageFailed: a file has changed or is gone.
    """
    hashes = artifact.Hashes(step.folder.parent / HASHES)
    for path, digest in step.files.items():
        if not Path(path).is_file() or hashes.one(Path(path)) != digest:
            raise StageFailed(f"stage `{step.name}`: `{path}` changed while the run was going on; run again")


def _is_file(source: _rows.Source) -> bool:
    return Path(source.path).is_file()


def _sources(config: BaseModel) -> Iterator[_rows.Source]:
    """Every data source in a stage's config."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, _rows.Source):
                yield item
            elif isinstance(item, BaseModel):
                yield from _sources(item)


def versions(use: str) -> dict[str, str]:
    """Everything installed that computes, and our own stage's version."""
    from pipeline.config import module

    libraries = (*LIBRARIES, "gptqmodel") if use == "quantize" else LIBRARIES
    found = {f"stage {use}": str(module(use).VERSION), "python": ".".join(platform.python_version_tuple()[:2])}
    return found | {library: _version(library) for library in libraries}


@cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _canonical(value: Any) -> bytes:
    """The same bytes for the same value, whatever the order of its keys.

    Raises:
        TypeError: a value has no exact JSON form.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=True, separators=(",", ":")).encode()


def _differences(old: Any, new: Any, path: str, place: Any) -> Iterator[str]:
    """Clauses that name each value which changed, such as `trainer.learning_rate` 5e-05 → 2e-05 (x.yaml:31)."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if key not in ("use", "inputs")]
        for key in keys:
            below = key if path in ("", "recipe", "versions") else f"{path}.{key}"
            yield from _differences(old.get(key), new.get(key), below, place)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for before, after in zip(old, new, strict=True):
            yield from _differences(before, after, path, place)
    elif old != new:
        if path.endswith("sha256"):
            yield f"the content of `{path.removesuffix('.sha256')}` changed"
        elif len(str(old)) + len(str(new)) > 60:
            yield f"`{path}` changed{place(path)}"
        else:
            yield f"`{path}` {_word(old)} → {_word(new)}{place(path)}"


def _word(value: Any) -> str:
    return (
        "not set" if value is None else json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    )


def check(plan: Plan) -> None:
    """Stop when anything must be mended first.

    Raises:
        ConfigError: with every problem of every stage.
    """
    if plan.problems:
        raise ConfigError(in_order(plan.problems))
