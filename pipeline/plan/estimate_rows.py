"""Rows, tokens and steps of a training stage before it runs: counted by a finished stage, or by the first rows."""

import contextlib
import json
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.errors import NewerRecord
from pipeline.plan.estimate_result import Batches, Work
from pipeline.plan.fingerprint import digest
from pipeline.plan.lengths import BYTES, row_tokens
from pipeline.plan.step import Plan, Step
from pipeline.saves import artifact
from pipeline.saves.content import ESTIMATES
from stages.chat.trial import Trial
from stages.data import mixture
from stages.data.drawing import held_out
from stages.data.source import READER_VERSION, Reading, Source, data_files
from stages.runtime.errors import StageError
from stages.runtime.hashes import write_cache
from stages.training.settings import Training
from stages.training.sharing import split

SAMPLE = 2000
"""Rows of a data set that are tokenized."""
EPOCHS = 3
"""transformers' default."""
DATA = ("data", "weights", "rows", "eval_data", "eval_size", "seed", "template", "streaming")
ROWS_OF_TRAINER = ("max_length", "packing", "packing_strategy")
"""Settings under `trainer` that decide what the rows become."""


@dataclass(frozen=True)
class Sample:
    """The first rows of a data set."""

    longest: list[int]
    """Tokens of each row; of a pair those of its longer answer after the prompt."""
    tokens: list[int]
    """Tokens of each row, of all its sequences."""
    whole: bool
    """Whether the data set has no other rows."""
    guessed: bool
    """Whether there is no tokenizer yet."""

    @property
    def most(self) -> int:
        """The tokens that no row has more of: a token that is not known yet has at least one byte."""
        return max(self.longest, default=0) * (BYTES if self.guessed else 1)


@dataclass(frozen=True)
class Rows:
    """The rows that a stage trains on in an epoch."""

    count: int
    tokens: int
    longest: int | None
    """Tokens of the longest row, uncut; None where it is not known."""
    lengths: Sequence[int]
    """Tokens of some of the rows, cut at `max_length`."""
    packed: int | None = None
    """Packed rows, where a finished stage has counted them."""
    padding: float | None = None
    """The share of pad tokens in the batches, where a finished stage has counted it."""
    guessed: bool = False
    """Whether there is no tokenizer yet."""

    @property
    def counted(self) -> bool:
        """Whether a finished stage has counted the rows."""
        return self.padding is not None


def counted_rows(metrics: Mapping[str, Any], training: Training) -> Rows | None:
    """The rows that a finished stage trained on in an epoch; None where it did not count them, as of a stream."""
    if not metrics.keys() >= {"rows", "dropped", "tokens", "longest"}:
        return None
    count = metrics["rows"] - metrics["dropped"]
    pairs = any(source.format == "preference" for source in training.draw.sources)
    mean = metrics["tokens"] // max(1, count * (2 if pairs else 1))
    lengths = [min(mean, training.max_length or mean)]
    packed, padding = metrics.get("packed_into"), metrics.get("padding", 0.0)
    return Rows(count, metrics["tokens"], metrics["longest"], lengths, packed, padding)


