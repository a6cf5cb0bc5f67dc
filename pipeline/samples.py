"""A plan in, what its data comes to out: the account of a data set in each stage, and rows as the model sees them."""

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, nearest
from pipeline.plan import Plan, Step
from stages import _account, _clean, _drawn, _prepared, _processes, _rows, _trainer

MAX_LENGTH = 1024  # TRL's default
BATCH = 8  # transformers' default


@dataclass(frozen=True)
class Seen:
    """A data set as a stage reads it."""

    data: str
    stage: str
    account: _clean.Account
    tokens: _account.Tokens | None
    """None while the stage's tokenizer has not been made."""
    samples: list[list[tuple[str, bool]]]
    """The text of the first sequences in stretches, each with whether it is in the loss."""


def look(plan: Plan, name: str | None, rows: int) -> Iterator[Seen]:
    """Each data set, or the one named, in each training stage that reads it, with its first `rows` rows.

    Raises:
        ConfigError: there is no such data set, or no stage trains on it.
    """
    if name is not None and name not in plan.pipeline.data:
        raise ConfigError([f"there is no data `{name}`{nearest(name, plan.pipeline.data)}"])
    names = [name] if name is not None else list(plan.pipeline.data)
    pairs = [(data, step) for data in names for step in plan.steps if _reads(step, plan.pipeline.data[data])]
    if not pairs:
        raise ConfigError([f"no stage trains on `{name}`" if name else "no stage trains on data"])
    for data, step in pairs:
        yield _seen(data, plan.pipeline.data[data], step, _with_tokenizer(plan, step), rows)


def _reads(step: Step, source: _rows.Source) -> bool:
    config = step.stage.config
    return isinstance(config, _trainer.TrainingConfig) and source in (*config.data, *config.eval_data)


def _with_tokenizer(plan: Plan, step: Step) -> Path | None:
    """The nearest folder before a step that holds the tokenizer, which goes unchanged from stage to stage."""
    above = plan.steps[: plan.steps.index(step) + 1]
    folders = [Path(folder) for one in above for folder in getattr(one.config, "model", [])]
    return next((folder for folder in reversed(folders) if (folder / "tokenizer.json").is_file()), None)


def _seen(data: str, source: _rows.Source, step: Step, folder: Path | None, rows: int) -> Seen:
    account = _clean.Account()
    chunks = _drawn.chunks(_drawn.Placed(0, *placed) for placed in _rows.kept(source, account))
    if folder is None:
        deque(chunks, maxlen=0)
        return Seen(data, step.name, account, None, [])
    tokenizer = _tokenizer(step, folder)
    settings: dict[str, Any] = step.stage.config.trainer  # type: ignore[attr-defined]
    make = _prepared.sequences(tokenizer, settings.get("max_length", MAX_LENGTH), step.stage.use == "pt", 1)

    def count(chunk: _drawn.Chunk) -> tuple[_account.Tokens, list[int], list[_rows.Row]]:
        made, (tokens,) = make(chunk)
        return tokens, _prepared.lengths(made) if made else [], [placed.row for _, placed, _ in chunk.trained()][:rows]

    whole, lengths, first = _account.Tokens(), array("L"), list[_rows.Row]()
    for tokens, more, begun in _processes.mapped(count, chunks, _processes.cores(), _prepared.FEW):
        whole.add(tokens)
        lengths.extend(more)
        first += begun[: rows - len(first)]
    whole.padding = _account.padding(lengths, settings.get("per_device_train_batch_size", BATCH))
    shown = [_account.pieces(tokenizer, one) for row in _account.encode(tokenizer, first) for one in row]
    return Seen(data, step.name, account, whole, shown)


def _tokenizer(step: Step, folder: Path) -> Any:
    from stages import _model, _template

    tokenizer = _model.load_tokenizer([str(folder)])
    _template.install(tokenizer, step.config.template)  # type: ignore[attr-defined]
    return tokenizer
