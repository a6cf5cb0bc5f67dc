"""A YAML file in, a typed pipeline out; or every mistake in it at once, each with its line and the right word."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.config import settings
from pipeline.config.document import Document, Key, read
from pipeline.config.library_names import MOVED
from pipeline.config.pipeline import Card, Launch, Pipeline, StageEntry, kinds, leaves_model, module
from pipeline.errors import ConfigError
from stages.chat.template import template_text
from stages.data.cleaning_steps import Contamination
from stages.data.source import Source
from stages.model.facts import is_hub_name
from stages.runtime.errors import StageError, nearest

NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}\Z")  # becomes a folder name
ROOT = ("model", "template", "data", "stages", "launch", "seed", "question", "card")
NONE_YET = Source.model_construct(
    path="?", format="text"
)  # stands in for data that could not be read, so that checking goes on


def load_config(path: Path, assignments: Sequence[str] = ()) -> Pipeline:
    """Read and check a config; `assignments` are `key.path=value` from the command line.

    Raises:
        ConfigError: with every problem found.
    """
    document = read(path)
    if not isinstance(document.data, dict) or (document.problems and not document.data):
        raise ConfigError(document.problems)
    for assignment in assignments:
        document.set(assignment)
    return _Checker(path, document).pipeline()


@dataclass
class _Checker:
    """Goes through a document once and collects what is wrong."""

    path: Path
    document: Document
    problems: list[str] = field(default_factory=list)
    data: dict[str, Source] = field(default_factory=dict)
    stages: list[StageEntry] = field(default_factory=list)

    def pipeline(self) -> Pipeline:
        root = self.document.data
        self.problems += self.document.problems
        for key in root:
            if key not in ROOT:
                self.at_key((key,), f"there is no `{key}` here{nearest(key, ROOT)}")
        self.check_type(("seed",), int, "a whole number")
        self.check_type(("question",), str, "text")
        self.read_data(root.get("data"))
        template = self.read_template(root.get("template"))
        launch = self.model(Launch, root.get("launch") or {}, ("launch",), "`launch`") or Launch()
        card = self.model(Card, root.get("card") or {}, ("card",), "`card`") or Card()
        self.place_evaluations(root)
        written = root.get("stages")
        if not isinstance(written, dict) or not written:
            self.at_key(("stages",), "`stages` names the stages in order, such as `sft: {data: consult}`")
            written = {}
        for name, raw in written.items():
            self.read_stage(name, raw, template, launch)
        first = self.stages[0] if self.stages else None
        makes_its_own = first is not None and first.model is None and first.leaves_model
        if root.get("model") is not None and first is not None and makes_its_own:
            self.at_key(("model",), f"`model` is not used: stage `{first.name}` makes a model; remove one of the two")
        if self.problems:
            raise ConfigError(in_order(self.problems))
        return Pipeline(self.path, self.document, self.data, self.stages, root.get("question"), card)

    def at_key(self, key: Key, text: str) -> None:
        self.problems.append(f"{self.document.key_place(key)}: {text}")

    def at_value(self, key: Key, text: str) -> None:
        self.problems.append(f"{self.document.value_place(key)}: {text}")

    def check_type(self, key: tuple[str], kind: type, wanted: str) -> None:
        value = self.document.data.get(key[0])
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            self.at_value(key, f"`{key[0]}` is `{settings.shown(value)}`; it wants {wanted}")

    def read_data(self, written: Any) -> None:
        if written is None:
            return
        if not isinstance(written, dict):
            self.at_value(("data",), "`data` names data sets, such as `consult: {path: consult.json, format: alpaca}`")
            return
        for name, raw in written.items():
            if not NAME.match(name):
                self.at_key(("data", name), f"`{name}` is no name for data; use small letters, digits, `_` and `-`")
            if isinstance(raw, dict) and "others" in raw:
                self.at_key(("data", name, "others"), f"data `{name}`: there is no setting `others`; remove it")
            source = self.model(Source, raw, ("data", name), f"data `{name}`")
            self.data[name] = source or NONE_YET
            if self.data[name].path.startswith("$"):
                text = f"data `{name}`: `{self.data[name].path}` is what a stage leaves; name it in the stage's `data`"
                self.at_value(("data", name, "path"), text)
        plain = dict(self.data)
        self.data = {name: self.with_others(name, source, plain) for name, source in plain.items()}

    def with_others(self, name: str, source: Source, plain: Mapping[str, Source]) -> Source:
        """The source with the data sets that its contamination step names."""
        steps = [step for step in source.clean if isinstance(step, Contamination)]
        against = [other for step in steps for other in step.against]
        for other in against:
            if other == name:
                self.at_key(("data", name, "clean"), f"data `{name}`: `contamination` against itself drops every row")
            elif other not in plain:
                text = f"data `{name}`: `contamination` names `{other}`, which is not declared{nearest(other, plain)}"
                self.at_key(("data", name, "clean"), text)
        others = {other: plain[other] for other in against if other in plain and other != name}
        return source.model_copy(update={"others": others}) if others else source

    def read_template(self, written: Any, key: Key = ("template",)) -> str | None:
        if written is None:
            return None
        if not isinstance(written, str):
            self.at_value(key, "`template` is a built-in name, a .jinja file or a prompt-template .json file")
            return None
        try:
            return template_text(written)
        except StageError as error:
            self.at_value(key, str(error))
            return None

    def place_evaluations(self, root: dict[str, Any]) -> None:
        """`evaluate: …` in a stage that leaves a model is an `evaluate` stage right below it, with these settings."""
        written = root.get("stages")
        if not isinstance(written, dict):
            return
        placed: dict[str, Any] = {}
        models = ["base"] if isinstance(root.get("model"), str) else []
        for name, raw in written.items():
            placed[name] = raw
            use = raw.get("use", name) if isinstance(raw, dict) else name
            if use not in kinds() or not leaves_model(module(use)):
                continue
            if isinstance(raw, dict) and "evaluate" in raw:
                placed[name] = {key: value for key, value in raw.items() if key != "evaluate"}
                below = f"{name}_evaluate"
                if below in written:
                    text = f"stage `{name}`: its `evaluate` becomes the stage `{below}`, which is here already"
                    self.at_key(("stages", name, "evaluate"), text)
                placed[below] = self.evaluation(name, raw, models)
                self.document.move(("stages", name, "evaluate"), ("stages", below))
                if not isinstance(raw["evaluate"], dict):
                    self.document.move(("stages", name, "evaluate"), ("stages", below, "data"))
            models.append(name)
        root["stages"] = placed

    def evaluation(self, name: str, raw: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
        """The settings of the evaluation after a stage: it compares what the stage makes with what it starts from."""
        given, model = raw["evaluate"], raw.get("model")
        start = list(models[-1:]) if model is None else [one for one in models if model == f"${one}"]
        if not isinstance(given, str | list | dict):
            text = f"stage `{name}`: `evaluate` names held-out data, such as `evaluate: consult_held`, or has settings"
            self.at_value(("stages", name, "evaluate"), text)
            given = {"prompts": ["?"]}
        known = given if isinstance(given, dict) else {"data": given}
        return {"use": "evaluate", "compare": [*start, name], **known}

    def read_stage(self, name: str, raw: Any, template: str | None, launch: Launch) -> None:
        key: Key = ("stages", name)
        raw = {} if raw is None else raw
        if not isinstance(raw, dict):
            self.at_value(key, f"stage `{name}` is `{settings.shown(raw)}`; its settings are a mapping")
            return
        raw = dict(raw)
        use = raw.pop("use", name)
        if use not in kinds():
            near = nearest(str(use), kinds())
            if use != name:
                self.at_value((*key, "use"), f"there is no stage `{use}`{near}")
            else:
                self.at_key(key, f"there is no stage `{use}` (a second of a kind is `{name}: {{use: KIND}}`){near}")
            return
        if not NAME.match(name):
            self.at_key(key, f"`{name}` is no name for a stage; use small letters, digits, `_` and `-`")
        kind = module(use)
        own_launch = raw.pop("launch", None)
        if own_launch is not None:
            launch = self.model(Launch, own_launch, (*key, "launch"), f"stage `{name}`: `launch`") or launch
            if not getattr(kind, "PARALLEL", False):
                self.at_key((*key, "launch"), f"stage `{name}`: `{use}` runs in one process; remove `launch`")
        launch = launch if getattr(kind, "PARALLEL", False) else Launch()
        if "template" in raw and "template" in kind.Config.model_fields:
            raw["template"] = self.read_template(raw["template"], (*key, "template"))
        emptied = self.document.key_place((*key, "lora")).startswith("--set")  # a way to take it out
        if "lora" in raw and raw["lora"] is None and not emptied:
            text = "`lora` is empty; write `lora: {}` for its defaults, or remove it to train the whole model"
            self.at_key((*key, "lora"), f"stage `{name}`: {text}")
        self.check_one_process(kind, raw, launch, key, name)
        self.fill_in(kind.Config.model_fields, raw, template)
        self.resolve_data(kind.Config.model_fields, raw, key, name)
        model = self.starting_model(kind.Config.model_fields, raw, key, name)
        compared = self.compared(kind.Config.model_fields, raw, key, name)
        if leaves_model(kind) and "model" not in kind.Config.model_fields and self._models_above(name):
            self.at_key(key, f"stage `{name}` makes a new model and would drop the one above it; put it first")
        self.check_settings(kind, raw, key, name)
        config = self.model(kind.Config, raw, key, f"stage `{name}`", skip=_lists_of_sources(raw))
        if config is not None:
            self.stages.append(StageEntry(name, use, config, model, launch, compared))

    def check_one_process(self, kind: ModuleType, raw: Mapping[str, Any], launch: Launch, key: Key, name: str) -> None:
        """Settings that work in one process only."""
        trainer = raw.get("trainer")
        if launch.processes == 1 or not isinstance(trainer, dict):
            return
        for word in getattr(kind, "ONE_PROCESS", []):
            if trainer.get(word):
                text = f"stage `{name}`: `{word}` works in one process; remove it, or set `launch: {{processes: 1}}`"
                self.at_key((*key, "trainer", word), text)

    def fill_in(self, fields: Mapping[str, Any], raw: dict[str, Any], template: str | None) -> None:
        """What the top of the file says for every stage."""
        root = self.document.data
        shared = (("template", template), ("seed", root.get("seed")), ("question", root.get("question")))
        for field_name, value in shared:
            if field_name in fields and value is not None and isinstance(value, str | int):
                raw.setdefault(field_name, value)

    def resolve_data(self, fields: Mapping[str, Any], raw: dict[str, Any], key: Key, stage: str) -> None:
        """Wherever a stage has `data` or `eval_data`, names become sources, and their weights a list of its own."""
        self.split_weights(fields, raw, key, stage)
        for word in ("data", "eval_data", "prompts"):
            if word in raw and "compare" in fields:
                raw[word] = self.named_sources(raw[word], (*key, word), stage)
            elif word in raw:
                raw[word] = self.sources(raw[word], (*key, word), stage)
        for word, value in raw.items():
            if isinstance(value, dict) and "data" in value and word in fields and word not in ("trainer", "lora"):
                raw[word] = inner = dict(value)
                self.split_weights(getattr(fields[word].annotation, "model_fields", {}), inner, (*key, word), stage)
                inner["data"] = self.sources(inner["data"], (*key, word, "data"), stage)

    def split_weights(self, fields: Mapping[str, Any], raw: dict[str, Any], key: Key, stage: str) -> None:
        """Names with weights become names, and weights beside them."""
        written = raw.get("data")
        if isinstance(written, dict) and written and "weights" in fields:
            raw["data"] = list(written)
            raw["weights"] = self.weights(written, (*key, "data"), stage)
        elif "weights" in raw and "weights" in fields:
            text = f"stage `{stage}`: weights stand beside the names; write `data: {{books: 1, general: 5}}`"
            self.at_key((*key, "weights"), text)

    def named_sources(self, written: Any, key: Key, stage: str) -> Any:
        """Sources by their names, for a stage whose result speaks of them; a list of prompts stays what it is."""
        if key[-1] == "prompts" and isinstance(written, list):
            if wrong := [text for text in written if not isinstance(text, str) or not text.strip()]:
                self.at_value(key, f"stage `{stage}`: a prompt is `{settings.shown(wrong[0])}`; it wants text")
            return [str(text) for text in written]
        if key[-1] == "prompts" and not isinstance(written, str):
            self.at_value(key, f"stage `{stage}`: `prompts` is a name of declared data, or a list of questions")
            return ["?"]
        sources = self.sources(written, key, stage)
        names = [written] if isinstance(written, str) else map(str, written) if isinstance(written, list) else ["?"]
        return dict(zip(names, sources, strict=False))

    def weights(self, written: Mapping[str, Any], key: Key, stage: str) -> list[float]:
        for name, weight in written.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                text = (
                    f"stage `{stage}`: the weight of `{name}` is `{settings.shown(weight)}`; it wants a number above 0"
                )
                self.at_value((*key, name), text)
        return [float(weight) if isinstance(weight, int | float) else 1.0 for weight in written.values()]

    def sources(self, written: Any, key: Key, stage: str) -> list[Source]:
        names = [written] if isinstance(written, str) else written
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
            self.at_value(key, f"stage `{stage}`: `{key[-1]}` is a name of declared data, or a list of names")
            return [NONE_YET]
        places = [self.place_of_name(written, key, index, name) for index, name in enumerate(names)]
        return [self.source(name, place, stage) for name, place in zip(names, places, strict=True)]

    def place_of_name(self, written: Any, key: Key, index: int, name: str) -> str:
        """Where a name stands: as a key with its weight, in a list, or alone."""
        if (*key, name) in self.document.keys:
            return self.document.key_place((*key, name))
        return self.document.value_place((*key, index) if isinstance(written, list) else key)

    def source(self, name: str, place: str, stage: str) -> Source:
        """Declared data, or the rows that a stage above leaves; only the plan knows where these will lie."""
        if not name.startswith("$"):
            if name not in self.data:
                hint = nearest(name, self.data) if self.data else "; declare it at the top under `data:`"
                self.problems.append(f"{place}: stage `{stage}`: no data `{name}` is declared{hint}")
            return self.data.get(name, NONE_YET)
        above = self._names_above(stage)
        if name[1:] not in above:
            below = name[1:] in self.document.data["stages"]
            hint = "; it stands below or is the stage itself" if below else nearest(name[1:], above)
            self.problems.append(f"{place}: stage `{stage}`: no stage `{name[1:]}` is above it{hint}")
        elif name[1:] in self._names_above(stage, lambda kind: not hasattr(kind, "rows_after")):
            leaves = "a model" if name[1:] in self._models_above(stage) else "figures"
            text = f"stage `{stage}`: `{name[1:]}` leaves {leaves}, not rows; name declared data"
            self.problems.append(f"{place}: {text}")
        for done in self.stages:
            if done.name == name[1:] and done.leaves_data:
                kind = done.module.rows_after(done.config)
                return Source.model_validate({"path": name, "format": kind, "encoding": "utf-8", "fill": {}})
        return NONE_YET

    def starting_model(self, fields: Mapping[str, Any], raw: dict[str, Any], key: Key, name: str) -> str | None:
        """Where the stage's model comes from: its own `model`, the stage above, or the top of the file."""
        if "model" not in fields:
            return None
        above = self._models_above(name)
        root = self.document.data.get("model")
        model = raw.get("model", f"${above[-1]}" if above else root)
        place = (*key, "model") if "model" in raw else ("model",)
        if model is None:
            self.at_key(
                key,
                f"stage `{name}` has no model to start from; set `model:` at the top, or put an `init` stage first",
            )
        elif not isinstance(model, str):
            self.at_value(
                place,
                f"`model` is `{settings.shown(model)}`; it is a folder, `org/name@commit` on the Hub, or `$stage`",
            )
        elif model in above and not Path(model).exists():
            self.at_value(place, f"`{model}` is no folder; for the stage of that name write `model: ${model}`")
        elif model.startswith("$") and model[1:] in self._names_above(name) and model[1:] not in above:
            leaves_rows = model[1:] in self._names_above(name, lambda kind: hasattr(kind, "rows_after"))
            hint = "rows, not a model; name it under `data`" if leaves_rows else "figures, not a model; name another"
            self.at_value(place, f"stage `{name}`: `{model[1:]}` leaves {hint}")
        elif model.startswith("$") and model[1:] not in above:
            below = model[1:] in self.document.data["stages"]
            hint = "; it stands below or is the stage itself" if below else nearest(model[1:], above)
            self.at_value(place, f"stage `{name}`: no stage `{model[1:]}` is above it{hint}")
        elif not model.startswith("$") and is_hub_name(model) and not re.search("@[0-9a-f]{40}$", model):
            self.at_value(
                place,
                f"`{model}` is no folder here; for a model on the Hub pin its commit (40 hex digits), "
                f"as `{model.partition('@')[0]}@COMMIT`",
            )
        raw["model"] = model if isinstance(model, str) else ""
        return model if isinstance(model, str) else None

    def compared(self, fields: Mapping[str, Any], raw: dict[str, Any], key: Key, name: str) -> dict[str, str]:
        """The models that a stage compares by their names; all there are unless `compare` names some."""
        if "compare" not in fields:
            return {}
        root = self.document.data.get("model")
        known = {"base": root} if isinstance(root, str) else {}
        known |= {above: f"${above}" for above in self._models_above(name)}
        written = raw.get("compare", list(known))
        names = [written] if isinstance(written, str) else written
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            self.at_value((*key, "compare"), f"stage `{name}`: `compare` is a list of stages above, such as [sft, dpo]")
            names = []
        elif not names:
            self.at_key(key, f"stage `{name}` has no model to evaluate; set `model:` at the top, or put it below one")
        for index, one in enumerate(names):
            place = self.document.value_place((*key, "compare", index))
            if one in names[:index]:
                self.problems.append(f"{place}: stage `{name}`: `{one}` is here twice")
            elif one not in known:
                self.problems.append(f"{place}: stage `{name}`: {self.no_such_model(one, name)}{nearest(one, known)}")
        raw["compare"] = [one for one in names if one in known]
        return {one: known[one] for one in raw["compare"]}

    def no_such_model(self, name: str, stage: str) -> str:
        if name == "base":
            return "`base` is the `model:` at the top, and there is none"
        below = name in self.document.data["stages"] and name not in self._names_above(stage)
        where = "stands below or is the stage itself" if below else "is no stage above that leaves a model"
        return f"`{name}` {where}"

    def _names_above(self, name: str, wanted: Callable[[ModuleType], bool] = lambda _: True) -> list[str]:
        """The stages above, or those of them whose kind is `wanted`; of one that is no kind it is not known."""
        written = self.document.data["stages"]
        names = list(written)[: list(written).index(name)]
        uses = {
            other: (written[other] or {}).get("use", other) if isinstance(written[other] or {}, dict) else other
            for other in names
        }
        return [other for other, use in uses.items() if use not in kinds() or wanted(module(use))]

    def _models_above(self, name: str) -> list[str]:
        """The stages above that leave a model: what is below another one starts from the model above it."""
        return self._names_above(name, leaves_model)

    def check_settings(self, kind: ModuleType, raw: Mapping[str, Any], key: Key, name: str) -> None:
        """Settings that belong to a library, checked against the installed one."""
        own = set(kind.Config.model_fields)
        for prefix, reference in getattr(kind, "SETTINGS", {}).items():
            theirs = raw.get(prefix) if prefix else {word: raw[word] for word in raw if word not in own}
            if not isinstance(theirs, dict):
                continue
            for word, value in theirs.items():
                where = (*key, prefix, word) if prefix else (*key, word)
                text = settings.problem(reference, word, value)
                if text and not prefix and (close := get_close_matches(word, own, n=1, cutoff=0.75)):
                    text = f"there is no setting `{word}`; did you mean `{close[0]}`?"
                if text:
                    unknown = word not in settings.settings(reference)
                    report = self.at_key if unknown else self.at_value
                    report(where, f"stage `{name}`: {text}")

    def model(self, kind: Any, raw: Any, key: Key, label: str, skip: Sequence[str] = ()) -> Any:
        """`raw` as a pydantic model, or None and its problems noted."""
        if not isinstance(raw, dict):
            self.at_value(key, f"{label} is `{settings.shown(raw)}`; it wants a mapping")
            return None
        try:
            return kind.model_validate(raw, strict=True)
        except ValidationError as error:
            for found in error.errors():
                if (found["loc"] and found["loc"][0] not in skip) or not found["loc"]:
                    self.note(found, kind, key, label)
            return None

    def note(self, found: Any, kind: Any, key: Key, label: str) -> None:
        location = tuple(part for part in found["loc"] if isinstance(part, str | int))
        where, word = (*key, *location), str(location[-1]) if location else ""
        if found["type"] == "extra_forbidden":
            hint = _library_setting(kind, word) if len(location) == 1 else None
            self.at_key(where, f"{label} has no setting `{word}`{hint or nearest(word, _fields(kind, location))}")
        elif found["type"] == "missing":
            self.at_key(where, f"{label} needs `{'.'.join(map(str, location))}`")
        elif found["type"] == "value_error":
            report = self.at_value if isinstance(where[-1], int) else self.at_key
            report(where, f"{label}: {found['ctx']['error']}")
        else:
            wanted = _wanted(found)
            hint = ""
            if found["type"] == "literal_error":
                hint = nearest(str(found["input"]), re.findall(r"'([^']+)'", found["ctx"]["expected"]))
            self.at_value(
                where, f"{label}: `{word}` is `{settings.shown(found['input'])}`{hint or f'; it wants {wanted}'}"
            )


