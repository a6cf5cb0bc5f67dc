"""Data in a plan: which files a source names, their hashes, and what a first look at their rows found."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.config.pipeline import StageEntry
from pipeline.plan.fingerprint import digest
from pipeline.plan.step import Plan, Step
from pipeline.saves.content import ROWS, Inspection, Inspections
from stages.chat.shapes import Shapes
from stages.data import drawing
from stages.data.mixture import Mixture
from stages.data.source import NotFetched, Source, data_files, file_types, is_on_hub
from stages.runtime.errors import StageError
from stages.training import held_out


def sources_in(value: Any, *, others: bool = True) -> Iterator[Source]:
    """Every data source in the settings of a stage; with `others` also those that cleaning only compares it with."""
    if isinstance(value, Source):
        yield from (value, *(value.others.values() if others else ()))
    elif isinstance(value, Mixture):
        for source in value.sources:
            yield from sources_in(source, others=others)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from sources_in(getattr(value, name), others=others)
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from sources_in(item, others=others)


class DataSets:
    """The data sets of a plan. Each is read once, and its problems go into the plan."""

    def __init__(self, plan: Plan, *, fetch: bool) -> None:
        self.plan, self.fetch = plan, fetch
        self.inspections = Inspections(plan.saves / ROWS)
        self.shapes: dict[str, Shapes] = {}
        """Name of a data set that could be read → the shapes of its conversations."""
        self.made: dict[str, Step] = {}
        """`$stage` → the step that leaves rows."""
        self._digests: dict[tuple[Path, ...], str | None] = {}
        self._found: dict[tuple[str, str | None, str | None], tuple[list[Path], StageError | None]] = {}

    def names(self, source: Source) -> list[str]:
        """What a source is called in the config; what a stage leaves is called `$stage`."""
        declared = self.plan.pipeline.data.items()
        return [name for name, known in declared if known == source] or [source.path]

    def files(self, source: Source) -> list[Path]:
        """The files of a source; empty when they are not there, which `check` reports."""
        return [] if source.path.startswith("$") else self._located(source)[0]

    def _located(self, source: Source) -> tuple[list[Path], StageError | None]:
        key = (source.path, source.subset, source.split)
        if key not in self._found:
            try:
                self._found[key] = data_files(source, download=self.fetch), None
            except StageError as error:
                self._found[key] = [], error
        return self._found[key]

    def too_few_held_out(self, entry: StageEntry) -> list[str]:
        """A warning about held-out rows or tokens that are sure to be too few: a token has a byte or more."""
        training = entry.training
        if training is None or not (training.draw.eval_size or training.draw.eval_data):
            return []
        draw = training.draw
        if training.cut:
            files = [file for source in draw.sources for file in self.files(source)]
            whole = [file for source in draw.eval_data for file in self.files(source)]
            size = sum(file.stat().st_size for file in files) * min(1, draw.eval_size)
            size += sum(file.stat().st_size for file in whole)
            plain = all(file.suffix in (".txt", ".json", ".jsonl", ".csv") for file in (*files, *whole))
            few = f"fewer than {held_out.FEW_TOKENS:,} tokens" if plain and size < held_out.FEW_TOKENS else None
            return [held_out.warning(few)] if few is not None and (files or whole) else []
        rows, kept = (
            [self.plan.rows.get(self.names(source)[0], 0) for source in sources]
            for sources in (draw.sources, draw.eval_data)
        )
        few = held_out.few(drawing.held_out(draw.eval_size, sum(rows)) + sum(kept))
        return [held_out.warning(few)] if few is not None and all((*rows, *kept)) else []

    def digest(self, source: Source) -> str | None:
        """One hash for the content of all files, in their order; None when there are none."""
        files = tuple(self.files(source))
        if files not in self._digests:
            hashes = self.plan.hashes.of(files)
            self._digests[files] = hashes[0] if len(hashes) == 1 else digest(hashes) if hashes else None
        return self._digests[files]

    def check(self, source: Source) -> None:
        """Read a data set that was not read yet, and report what is wrong with it."""
        names = self.names(source)
        if names[0] in self.plan.rows or source.path.startswith("$"):  # what a stage leaves is not made yet
            return
        files, missing = self._located(source)
        if isinstance(missing, NotFetched):
            note = f"`{source.path}` is not on this machine; `run` fetches it, until then its rows are unchecked"
            self.plan.notes += [note] if note not in self.plan.notes else []
            return
        known = self.digest(source)
        inspection = Inspection(0, 0, [], [str(missing)])
        if known is not None:
            inspection = self.inspections.of(source, known, file_types(files))
        self.shapes[names[0]] = Shapes(inspection.shapes)
        if inspection.bad and not inspection.problems:
            note = f"data `{names[0]}`: {inspection.bad:,} of {inspection.rows:,} rows are bad and skipped"
            self.plan.notes.append(f"{note}: {'; '.join(inspection.first)}")
        self.plan.notes += [f"data `{names[0]}`: {clause}" for clause in (*inspection.notes, *inspection.unread)]
        self.plan.rows.update(dict.fromkeys(names, inspection.rows))
        place = self.plan.pipeline.document.key_place(("data", names[0]))
        self.plan.problems += [f"{place}: data `{names[0]}`: {text}" for text in inspection.problems]

    def keep_shapes(self, name: str, sources: Iterable[Source]) -> None:
        """Let the rows that a stage leaves have the shapes of those that it reads."""
        self.shapes[name] = Shapes()
        for source in sources:
            self.shapes[name].merge(self.shapes.get(self.names(source)[0], Shapes()))

    def content(self, value: Any) -> Any:
        """A value of JSON settings with every data set replaced by the hash of its content.

        So moving a file changes nothing, and changing it does.
        """
        if isinstance(value, dict) and {"path", "format"} <= value.keys():
            return self._content(Source.model_validate(value), value)
        if isinstance(value, dict):
            return {key: self.content(entry) for key, entry in value.items()}
        return [self.content(entry) for entry in value] if isinstance(value, list) else value

    def _content(self, source: Source, value: Mapping[str, Any]) -> dict[str, Any]:
        if source.path in self.made:
            known = f"step:{self.made[source.path].fingerprint}"
            return {**{key: entry for key, entry in value.items() if key != "path"}, "sha256": known}
        pinned = f"hub:{source.path}" if is_on_hub(source.path) else None
        rest = {key: self.content(entry) for key, entry in value.items() if key not in ("path", "others")}
        if value.get("others"):  # what they are called changes nothing
            rest["compared_with"] = [self.content(other) for other in value["others"].values()]
            rest["clean"] = [{**step, "against": None} if "against" in step else step for step in rest["clean"]]
        kind = file_types(self.files(source)) if pinned is None else ""
        return {**rest, **({"kind": kind} if kind else {}), "sha256": pinned or self.digest(source)}
