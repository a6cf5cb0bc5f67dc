"""Stages of several commands → one config: which stage starts from which, and what stands at the top of the file.

A command that names the output folder of an earlier one starts from its stage. One that names the same base model as an
earlier stage of an earlier kind starts from that stage too, since that is what a chain is for, and a note says so. A
command with another base model starts from that model, and a note names the line to delete to chain it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.tools.convert_datasets import CommitOf, pinned
from pipeline.tools.convert_launch import launch_of, share_rows
from pipeline.tools.convert_parts import Book, Part
from pipeline.tools.convert_reading import is_source
from stages import Model, find
from stages.model.facts import HUB_NAME

# An order of kinds: a stage is chained to an earlier one of a lower rank.
RANK = {"pt": 0, "sft": 1, "reward": 2, "dpo": 2, "kto": 2, "merge": 3, "quantize": 4, "evaluate": 5, "chat": 5}
# The order of a stage's settings: these first, these last.
FIRST = ("use", "model", "compare", "data", "rows", "eval_data", "eval_size", "prompts", "template", "seed", "launch")
LAST = ("lora", "trainer")
# First parts of paths that look like names on the Hub and are folders.
FOLDERS = (
    *(
        "saves",
        "save",
        "output",
        "outputs",
        "models",
        "model",
        "checkpoints",
        "ckpt",
        "data",
        "runs",
        "results",
        "exports",
    ),
    *("export", "merged", "output_model", "pretrained", "weights", "adapters"),
)


@dataclass
class Chain:
    """The stages so far."""

    book: Book
    commit_of: CommitOf
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str | None] = field(default_factory=dict)
    """Stage → the model that its chain began with, as the commands name it."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Folder → the stage that the command wrote it in."""
    model: str | None = None
    """The model at the top."""
    begun: str | None = None
    """The same, as the first command names it."""

    def add(self, part: Part) -> None:
        """Add a stage."""
        name = self._name(part.kind)
        written: dict[str, Any] = {} if name == part.kind else {"use": part.kind}
        start, base = self._start(part, name)
        default = self._above()
        if part.kind == "evaluate":
            written |= {"compare": [start[1:] if start.startswith("$") else "base"]}
        elif start != (f"${default}" if default else self.model):
            written["model"] = start
        settings = written | part.settings
        self.stages[name] = {word: settings[word] for word in sorted(settings, key=_order)}
        self.kinds[name], self.bases[name] = part.kind, base
        if part.leaves:
            self.outputs[os.path.normpath(part.leaves)] = name

    def _name(self, kind: str) -> str:
        taken = [name for name, other in self.kinds.items() if other == kind]
        return kind if not taken else f"{kind}_{len(taken) + 1}"

    def _above(self) -> str | None:
        """The last stage that leaves a model."""
        return next((name for name in reversed(self.kinds) if self._leaves_model(name)), None)

    def _leaves_model(self, name: str) -> bool:
        return isinstance(find(self.kinds[name]).leaves, Model)

    # Where a stage starts

    def _start(self, part: Part, name: str) -> tuple[str, str | None]:
        """The reference that the stage starts from, and the base of its chain."""
        named = [os.path.normpath(path) for path in (*reversed(part.adapters), part.model or "") if path]
        made = next((self.outputs[path] for path in named if path in self.outputs), None)
        if made is not None and self._leaves_model(made):
            return f"${made}", self.bases[made]
        if made is not None:
            text = (
                f"`{made}` leaves a reward model, which no other stage starts from; `{name}` starts from the base model"
            )
            self.book.note("not supported", part.place, text)
        if part.adapters and made is None:
            return self._adapter(part, name), part.model
        if part.model is None:
            self.book.note("to do", part.place, f"`{name}`: no model is named; write it under `model`")
        above = [other for other in self.kinds if self.bases[other] == part.model and self._leaves_model(other)]
        lower = [other for other in above if RANK[self.kinds[other]] < RANK[part.kind]]
        if lower and part.kind not in ("merge", "quantize", "evaluate"):
            text = f"`{name}` starts from `{lower[-1]}`; the command starts again from `{part.model}`"
            advice = f"to do as it does, write `model: {self._reference(part)}` under `{name}`"
            self.book.note("differs", part.place, f"{text}; {advice}")
            return f"${lower[-1]}", part.model
        return self._base(part, name), part.model

    def _base(self, part: Part, name: str) -> str:
        """A model that no earlier command made."""
        reference = self._reference(part)
        self.begun = self.begun or part.model
        self.model = self.model or reference
        if (default := self._above()) is not None:
            text = f"`{name}` starts from `{part.model}`, as the command does"
            chained = f"to go on from `{default}`, delete the line `model: {reference}` of `{name}`"
            self.book.note("differs", part.place, f"{text}; {chained}")
        return reference

    def _reference(self, part: Part) -> str:
        return model_reference(self.book, self.commit_of, part.model or "MODEL", part.revision, part.place)

    def _adapter(self, part: Part, name: str) -> str:
        """An adapter that no command here wrote."""
        path = _as_folder(part.adapters[-1])
        note_missing(self.book, path, part.place)
        if len(part.adapters) > 1:
            text = f"`{name}` starts from `{path}` alone; fold the other adapters of `adapter_name_or_path` in before"
            self.book.note("not supported", part.place, text)
        text = f"`{name}` starts from the adapter `{path}`, whose own base model is used, not `{part.model}`"
        self.book.note("differs", part.place, text)
        self.model = self.model or path
        self.begun = self.begun or part.model
        return path


