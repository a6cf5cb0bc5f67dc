"""A typed pipeline in, its steps out: each with a folder, a fingerprint, and the reason why it will run or not."""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.config.document import Key
from pipeline.config.pipeline import Pipeline, StageEntry
from pipeline.errors import ConfigError, NewerRecord
from pipeline.plan.fingerprint import CHOOSE_BEST, NO_RESULT, canonical, installed_versions
from pipeline.plan.step import NO_NEEDS, Plan, State, Step, gate_verdicts, other_models
from pipeline.saves import artifact
from pipeline.saves.content import HASHES, ROWS, Hashes, Look, Rows
from pipeline.saves.links import belongs, same_file
from stages.chat.trial import try_tools
from stages.data import mixture
from stages.data.source import ROWS_FILE, NotFetched, Source, data_files, is_on_hub, kinds_of
from stages.model.device import has_gpu
from stages.model.facts import Facts, Needs, is_hub_name, locate_model, read_facts
from stages.runtime.errors import StageError, nearest
from stages.training.checkpoint import reached_step
from stages.training.settings import TrainingConfig, inexact_resume


@dataclass(frozen=True)
class _Model:
    """A model at some place in the chain: its folders, what identifies its content, what is known of it."""

    folders: list[str]
    identity: str
    facts: Facts
    files: Mapping[str, str] = field(default_factory=dict)


