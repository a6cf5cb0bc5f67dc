"""A YAML file in, a typed pipeline out; or every mistake in it at once, each with its line and the right word."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import settings
from pipeline.config.document import Document, Key, read
from pipeline.config.foreign import NAMES, program_of
from pipeline.config.pipeline import TENSORBOARD, Card, Launch, Pipeline, StageEntry
from pipeline.config.problems import Problems, in_order
from pipeline.config.references import UNKNOWN, References, joined
from pipeline.config.shorthand import Above, at_top, place_top, write_out
from pipeline.errors import ConfigError
from stages import Model, Stage, find, kinds
from stages.chat.template import template_text
from stages.data.cleaning_steps import Contamination
from stages.data.source import Source
from stages.model.references import Role
from stages.runtime.errors import StageError, nearest

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}\Z")  # becomes a folder name
PARTS_OF_A_SEQUENCE = {"cp_size", "sp_size"}  # accelerate's names of context and of sequence parallelism
ROOT = ("model", "template", "data", "stages", "launch", "seed", "question", "card")


def load_config(path: Path, assignments: Sequence[str] = ()) -> Pipeline:
    """Read and check a config; `assignments` are `key.path=value` from the command line.

    Raises:
        ConfigError: with every problem found.
    """
    document = read(path)
    if not isinstance(document.data, dict) or (document.problems and not document.data):
        raise ConfigError(document.problems)
    if "stages" not in document.data and (program := program_of(document.data)) is not None:
        way = f"`pipeline convert {path}` writes it as a config of this program"
        raise ConfigError([f"{path}: this is a config of {NAMES[program]}; {way}"])
    document.drop_extensions()
    for assignment in assignments:
        document.set(assignment)
    document.refuse_variables()
    checker = Checker(path, document)
    pipeline = checker.pipeline()
    if checker.problems.found:
        raise ConfigError(in_order(checker.problems.found))
    return pipeline


class Checker:
    """Goes through a document once and collects what is wrong."""

    def __init__(self, path: Path, document: Document) -> None:
        self.path, self.root = path, document.data
        self.problems = Problems(document)
        self.data: dict[str, Source] = {}
        self.stages: list[StageEntry] = []

    def pipeline(self) -> Pipeline:
        """The pipeline as far as it can be read."""
        root, problems = self.root, self.problems
        allowed = (*ROOT, *at_top())
        for key in root:
            if key not in allowed:
                problems.at_key((key,), f"there is no `{key}` here{nearest(key, allowed)}")
        self._check_type("seed", int, "a whole number")
        self._check_type("question", str, "text")
        self._read_data(root.get("data"))
        template = self._read_template(root.get("template"))
        launch = self._own_launch(root.get("launch") or {}, ("launch",), "`launch`") or Launch()
        card = problems.validated(Card, root.get("card") or {}, ("card",), "`card`") or Card()
        root = place_top({**root, "model": joined(root.get("model"))}, problems)
        written = write_out(root, problems)
        if not written:
            problems.at_key(("stages",), "`stages` names the stages in order, such as `sft: {data: consult}`")
        self.root = root | {"stages": written}
        for name, raw in written.items():
            self._read_stage(name, raw, template, launch)
        self._check_machines()
        first = self.stages[0] if self.stages else None
        if self.root.get("model") is not None and first is not None and first.makes_model:
            text = f"`model` is not used: stage `{first.name}` makes a model; remove one of the two"
            problems.at_key(("model",), text)
        return Pipeline(self.path, problems.document, self.data, self.stages, root.get("question"), card)

    def _check_type(self, key: str, kind: type, wanted: str) -> None:
        value = self.root.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            self.problems.at_value((key,), f"`{key}` is `{settings.shown(value)}`; it wants {wanted}")

    # Data

    def _read_data(self, written: Any) -> None:
        if written is None:
            return
        if not isinstance(written, dict):
            text = "`data` names data sets, such as `consult: {path: consult.json, format: alpaca}`"
            self.problems.at_value(("data",), text)
            return
        for name, raw in written.items():
            key: Key = ("data", name)
            if not NAME.match(name):
                text = f"`{name}` is not a valid data set name; use small letters, digits, `_` and `-`"
                self.problems.at_key(key, text)
            if isinstance(raw, dict) and "others" in raw:
                self.problems.at_key((*key, "others"), f"data `{name}`: there is no setting `others`; remove it")
            source = self.problems.validated(Source, raw, key, f"data `{name}`") or UNKNOWN
            self.data[name] = source
            if source.path.startswith("$"):
                text = f"data `{name}`: `{source.path}` is what a stage leaves; name it in the stage's `data`"
                self.problems.at_value((*key, "path"), text)
        plain = dict(self.data)
        self.data = {name: self._with_others(name, source, plain) for name, source in plain.items()}

    def _with_others(self, name: str, source: Source, plain: Mapping[str, Source]) -> Source:
        """The source with the data sets that its contamination step names."""
        steps = [step for step in source.clean if isinstance(step, Contamination)]
        against = [other for step in steps for other in step.against]
        for other in against:
            text = None
            if other == name:
                text = "`contamination` against itself drops every row"
            elif other not in plain:
                text = f"`contamination` names `{other}`, which is not declared{nearest(other, plain)}"
            if text is not None:
                self.problems.at_key(("data", name, "clean"), f"data `{name}`: {text}")
        others = {other: plain[other] for other in against if other in plain and other != name}
        return source.model_copy(update={"others": others}) if others else source

    def _read_template(self, written: Any, key: Key = ("template",)) -> str | None:
        if written is None:
            return None
        if not isinstance(written, str):
            text = "`template` is a built-in name, a .jinja file or a prompt-template .json file"
            self.problems.at_value(key, text)
            return None
        try:
            return template_text(written)
        except StageError as error:
            self.problems.at_value(key, str(error))
            return None

    # Stages

    def _read_stage(self, name: str, written: Any, template: str | None, launch: Launch) -> None:
        key: Key = ("stages", name)
        label = f"stage `{name}`"
        raw = {} if written is None else written
        if not isinstance(raw, dict):
            self.problems.at_value(key, f"{label} is `{settings.shown(raw)}`; its settings are a mapping")
            return
        raw = dict(raw)
        use = self._kind(name, raw)
        if use is None:
            return
        kind = find(use)
        launch = self._launch(kind, use, raw, launch, key, label)
        fields = kind.config.model_fields
        if "template" in raw and "template" in fields:
            raw["template"] = self._read_template(raw["template"], (*key, "template"))
        self._check_emptied(kind, raw, key, label)
        self._fill_in(fields, raw, template)
        above = Above(self.root["stages"])
        references = References(name, key, self.problems, root=self.root, data=self.data, above=above, done=self.stages)
        references.resolve_data(kind, raw)
        start = references.starting_model(kind, raw)
        references.check_others(kind, raw)
        compared = references.compared(kind, raw)
        starts = kind.setting(Role.START) is not None
        if isinstance(kind.leaves, Model) and not starts and above.models(name):
            text = "makes a new model and would drop the one above it; put it first"
            self.problems.at_key(key, f"{label} {text}")
        self._check_settings(kind, raw, key, label)
        config = self.problems.validated(kind.config, raw, key, label, skip=references.noted, libraries=kind.settings)
        if config is not None:
            self.stages.append(StageEntry(name, use, config, start, launch, compared))

    def _kind(self, name: str, raw: dict[str, Any]) -> str | None:
        """The kind of a stage; None when there is no such kind."""
        key: Key = ("stages", name)
        use = raw.pop("use", name)
        if use in kinds():
            if not NAME.match(name):
                text = f"`{name}` is not a valid stage name; use small letters, digits, `_` and `-`"
                self.problems.at_key(key, text)
            if name == TENSORBOARD:
                text = (
                    f"`{name}` is the folder of TensorBoard's curves in `saves/<config>`; give the stage another name"
                )
                self.problems.at_key(key, text)
            return str(use)
        near = nearest(str(use), kinds())
        if use != name:
            self.problems.at_value((*key, "use"), f"there is no stage `{use}`{near}")
        else:
            text = f"there is no stage `{use}` (a second of a kind is `{name}: {{use: KIND}}`){near}"
            self.problems.at_key(key, text)
        return None

    def _launch(self, kind: Stage[Any], use: str, raw: dict[str, Any], launch: Launch, key: Key, label: str) -> Launch:
        """How the processes of a stage are started."""
        own = raw.pop("launch", None)
        if own is not None:
            launch = self._own_launch(own, (*key, "launch"), f"{label}: `launch`") or launch
            if kind.parallel is None:
                self.problems.at_key((*key, "launch"), f"{label}: `{use}` runs in one process; remove `launch`")
        return launch if kind.parallel is not None else Launch()

    def _own_launch(self, written: Any, key: Key, label: str) -> Launch | None:
        """A `launch` as it is written; None when it is wrong."""
        for word in PARTS_OF_A_SEQUENCE & {*written} if isinstance(written, dict) else ():
            text = f"{label}: `{word}` divides a sequence between processes, which is not supported"
            self.problems.at_key((*key, word), f"{text}; remove it, and lower `trainer.max_length` if memory runs out")
        return self.problems.validated(Launch, written, key, label, skip=PARTS_OF_A_SEQUENCE)

    def _check_machines(self) -> None:
        """A run has one group of machines: stages may use it or not, and cannot have another one."""
        several = [stage for stage in self.stages if stage.launch.machines > 1]
        settings = ("machines", "rank", "rendezvous", "timeout")
        for stage in several[1:]:
            for word in settings:
                first, other = (getattr(one.launch, word) for one in (several[0], stage))
                if first != other:
                    text = f"stage `{stage.name}`: `{word}` is `{other}`, and `{first}` for `{several[0].name}`"
                    way = "the machines of a run meet once, so write the same for all stages that they train"
                    self.problems.at_key(("stages", stage.name, "launch", word), f"{text}; {way}")

    def _check_emptied(self, kind: Stage[Any], raw: Mapping[str, Any], key: Key, label: str) -> None:
        """`lora:` with nothing behind it may mean its defaults, or none; `--set sft.lora=` takes it out."""
        for word in kind.settings:
            by_hand = self.problems.document.key_place((*key, word)).startswith("--set")
            if word in raw and raw[word] is None and not by_hand and kind.config.model_fields[word].default is None:
                text = f"`{word}` is empty; write `{word}: {{}}` for its defaults, or remove it to do without"
                self.problems.at_key((*key, word), f"{label}: {text}")

    def _fill_in(self, fields: Mapping[str, Any], raw: dict[str, Any], template: str | None) -> None:
        """What the top of the file says for every stage that has a setting of the same name."""
        shared = (("template", template), ("seed", self.root.get("seed")), ("question", self.root.get("question")))
        for word, value in shared:
            if word in fields and value is not None and isinstance(value, str | int):
                raw.setdefault(word, value)

    def _check_settings(self, kind: Stage[Any], raw: Mapping[str, Any], key: Key, label: str) -> None:
        """Settings of a library, checked against the installed one."""
        for prefix, reference in kind.settings.items():
            theirs = raw.get(prefix)
            for word, value in theirs.items() if isinstance(theirs, dict) else ():
                text = settings.problem(reference, word, value)
                if text is None:
                    continue
                unknown = word not in settings.settings(reference)
                if unknown and word in kind.config.model_fields:
                    text = f"`{word}` is a setting of the stage; write it beside `{prefix}`"
                report = self.problems.at_key if unknown else self.problems.at_value
                report((*key, prefix, word), f"{label}: {text}")