def model_reference(book: Book, commit_of: CommitOf, model: str, revision: str | None, place: str) -> str:
    """A model as a config names it: a folder, or a name on the Hub with its commit."""
    if "/" not in model and not Path(model).exists() and model != "MODEL":
        text = f"`{model}` is neither a folder here nor a name on the Hub with its owner, `owner/{model}`; write either"
        book.note("to do", place, text)
    if not HUB_NAME.match(model) or Path(model).exists() or model.partition("/")[0] in FOLDERS:
        folder = _as_folder(model)
        if "/" in model:
            note_missing(book, folder, place)
        return folder
    name, _, own = model.partition("@")
    return pinned(book, commit_of, "model", name, place, own or revision)


def note_missing(book: Book, path: str, place: str) -> None:
    """Name a folder of a model that is not here: most often another command writes it."""
    if not Path(path).exists():
        text = f"`{path}` is not here; if another command writes it, name that command before this one"
        book.note("to do", place, text)


def _as_folder(path: str) -> str:
    """A path that cannot be taken for a name on the Hub."""
    return f"./{path}" if HUB_NAME.match(path) and not Path(path).exists() else path


def root(parts: Sequence[Part], book: Book, commit_of: CommitOf) -> dict[str, Any]:
    """All that a config says."""
    written = [part for part in parts if part.kind != "chat"] or [_asked(part) for part in parts[:1]]
    for part in parts:
        if part.kind == "chat" and len(written) != len(parts):
            text = "no stage: `pipeline chat` and `pipeline serve` use what the last stage leaves"
            book.note("not needed", part.place, text)
    chain = Chain(book, commit_of)
    for part in written:
        chain.add(part)
    trained = [part for part in written if "trainer" in part.settings]
    chats = {name: part for name, part in zip(chain.stages, written, strict=True) if _uses_template(part)}
    found: dict[str, Any] = {"model": chain.model}
    found |= _shared("template", {name: part.template for name, part in chats.items()}, chain.stages, None)
    seeds = {name: part.seed for name, part in zip(chain.stages, written, strict=True) if part in trained}
    found |= _shared("seed", seeds, chain.stages, 42)
    launches = {name: launch_of(part) for name, part in zip(chain.stages, written, strict=True) if part in trained}
    for name, part in zip(chain.stages, written, strict=True):
        if part in trained:
            share_rows(chain.stages[name], part, book)
    found |= _shared("launch", launches, chain.stages, {"processes": 1})
    found |= _tokens(written)
    return found | ({"data": book.data} if book.data else {}) | {"stages": chain.stages}


def _tokens(parts: Sequence[Part]) -> dict[str, Any]:
    """`add_tokens` with the tokens of all commands."""
    special = list(dict.fromkeys(token for part in parts for token in part.special))
    words = list(dict.fromkeys(token for part in parts for token in part.words if token not in special))
    if not words:
        return {"add_tokens": special} if special else {}
    return {"add_tokens": {**({"special": special} if special else {}), "words": words}}


def _asked(part: Part) -> Part:
    """A command that only serves a model becomes one that asks it a question."""
    part.kind = "evaluate"
    return part


def _uses_template(part: Part) -> bool:
    return "template" in find(part.kind).config.model_fields and part.kind != "pt" and "tasks" not in part.settings


def _shared(word: str, values: Mapping[str, Any], stages: dict[str, dict[str, Any]], unset: Any) -> dict[str, Any]:
    """A setting for the top of the file if all stages agree; otherwise each stage gets its own."""
    different = [value for index, value in enumerate(values.values()) if value not in [*values.values()][:index]]
    if len(different) == 1 and different[0] != unset:
        return {word: different[0]}
    if len(different) > 1:
        for name, value in values.items():
            if value != unset:
                settings = {**stages[name], word: value}
                stages[name] = {key: settings[key] for key in sorted(settings, key=_order)}
    return {}


def _order(word: str) -> int:
    """Where a setting is written in its stage; those that are not named here stay where they are, above `lora`."""
    return FIRST.index(word) if word in FIRST else len(FIRST) + (LAST.index(word) + 1 if word in LAST else 0)


def title(sources: Sequence[str]) -> str:
    """The sources in words, for the first line of the config; a command line may hold secrets, and is not shown."""
    names = [Path(source).name if is_source(source) and " " not in source else "a command line" for source in sources]
    different = list(dict.fromkeys(names if is_source(next(iter(sources), "")) else ["a command line"]))
    return ", ".join([*different[:6], *(["…"] if different[6:] else [])])