def build_plan(
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
        no = (
            [verdict.text for verdict in gate_verdicts(step, plan) if not verdict.passed]
            if step.state == "done"
            else []
        )
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
                f"{plan.saves}: stage `{step.name}` takes at least {artifact.size_of(step.needs.disk)} of disk, and "
                f"{artifact.size_of(free)} are free; free space, keep fewer checkpoints with "
                "`trainer.save_total_limit: 1`, or choose another disk with `--saves DIR`"
            )


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
    elif (other := belongs(links)) is not None and other.is_file() and not same_file(other, plan.pipeline.path):
        plan.problems.append(
            f"{plan.pipeline.path}: `{links}` holds the stages of `{other}`, a config of the same name; rename one of "
            "the two, or give this one a folder of its own with `--saves DIR`"
        )


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

    def place(self, stage: StageEntry) -> None:
        model = self.starting(stage) if _uses_model(stage) else None
        others = self.other_models(stage)
        compared = self.compared(stage)
        self.check(stage, model, compared)
        lacking = len(others) < len(other_models(stage)) or len(compared) < len(stage.compared)
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
        content = {"use": stage.use, "recipe": recipe, "inputs": inputs, "versions": installed_versions(stage.use)}
        fingerprint = hashlib.sha256(canonical(content)).hexdigest()
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
        inexact = inexact_resume(stage.config) if isinstance(stage.config, TrainingConfig) else None
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

    def needs(self, stage: StageEntry, models: Sequence[_Model | None]) -> Needs:
        """What it needs with the model that takes most."""
        needs = getattr(stage.module, "needs", None)
        found = [needs(stage.config, model.facts if model is not None else None) for model in models] if needs else []
        return max(found, key=lambda one: one.memory, default=NO_NEEDS)

    def facts_after(self, stage: StageEntry, facts: Facts) -> Facts:
        after = getattr(stage.module, "facts_after", None)
        template = getattr(stage.config, "template", None) or facts.template
        changed: Facts = after(stage.config, facts) if after else facts
        return replace(changed, source=f"the model of `{stage.name}`", template=template)

    def starting(self, stage: StageEntry) -> _Model | None:
        return self.model(stage.model, stage) if stage.model is not None else None

    def compared(self, stage: StageEntry) -> dict[str, _Model]:
        """The models that it compares; one that cannot be placed was noted where that was found."""
        found = {name: self.model(model, stage) for name, model in stage.compared.items()}
        return {name: model for name, model in found.items() if model is not None}

    def model(self, model: str, stage: StageEntry) -> _Model | None:
        """The model of an earlier stage as `$name`, or one that no stage makes."""
        if model.startswith("$"):
            return self.models.get(model[1:])
        if model not in self.bases:
            self.bases[model] = self.base(model, stage)
        return self.bases[model]

    def other_models(self, stage: StageEntry) -> dict[str, _Model]:
        """The models that its settings name besides the one it starts from; a missing one is noted."""
        for setting, name in (named := other_models(stage)).items():
            if name not in self.bases:
                self.bases[name] = self.base(name, stage, setting)
        found = {setting: self.bases[name] for setting, name in named.items()}
        return {setting: model for setting, model in found.items() if model is not None}

    def base(self, model: str, stage: StageEntry, setting: str = "model") -> _Model | None:
        """A model that no stage makes: a folder by the hashes of its files, a Hub model by its pinned revision."""
        try:
            folder = locate_model(model, download=self.fetch)
            if folder is None:
                self.plan.notes.append(
                    f"`{model}` is not on this machine; `run` fetches it, until then it is unchecked"
                )
                return _Model([model], f"hub:{model}", Facts(f"`{model}`", {}, known=False))
            facts = read_facts(folder, f"`{model}`")
        except StageError as error:
            self.problem(stage, setting, str(error))
            return None
        if is_hub_name(model):
            return _Model([str(folder)], f"hub:{model}", facts)
        kinds = (".safetensors", ".json", ".jinja", ".model")
        files = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.name not in artifact.NOT_CONTENT)
        content = dict(zip([str(path) for path in files], self.hashes.of(files), strict=True))
        named = {Path(path).name: digest for path, digest in content.items()}
        identity = "folder:" + hashlib.sha256(canonical(named)).hexdigest()
        return _Model([str(folder)], identity, facts, content)

    def problem(self, stage: StageEntry, setting: str, text: str) -> None:
        document = self.plan.pipeline.document
        words = [int(word) if word.isdigit() else word for word in setting.split(".") if word]
        key: Key = ("stages", stage.name, *words)
        from_top = setting == "template" or (setting == "model" and not (stage.model or "").startswith("$"))
        if from_top and key not in document.keys and (setting,) in document.keys:
            key = (setting,)
        self.plan.problems.append(f"{document.value_place(key)}: stage `{stage.name}`: {text}")

    def check(self, stage: StageEntry, model: _Model | None, compared: Mapping[str, _Model]) -> None:
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

    def files(self, source: Source) -> list[Path]:
        """Where its data lies; empty when it is not there, which `check_data` tells."""
        return [] if source.path.startswith("$") else self.located(source)[0]

    def located(self, source: Source) -> tuple[list[Path], StageError | None]:
        key = (source.path, source.subset, source.split)
        if key not in self.found:
            try:
                self.found[key] = data_files(source, download=self.fetch), None
            except StageError as error:
                self.found[key] = [], error
        return self.found[key]

    def digest(self, files: list[Path]) -> str | None:
        """One hash for the content of all, in their order."""
        hashes = self.hashes.of(files)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(canonical(hashes)).hexdigest() if hashes else None

    def check_tools(self, stage: StageEntry, model: _Model | None) -> None:
        """Rows with tools need a template that writes them."""
        template = getattr(stage.config, "template", None) or (model.facts.template if model else None)
        names = [
            name for source in _sources(stage.config) for name in self.names(source)[:1] if name in self.with_tools
        ]
        if model is not None and template is not None and names:
            trouble = try_tools(template, model.facts.tokenizer)
            if trouble is not None:
                self.problem(stage, "template", f"data `{names[0]}` holds tool calls, and {trouble}")

    def check_held_out(self, stage: StageEntry) -> None:
        """Rows must be left to train on, where their number is known."""
        if isinstance(stage.config, TrainingConfig):
            rows = [self.plan.rows.get(self.names(source)[0], 0) for source in stage.config.data]
            text = mixture.too_many_held_out(stage.config.eval_size, sum(rows)) if all(rows) else None
            if text is not None:
                self.problem(stage, "eval_size", text)

    def check_unseen(self, stage: StageEntry) -> None:
        """What models are measured on should not be what they were trained or calibrated with."""
        measured = {self.digest(self.files(source)): source for source in _sources(stage.config) if stage.compared}
        for step in self.plan.steps if measured else ():
            seen = {self.digest(self.files(source)) for source in _sources(step.stage.config)} - {None}
            if step.stage.model is not None and step.stage.leaves_model:
                for source in (measured[digest] for digest in measured.keys() & seen):
                    text = f"`{stage.name}` measures on data `{self.names(source)[0]}`, which `{step.name}` reads too"
                    self.plan.notes.append(f"{text}; its figures say little about new rows")

    def names(self, source: Source) -> list[str]:
        """What a data source is called in the file; what a stage leaves is called `$stage`."""
        declared = self.plan.pipeline.data.items()
        return [name for name, known in declared if known == source] or [source.path]

    def check_data(self, source: Source) -> None:
        names = self.names(source)
        if names[0] in self.plan.rows or source.path.startswith("$"):  # what a stage leaves is not made yet
            return
        files, missing = self.located(source)
        if isinstance(missing, NotFetched):
            note = f"`{source.path}` is not on this machine; `run` fetches it, until then its rows are unchecked"
            self.plan.notes += [note] if note not in self.plan.notes else []
            return
        digest = self.digest(files)
        look = (
            Look(0, 0, [], False, [str(missing)]) if digest is None else self.rows.look(source, digest, kinds_of(files))
        )
        if look.tools:
            self.with_tools.add(names[0])
        if look.bad and not look.problems:
            note = f"data `{names[0]}`: {look.bad:,} of {look.rows:,} rows are bad and left out"
            self.plan.notes.append(f"{note}: {'; '.join(look.first)}")
        self.plan.rows.update(dict.fromkeys(names, look.rows))
        place = self.plan.pipeline.document.key_place(("data", names[0]))
        self.plan.problems += [f"{place}: data `{names[0]}`: {text}" for text in look.problems]

    def recipe(self, stage: StageEntry) -> dict[str, Any]:
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
            source = Source.model_validate(value)
            if source.path in self.made:
                value = {**value, "sha256": f"step:{self.made[source.path].fingerprint}"}
                return {key: entry for key, entry in value.items() if key != "path"}
            pinned = f"hub:{source.path}" if is_on_hub(source.path) else None
            digest = pinned or self.digest(self.files(source))
            rest = {key: self.content(entry) for key, entry in value.items() if key not in ("path", "others")}
            if value.get("others"):  # what they are called changes nothing
                rest["compared_with"] = [self.content(other) for other in value["others"].values()]
                rest["clean"] = [{**step, "against": None} if "against" in step else step for step in rest["clean"]]
            kind = kinds_of(self.files(source)) if pinned is None else ""
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
        self, stage: StageEntry, folder: Path, link: Path, content: Mapping[str, Any], left: list[Path]
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
        step = reached_step(folder.with_name(f"{folder.name}.part") / "checkpoints")
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

    def left(self, stage: StageEntry, folder: Path) -> list[Path]:
        """Unfinished work of this stage of this config with other settings, the one that got farthest last."""
        found = []
        for part in folder.parent.glob(f"{stage.use}-*.part"):
            spec = artifact.begun(part) or {}
            step = reached_step(part / "checkpoints")
            ours = (spec.get("of"), spec.get("stage")) == (self.plan.pipeline.name, stage.name)
            if ours and step is not None and part.name != f"{folder.name}.part":
                found.append((int(step.split()[0]), part))
        return [part for _, part in sorted(found)]

    def refusal(self, stage: StageEntry, part: Path, content: Mapping[str, Any]) -> str:
        return (
            f"was stopped at step {reached_step(part / 'checkpoints')}, and now "
            f"{self.changes(stage, artifact.begun(part) or {}, content)}. Undo that to go on from there, or start over "
            f"with `--fresh {stage.name}`"
        )

    def changes(self, stage: StageEntry, old: Mapping[str, Any], content: Mapping[str, Any]) -> str:
        """What has changed since a record or an unfinished beginning; the stage above, when nothing of its own has."""
        found = list(self.differences(stage, {key: old.get(key) for key in ("recipe", "versions")}, content, ""))
        if found:
            return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
        sources = [model[1:] for model in (stage.model or "", *stage.compared.values())]
        above = next((step for step in self.plan.steps if step.name in sources and step.state != "done"), None)
        return f"`{above.name}` above it will run" if above else "the model it starts from changed"

    def differences(self, stage: StageEntry, old: Any, new: Any, path: str) -> Iterator[str]:
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

    def data_differences(self, stage: StageEntry, old: Any, new: Any, path: str) -> Iterator[str]:
        """The data file that changed, by its name today and the rows that changed; then how it is read."""
        if old["sha256"] != new["sha256"]:
            files = (source.path for source in _sources(stage.config) if self.content(_as_json(source)) == new)
            yield f"`{next(files)}` changed{self.rows.difference(old, {**old, 'sha256': new['sha256']})}"
        for key in old:
            if key != "sha256":
                yield from self.differences(stage, old[key], new[key], f"{path}.{key}")

    def place_of(self, stage: StageEntry, path: str) -> str:
        """Where a setting stands, as ` (x.yaml:31)`."""
        document, words = self.plan.pipeline.document, tuple(path.split("."))
        keys = [key for key in (("stages", stage.name, *words), words) if key in document.keys]
        return f" ({':'.join(document.keys[keys[0]].split(':')[:2])})" if keys else ""