def _library_setting(kind: Any, word: str) -> str | None:
    """Where a word belongs that is a library's setting, or another tool's name for one."""
    for prefix, reference in getattr(sys.modules[kind.__module__], "SETTINGS", {}).items():
        if prefix and word in settings.settings(reference):
            return f"; it belongs under `{prefix}:`"
        moved = MOVED.get(reference.rpartition(":")[2], {}).get(word)
        if moved is not None:
            return f"; it is now {moved}" + (f" under `{prefix}:`" if re.fullmatch("`[a-z_]+`", moved) else "")
    return None


def _lists_of_sources(raw: Mapping[str, Any]) -> list[str]:
    """Keys whose problems were noted when their names were looked up."""
    lists = {key: list(value.values()) if isinstance(value, dict) else value for key, value in raw.items()}
    return [key for key, value in lists.items() if isinstance(value, list) and NONE_YET in value]


def _fields(kind: Any, location: Sequence[str | int]) -> list[str]:
    """The fields a misspelt key could have meant: those of the model that it stands in."""
    for part in location[:-1]:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        annotation = get_args(annotation)[0] if get_origin(annotation) is list else annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            kind = annotation
    return list(kind.model_fields)


def _wanted(found: Any) -> str:
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
    kinds |= {"list": "a list", "dict": "a mapping", "model": "a mapping"}
    for word, text in kinds.items():
        if found["type"].startswith(f"{word}_") and "pattern" not in found["type"]:
            return text
    if found["type"] == "string_pattern_mismatch":
        return f"text that matches `{found['ctx']['pattern']}`"
    message = str(found["msg"]).removeprefix("Input should be ")
    return f"a number {message}" if found["type"].startswith(("greater", "less")) else message[0].lower() + message[1:]


def in_order(problems: Sequence[str]) -> list[str]:
    """By line, as a reader of the file meets them; each once."""

    def line(problem: str) -> tuple[int, int]:
        match = re.search(r":(\d+):(\d+): ", problem)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    return sorted(dict.fromkeys(problems), key=line)
