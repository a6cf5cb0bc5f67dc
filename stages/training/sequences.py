"""Rows as sequences for a trainer: Arrow columns of token ids and labels, and the token counts of each data set."""

import struct
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stages.chat import encoding
from stages.chat.encoder import Encoder
from stages.chat.labels import IGNORED, Encoded
from stages.data import drawing
from stages.data.row import Row

if TYPE_CHECKING:
    import pyarrow as pa

SOME = 8  # chunks of a process after which a faster tokenizer is worth looking for
_COMPARED = 4000  # tokens of a vocabulary that the search goes through in the time of a chunk


def sequences(
    tokenizer: Any, limit: int | None, cut: bool, data: int, *, whole: bool = False
) -> Callable[[drawing.Chunk], tuple["pa.RecordBatch | None", list[encoding.Tokens]]]:
    """A function that turns a chunk of rows into a batch of sequences and the token counts of each data set.

    `whole`: pairs are conversations as a reward model reads them (`encoding.encode`).
    """
    some = max(SOME, len(tokenizer) // _COMPARED)
    begun, encoder = 0, Encoder(tokenizer)

    def work(chunk: drawing.Chunk) -> tuple["pa.RecordBatch | None", list[encoding.Tokens]]:
        nonlocal begun, encoder
        begun += 1
        if begun == some:
            encoder = encoder.with_twin()
        totals = [encoding.Tokens() for _ in range(data)]
        columns: defaultdict[str, _Column] = defaultdict(_Column)
        trained = list(chunk.trained())
        encoded = encoding.encode(encoder, [placed.row for _, placed, _ in trained], whole=whole)
        for (_, placed, copies), row in zip(trained, encoded, strict=True):
            if totals[placed.data].count(row, limit, cut=cut, place=placed.place, copies=copies):
                for example in examples(placed.row, row, limit, cut, whole=whole) * copies:
                    for name, values in example.items():
                        columns[name].add(values)
        return _batch(columns), totals

    return work


def examples(
    row: Row, encoded: Sequence[Encoded], limit: int | None, cut: bool, *, whole: bool = False
) -> "list[dict[str, array[int] | bool]]":
    """The sequences of a row, by column. All tokens of `cut` rows are in the loss, so they have no `labels`.

    A text or a conversation has `input_ids` and `labels`; a preference pair `prompt_ids`, `chosen_ids` and
    `rejected_ids`, or with `whole` only the last two, after the prompt; a labelled answer `prompt_ids`,
    `completion_ids` and `label`.
    """
    ids, trained = _numbers(encoded[0].ids), encoded[0].trained
    if whole:
        return [{"chosen_ids": ids, "rejected_ids": _numbers(encoded[1].ids)}]
    if "chosen" in row:  # chosen and rejected, after the same prompt
        ((start, _),) = trained
        rejected = _numbers(encoded[1].ids[start:])
        return [{"prompt_ids": ids[:start], "chosen_ids": ids[start:], "rejected_ids": rejected}]
    if "label" in row:
        ((start, _),) = trained
        return [{"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": row["label"]}]
    if cut:
        length = limit or len(ids)
        return [{"input_ids": ids[start : start + length]} for start in range(0, len(ids), length)]
    labels = array("i", [IGNORED]) * len(ids)
    for begin, end in trained:
        labels[begin:end] = ids[begin:end]
    return [{"input_ids": ids[:limit], "labels": labels[:limit]}]


def _numbers(ids: list[int]) -> "array[int]":
    """Token ids as 32-bit numbers; building the `array` itself takes twice as long."""
    return array("i", struct.pack(f"{len(ids)}i", *ids))


class _Column:
    """A column of lists of numbers as Arrow stores them (all values, and the end of each list), or of booleans."""

    def __init__(self) -> None:
        self.values, self.ends = array("i"), array("i", [0])
        self.flags: list[bool] = []

    def add(self, values: "array[int] | bool") -> None:
        if isinstance(values, bool):
            self.flags.append(values)
            return
        self.values.extend(values)
        self.ends.append(len(self.values))

    def made(self) -> "pa.Array":
        import pyarrow as pa

        def numbers(values: "array[int]") -> pa.Array:
            return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])

        if self.flags:
            return pa.array(self.flags)
        return pa.ListArray.from_arrays(numbers(self.ends), numbers(self.values))


def _batch(columns: dict[str, _Column]) -> "pa.RecordBatch | None":
    import pyarrow as pa

    return pa.RecordBatch.from_pydict({name: column.made() for name, column in columns.items()}) if columns else None


def lengths(rows: "pa.RecordBatch") -> list[int]:
    """The number of tokens of each sequence, the two of a pair one after the other."""
    from pyarrow import compute

    names = [name for name in rows.schema.names if name != "label"]
    columns = {name: compute.list_value_length(rows[name]).to_pylist() for name in names}
    if "input_ids" in columns:
        return list(columns["input_ids"])
    prompts = columns.pop("prompt_ids", [0] * rows.num_rows)
    return [prompt + answer for prompt, *answers in zip(prompts, *columns.values(), strict=True) for answer in answers]
