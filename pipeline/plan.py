"""A typed pipeline in, its steps out: each with a folder, a fingerprint, and the reason why it will run or not."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pipeline import artifact
from pipeline.config import Pipeline, Stage, in_order
from pipeline.content import HASHES, ROWS, Hashes, Look, Rows
from pipeline.document import Key
from pipeline.errors import ConfigError, NewerRecord, StageError, StageFailed, nearest
from stages import _checkpoint, _model, _rows, _template, _trainer

LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets")
COMPUTES = {
    "quantize": ["gptqmodel"],
    "select": ["numpy"],
    "evaluate": ["numpy", "gptqmodel", "jieba", "rouge-chinese", "nltk", "lm_eval"],
}
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

BELONGS = ".config.json"  # beside the links of a config: which file they are of
State = Literal["done", "resume", "run", "refused"]


_NOTHING = _model.Needs(0, 0)


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
    fresh: bool = False
    """Asked to start over, whatever there is to go on from."""
    left: tuple[Path, ...] = ()
    """Unfinished work of the same stage with other settings, which `fresh` gives up."""
    inexact: str | None = None
    """Why a stop may change its result; None: it ends bit for bit the same."""
    needs: _model.Needs = _NOTHING
    """Memory and disk that it takes at least."""
    data: tuple[Path, ...] = ()
    """Folders of the steps whose rows it reads."""

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def part(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.part")

    @property
    def produces(self) -> list[str]:
        """The model after this step, as folders; none when it leaves something else."""
        if not self.stage.leaves_model:
            return []
        before = getattr(self.config, "model", [])
        return [*before, str(self.folder)] if self.stage.leaves_adapter else [str(self.folder)]


@dataclass
class Plan:
    """The steps in order; `notes` are things a reader should know, `problems` what must be mended first."""

    pipeline: Pipeline
    saves: Path
    hashes: Hashes
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    ignore_gates: bool = False


@dataclass(frozen=True)
class _Model:
    """A model at some place in the chain: its folders, what identifies its content, what is known of it."""

    folders: list[str]
    identity: str
    facts: _model.Facts
    files: Mapping[str, str] = field(default_factory=dict)


def build(
    pipeline: Pipeline,
    saves: Path,
    *,
    fetch: bool = False,
    until: str | None = None,
    fresh: Collection[str] = (),
    ignore_gates: bool = False,
) -> Plan:
    """Place every stage, up to `until`, and check each; `fetch` allows downloads, stages in `fresh` start over.

    With `ignore_gates` a gate that says no is told and does not stop the run.

    Raises:
        ConfigError: `until` or `fresh` names no stage.
    """
    names = [stage.name for stage in pipeline.stages]
    last = names.index(until) if until in names else len(names) - 1
    wrong = [("--until", until)] if until is not None and until not in names else []
    wrong += [("--fresh", name) for name in fresh if name not in names]
    problems = [f"{option} {name}: there is no such stage{nearest(name, names)}" for option, name in wrong]
    problems += [f"--fresh {name}: it comes after `--until {until}`" for name in fresh if name in names[last + 1 :]]
    if problems:
        raise ConfigError(problems)
    plan = Plan(pipeline, saves, Hashes(saves / HASHES), ignore_gates=ignore_gates)
    _check_place(plan)
    placer = _Placer(plan, fetch, fresh)
    for stage in pipeline.stages[: last + 1]:
        placer.place(stage)
    _check_disk(plan)
    for step in plan.steps:
        no = [verdict.text for verdict in verdicts(step, plan) if not verdict.passed] if step.state == "done" else []
        plan.notes += [f"a gate of `{step.name}` says no, and `run` stops after it: {text}" for text in no]
    plan.hashes.save()
    return plan


def _check_disk(plan: Plan) -> None:
    """A stage that cannot but fill the disk is told before anything is spent."""
    free = shutil.disk_usage(_existing(plan.saves)).free
    for step in plan.steps:
        there = artifact.size(step.part)
        if step.state != "done" and step.needs.disk - there > free:
            plan.problems.append(
                f"{plan.saves}: stage `{step.name}` takes at least {size_of(step.needs.disk)} of disk, and "
                f"{size_of(free)} are free; free space, keep fewer checkpoints with `trainer.save_total_limit: 1`, or "
                "choose another disk with `--saves DIR`"
            )


def size_of(count: float) -> str:
    """Bytes for people, such as `12.3 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _check_place(plan: Plan) -> None:
    """Outputs must be writable before anything is spent."""
    folder = _existing(plan.saves)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or _read_only(folder):
        plan.problems.append(f"{plan.saves}: cannot be written; choose another folder with `--saves DIR`")
    links = plan.saves / plan.pipeline.name
    if links.is_symlink():
        plan.problems.append(f"{links}: is a symbolic link, so results would be written elsewhere; remove it")
    elif (other := belongs(links)) is not None and other.is_file() and not _same_file(other, plan.pipeline.path):
        plan.problems.append(
            f"{plan.pipeline.path}: `{links}` holds the stages of `{other}`, a config of the same name; rename one of "
            "the two, or give this one a folder of its own with `--saves DIR`"
        )


def belongs(links: Path) -> Path | None:
    """The config file that a folder of links was made for, or None when that is not known."""
    try:
        known = json.loads((links / BELONGS).read_text(encoding="utf-8"))
        beside = Path(os.path.relpath(os.path.normpath(links.resolve() / known["config"])))
        before = Path(known.get("absolute") or beside)  # where it was before `saves` was moved
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return before if before.exists() and not beside.exists() else beside


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


class _Placer:
    def __init__(self, plan: Plan, fetch: bool, fresh: Collection[str]) -> None:
        self.plan, self.hashes, self.fetch, self.fresh = plan, plan.hashes, fetch, fresh
        self.rows = Rows(plan.saves / ROWS)
        self.found: dict[tuple[str, str | None, str | None], tuple[list[Path], StageError | None]] = {}
        self.with_tools: set[str] = set()
        self.models: dict[str, _Model] = {}
        self.made: dict[str, Step] = {}
        self.bases: dict[str, _Model | None] = {}

    def place(self, stage: Stage) -> None:
        model = self.starting(stage) if _uses_model(stage) else None
        others = self.other_models(stage)
        compared = self.compared(stage)
        self.check(stage, model, compared)
        lacking = len(others) < len(_other_models(stage)) or len(compared) < len(stage.compared)
        if (model is None and _uses_model(stage)) or lacking:
            return  # a problem was noted; what hangs on it cannot be placed
        folders: dict[str, Any] = {setting: other.folders[0] for setting, other in others.items()}
        if compared:
            folders["compare"] = {name: other.folders for name, other in compared.items()}
        if stage.model is not None:
            folders["model"] = model.folders if model is not None else []
        config = _with_made(stage.config.model_copy(update=folders), self.made)
        recipe = self.recipe(stage) | {setting: other.identity for setting, other in others.items()}
        inputs = {name: other.identity for name, other in compared.items()}
        inputs |= {} if model is None else {"model": model.identity}
        content = {"use": stage.use, "recipe": recipe, "inputs": inputs, "versions": versions(stage.use)}
        fingerprint = hashlib.sha256(_canonical(content)).hexdigest()
        folder = self.plan.saves / f"{stage.use}-{fingerprint[:12]}"
        link = self.plan.saves / self.plan.pipeline.name / stage.name
        self.check_own(folder, link)
        left = self.left(stage, folder)
        state, why = self.state(stage, folder, link, content, left)
        sources = [file for source in _sources(stage.config) for file in self.files(source)] + _read_files(stage)
        files = dict(zip(map(str, sources), self.hashes.of(sources), strict=True))
        for other in (model, *others.values(), *compared.values()):
            files |= other.files if other is not None else {}
        fresh = stage.name in self.fresh
        inexact = _trainer.inexact(stage.config) if isinstance(stage.config, _trainer.TrainingConfig) else None
        if inexact is not None and state != "done":
            self.plan.notes.append(f"stage `{stage.name}` does not go on bit for bit after a stop: {inexact}")
        step = Step(
            stage,
            config,
            folder,
            link,
            fingerprint,
            recipe,
            inputs,
            files,
            state,
            why,
            fresh=fresh,
            left=tuple(left),
            data=tuple(self.made[source.path].folder for source in _sources(stage.config) if source.path in self.made),
            inexact=inexact,
            needs=self.needs(stage, [model] if model is not None or not compared else list(compared.values())),
        )
        self.plan.steps.append(step)
        if stage.leaves_data:
            self.made[f"${stage.name}"] = step
        if not stage.leaves_model:
            return
        facts = stage.module.facts(stage.config) if model is None else self.facts_after(stage, model.facts)
        self.models[stage.name] = _Model(step.produces, fingerprint, facts)

    def needs(self, stage: Stage, models: Sequence[_Model | None]) -> _model.Needs:
        """What it needs with the model that takes most."""
        needs = getattr(stage.module, "needs", None)
        found = [needs(stage.config, model.facts if model is not None else None) for model in models] if needs else []
        return max(found, key=lambda one: one.memory, default=_NOTHING)

    def facts_after(self, stage: Stage, facts: _model.Facts) -> _model.Facts:
        after = getattr(stage.module, "facts_after", None)
        template = getattr(stage.config, "template", None) or facts.template
        changed: _model.Facts = after(stage.config, facts) if after else facts
        return replace(changed, source=f"the model of `{stage.name}`", template=template)

    def starting(self, stage: Stage) -> _Model | None:
        return self.model(stage.model, stage) if stage.model is not None else None

    def compared(self, stage: Stage) -> dict[str, _Model]:
        """The models that it compares; one that cannot be placed was noted where that was found."""
        found = {name: self.model(model, stage) for name, model in stage.compared.items()}
        return {name: model for name, model in found.items() if model is not None}

    def model(self, model: str, stage: Stage) -> _Model | None:
        """The model of an earlier stage as `$name`, or one that no stage makes."""
        if model.startswith("$"):
            return self.models.get(model[1:])
        if model not in self.bases:
            self.bases[model] = self.base(model, stage)
        return self.bases[model]

    def other_models(self, stage: Stage) -> dict[str, _Model]:
        """The models that its settings name besides the one it starts from; a missing one is noted."""
        for setting, name in (named := _other_models(stage)).items():
            if name not in self.bases:
                self.bases[name] = self.base(name, stage, setting)
        found = {setting: self.bases[name] for setting, name in named.items()}
        return {setting: model for setting, model in found.items() if model is not None}

    def base(self, model: str, stage: Stage, setting: str = "model") -> _Model | None:
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
            self.problem(stage, setting, str(error))
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
        words = [int(word) if word.isdigit() else word for word in setting.split(".") if word]
        key: Key = ("stages", stage.name, *words)
        from_top = setting == "template" or (setting == "model" and not (stage.model or "").startswith("$"))
        if from_top and key not in document.keys and (setting,) in document.keys:
            key = (setting,)
        self.plan.problems.append(f"{document.value_place(key)}: stage `{stage.name}`: {text}")

    def check(self, stage: Stage, model: _Model | None, compared: Mapping[str, _Model]) -> None:
        """What can be known to fail before the first stage starts: the data, and what the stage itself knows."""
        for source in _sources(stage.config):
            self.check_data(source)
        self.check_held_out(stage)
        self.check_unseen(stage)
        self.check_tools(stage, model)
        if stage.leaves_data and any(self.names(source)[0] in self.with_tools for source in _sources(stage.config)):
            self.with_tools.add(f"${stage.name}")
        check = getattr(stage.module, "check", None)
        if check is not None and (model is not None or not _uses_model(stage)):
            config = stage.config if model is None else stage.config.model_copy(update={"model": model.folders})
            for setting, text in check(config, model.facts if model else None):
                self.problem(stage, setting, text)
            for other in compared.values():
                for setting, text in check(config, other.facts):
                    self.problem(stage, setting, text)

    def files(self, source: _rows.Source) -> list[Path]:
        """Where its data lies; empty when it is not there, which `check_data` tells."""
        return [] if source.path.startswith("$") else self.located(source)[0]

    def located(self, source: _rows.Source) -> tuple[list[Path], StageError | None]:
        key = (source.path, source.subset, source.split)
        if key not in self.found:
            try:
                self.found[key] = _rows.files(source, download=self.fetch), None
            except StageError as error:
                self.found[key] = [], error
        return self.found[key]

    def digest(self, files: list[Path]) -> str | None:
        """One hash for the content of all, in their order."""
        hashes = self.hashes.of(files)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(_canonical(hashes)).hexdigest() if hashes else None

    def check_tools(self, stage: Stage, model: _Model | None) -> None:
        """Rows with tools need a template that writes them."""
        template = getattr(stage.config, "template", None) or (model.facts.template if model else None)
        names = [
            name for source in _sources(stage.config) for name in self.names(source)[:1] if name in self.with_tools
        ]
        if model is not None and template is not None and names:
            trouble = _template.trial_of_tools(template, model.facts.tokenizer)
            if trouble is not None:
                self.problem(stage, "template", f"data `{names[0]}` holds tool calls, and {trouble}")

    def check_held_out(self, stage: Stage) -> None:
        """Rows must be left to train on, where their number is known."""
        if isinstance(stage.config, _trainer.TrainingConfig):
            rows = [self.plan.rows.get(self.names(source)[0], 0) for source in stage.config.data]
            text = _trainer.too_many_held_out(stage.config.eval_size, sum(rows)) if all(rows) else None
            if text is not None:
                self.problem(stage, "eval_size", text)

    def check_unseen(self, stage: Stage) -> None:
        """What models are measured on should not be what they were trained or calibrated with."""
        measured = {self.digest(self.files(source)): source for source in _sources(stage.config) if stage.compared}
        for step in self.plan.steps if measured else ():
            seen = {self.digest(self.files(source)) for source in _sources(step.stage.config)} - {None}
            if step.stage.model is not None and step.stage.leaves_model:
                for source in (measured[digest] for digest in measured.keys() & seen):
                    text = f"`{stage.name}` measures on data `{self.names(source)[0]}`, which `{step.name}` reads too"
                    self.plan.notes.append(f"{text}; its figures say little about new rows")

    def names(self, source: _rows.Source) -> list[str]:
        """What a data source is called in the file; what a stage leaves is called `$stage`."""
        declared = self.plan.pipeline.data.items()
        return [name for name, known in declared if known == source] or [source.path]

    def check_data(self, source: _rows.Source) -> None:
        names = self.names(source)
        if names[0] in self.plan.rows or source.path.startswith("$"):  # what a stage leaves is not made yet
            return
        files, missing = self.located(source)
        if isinstance(missing, _rows.NotFetched):
            note = f"`{source.path}` is not on this machine; `run` fetches it, until then its rows are unchecked"
            self.plan.notes += [note] if note not in self.plan.notes else []
            return
        digest = self.digest(files)
        look = (
            Look(0, 0, [], False, [str(missing)])
            if digest is None
            else self.rows.look(source, digest, _rows.kind(files))
        )
        if look.tools:
            self.with_tools.add(names[0])
        if look.bad and not look.problems:
            note = f"data `{names[0]}`: {look.bad:,} of {look.rows:,} rows are bad and left out"
            self.plan.notes.append(f"{note}: {'; '.join(look.first)}")
        self.plan.rows.update(dict.fromkeys(names, look.rows))
        place = self.plan.pipeline.document.key_place(("data", names[0]))
        self.plan.problems += [f"{place}: data `{names[0]}`: {text}" for text in look.problems]

    def recipe(self, stage: Stage) -> dict[str, Any]:
        """What the stage does, in values that can be compared: settings, and the content of its data by hash."""
        exclude = {"model", *getattr(stage.module, "NO_RECIPE", ())}
        recipe = stage.config.model_dump(mode="json", exclude=exclude)
        if read := _read_files(stage):
            recipe["files"] = self.hashes.of(read)
        if isinstance(recipe.get("trainer"), dict):
            # With the best checkpoint loaded at the end, when to save decides which one that can be.
            best = recipe["trainer"].get("load_best_model_at_end")
            ignored = NO_RESULT - CHOOSE_BEST if best else NO_RESULT
            follows = best or recipe["trainer"].get("lr_scheduler_type") == "reduce_lr_on_plateau"
            if follows and "eval_steps" not in recipe["trainer"]:  # transformers evaluates when it logs
                ignored = ignored - {"logging_steps"}
            recipe["trainer"] = {key: value for key, value in recipe["trainer"].items() if key not in ignored}
        if stage.launch.processes > 1:
            recipe["processes"] = stage.launch.processes  # the order of rows and of sums depends on it
        if recipe.get("early_stopping") is None:  # it came later: records made before still compare equal
            recipe.pop("early_stopping", None)
        recipe.pop("question", None)
        return {key: self.content(value) for key, value in recipe.items()}

    def content(self, value: Any) -> Any:
        """The value with every data file replaced by its hash, so that moving a file changes nothing."""
        if isinstance(value, dict) and {"path", "format"} <= value.keys():
            source = _rows.Source.model_validate(value)
            if source.path in self.made:
                value = {**value, "sha256": f"step:{self.made[source.path].fingerprint}"}
                return {key: entry for key, entry in value.items() if key != "path"}
            pinned = f"hub:{source.path}" if _rows.is_on_hub(source.path) else None
            digest = pinned or self.digest(self.files(source))
            rest = {key: self.content(entry) for key, entry in value.items() if key not in ("path", "others")}
            if value.get("others"):  # what they are called changes nothing
                rest["compared_with"] = [self.content(other) for other in value["others"].values()]
                rest["clean"] = [{**step, "against": None} if "against" in step else step for step in rest["clean"]]
            kind = _rows.kind(self.files(source)) if pinned is None else ""
            return {**rest, **({"kind": kind} if kind else {}), "sha256": digest}
        if isinstance(value, dict):
            return {key: self.content(entry) for key, entry in value.items()}
        return [self.content(entry) for entry in value] if isinstance(value, list) else value

    def check_own(self, folder: Path, link: Path) -> None:
        """Nothing may lead out of `saves`, and nothing of the user's is replaced."""
        for path in (folder, folder.with_name(f"{folder.name}.part")):
            if path.is_symlink():
                self.plan.problems.append(f"{path}: is a symbolic link; results are kept in `saves` itself; remove it")
        if link.exists() and not link.is_symlink():
            self.plan.problems.append(f"{link}: is in the way of a link to the stage's folder; move it")

    def state(
        self, stage: Stage, folder: Path, link: Path, content: Mapping[str, Any], left: list[Path]
    ) -> tuple[State, str]:
        """Whether it will run, and why."""
        fresh = stage.name in self.fresh
        try:
            record = artifact.read(folder)
            previous = artifact.read(link.resolve()) if link.is_symlink() else None
        except NewerRecord as error:
            self.plan.problems.append(str(error))
            return "done", "was made by a later version"
        damage = artifact.damage(folder, record, self.hashes) if record is not None else None
        if record is not None and damage is None and not fresh:
            return "done", "nothing it depends on has changed"
        step = _checkpoint.reached(folder.with_name(f"{folder.name}.part") / "checkpoints")
        if step is not None and not fresh:
            return "resume", f"goes on at step {step}" + self.elsewhere(folder)
        if left and not fresh:
            return "refused", self.refusal(stage, left[-1], content)
        if fresh and (record is not None or step is not None or left):
            return "run", "`--fresh` starts it over"
        if folder.exists():
            return "run", f"its folder is damaged ({damage or 'no record of it can be read'}); it is made anew"
        if previous is None:
            return "run", "has not run yet"
        return "run", "because " + self.changes(stage, previous, content)

    def elsewhere(self, folder: Path) -> str:
        """A warning when the unfinished work was begun on another kind of machine."""
        spec = artifact.begun(folder.with_name(f"{folder.name}.part")) or {}
        if spec.get("gpu", has_gpu()) == has_gpu():
            return ""
        return f"; begun {'with' if spec['gpu'] else 'without'} a GPU, so the weights will not be bit for bit the same"

    def left(self, stage: Stage, folder: Path) -> list[Path]:
        """Unfinished work of this stage of this config with other settings, the one that got farthest last."""
        found = []
        for part in folder.parent.glob(f"{stage.use}-*.part"):
            spec = artifact.begun(part) or {}
            step = _checkpoint.reached(part / "checkpoints")
            ours = (spec.get("of"), spec.get("stage")) == (self.plan.pipeline.name, stage.name)
            if ours and step is not None and part.name != f"{folder.name}.part":
                found.append((int(step.split()[0]), part))
        return [part for _, part in sorted(found)]

    def refusal(self, stage: Stage, part: Path, content: Mapping[str, Any]) -> str:
        return (
            f"was stopped at step {_checkpoint.reached(part / 'checkpoints')}, and now "
            f"{self.changes(stage, artifact.begun(part) or {}, content)}. Undo that to go on from there, or start over "
            f"with `--fresh {stage.name}`"
        )

    def changes(self, stage: Stage, old: Mapping[str, Any], content: Mapping[str, Any]) -> str:
        """What has changed since a record or an unfinished beginning; the stage above, when nothing of its own has."""
        found = list(self.differences(stage, {key: old.get(key) for key in ("recipe", "versions")}, content, ""))
        if found:
            return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
        sources = [model[1:] for model in (stage.model or "", *stage.compared.values())]
        above = next((step for step in self.plan.steps if step.name in sources and step.state != "done"), None)
        return f"`{above.name}` above it will run" if above else "the model it starts from changed"

    def differences(self, stage: Stage, old: Any, new: Any, path: str) -> Iterator[str]:
        """Clauses that name each value which changed, such as `trainer.learning_rate` 5e-05 → 2e-05 (x.yaml:31)."""
        if isinstance(new, dict) and isinstance(old, dict) and "sha256" in new and old.keys() == new.keys():
            yield from self.data_differences(stage, old, new, path)
        elif isinstance(old, dict) and isinstance(new, dict):
            for key in [key for key in {**old, **new} if key not in ("use", "inputs")]:
                below = key if path in ("", "recipe", "versions") else f"{path}.{key}"
                yield from self.differences(stage, old.get(key), new.get(key), below)
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            for before, after in zip(old, new, strict=True):
                yield from self.differences(stage, before, after, path)
        elif old != new and len(str(old)) + len(str(new)) > 60:
            yield f"`{path}` changed{self.place_of(stage, path)}"
        elif old != new:
            yield f"`{path}` {_word(old)} → {_word(new)}{self.place_of(stage, path)}"

    def data_differences(self, stage: Stage, old: Any, new: Any, path: str) -> Iterator[str]:
        """The data file that changed, by its name today and the rows that changed; then how it is read."""
        if old["sha256"] != new["sha256"]:
            files = (source.path for source in _sources(stage.config) if self.content(_as_json(source)) == new)
            yield f"`{next(files)}` changed{self.rows.difference(old, {**old, 'sha256': new['sha256']})}"
        for key in old:
            if key != "sha256":
                yield from self.differences(stage, old[key], new[key], f"{path}.{key}")

    def place_of(self, stage: Stage, path: str) -> str:
        """Where a setting stands, as ` (x.yaml:31)`."""
        document, words = self.plan.pipeline.document, tuple(path.split("."))
        keys = [key for key in (("stages", stage.name, *words), words) if key in document.keys]
        return f" ({':'.join(document.keys[keys[0]].split(':')[:2])})" if keys else ""


def has_gpu() -> bool:
    """Is there an NVIDIA driver? Asked without torch, which would open the GPU."""
    return shutil.which("nvidia-smi") is not None


@dataclass(frozen=True)
class Verdict:
    """What a gate says to a finished step: a sentence with its place, the figure, the bound and the evidence."""

    passed: bool
    text: str


def verdicts(step: Step, plan: Plan) -> list[Verdict]:
    """What the gates of a finished step say. They are judged anew by every run: a bound is no part of a recipe."""
    judge = getattr(step.stage.module, "verdicts", None)
    found = judge(step.stage.config, step.folder) if judge is not None else []
    places = (plan.pipeline.document.value_place(("stages", step.name, "gates", n)) for n in range(len(found)))
    return [Verdict(one.passed, f"{place}: {one.text}") for one, place in zip(found, places, strict=False)]


def begin(step: Step, plan: Plan) -> dict[str, Any]:
    """What the unfinished folder of a step says of itself: enough to run it, and to see later what has changed."""
    return {
        "of": plan.pipeline.name,
        "stage": step.name,
        "use": step.stage.use,
        "config": step.config.model_dump(mode="json"),
        "fingerprint": step.fingerprint,
        "recipe": dict(step.recipe),
        "versions": versions(step.stage.use),
        "stands_on": stands_on(step),
        "gpu": has_gpu(),
    }


def stands_on(step: Step) -> list[str]:
    """Names of the folders in `saves` that it reads: what it starts from, rows, and other models."""
    others = [getattr(step.config, setting) for setting in _other_models(step.stage)]
    folders = [Path(folder).resolve() for folder in (*_folders(step.config), *step.data, *others)]
    return sorted({folder.name for folder in folders if folder.parent == step.folder.parent.resolve()})


def check_unchanged(step: Step, hashes: Hashes, *, read: bool = False) -> None:
    """What it reads must be what the plan hashed: hours may lie between, and the record speaks of that.

    `read` reads every byte again, since a disk can rot without a change of times.

    Raises:
        StageFailed: a file has changed or is gone.
    """
    there = [Path(path) for path in step.files if Path(path).is_file()]
    found = dict(zip(map(str, there), hashes.of(there, read=read), strict=True))
    for path, digest in step.files.items():
        if found.get(str(Path(path))) != digest:
            raise StageFailed(f"stage `{step.name}`: `{path}` changed while the run was going on; run again")
    for folder in [*map(Path, _folders(step.config)), *step.data]:
        if folder.parent != step.folder.parent:
            continue
        record = artifact.read(folder)
        damage = artifact.damage(folder, record, hashes, thorough=read) if record else "its record is gone"
        if damage is not None:
            how = "which it starts from" if str(folder) in getattr(step.config, "model", []) else "which it compares"
            how = "whose rows it reads" if folder in step.data else how
            raise StageFailed(
                f"stage `{step.name}`: `{folder}`, {how}, is damaged ({damage}); "
                "nothing was read from it; run again to make it anew"
            )


def _folders(config: BaseModel) -> list[str]:
    """The folders of the model that it starts from, and of those that it compares."""
    compared = getattr(config, "compare", None)
    named = compared.values() if isinstance(compared, dict) else ()
    return list(dict.fromkeys([*getattr(config, "model", []), *(folder for folders in named for folder in folders)]))


def _read_files(stage: Stage) -> list[Path]:
    """Files that a stage reads besides models and data."""
    read = getattr(stage.module, "read_files", None)
    return list(read(stage.config)) if read is not None else []


def _uses_model(stage: Stage) -> bool:
    """Does the stage read the model it stands on? One that does not need not run again when that changes."""
    uses = getattr(stage.module, "uses_model", None)
    return stage.model is not None and (uses is None or uses(stage.config))


def _other_models(stage: Stage) -> dict[str, str]:
    """Setting → folder or Hub name, for those that the module calls `MODELS`."""
    named = {setting: getattr(stage.config, setting) for setting in getattr(stage.module, "MODELS", ())}
    return {setting: model for setting, model in named.items() if model is not None}


def _with_made(config: Any, made: Mapping[str, Step]) -> Any:
    """The config with the file of rows in place of each `$stage`."""
    if isinstance(config, _rows.Source):
        rows = made.get(config.path)
        return config.model_copy(update={"path": str(rows.folder / _rows.MADE)}) if rows is not None else config
    if isinstance(config, list):
        return [_with_made(item, made) for item in config]
    if isinstance(config, dict):
        return {name: _with_made(item, made) for name, item in config.items()}
    if not isinstance(config, BaseModel):
        return config
    return config.model_copy(
        update={name: _with_made(getattr(config, name), made) for name in type(config).model_fields}
    )


def _sources(config: BaseModel) -> Iterator[_rows.Source]:
    """Every data source in a stage's config, and those that these are compared with."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
            if isinstance(item, _rows.Source):
                yield from (item, *item.others.values())
            elif isinstance(item, BaseModel):
                yield from _sources(item)


def versions(use: str) -> dict[str, str]:
    """Everything installed that computes, and our own stage's version."""
    from pipeline.config import module

    libraries = (*LIBRARIES, *COMPUTES.get(use, []))
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


def _as_json(source: _rows.Source) -> dict[str, Any]:
    return source.model_dump(mode="json")


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


def refuse(plan: Plan) -> None:
    """Stop when unfinished work would be left behind without a word.

    Raises:
        ConfigError: with every stage that this holds for, and the ways out.
    """
    refused = [step for step in plan.steps if step.state == "refused"]
    if refused:
        raise ConfigError(f"{plan.pipeline.path}: stage `{step.name}` {step.why}" for step in refused)
