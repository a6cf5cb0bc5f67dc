"""A file of questions in, a file of answers out; a killed run goes on where it was, with the same bytes in the end.

Questions and answers stay on disk. Memory holds the length of each prompt, the place of each answer and its figures.
"""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.errors import Busy, ConfigError
from pipeline.saves.locks import HELD
from pipeline.serve.asked import Row, Rows, as_bytes
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


@contextlib.contextmanager
def claimed(output: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[IO[bytes]]:
    """The unfinished answers of `output`, held for this process alone; `output`.part is removed if it stays empty.

    On a disk without locks nothing holds them, which `say` is told.

    Raises:
        Busy: another `predict` writes the same output.
    """
    path = part_of(output)
    while True:
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in HELD:
                    advice = "wait for it, or name another file"
                    raise Busy(f"--output {output}: another `predict` is writing it; {advice}") from None
                say(f"--output {output}: its disk knows no locks ({error.strerror}); let no other `predict` write it")
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # the run that held it has finished and removed it
            try:
                yield file
            finally:
                if not path_size(path):
                    path.unlink(missing_ok=True)
            return


def part_of(output: Path) -> Path:
    """The file with the answers so far."""
    return output.with_name(f"{output.name}.part")


def path_size(path: Path) -> int:
    """The bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def answer_file(
    engine: "Engine",
    rows: Rows,
    output: Path,
    settings: Settings,
    identity: object,
    part: IO[bytes],
    *,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Answer every row and write one line a row to `output`, in the order of the rows.

    While it works, answers go to `part`, which `claimed` gives, one batch after the other. A later run with the same
    rows, model (`identity`) and settings keeps them. Batches depend on the rows alone, so both ways give the same
    bytes.

    Raises:
        ConfigError: `output`, or unfinished work beside it, belongs to other rows, models or settings.
    """
    key = rows.key(asdict(settings), identity)
    about = output.with_name(f"{output.name}.about.json")
    if overwrite:
        output.unlink(missing_ok=True)
        about.unlink(missing_ok=True)
        part.truncate(0)
    if output.exists():
        if _stored(about).get("key") == key:
            part.truncate(0)
            return Result(**{**_stored(about)["result"], "kept": len(rows), "answered": 0})
        raise ConfigError([f"--output {output}: exists already; choose another file, or overwrite it with --overwrite"])
    known = _known(part, key, part_of(output))
    lengths, without = _lengths(engine, rows, settings)
    left = [batch for batch in _batches(lengths, settings) if any(index not in known for index in batch)]
    kept = len(lengths) - len({index for batch in left for index in batch})
    done = kept
    if not known:
        part.truncate(0)
        part.write(json.dumps({"key": key}).encode() + b"\n")
    for batch in left:
        for index, line in _answered(engine, rows, batch, settings).items():
            known[index] = part.seek(0, os.SEEK_END)
            part.write(_bytes(line))
        part.flush()
        os.fsync(part.fileno())
        done += len(batch)
        report(done, len(lengths))
    whole = output.with_name(f"{output.name}.whole")
    figures = _whole(whole, part, rows, known, without)
    result = Result(len(rows), len(lengths) - kept, kept, len(without), figures)
    about.write_text(json.dumps({"key": key, "result": asdict(result)}, ensure_ascii=False, indent=1), encoding="utf-8")
    sync(whole)
    whole.rename(output)
    part_of(output).unlink()
    return result


def _bytes(line: dict[str, Any]) -> bytes:
    return as_bytes(line) + b"\n"


def _whole(
    path: Path, part: IO[bytes], rows: Rows, known: dict[int, int], without: dict[int, str]
) -> dict[str, dict[str, Any]]:
    """Write the lines of all rows in their order; the metrics of all answers."""
    values: dict[str, list[Any]] = {metric: [] for metric in metric_names("reference", "answer")}
    with open(path, "wb") as file:
        for index in range(len(rows)):
            if index in without:
                row = rows[index]
                line: dict[str, Any] = {"row": row.number, "place": row.place, "answer": None}
                line["error"] = without[index]
                file.write(_bytes(line))
            else:
                part.seek(known[index])
                file.write(read := part.readline())
                line = dict(json.loads(read))
            for metric, found in values.items():
                found.append(line.get("metrics", {}).get(metric))
    return _figures(values)


def _stored(about: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(about.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _known(part: IO[bytes], key: str, path: Path) -> dict[int, int]:
    """Index of a row → where its line is, from an earlier run; a line that the kill has torn is cut off.

    Raises:
        ConfigError: the earlier run had other questions, another model or other settings.
    """
    found: dict[int, int] = {}
    part.seek(0)
    first, end = part.readline(), part.tell()
    if not first.endswith(b"\n"):
        return found
    if json.loads(first).get("key") != key:
        why = "belongs to a run with other questions, another model or other settings, which was stopped"
        raise ConfigError([f"{path}: {why}; run that command again, or give it up with --overwrite"])
    while (line := part.readline()).endswith(b"\n"):
        found[json.loads(line)["row"] - 1] = end
        end = part.tell()
    part.truncate(end)
    return found


def _prompt(engine: "Engine", row: Row, settings: Settings) -> "Ids":
    """The token ids of a question. Raises StageError if the model cannot take it."""
    if row.question is None:
        raise StageError(row.error)
    messages = list(row.question.messages)
    if settings.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.system}, *messages]
    ids = engine.prompt(messages, row.question.tools)
    limit = inference.positions(engine.model)
    if len(ids) >= limit:
        raise StageError(f"the prompt has {len(ids):,} tokens; this model takes {limit - 1:,} at most")
    return ids


def _lengths(engine: "Engine", rows: Rows, settings: Settings) -> tuple[dict[int, int], dict[int, str]]:
    """Index of a row → tokens of its prompt; and index → the reason for rows that cannot be answered."""
    found: dict[int, int] = {}
    without: dict[int, str] = {}
    for index, row in enumerate(rows):
        try:
            found[index] = len(_prompt(engine, row, settings))
        except StageError as error:
            without[index] = str(error)
    return found, without


def _batches(lengths: dict[int, int], settings: Settings) -> list[list[int]]:
    """Indices of rows in batches of about the same length, the longest first."""
    order = list(lengths)
    found = inference.batches([lengths[index] + settings.max_tokens for index in order], TOKENS)
    return [[order[place] for place in batch] for batch in found]


def _answered(engine: "Engine", rows: Rows, batch: Sequence[int], settings: Settings) -> dict[int, dict[str, Any]]:
    """Index of a row → its line in the output."""
    limit = inference.positions(engine.model)
    asked = [rows[index] for index in batch]
    prompts = [_prompt(engine, row, settings) for row in asked]
    answers = [Answer(ids, min(settings.max_tokens, limit - len(ids)), strip=True) for ids in prompts]
    seed = settings.seed + batch[0] if settings.temperature else None
    generate(engine, answers, Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=seed))
    lines = [_line(row, answer, engine) for row, answer in zip(asked, answers, strict=True)]
    return dict(zip(batch, lines, strict=True))


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


def _figures(values: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Metric → its figure, from the values of all rows; None in a list is a row without the metric."""
    found = {}
    for metric, given in values.items():
        measured = Measured([None if value is None else (value, 1.0) for value in given])
        figure = figure_of(metric, measured, BOOTSTRAP_SEED)
        if figure["value"] is not None:
            found[metric] = {name: figure[name] for name in ("value", "ci", "n")}
    return found
