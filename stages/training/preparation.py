"""The rows of a training stage as its trainer reads them: drawn, tokenized, packed, and kept for later runs.

They are in `saves/.prepared/<key>`. The key is a hash of everything that decides what the rows become: the content of
every data file, the settings that read, clean, draw and cut rows, the tokenizer with its template, and the versions of
the libraries. Stages that agree in all of it share the rows. The trainer maps the files into memory.
"""

import fcntl
import hashlib
import json
import shutil
import weakref
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.chat import encoding
from stages.data import drawing
from stages.data.drawing import Draw
from stages.data.source import READER_VERSION
from stages.runtime.errors import StageError, lack_of_memory
from stages.runtime.events import emit
from stages.runtime.files import sha256
from stages.runtime.processes import parallel_map, usable_cores
from stages.training import held_out, identity
from stages.training import packing as packing_module
from stages.training.sequences import lengths, sequences

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


FOLDER = ".prepared"
VERSION = 1  # raise it when the same rows would become other sequences
_ACCOUNT = "account.json"  # written last: a folder without it is not whole
# Why rows are too long to train on: nothing of the answer is left, or a reward model would score a part of the pair.
NO_ANSWER, TOO_LONG = "lose their answer at `max_length`", "are longer than `max_length`"
REASONS = {NO_ANSWER: "no answer left at `max_length`", TOO_LONG: "longer than `max_length`"}
MANY_CUT = 0.05  # the share of rows that lose their end which is worth a warning
FEW = 8  # chunks that are not worth another process


@dataclass(frozen=True)
class Prepared:
    """Rows for a trainer, and their counts. While it exists, `gc` does not remove the rows."""

    train: "Dataset"
    """Columns `input_ids` and, where they differ, `labels`; `seq_lengths` when packed. For pairs `prompt_ids`,
    `chosen_ids` and `rejected_ids`, or the last two alone, after the prompt."""
    held: "Dataset | None"
    account: dict[str, Any]


def prepare(
    draw: Draw,
    tokenizer: "PreTrainedTokenizerBase",
    args: Any,
    out: Path,
    *,
    cut: bool = False,
    whole: bool = False,
) -> Prepared:
    """The rows of a stage for the arguments of its trainer; rows that were prepared before are used again.

    With `cut`, a text longer than `max_length` is cut into pieces, and no token is lost. Otherwise a row keeps its
    start, and a row without a token to train on is dropped and counted. With `whole`, pairs are conversations as a
    reward model reads them, and a pair longer than `max_length` is dropped and counted.

    Raises:
        StageError: more rows are dropped than the data sets allow, nothing is left to train on, or a file changed
            while it was read.
    """
    recipe = _recipe(draw, tokenizer, args, cut=cut) | ({"whole": True} if whole else {})
    key = identity.key(recipe, draw, out.parent)
    folder = out.parent / FOLDER / key
    with _alone(folder):
        account = _whole(folder, draw)
        if account is None:
            try:
                account = _make(draw, tokenizer, recipe, args, folder)
            except MemoryError as error:
                raise StageError(f"{lack_of_memory(error)}; {_fewer(args)}") from None
            if identity.key(recipe, draw, out.parent) != key:
                shutil.rmtree(folder)
                raise StageError("a data file changed while it was read; run again")
        else:
            emit(out, "note", text=f"takes the rows that were prepared before, from {FOLDER}/{key}")
        reader = open(reader_lock(folder), "a+", encoding="utf-8")  # noqa: SIM115 - held while the rows are in use
        fcntl.flock(reader, fcntl.LOCK_SH)
    for entry in account["data"]:
        emit(out, "note", text=drawing.summary(entry), keep=True)
    emit(out, "note", text=_told(account), keep=True)
    if few := account.get("few_held_out"):
        emit(out, "note", text=held_out.warning(few), warning=True)
    if not cut and (text := many_cut(account["truncated"], account["rows"], args.max_length)):
        emit(out, "note", text=text, warning=True)
    train = _dataset(folder / "train.arrow")
    held = _dataset(folder / "held.arrow") if account["held_out"] else None
    if "packed" not in account:
        there = array("L")
        for batch in train.data.to_batches():
            there.extend(lengths(batch))
        account["padding"] = encoding.padding(there, args.per_device_train_batch_size)
    prepared = Prepared(train, held, account)
    weakref.finalize(prepared, reader.close)
    return prepared


