"""A typed pipeline in, its steps out: each with a folder, a fingerprint, and the reason why it will run or not."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import secret
from pipeline.config.document import Key
from pipeline.config.pipeline import Pipeline, StageEntry
from pipeline.errors import ConfigError
from pipeline.plan import launching
from pipeline.plan.datasets import DataSets, sources_in
from pipeline.plan.fingerprint import digest, installed_versions, settings_of
from pipeline.plan.history import History
from pipeline.plan.lengths import cut_rows
from pipeline.plan.models import Models, PlacedModel
from pipeline.plan.step import Plan, Step, gate_verdicts
from pipeline.plan.templates import FIXED_DATE, Templates
from pipeline.saves import artifact
from pipeline.saves.links import belongs, same_file
from stages import Scorer
from stages.chat.encoding import refused_rows, too_many
from stages.chat.trial import has_clock
from stages.data.source import ROWS_FILE
from stages.model.facts import NO_MODEL, Facts, Needs
from stages.model.inputs import Inputs
from stages.model.tokens import check_rows
from stages.runtime.errors import Problem, nearest
from stages.runtime.figures import size_of
from stages.runtime.hashes import HASHES, Hashes


def build_plan(
    pipeline: Pipeline,
    saves: Path,
    *,
    fetch: bool = False,
    online: bool = False,
    until: str | None = None,
    fresh: Collection[str] = (),
    ignore_gates: bool = False,
) -> Plan:
    """Place every stage, up to `until`, and check each; `fetch` allows downloads, stages in `fresh` start over.

    With `online` a model that is on the Hub alone is checked by its small files and the headers of its weights.
    With `ignore_gates` a failed gate is reported and does not stop the run.

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
    placer = Placer(plan, fresh, fetch=fetch, online=online)
    for entry in pipeline.stages[: last + 1]:
        placer.place(entry)
    _check_disk(plan)
    for step in plan.steps:
        verdicts = gate_verdicts(step, plan) if step.state == "done" else []
        failed = [verdict.text for verdict in verdicts if not verdict.passed]
        plan.notes += [f"a gate of `{step.name}` failed, and `run` stops after it: {text}" for text in failed]
    plan.hashes.save()
    return plan


def _check_disk(plan: Plan) -> None:
    """A run that is sure to fill the disk is reported before anything is spent.

    Every stage leaves its result, and while one works, its checkpoints are there too.
    """
    free, kept = shutil.disk_usage(_existing(plan.saves)).free, 0
    for step in plan.steps:
        if step.state == "done":
            continue
        wanted = kept + step.needs.disk - artifact.size(step.part)
        if wanted > free:
            taken = f"takes at least {size_of(step.needs.disk)} of disk"
            taken += f" after {size_of(kept)} of the stages before it" if kept else ""
            way = ", keep fewer checkpoints with `trainer.save_total_limit: 1`" if step.entry.training else ""
            plan.problems.append(
                f"{plan.saves}: stage `{step.name}` {taken}, and {size_of(free)} are free; free space{way}, "
                "or choose another disk with `--saves DIR`"
            )
            return
        kept += step.needs.left


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
    elif links.exists() and not links.is_dir():
        plan.problems.append(f"{links}: is in the way of the folder with the links to the stages; move it")
    elif (other := belongs(links)) is not None and other.is_file() and not same_file(other, plan.pipeline.path):
        plan.problems.append(
            f"{plan.pipeline.path}: `{links}` holds the stages of `{other}`, a config of the same name; rename one of "
            "the two, or give this one a folder of its own with `--saves DIR`"
        )


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


