"""A file of questions in, a file of answers out; a killed run goes on where it was, with the same bytes in the end."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from stages.data.files import HowToRead, find_files, parts
from stages.data.questions import Question, as_question
from stages.data.row import RowError
from stages.data.source import Reading, Source
from stages.measuring.metrics import Measured, figure_of, metric_names, score_answer
from stages.model import inference
from stages.model.live import Answer, Sampling, generate
from stages.runtime.errors import StageError
from stages.runtime.files import sync

if TYPE_CHECKING:
    from stages.model.generation import Engine, Ids

BOOTSTRAP_SEED = 0
TOKENS = 8192
"""Prompts and answers of a batch, in tokens."""


@dataclass(frozen=True)
class Row:
    """A row of the input."""

    number: int
    place: str
    """As `questions.csv:12`."""
    question: Question | None
    error: str = ""
    """Why the row holds no question."""


@dataclass(frozen=True)
class Settings:
    """How questions are answered."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    system: str | None = None
    """A system prompt for questions that have none of their own."""


@dataclass(frozen=True)
class Result:
    """What `answer_file` did."""

    rows: int
    answered: int
    kept: int
    """Answers that an earlier run of the same command has given."""
    failed: int
    """Rows without an answer; each says why in the output."""
    figures: dict[str, dict[str, Any]]
    """Metric → its value, interval and number of rows, from the rows with a reference answer."""


def read_questions(source: str, declared: Source | None, column: str | None) -> list[Row]:
    """The questions of a file, or of a data set that the config declares.

    Raises:
        ConfigError: the file cannot be read, or no row of it holds a question.
    """
    try:
        rows = list(_declared(declared) if declared is not None else _of_files(source, column))
    except StageError as error:
        raise ConfigError([f"--input {source}: {error}"]) from None
    if not rows:
        raise ConfigError([f"--input {source}: holds no rows"])
    if not any(row.question for row in rows):
        hint = "" if column else "; name the column with the question with `--column NAME`"
        raise ConfigError([f"{rows[0].place}: {rows[0].error}{hint}"])
    return rows


def check_output(output: Path) -> None:
    """Check that a file can be written, before the model is loaded.

    Raises:
        ConfigError: there is no such folder, it cannot be written, or the output is a folder.
    """
    if not output.parent.is_dir():
        raise ConfigError([f"--output {output}: there is no folder `{output.parent}`"])
    if output.is_dir():
        raise ConfigError([f"--output {output}: is a folder; name a file, such as `{output / 'answers.jsonl'}`"])
    try:
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError([f"--output {output}: `{output.parent}` cannot be written ({why})"]) from None


def _declared(source: Source) -> Iterator[Row]:
    """Rows of a data set of the config. Raises StageError when too many of them are bad."""
    for number, (place, row) in enumerate(Reading(source).kept(), 1):
        yield _read(number, place, row, None)


def _of_files(path: str, column: str | None) -> Iterator[Row]:
    number = 0
    for file in find_files(path):
        for place, row in (row for part in parts(file, HowToRead(), told=lambda note: None) for row in part.rows()):
            number += 1
            if isinstance(row, RowError):
                yield Row(number, place, None, str(row))
            else:
                yield _read(number, place, row, column)


def _read(number: int, place: str, row: dict[str, Any], column: str | None) -> Row:
    try:
        if column is not None and column not in row:
            raise RowError(f"the row has no `{column}`")
        given = row if column is None else {**row, "prompt": row[column], "messages": None, "conversations": None}
        return Row(number, place, as_question(given))
    except (RowError, RecursionError) as error:
        return Row(number, place, None, str(error) or "the row is nested too deeply")