class Counts:
    """Counts the rows of the stages of a plan. With `remembered_only` nothing is read that was not read before."""

    def __init__(self, plan: Plan, *, remembered_only: bool) -> None:
        self.plan, self.remembered_only = plan, remembered_only
        self.records = list(_records(plan.saves))
        """Every finished training stage in `saves`, with its folder."""

    def batches_and_work(self, step: Step) -> tuple[Batches | None, Work | None]:
        """How the rows of a step are batched, and how many steps they take; None for what is not known."""
        training = step.entry.training
        assert training is not None
        trainer: Mapping[str, Any] = vars(step.entry.config)["trainer"]
        rows = self._counted(step, training) or self._sampled(step, training)
        processes = step.entry.launch.world
        given = training.batch, int(trainer.get("gradient_accumulation_steps", 1))
        try:
            batch, accumulation = split(*given, processes)
        except StageError:  # reported as a problem of the stage
            batch, accumulation = given
        packs, limit = bool(trainer.get("packing", training.cut)), training.max_length
        longest = rows.longest if rows is not None and not packs else None
        room = min((length for length in (longest, limit) if length is not None), default=None)
        if room is None:
            return None, None
        documents = _documents(rows, room) if packs and trainer.get("packing_strategy") != "wrapped" else ()
        batches = Batches(
            rows=batch,
            accumulation=accumulation,
            processes=processes,
            on_machine=step.entry.launch.processes,
            row_tokens=room,
            longest_seen=longest is not None and rows is not None and not rows.guessed,
            packed=packs,
            documents=documents,
        )
        return batches, work_of(rows, batches, training, trainer) if rows is not None else None

    def _counted(self, step: Step, training: Training) -> Rows | None:
        """What a finished stage counted that read the same rows in the same way."""
        file = (self.plan.tokenizer_folder(step) or Path()) / "tokenizer.json"
        tokenizer = self.plan.hashes.one(file) if file.is_file() else None
        for folder, record in self.records:
            metrics = record.get("metrics", {})
            same = folder == step.folder or (
                record.get("use") == step.use
                and record["files"].get("tokenizer.json", {}).get("sha256") == tokenizer
                and _of_rows(record.get("recipe", {})) == _of_rows(step.recipe)
            )
            if same and (rows := counted_rows(metrics, training)) is not None:
                return rows
        return None

    def _sampled(self, step: Step, training: Training) -> Rows | None:
        """What follows from the first rows of each data set; None where a data set does not exist yet."""
        draw, limit = training.draw, training.max_length
        samples = [self._sample(step, source) for source in draw.sources]
        if not samples or None in samples:
            return None
        counts = [self._count(step, source) for source in draw.sources]
        if None in counts:
            return None
        there = [sample for sample in samples if sample is not None]
        available = [count for count in counts if count is not None]
        held = 1 - min(1.0, draw.eval_size) if draw.by_characters else 1.0
        if draw.eval_size and not draw.by_characters:
            every = sum(available)
            held = max(0, every - held_out(draw.eval_size, every)) / max(1, every)
        left = [max(1, round(count * held)) for count in available]
        drawn = mixture.counts(left, draw.weights, draw.rows) if draw.weights else left
        lengths, tokens = list[int](), 0.0
        for sample, count in zip(there, drawn, strict=True):
            cut = _cut(sample, limit, training)
            tokens += count * sum(cut.tokens) / max(1, len(sample.tokens))
            lengths += cut.longest
        whole = all(sample.whole for sample in there)
        longest = max((sample.most for sample in there), default=0) if whole else None
        return Rows(sum(drawn), round(tokens), longest, lengths, guessed=any(sample.guessed for sample in there))

    def _count(self, step: Step, source: Source) -> int | None:
        """The rows of a data set, bad ones included; None where they do not exist yet."""
        file = step.inputs.rows.get(source.path)
        if file is not None:
            return lines_in(Path(file)) if Path(file).is_file() else None
        names = [name for name, known in self.plan.pipeline.data.items() if known == source]
        return self.plan.rows.get((names or [source.path])[0])

    def _sample(self, step: Step, source: Source) -> Sample | None:
        """The lengths of the first rows, remembered by the content of the files; None where nothing can be read."""
        read = step.inputs.read(source)
        template = step.entry.template or step.facts.template
        tokenizer = ((self.plan.tokenizer_folder(step) or Path()) / "tokenizer.json").resolve()
        file = tokenizer if tokenizer.is_file() else None
        settings = read.model_dump(mode="json", exclude={"path", "others"})
        key = {"source": settings, "template": template, "files": self._hashes(step, read), "code": [1, READER_VERSION]}
        key["tokenizer"] = self.plan.hashes.one(file) if file is not None else None
        cache = self.plan.saves / ESTIMATES / f"rows-{digest(key)[:32]}.json"
        try:
            return Sample(**json.loads(cache.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            if self.remembered_only:
                return None
        found = _tokenized(read, template, step, file)
        if found is not None:
            write_cache(cache, json.dumps(asdict(found)).encode())
        return found

    def _hashes(self, step: Step, source: Source) -> list[str]:
        """The hashes of the files of a source."""
        try:
            files = data_files(source)
        except StageError:
            return []
        return [step.files[str(file)] if str(file) in step.files else self.plan.hashes.one(file) for file in files]


def _records(saves: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    for file in sorted(saves.glob(f"*/{artifact.RECORD}")):
        if not file.parent.is_symlink() and (record := record_of(file.parent)) is not None:
            yield file.parent, record


def lines_in(file: Path) -> int:
    """The lines of a file, of which memory holds a few at a time."""
    with open(file, "rb") as lines:
        return sum(1 for _ in lines)


def record_of(folder: Path) -> Mapping[str, Any] | None:
    """The record of a finished folder; None where it has none, or one that a later version wrote."""
    with contextlib.suppress(NewerRecord):
        return artifact.read(folder)
    return None


def _of_rows(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe that decide what the rows become."""
    trainer = recipe.get("trainer") or {}
    return {name: recipe.get(name) for name in DATA} | {name: trainer.get(name) for name in ROWS_OF_TRAINER}


def _tokenized(source: Source, template: str | None, step: Step, tokenizer: Path | None) -> Sample | None:
    trial = Trial(template, step.facts.tokenizer, step.facts.has_token) if template is not None else None
    first = [row for _, row in islice(Reading(source).rows(), SAMPLE + 1)]
    found = [sizes for row in first[:SAMPLE] if (sizes := row_tokens(trial, tokenizer, row)) is not None]
    if not found:
        return None
    whole = len(first) <= SAMPLE and not source.clean
    return Sample([max(sizes) for sizes in found], [sum(sizes) for sizes in found], whole, tokenizer is None)


def _cut(sample: Sample, limit: int | None, training: Training) -> Sample:
    """A sample as a stage reads it: longer texts are cut into pieces, other rows keep their start."""
    if limit is None:
        return sample
    if training.cut:
        pieces = [min(limit, size - at) for size in sample.longest for at in range(0, size, limit)]
        return Sample(pieces, sample.tokens, sample.whole, sample.guessed)
    kept = [min(size, limit) for size in sample.longest]
    both = [
        min(every, every * room // max(1, size))
        for every, room, size in zip(sample.tokens, kept, sample.longest, strict=True)
    ]
    return Sample(kept, both, sample.whole, sample.guessed)


def _documents(rows: Rows | None, room: int) -> tuple[int, ...]:
    """The documents of a packed row of `room` tokens: as many of the mean length as it takes."""
    lengths = [length for length in rows.lengths if length] if rows is not None else []
    mean = min(room, max(1, round(sum(lengths) / len(lengths)))) if lengths else room
    rest = room % mean
    return (*[mean] * (room // mean), *([rest] if rest else []))


def packed_rows(lengths: Sequence[int], room: int) -> int:
    """How many rows of `room` tokens best-fit decreasing packs sequences of these lengths into, as TRL does."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(free, length)
        left = free.pop(at) - length if at < len(free) else room - length
        insort(free, left)
    return len(free)


def work_of(rows: Rows, batches: Batches, training: Training, trainer: Mapping[str, Any]) -> Work:
    """Tokens and steps of a stage that trains on these rows; `trainer` are its settings of TRL."""
    packs = bool(trainer.get("packing", training.cut))
    room, sequences = batches.row_tokens, rows.count
    padded: float = _longest_of(rows.lengths, batches.rows)
    if packs:
        share = sum(rows.lengths) / max(1, packed_rows(rows.lengths, room) * room)
        if trainer.get("packing_strategy") == "wrapped":
            share = 1.0
        sequences = rows.packed or math.ceil(rows.tokens / (room * max(share, 1e-9)))
        padded = rows.tokens / max(1, sequences)
    elif training.cut:  # texts are cut into pieces, of which `lengths` has those of the first texts
        sequences = math.ceil(rows.tokens * len(rows.lengths) / max(1, sum(rows.lengths)))
    if not packs and rows.padding is not None:
        padded = sum(rows.lengths) / len(rows.lengths) / max(1e-9, 1 - rows.padding)
    loaded = math.ceil(sequences / (batches.rows * batches.processes))
    of_epoch = max(1, math.ceil(loaded / batches.accumulation))
    most = int(trainer.get("max_steps") or 0)
    steps = most if most > 0 else math.ceil(float(trainer.get("num_train_epochs", EPOCHS)) * of_epoch)
    return Work(
        rows=rows.count,
        tokens=rows.tokens,
        steps_of_epoch=of_epoch,
        steps=steps,
        counted=rows.counted,
        guessed=rows.guessed,
        fixed=most > 0,
        padded_tokens=padded,
    )


def _longest_of(lengths: Sequence[int], batch: int) -> float:
    """The expected length of the longest of `batch` rows that are drawn at random."""
    count, before, expected = len(lengths), 0.0, 0.0
    for number, length in enumerate(sorted(lengths), 1):
        below = (number / count) ** batch
        expected += length * (below - before)
        before = below
    return expected
