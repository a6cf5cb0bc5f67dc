"""References in the settings of a stage: names of data become sources, and models are looked up among those above."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import settings
from pipeline.config.document import Key
from pipeline.config.pipeline import StageEntry
from pipeline.config.problems import Problems
from pipeline.config.shorthand import Above
from stages import Model, Report, Rows, Scorer, Stage
from stages.data.mixture import Mixture
from stages.data.source import Source
from stages.model.facts import CHAIN, chain_of, is_hub_name
from stages.model.references import Role
from stages.runtime.errors import nearest

UNKNOWN = Source.model_construct(path="?", format="text")  # in the place of data that could not be read
LEAVES = {Model: "a model", Scorer: "a reward model", Rows: "rows", Report: "figures"}


class References:
    """Looks up what the settings of one stage name; what is wrong goes into `problems`."""

    def __init__(
        self,
        stage: str,
        key: Key,
        problems: Problems,
        *,
        root: Mapping[str, Any],
        data: Mapping[str, Source],
        above: Above,
        done: Sequence[StageEntry],
    ) -> None:
        self.stage, self.key, self.problems = stage, key, problems
        self.root, self.data, self.above, self.done = root, data, above, done
        self.noted: set[str] = set()
        """Settings whose problems were noted here."""

    def at_key(self, path: Sequence[str | int], text: str) -> None:
        self.noted.add(str(path[0]))
        self.problems.at_key((*self.key, *path), f"stage `{self.stage}`: {text}")

    def at_value(self, path: Sequence[str | int], text: str) -> None:
        self.noted.add(str(path[0]))
        self.problems.at_value((*self.key, *path), f"stage `{self.stage}`: {text}")

    # Data

    def resolve_data(self, kind: Stage[Any], raw: dict[str, Any]) -> None:
        """Put sources in the place of names, wherever the types of the settings say that they are data."""
        for path, role in kind.roles.items():
            inner: Any = raw
            for word in path[:-1]:
                inner[word] = dict(inner[word]) if isinstance(inner.get(word), dict) else None
                inner = inner[word]
                if inner is None:
                    break
            if inner is None:
                self._restore(path, raw)
                continue
            self._resolve(role, inner, path)

    def _restore(self, path: tuple[str, ...], raw: dict[str, Any]) -> None:
        """A setting that is no mapping, or missing, stays as it is written: its own check names what is wrong."""
        written = self.root["stages"].get(self.stage) or {}
        if path[0] in written:
            raw[path[0]] = written[path[0]]
        else:
            raw.pop(path[0], None)

    def _resolve(self, role: Role, inner: dict[str, Any], path: tuple[str, ...]) -> None:
        word = path[-1]
        if role is Role.MIXTURE and "weights" in inner:
            del inner["weights"]
            text = "weights stand beside the names; write `data: {books: 1, general: 5}`"
            self.at_key((*path[:-1], "weights"), text)
        if word not in inner:
            return
        written = inner[word]
        if role is Role.MIXTURE:
            inner[word] = self.mixture(written, path)
        elif role is Role.SOURCES:
            inner[word] = self.sources(written, path)
        elif role is Role.PROMPTS:
            inner[word] = self.prompts(written, path)
        elif role is Role.NAMED:
            inner[word] = self.named(written, path)

    def mixture(self, written: Any, path: Sequence[str]) -> Mixture:
        """Names, or names with weights."""
        if not isinstance(written, dict) or not written:
            return Mixture(sources=self.sources(written, path))
        for name, weight in written.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                text = f"the weight of `{name}` is `{settings.shown(weight)}`; it wants a number above 0"
                self.at_value((*path, name), text)
        weights = [float(weight) if isinstance(weight, int | float) else 1.0 for weight in written.values()]
        places = [self.problems.document.key_place((*self.key, *path, name)) for name in written]
        found = [self.source(name, place, path) for name, place in zip(written, places, strict=True)]
        return Mixture(sources=found, weights=weights)

    def named(self, written: Any, path: Sequence[str]) -> dict[str, Source]:
        """Sources by their names, for a stage whose result speaks of them."""
        names = [written] if isinstance(written, str) else map(str, written) if isinstance(written, list) else ["?"]
        return dict(zip(names, self.sources(written, path), strict=False))

    def prompts(self, written: Any, path: Sequence[str]) -> dict[str, Source] | list[str]:
        """The name of conversations, or a list of questions."""
        if isinstance(written, str):
            return self.named(written, path)
        if not isinstance(written, list):
            self.at_value(path, "`prompts` is a name of declared data, or a list of questions")
            return ["?"]
        if wrong := [text for text in written if not isinstance(text, str) or not text.strip()]:
            self.at_value(path, f"a prompt is `{settings.shown(wrong[0])}`; it wants text")
        return [str(text) for text in written]

    def sources(self, written: Any, path: Sequence[str]) -> list[Source]:
        """The sources of a name, or of a list of names."""
        names = [written] if isinstance(written, str) else written
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
            self.at_value(path, f"`{path[-1]}` is a name of declared data, or a list of names")
            return [UNKNOWN]
        listed = isinstance(written, list)
        document = self.problems.document
        places = [
            document.value_place((*self.key, *path, index) if listed else (*self.key, *path))
            for index in range(len(names))
        ]
        return [self.source(name, place, path) for name, place in zip(names, places, strict=True)]

    def source(self, name: str, place: str, path: Sequence[str]) -> Source:
        """Declared data, or the rows that a stage above leaves; where these will be, only the plan knows."""
        if not name.startswith("$"):
            if name not in self.data:
                hint = nearest(name, self.data) if self.data else "; declare it at the top under `data:`"
                self._at_name(place, path, f"no data `{name}` is declared{hint}")
            return self.data.get(name, UNKNOWN)
        problem = self._not_above(name[1:]) or self._leaves_other(name[1:], Rows, "rows", "name declared data")
        if problem is not None:
            self._at_name(place, path, problem)
        for entry in self.done:
            leaves = entry.stage.leaves
            if entry.name == name[1:] and isinstance(leaves, Rows):
                form = leaves.format(entry.config)
                return Source.model_validate({"path": name, "format": form, "encoding": "utf-8", "fill": {}})
        return UNKNOWN

    def _at_name(self, place: str, path: Sequence[str], text: str) -> None:
        self.noted.add(path[0])
        self.problems.at(place, f"stage `{self.stage}`: {text}")

    # Models

    def _not_above(self, name: str) -> str | None:
        """What is wrong with `$name` if there is no such stage above."""
        above = self.above.names(self.stage)
        if name in above:
            return None
        below = self.above.is_below(name, self.stage)
        hint = "; it stands below or is the stage itself" if below else nearest(name, above)
        return f"no stage `{name}` is above it{hint}"

    def _leaves_other(self, name: str, kind: type, what: str, advice: str) -> str | None:
        """What is wrong with `$name` if that stage leaves something else."""
        if name in self.above.leaving(self.stage, kind):
            return None
        leaves = next((text for other, text in LEAVES.items() if name in self.above.leaving(self.stage, other)), "")
        return f"`{name}` leaves {leaves}, not {what}; {advice}"

    def starting_model(self, kind: Stage[Any], raw: dict[str, Any]) -> str | None:
        """The model that the stage starts from: its own `model`, the stage above, or the top of the file."""
        word = kind.setting(Role.START)
        if word is None:
            return None
        above = self.above.models(self.stage)
        model = joined(raw.get(word, f"${above[-1]}" if above else self.root.get("model")))
        place = (*self.key, word) if word in raw else ("model",)
        if model is None:
            text = "has no model to start from; set `model:` at the top, or put an `init` stage first"
            self.problems.at_key(self.key, f"stage `{self.stage}` {text}")
        elif (problem := self._not_a_model(model)) is not None:
            self.problems.at_value(place, problem)
        raw[word] = model if isinstance(model, str) else ""
        return model if isinstance(model, str) else None

    def _not_a_model(self, model: Any) -> str | None:
        """What is wrong with the reference of a starting model."""
        above = self.above.models(self.stage)
        if not isinstance(model, str):
            what = "it is a folder, `org/name@commit` on the Hub, `$stage`, or a list: a base, then adapters on it"
            return f"`model` is `{settings.shown(model)}`; {what}"
        if model in above and not Path(model).exists():
            return f"`{model}` is not a folder; for the stage of that name write `model: ${model}`"
        parts = chain_of(model)
        if parts[1:] and (stage := next((part for part in parts if part.startswith("$")), None)):
            return f"`{stage}` is in a list of folders; write `model: {stage}` alone, which has its adapters with it"
        if model.startswith("$"):
            name = model[1:]
            rows = name in self.above.leaving(self.stage, Rows)
            advice = "name it under `data`" if rows else "name another"
            text = self._not_above(name) or self._leaves_other(name, Model, "a model", advice)
            return None if text is None else f"stage `{self.stage}`: {text}"
        return next((problem for part in parts if (problem := _unpinned(part)) is not None), None)

    def check_others(self, kind: Stage[Any], raw: Mapping[str, Any]) -> None:
        """Other models: a folder, a pinned name on the Hub, or `$stage` where a reward model is wanted."""
        for path, role in kind.roles.items():
            model = raw.get(path[0])
            if role not in (Role.SCORER, Role.OTHER) or not isinstance(model, str) or not model.startswith("$"):
                continue
            if role is Role.OTHER:
                self.at_value(path, f"`{path[0]}` is a folder, or `org/name@commit` on the Hub, not a stage")
                continue
            advice = "name a stage that trains one, or a folder"
            problem = self._not_above(model[1:]) or self._leaves_other(model[1:], Scorer, "a reward model", advice)
            if problem is not None:
                self.at_value(path, problem)

    def compared(self, kind: Stage[Any], raw: dict[str, Any]) -> dict[str, str]:
        """Name → reference of the models that a stage compares; all models above unless it names some."""
        word = kind.setting(Role.COMPARED)
        if word is None:
            return {}
        base = self.root.get("model")
        known = {"base": base} if isinstance(base, str) else {}
        known |= {above: f"${above}" for above in self.above.models(self.stage)}
        written = raw.get(word, self._with_one_tokenizer(known))
        names = [written] if isinstance(written, str) else written
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            self.at_value((word,), f"`{word}` is a list of stages above, such as [sft, dpo]")
            names = []
        elif not names:
            text = "has no model to evaluate; set `model:` at the top, or put it below one"
            self.problems.at_key(self.key, f"stage `{self.stage}` {text}")
        for index, one in enumerate(names):
            if one in names[:index]:
                self.at_value((word, index), f"`{one}` is here twice")
            elif one not in known:
                self.at_value((word, index), f"{self._no_such_model(one)}{nearest(one, known)}")
        raw[word] = [one for one in names if one in known]
        return {one: known[one] for one in raw[word]}

    def _with_one_tokenizer(self, known: Mapping[str, str]) -> list[str]:
        """The models that are compared by default: each once, and those with the tokenizer of the last one."""
        others = self.above.names(self.stage, lambda leaves: isinstance(leaves, Model) and leaves.tokenizer)
        last = f"${others[-1]}" if others else None
        names: dict[str, str] = {}
        for name, reference in known.items():
            names.setdefault(reference, name)  # `base` and the stage that takes its place are one model
        references = list(names)
        return [names[one] for one in references[references.index(last) if last in names else 0 :]]

    def _no_such_model(self, name: str) -> str:
        if name == "base":
            return "`base` is the `model:` at the top, and there is none"
        below = self.above.is_below(name, self.stage)
        return f"`{name}` {'stands below or is the stage itself' if below else 'is no stage above that leaves a model'}"


def joined(model: Any) -> Any:
    """A list of a base and adapters as one reference; any other value as it is."""
    is_chain = isinstance(model, list) and model and all(isinstance(part, str) and part for part in model)
    return CHAIN.join(model) if is_chain else model


def _unpinned(model: str) -> str | None:
    """What is wrong with a name on the Hub without a commit."""
    if not is_hub_name(model) or re.search("@[0-9a-f]{40}$", model):
        return None
    pin = f"as `{model.partition('@')[0]}@COMMIT`"
    return f"`{model}` is not a folder here; for a model on the Hub pin its commit (40 hex digits), {pin}"