def _read_files(stage: StageEntry) -> list[Path]:
    """Files that a stage reads besides models and data."""
    read = getattr(stage.module, "read_files", None)
    return list(read(stage.config)) if read is not None else []


def _uses_model(stage: StageEntry) -> bool:
    """Does the stage read the model it stands on? One that does not need not run again when that changes."""
    uses = getattr(stage.module, "uses_model", None)
    return stage.model is not None and (uses is None or uses(stage.config))


def _with_made(config: Any, made: Mapping[str, Step]) -> Any:
    """The config with the file of rows in place of each `$stage`."""
    if isinstance(config, Source):
        rows = made.get(config.path)
        return config.model_copy(update={"path": str(rows.folder / ROWS_FILE)}) if rows is not None else config
    if isinstance(config, list):
        return [_with_made(item, made) for item in config]
    if isinstance(config, dict):
        return {name: _with_made(item, made) for name, item in config.items()}
    if not isinstance(config, BaseModel):
        return config
    return config.model_copy(
        update={name: _with_made(getattr(config, name), made) for name in type(config).model_fields}
    )


def _sources(config: BaseModel) -> Iterator[Source]:
    """Every data source in a stage's config, and those that these are compared with."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
            if isinstance(item, Source):
                yield from (item, *item.others.values())
            elif isinstance(item, BaseModel):
                yield from _sources(item)


def _as_json(source: Source) -> dict[str, Any]:
    return source.model_dump(mode="json")


def _word(value: Any) -> str:
    return (
        "not set" if value is None else json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    )