def _recipe(draw: Draw, tokenizer: Any, args: Any, *, cut: bool) -> dict[str, Any]:
    """Everything besides the files that decides what the rows become."""
    packs = getattr(args, "packing", False)
    eval_packing = getattr(args, "eval_packing", None)
    wraps = packs and args.packing_strategy == "wrapped"  # cuts the stream of all texts by itself
    packs_held = packs if eval_packing is None else eval_packing
    words = {
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "split_special_tokens": tokenizer.backend_tokenizer.encode_special_tokens,  # not in to_str()
    }
    packing = [args.packing_strategy, args.max_length, args.shuffle_dataset and args.seed] if packs else None
    return {
        **draw.as_json(),
        **words,
        "cut": cut,
        "max_length": None if wraps else args.max_length,
        "held_max_length": None if wraps and packs_held else args.max_length,
        "packing": packing,
        "packs_held": bool(packing and packs_held),
        "versions": {
            name: metadata.version(name) for name in ("tokenizers", "tiktoken", "transformers", "trl", "datasets")
        },
        "code": [VERSION, READER_VERSION],
    }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process prepare, and others, of this run or of another, wait for it."""
    for made in (lock(folder), folder):
        made.parent.mkdir(parents=True, exist_ok=True)
    with open(lock(folder), "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock(folder: Path) -> Path:
    """The file that is locked while rows are prepared in a folder."""
    return folder.parent.parent / ".locks" / f"prepared-{folder.name.removesuffix('.part')}"


def reader_lock(folder: Path) -> Path:
    """The file that every stage locks, together with others, while it reads prepared rows."""
    return lock(folder).with_suffix(".reader")


def _whole(folder: Path, draw: Draw) -> dict[str, Any] | None:
    """The counts of prepared rows, with data files as they are called now; None unless every file is as written."""
    try:
        kept: dict[str, Any] = json.loads((folder / _ACCOUNT).read_text(encoding="utf-8"))
        files: dict[str, str] = kept["files"]
        whole = all(sha256(folder / name) == hashed for name, hashed in files.items())
        identity.rename(kept["account"]["data"], kept["names"], identity.names(draw))
    except (OSError, ValueError, KeyError):
        return None
    return dict(kept["account"]) if whole else None


def _make(draw: Draw, tokenizer: Any, recipe: dict[str, Any], args: Any, folder: Path) -> dict[str, Any]:
    """Prepare the rows in `folder`; returns their counts."""
    part = folder.with_name(f"{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    processes = _processes(args)
    with drawing.drawn(draw, part, processes) as rows:
        encode = partial(sequences, tokenizer, cut=recipe["cut"], whole=recipe.get("whole", False))
        made = parallel_map(encode(recipe["max_length"], data=len(draw.sources)), rows.chunks, processes, FEW)
        totals = _written(made, part / "train.arrow", len(draw.sources))
        whole = encoding.Tokens()
        for total in totals:
            whole.add(total)
        lost = TOO_LONG if recipe.get("whole") else NO_ANSWER
        check_dropped(draw, whole, args.max_length, lost)
        account = _account_of(rows, totals, whole, lost)
        if rows.held:
            made = map(encode(recipe["held_max_length"], data=1), rows.held_chunks())
            (total,) = _written(made, part / "held.arrow", 1)
            account |= _account_of_held(total, args.max_length, lost, texts=recipe["cut"])
    if recipe["packing"]:
        account |= _pack(part / "train.arrow", args)
        if recipe["packs_held"] and account["held_out"]:
            _pack(part / "held.arrow", args)
    files = {file.name: sha256(file) for file in sorted(part.iterdir())}
    kept = {"account": account, "files": files, "names": identity.names(draw)}
    (part / _ACCOUNT).write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    part.rename(folder)
    return account


def _processes(args: Any) -> int:
    """How many processes tokenize rows."""
    return getattr(args, "dataset_num_proc", None) or usable_cores()


def _fewer(args: Any) -> str:
    """What to set when memory runs out while rows are prepared."""
    count = _processes(args)
    fewer = f"set `trainer.dataset_num_proc: {count // 2}` (it is {count}), or " if count > 1 else ""
    return f"rows were being prepared; {fewer}use fewer rows with `max_samples` of the data"


def _pack(file: Path, args: Any) -> dict[str, float]:
    """Replace an Arrow file by one with its rows packed; returns the counts of packing."""
    packed = file.with_suffix(".packed")
    figures = packing_module.pack(_dataset(file), args, packed)
    packed.replace(file)
    return figures


def _written(
    made: Iterable[tuple["pa.RecordBatch | None", list[encoding.Tokens]]], file: Path, data: int
) -> list[encoding.Tokens]:
    """Write batches to an Arrow file as they are made; returns the token counts of each data set."""
    import pyarrow as pa

    totals = [encoding.Tokens() for _ in range(data)]
    writer = None
    for batch, found in made:
        for total, more in zip(totals, found, strict=True):
            total.add(more)
        if batch is not None:
            writer = writer or pa.ipc.new_stream(str(file), batch.schema)
            writer.write_batch(batch)
    if writer is not None:
        writer.close()
    return totals


def _dataset(file: Path) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_file(str(file))


def check_dropped(draw: Draw, total: encoding.Tokens, max_length: int | None, lost: str = NO_ANSWER) -> None:
    """Check how many rows the chat template cannot be used for, and how many have no token to train on.

    Raises:
        StageError: there are more of them than `max_dropped` allows.
    """
    allowed = max(source.max_dropped for source in draw.sources)
    rows = total.rows + total.untrained
    every = rows + total.refused
    if encoding.too_many(total.refused, every, allowed):
        raise StageError(encoding.refused_rows(total.refused, every, allowed, total.why))
    if not total.rows:
        raise StageError(f"all {rows} rows {lost} {max_length}; raise it")
    if total.untrained > allowed * rows:
        raise StageError(
            f"{total.untrained:,} of {rows:,} rows {lost} {max_length}, the first at {total.first[0]}; "
            f"that is more than `max_dropped` {allowed:g} of them; raise `max_length`, or "
            "`max_dropped` of the data"
        )


def _account_of(
    drawn: drawing.Drawn, totals: list[encoding.Tokens], whole: encoding.Tokens, lost: str
) -> dict[str, Any]:
    """The counts of the stage, with those of each data set under `data`."""
    for entry, total in zip(drawn.account, totals, strict=True):
        if total.untrained:
            entry["trained_rows"] -= total.untrained
            entry["dropped"][REASONS[lost]] = {"rows": total.untrained, "first": total.first}
        if total.refused:
            entry["trained_rows"] -= total.refused
            first = [encoding.reasons({reason: places}) for reason, places in total.why.items()]
            entry["dropped"]["refused by the chat template"] = {"rows": total.refused, "first": first}
        entry |= {"tokens": total.tokens, "trained_tokens": total.trained, "truncated": total.truncated}
        entry |= {
            "longest": total.longest,
            "share_of_rows": total.rows / whole.rows,
            "share_of_tokens": total.tokens / whole.tokens,
        }
    return {
        "data": drawn.account,
        "rows": whole.rows + whole.untrained + whole.refused,
        "dropped": whole.untrained + whole.refused,
        "truncated": whole.truncated,
        "tokens": whole.tokens,
        "trained_tokens": whole.trained,
        "longest": whole.longest,
        "held_out": 0,
    }


def _account_of_held(total: encoding.Tokens, max_length: int | None, lost: str, *, texts: bool) -> dict[str, Any]:
    """The counts of the held-out rows; those without an answer at `max_length` are not measured.

    Raises:
        StageError: none is left to measure.
    """
    if not total.rows and total.refused:
        raise StageError(
            f"the chat template cannot be used for {total.refused:,} of the held-out rows, and no other is left: "
            f"{next(iter(total.why))}"
        )
    if not total.rows:
        raise StageError(f"all {total.untrained:,} held-out rows {lost} {max_length}; raise it")
    dropped = {"held_out_dropped": total.untrained, "held_out_refused": total.refused}
    found: dict[str, Any] = {name: rows for name, rows in dropped.items() if rows}
    if (few := held_out.few(total.rows, total.trained, texts=texts)) is not None:
        found["few_held_out"] = few
    return {"held_out": total.rows, "held_out_tokens": total.trained, **found}


def many_cut(truncated: int, rows: int, max_length: int | None) -> str | None:
    """A warning about rows that lose their end; None where they are few."""
    if truncated <= MANY_CUT * rows:
        return None
    share = f"{truncated:,} of {rows:,} rows ({truncated / rows:.0%}) are longer than `max_length` {max_length}"
    return f"{share} and lose their end, so the model would not learn to stop after them; raise `max_length`"


def _told(account: dict[str, Any]) -> str:
    """The counts as one line."""
    words = [f"{account['rows']:,} rows", f"{account['dropped']:,} dropped", f"{account['truncated']:,} truncated"]
    words += [f"{account['tokens']:,} tokens", f"{account['trained_tokens']:,} in the loss"]
    words += [f"{account['held_out']:,} held out"] if account["held_out"] else []
    if lost := account.get("held_out_dropped"):
        words.append(f"{lost:,} more held-out rows are too long and are not measured")
    if refused := account.get("held_out_refused"):
        words.append(f"{refused:,} more held-out rows are refused by the chat template and are not measured")
    if "packed_into" in account:
        words.append(f"{account['packed']:,} sequences packed into {account['packed_into']:,}")
        words.append(f"{account['padding']:.1%} of their room is empty")
    return ", ".join(words)