def answer_file(
    engine: "Engine",
    rows: Sequence[Row],
    output: Path,
    settings: Settings,
    identity: object,
    *,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Answer every row and write one line a row to `output`, in the order of the rows.

    While it works, answers go to `output`.part, one batch after the other. A later run with the same rows, model
    (`identity`) and settings keeps them. Batches depend on the rows alone, so both ways give the same bytes.

    Raises:
        ConfigError: `output`, or unfinished work beside it, belongs to other rows, models or settings.
    """
    key = _key(rows, settings, identity)
    part, about = output.with_name(f"{output.name}.part"), output.with_name(f"{output.name}.about.json")
    if overwrite:
        for path in (output, part, about):
            path.unlink(missing_ok=True)
    if output.exists():
        if _stored(about).get("key") == key:
            part.unlink(missing_ok=True)
            return Result(**{**_stored(about)["result"], "kept": len(rows), "answered": 0})
        raise ConfigError([f"--output {output}: exists already; choose another file, or overwrite it with --overwrite"])
    known = _known(part, key)
    encoded, without = _encoded(engine, rows, settings)
    left = [batch for batch in _batches(encoded, settings) if any(index not in known for index in batch)]
    kept = len(encoded) - len({index for batch in left for index in batch})
    done = kept
    with open(part, "a" if known else "w", encoding="utf-8") as file:
        if not known:
            file.write(json.dumps({"key": key}) + "\n")
        for batch in left:
            given = _answered(engine, rows, encoded, batch, settings)
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in given.values())
            file.flush()
            os.fsync(file.fileno())
            known |= given
            done += len(batch)
            report(done, len(encoded))
    every = known | without
    lines = [every[index] for index in range(len(rows))]
    result = Result(len(rows), len(encoded) - kept, kept, len(without), _figures(lines))
    whole = output.with_name(f"{output.name}.whole")
    whole.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    about.write_text(json.dumps({"key": key, "result": asdict(result)}, ensure_ascii=False, indent=1), encoding="utf-8")
    sync(whole)
    whole.rename(output)
    part.unlink()
    return result


def _key(rows: Sequence[Row], settings: Settings, identity: object) -> str:
    """What identifies the work: questions, model and settings."""
    questions = [asdict(row.question) if row.question else row.error for row in rows]
    text = json.dumps([questions, asdict(settings), identity], ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _stored(about: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(about.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _known(part: Path, key: str) -> dict[int, dict[str, Any]]:
    """Index of a row → its line, from an earlier run; a line that the kill has torn is cut off.

    Raises:
        ConfigError: the earlier run had other questions, another model or other settings.
    """
    try:
        text = part.read_bytes()
    except FileNotFoundError:
        return {}
    whole = text[: text.rfind(b"\n") + 1]
    first, *lines = whole.decode("utf-8").split("\n") if whole else [""]
    if not first:
        return {}
    if json.loads(first).get("key") != key:
        raise ConfigError(
            [
                f"{part}: belongs to a run with other questions, another model or other settings, which was stopped; "
                "run that command again, or give it up with --overwrite"
            ]
        )
    if len(whole) < len(text):
        part.write_bytes(whole)
    return {line["row"] - 1: line for line in map(json.loads, filter(None, lines))}


def _encoded(
    engine: "Engine", rows: Sequence[Row], settings: Settings
) -> tuple[dict[int, "Ids"], dict[int, dict[str, Any]]]:
    """Index of a row → the token ids of its prompt; and index → its line for rows that cannot be answered."""
    found: dict[int, Ids] = {}
    without: dict[int, dict[str, Any]] = {}
    limit = inference.positions(engine.model)
    for index, row in enumerate(rows):
        if row.question is None:
            without[index] = _without_answer(row, row.error)
            continue
        messages = list(row.question.messages)
        if settings.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": settings.system}, *messages]
        try:
            ids = engine.prompt(messages, row.question.tools)
            if len(ids) >= limit:
                raise StageError(f"the prompt has {len(ids):,} tokens; this model takes {limit - 1:,} at most")
        except StageError as error:
            without[index] = _without_answer(row, str(error))
            continue
        found[index] = ids
    return found, without


def _batches(encoded: dict[int, "Ids"], settings: Settings) -> list[list[int]]:
    """Indices of rows in batches of about the same length, the longest first."""
    order = list(encoded)
    lengths = [len(encoded[index]) + settings.max_tokens for index in order]
    return [[order[place] for place in batch] for batch in inference.batches(lengths, TOKENS)]


def _answered(
    engine: "Engine", rows: Sequence[Row], encoded: dict[int, "Ids"], batch: Sequence[int], settings: Settings
) -> dict[int, dict[str, Any]]:
    """Index of a row → its line in the output."""
    limit = inference.positions(engine.model)
    answers = [
        Answer(encoded[index], min(settings.max_tokens, limit - len(encoded[index])), strip=True) for index in batch
    ]
    seed = settings.seed + batch[0] if settings.temperature else None
    generate(engine, answers, Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=seed))
    return {index: _line(rows[index], answer, engine) for index, answer in zip(batch, answers, strict=True)}


def _line(row: Row, answer: Answer, engine: "Engine") -> dict[str, Any]:
    assert row.question is not None
    stopped = answer.reason == "stop"
    ids = answer.ids[:-1] if engine.stopped(answer.ids) else answer.ids
    scores = score_answer(answer.text, ids, reference=row.question.reference, stopped=stopped)
    return {
        "row": row.number,
        "place": row.place,
        "messages": [{key: value for key, value in message.items() if value} for message in row.question.messages],
        "answer": answer.text,
        "finish_reason": answer.reason,
        "prompt_tokens": len(answer.prompt),
        "answer_tokens": len(answer.ids),
        "reference": row.question.reference,
        "metrics": {name: value for name, value in scores.items() if value is not None},
    }


def _without_answer(row: Row, why: str) -> dict[str, Any]:
    return {"row": row.number, "place": row.place, "answer": None, "error": why}


def _figures(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The metrics of all answers."""
    found = {}
    for metric in metric_names("reference", "answer"):
        values = [line.get("metrics", {}).get(metric) for line in lines]
        measured = Measured([None if value is None else (value, 1.0) for value in values])
        figure = figure_of(metric, measured, BOOTSTRAP_SEED)
        if figure["value"] is not None:
            found[metric] = {name: figure[name] for name in ("value", "ci", "n")}
    return found
