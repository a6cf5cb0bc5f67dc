"""Weights read and written one at a time, so that memory holds one weight, however large the model or a file is.

A safetensors file is 8 bytes with the length of the header, the header as JSON, and the weights
(https://github.com/huggingface/safetensors#format). Files are those that `safetensors.torch.save_file` writes, byte
for byte; that function wants all weights of a file at once.
"""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.model.facts import weight_files

if TYPE_CHECKING:
    import torch

# safetensors writes the weights of a file by dtype, the last of these first, and then by name.
DTYPES = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)

Entry = dict[str, Any]
"""What a header says of a weight: `dtype` in the words of safetensors, `shape`, and `data_offsets` in bytes."""
Change = Callable[[str, "torch.Tensor"], "torch.Tensor"]
"""The name of a weight, and the weight as it is stored → the weight to be written."""
Check = Callable[[str, "torch.Tensor", "torch.Tensor"], None]
"""It gets the name of a weight, the weight to be written, and the weight as it was written."""


class Weights:
    """The weights of a model folder, in the order of its files."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self.entries: dict[str, Entry] = {}
        for file in weight_files(folder):
            with open(file, "rb") as opened:
                header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
            header.pop("__metadata__", None)
            self.entries.update(sorted(header.items()))
            self.files.update(dict.fromkeys(header, file))

    def read(self, name: str) -> "torch.Tensor":
        """A weight as it is stored."""
        return read(self.files[name], name)

    def size(self, name: str) -> int:
        """The bytes of a weight."""
        start, end = self.entries[name]["data_offsets"]
        return int(end - start)


def read(file: Path, name: str) -> "torch.Tensor":
    """A weight of a file, which is mapped into memory as long as the tensor is there.

    The file is opened for each weight, because pages that were read stay in memory until the mapping ends.
    """
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        return opened.get_tensor(name)


def write(weights: Weights, change: Change, out: Path, limit: int, check: Check | None = None) -> int:
    """Write every weight, as `change` hands it back, into files of at most `limit` bytes of weights each.

    `change` keeps dtype and shape. A weight larger than `limit` gets a file of its own. Several files get an index, as
    transformers writes one. `check` gets each weight as it was handed back, and as safetensors reads it from the file.

    Returns:
        The number of files.
    """
    shards = list(_shards(weights, limit))
    index: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if shards[1:] else "model.safetensors"
        _write_file(out / file, names, weights, change, check)
        index.update(dict.fromkeys(names, file))
    if shards[1:]:
        total = sum(map(weights.size, weights.entries))
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return len(shards)


def _shards(weights: Weights, limit: int) -> Iterator[list[str]]:
    """The names of the weights of each file, in the order of the source."""
    names: list[str] = []
    size = 0
    for name in weights.entries:
        if names and size + weights.size(name) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += weights.size(name)
    yield names


def _write_file(file: Path, names: list[str], weights: Weights, change: Change, check: Check | None) -> None:
    import torch

    entries = weights.entries
    names = sorted(names, key=lambda name: (-DTYPES.index(entries[name]["dtype"]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        header[name] = {**entries[name], "data_offsets": [end, end := end + weights.size(name)]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)  # safetensors reads a file only if it has its full size
        for name in names:
            weight = change(name, weights.read(name))
            opened.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy())
            if check is not None:
                opened.flush()
                check(name, weight, read(file, name))