class Placer:
    """Places one stage after the other."""

    def __init__(self, plan: Plan, fresh: Collection[str], *, fetch: bool, online: bool) -> None:
        self.plan, self.fresh = plan, fresh
        self.rows_checked = set[str]()
        self.models = Models(plan.hashes, plan.notes, fetch=fetch, online=online)
        self.data, self.templates = DataSets(plan, fetch=fetch), Templates()
        self.history = History(plan, self.data)

    def place(self, entry: StageEntry) -> None:
        """Add the step of a stage to the plan, unless a model that it reads could not be found."""
        start = self.find(entry, "model", entry.start) if entry.reads_model else None
        others = self.find_all(entry, entry.others)
        compared = self.find_all(entry, entry.compared, setting="model")
        self.check(entry, start, compared)
        lacking = len(others) < len(entry.others) or len(compared) < len(entry.compared)
        if lacking or (start is None and entry.reads_model):
            return  # the problem is already reported; what depends on it cannot be placed
        recipe = self.recipe(entry) | {setting: model.identity for setting, model in others.items()}
        identities = {name: model.identity for name, model in compared.items()}
        identities |= {} if start is None else {"model": start.identity}
        content = {"recipe": recipe, "inputs": identities, "versions": installed_versions(entry.use)}
        fingerprint = digest({"use": entry.use, **content})
        folder = self.plan.saves / f"{entry.use}-{fingerprint[:12]}"
        link = self.plan.saves / self.plan.pipeline.name / entry.name
        self.check_own(folder, link)
        self.check_secrets(entry, recipe, start)
        left, fresh = self.history.left(entry, folder), entry.name in self.fresh
        state, why = self.history.state(entry, folder, link, content, left, fresh=fresh)
        models = [start] if start is not None else list(compared.values())
        step = Step(
            entry,
            self.inputs(entry, start, others, compared),
            folder,
            link,
            fingerprint,
            recipe,
            identities,
            self.files(entry, [*models, *others.values()]),
            state,
            why,
            fresh=fresh,
            left=tuple(left),
            inexact=self.inexact(entry, state),
            needs=self.needs(entry, models),
            facts=start.facts if start is not None else NO_MODEL,
        )
        self.plan.steps.append(step)
        self.note(step, start)
        self.keep(step, start)

    def find(self, entry: StageEntry, setting: str, reference: str | None) -> PlacedModel | None:
        """The model of a reference; None when there is none, or when it could not be resolved."""
        if reference is None:
            return None
        return self.models.find(reference, lambda text: self.problem(entry, setting, text))

    def find_all(
        self, entry: StageEntry, references: Mapping[str, str], setting: str | None = None
    ) -> dict[str, PlacedModel]:
        """Models by name; models that could not be resolved are skipped, the problem is already reported."""
        found = {name: self.find(entry, setting or name, reference) for name, reference in references.items()}
        for name, model in found.items() if setting is None else ():
            if model is not None and len(model.folders) > 1:
                text = f"{model.facts.source} is a LoRA adapter, and `{name}` is a whole model; merge it and name that"
                self.problem(entry, name, text)
                found[name] = None
        return {name: model for name, model in found.items() if model is not None}

    def inputs(
        self,
        entry: StageEntry,
        start: PlacedModel | None,
        others: Mapping[str, PlacedModel],
        compared: Mapping[str, PlacedModel],
    ) -> Inputs:
        """What the references of a stage became."""
        made = {source.path: self.data.made.get(source.path) for source in sources_in(entry.config)}
        return Inputs(
            model=start.folders if start is not None else [],
            compared={name: model.folders for name, model in compared.items()},
            others={setting: model.folders[0] for setting, model in others.items()},
            rows={name: str(step.folder / ROWS_FILE) for name, step in made.items() if step is not None},
        )

    def keep(self, step: Step, start: PlacedModel | None) -> None:
        """Let later stages refer to what a step leaves."""
        if step.entry.leaves_rows:
            self.data.made[f"${step.name}"] = step
        before = start.facts if start is not None else NO_MODEL
        if step.entry.leaves_model:
            facts = step.stage.facts(step.entry.config, before)
            if start is not None:
                template = step.entry.template or before.template
                facts = replace(facts, source=f"the model of `{step.name}`", template=template)
            files = start.files if start is not None and step.entry.leaves_adapter else {}  # those of its base
            self.models.made[step.name] = PlacedModel(step.produces, step.fingerprint, facts, files)
        elif isinstance(step.stage.leaves, Scorer):
            facts = replace(before, source=f"the reward model of `{step.name}`")
            self.models.made[step.name] = PlacedModel([str(step.folder)], step.fingerprint, facts)

    def needs(self, entry: StageEntry, models: list[PlacedModel]) -> Needs:
        """What it needs with the model that takes most."""
        if entry.stage.needs is None:
            return Needs(0, 0)
        facts = [model.facts for model in models] or [NO_MODEL]
        return max((entry.stage.needs(entry.config, one) for one in facts), key=lambda needs: needs.memory)

    def inexact(self, entry: StageEntry, state: str) -> str | None:
        """Why resuming is not bit-exact; noted in the plan when the stage will run."""
        training = entry.training
        reason = training.inexact if training is not None else None
        if reason is not None and state != "done":
            self.plan.notes.append(f"stage `{entry.name}` does not go on bit for bit after a stop: {reason}")
        return reason

    def note(self, step: Step, start: PlacedModel | None) -> None:
        """Note what the stage itself has to say of its settings and its model, if it will run."""
        if step.state != "done":
            texts = step.stage.notes(step.entry.config, start.facts if start is not None else NO_MODEL)
            texts = [*texts, *self.data.too_few_held_out(step.entry), *self.cut_rows(step, start)]
            self.plan.notes += [f"stage `{step.name}`: {text}" for text in texts]

    def cut_rows(self, step: Step, start: PlacedModel | None) -> Iterator[str]:
        """What is known of rows that are longer than `max_length`."""
        if step.entry.training is not None and start is not None:
            template, folder = step.entry.template or start.facts.template, self.plan.tokenizer_folder(step)
            yield from cut_rows(step.entry.training, template, start.facts, folder, self.data)

    def files(self, entry: StageEntry, models: list[PlacedModel]) -> dict[str, str]:
        """Path → sha256 of what a stage reads besides the folders of other stages."""
        files = [file for source in sources_in(entry.config) for file in self.data.files(source)]
        files += entry.stage.reads_files(entry.config)
        found = dict(zip(map(str, files), self.plan.hashes.of(files), strict=True))
        for model in models:
            found |= model.files
        return found

    def recipe(self, entry: StageEntry) -> dict[str, Any]:
        """What a stage does, in values that can be compared: settings, and the content of its data by hash."""
        settings = settings_of(entry)
        if read := entry.stage.reads_files(entry.config):
            settings["files"] = self.plan.hashes.of(read)
        return {key: self.data.content(value) for key, value in settings.items()}

    # Checks

    def problem(self, entry: StageEntry, setting: str, text: str) -> None:
        """Note what is wrong with a setting, at its place in the file or at the top of the file."""
        document = self.plan.pipeline.document
        words = [int(word) if word.isdigit() else word for word in setting.split(".") if word]
        key: Key = ("stages", entry.name, *words)
        from_top = setting == "template" or setting.startswith("launch.")
        from_top = from_top or (setting == "model" and not (entry.start or "").startswith("$"))
        if from_top and key not in document.keys and tuple(words) in document.keys:
            key = tuple(words)
        self.plan.problems.append(f"{document.value_place(key)}: stage `{entry.name}`: {text}")

    def check(self, entry: StageEntry, start: PlacedModel | None, compared: Mapping[str, PlacedModel]) -> None:
        """What can be known to fail before the first stage starts: the data, and what the stage itself knows."""
        sources = list(sources_in(entry.config))
        for source in sources:
            self.data.check(source)
        self.check_held_out(entry)
        self.check_unseen(entry)
        for setting, text in launching.problems(entry):
            self.problem(entry, setting, text)
        if entry.leaves_rows:
            self.data.keep_shapes(f"${entry.name}", sources)
        found = entry.stage.check(entry.config)
        models = [start] if start is not None else list(compared.values())
        for model in models:
            found = found + entry.stage.check_model(entry.config, model.facts)
        if not any(setting in ("", "template") for setting, _ in found):
            for model in models:
                self.check_shapes(entry, model.facts)
        found = found + self.check_rows(entry, start, compared)
        for setting, text in found:
            self.problem(entry, setting, text)

    def check_rows(
        self, entry: StageEntry, start: PlacedModel | None, compared: Mapping[str, PlacedModel]
    ) -> list[Problem]:
        """The tokenizer of a model that no stage made may have more tokens than the model reads; told once."""
        models = {entry.compared[name]: model for name, model in compared.items()}
        models |= {entry.start: start} if start is not None and entry.start is not None else {}
        names = [name for name in models if not name.startswith("$") and name not in self.rows_checked]
        self.rows_checked |= set(names)
        leaves = [entry.stage.facts(entry.config, models[name].facts) for name in names]
        return [problem for facts in leaves for problem in check_rows(facts)]

    def check_shapes(self, entry: StageEntry, facts: Facts) -> None:
        """The chat template must be usable for the rows; those that it is not usable for are bad ones."""
        template = entry.template or facts.template
        if template is None or not facts.known or not entry.stage.renders(entry.config):
            return
        draw = entry.training.draw if entry.training is not None else None
        sources = [*draw.sources, *draw.eval_data] if draw is not None else sources_in(entry.config)
        for name, source in {self.data.names(source)[0]: source for source in sources}.items():
            shapes = self.data.shapes.get(name)
            if shapes is None:
                continue
            rows = self.plan.rows.get(name, shapes.rows)
            allowed = source.max_dropped if name in self.plan.rows else 1.0  # which rows a stage leaves is not known
            if has_clock(template) and FIXED_DATE not in self.plan.notes:
                self.plan.notes.append(FIXED_DATE)
            found = self.templates.refusals(template, facts, shapes, answered=draw is not None)
            if found.marks is not None:
                self.problem(entry, "template", found.marks)
            text = refused_rows(found.rows, rows, allowed, found.why, data=name)
            if too_many(found.rows, rows, allowed):
                self.problem(entry, "template", text)
            elif found.rows:
                self.plan.notes.append(f"stage `{entry.name}`: {text}")

    def check_held_out(self, entry: StageEntry) -> None:
        """Rows must be left to train on, where their number is known."""
        training = entry.training
        if training is not None:
            rows = [self.plan.rows.get(self.data.names(source)[0], 0) for source in training.draw.sources]
            text = training.draw.too_many_held_out(sum(rows)) if all(rows) else None
            if text is not None:
                self.problem(entry, "eval_size", text)

    def check_unseen(self, entry: StageEntry) -> None:
        """What models are measured on should not be what they were trained or calibrated with."""
        read = partial(sources_in, others=False)  # cleaning with `against: [held]` keeps those rows out
        measured = {self.data.digest(source): source for source in read(entry.config) if entry.compared}
        for step in self.plan.steps if measured else ():
            seen = {self.data.digest(source) for source in read(step.entry.config)} - {None}
            if step.entry.start is not None and step.entry.leaves_model:
                for source in (measured[known] for known in measured.keys() & seen):
                    name = self.data.names(source)[0]
                    text = f"`{entry.name}` measures on data `{name}`, which `{step.name}` reads too"
                    self.plan.notes.append(f"{text}; its figures say little about new rows")

    def check_secrets(self, entry: StageEntry, recipe: Mapping[str, Any], start: PlacedModel | None) -> None:
        """Neither settings nor the tokenizer, which go into the artifact, may hold a secret of the environment."""
        facts = start.facts if start is not None else NO_MODEL
        texts = {
            "its settings hold": json.dumps(recipe, ensure_ascii=False),
            f"the chat template of {facts.source} holds": facts.template or "",
            f"the tokenizer of {facts.source} holds": facts.tokens + json.dumps(facts.tokenizer, ensure_ascii=False),
        }
        for what, text in texts.items():
            if (name := secret.found_in(text)) is not None:
                way = f"take it out, or `unset {name}` if it is not a secret"
                self.problem(entry, "", f"{what} the value of the environment variable {name}; {way}")
                return

    def check_own(self, folder: Path, link: Path) -> None:
        """Nothing may lead out of `saves`, and nothing of the user's is replaced."""
        for path in (folder, folder.with_name(f"{folder.name}.part")):
            if path.is_symlink():
                self.plan.problems.append(f"{path}: is a symbolic link; results are kept in `saves` itself; remove it")
        if link.exists() and not link.is_symlink():
            self.plan.problems.append(f"{link}: is in the way of a link to the stage's folder; move it")
