"""Compressed files: their suffixes, and a stream of the bytes in them, which are unpacked as they are read."""

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from stages.runtime.errors import StageError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile)
"""What the readers raise for a damaged or incomplete file. `bz2` and zstd raise OSError without a number instead."""


def without_compression(name: str) -> str:
    """The name of the file that a compressed file holds: `x.csv` for `x.csv.gz`, and for `x.csv` itself."""
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in COMPRESSED else name


def open_bytes(path: Path) -> BinaryIO:
    """A stream of the bytes of a file; those of a compressed file are unpacked.

    Raises:
        StageError: a .zip file does not hold exactly one file, or this installation cannot read .zst files.
        OSError, and those in `DAMAGED`: the file cannot be read.
    """
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".bz2":
            return cast(BinaryIO, bz2.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
        case ".zst":
            return _zstd(path)
        case ".zip":
            return _zip(path)
        case _:
            return open(path, "rb")


def _zstd(path: Path) -> BinaryIO:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise StageError(f"`{path}`: the installed pyarrow reads no .zst files; `pip install -U pyarrow`, or unpack it")
    return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")))


def _zip(path: Path) -> BinaryIO:
    archive = zipfile.ZipFile(path)
    files = [entry for entry in archive.infolist() if not entry.is_dir() and not entry.filename.startswith("__MACOSX/")]
    if len(files) != 1:
        raise StageError(f"`{path}` holds {len(files)} files, and a .zip file is read if it holds one; unpack it")
    if files[0].flag_bits & 1:
        raise StageError(f"`{path}` is encrypted; unpack it")
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, archive.open(files[0]))))
