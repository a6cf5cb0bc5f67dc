"""Data files: which files a path names, and the rows of a file as the file has them."""

import codecs
import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from stages.data.formats._values import listed, type_in_words
from stages.data.row import FileRow, RowError
from stages.runtime.errors import StageError, nearest

FILE_TYPES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
BINARY = (".parquet", ".arrow")  # read by pyarrow; all other types are text, which may be compressed as .gz
TABLES = (".csv", ".tsv", *BINARY)  # types in which every row has every column
# Encodings that detection chooses from: among all encodings, a rare one often fits a short text best.
_LIKELY = ("big5", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r", "cp1252")
_SAMPLE = 256 * 1024  # bytes that encoding detection reads
_FIELD = 64 * 1024 * 1024  # the most characters in a CSV field; a quote that is never closed makes a longer one

ReadRow = tuple[str, FileRow | RowError]
"""Where a row is, as `path:12` or `path: row 12`, and the row, or what is wrong with it."""


# Paths


def file_type(path: Path) -> str:
    """The type of a file by its name: `.csv` for `x.csv` and for `x.csv.gz`."""
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return Path(name).suffix if not name.endswith(".gz") or inner in BINARY else inner


def find_files(path: str) -> list[Path]:
    """The file that a path names, the data files in a folder, or the files that match a pattern, sorted by name.

    Raises:
        StageError: there is no such file, or the type of a file is unknown.
    """
    if not path.strip():
        raise StageError("`path` is empty; name a file, a folder or a pattern")
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            files = sorted(file for file in place.iterdir() if is_data(file))
            if not files:
                raise StageError(f"`{path}` is a folder without data files; {_types()} files are read")
        elif not place.exists() and glob.has_magic(path):
            files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
            if not files:
                raise StageError(f"no file matches `{path}`")
        else:
            files = [place]
            if not place.is_file():
                neighbours = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
                raise StageError(f"`{path}` does not exist{did_you_mean(place.name, neighbours)}")
    except OSError as error:
        raise StageError(f"`{path}` cannot be read ({error.strerror or error})") from None
    for file in files:
        if file_type(file) not in FILE_TYPES:
            raise StageError(f"`{file}` must be a {_types()} file")
    return files


def is_data(path: Path) -> bool:
    """Whether a path is a file of a known type that is not hidden."""
    return file_type(path) in FILE_TYPES and not path.name.startswith(".") and path.is_file()


def _types() -> str:
    return f"{', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]}"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The clause `; did you mean …?` with the nearest name; empty when no name is near."""
    clause = nearest(word, names)
    return clause if clause.startswith("; did you mean") else ""


# Rows


def read_file(path: Path, encoding: str | None) -> Iterator[ReadRow]:
    """The rows of a file, each with its place; a bad row does not end the iteration.

    Raises:
        StageError: the rest of the file cannot be read.
    """
    shown = str(path)
    try:
        if file_type(path) in BINARY:
            yield from _table(path, shown)
        else:
            yield from _decoded(path, encoding or _detected(path), shown)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StageError(f"`{path}` is not a complete .gz file ({error}); compress it again") from None
    except OSError as error:
        raise StageError(f"`{path}` cannot be read ({error.strerror or error})") from None


def _table(path: Path, shown: str) -> Iterator[ReadRow]:
    from pyarrow import ArrowException

    what = "Parquet" if file_type(path) == ".parquet" else "Arrow"
    try:
        batches = _parquet(path) if what == "Parquet" else _arrow(path)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{shown}: row {number}", {name: _without_nulls(value) for name, value in row.items()}
    except (ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise StageError(f"`{path}` cannot be read as {what} ({why})") from None


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    yield from parquet.ParquetFile(path).iter_batches(1024)


def _arrow(path: Path) -> Iterator[Any]:
    """Record batches of both Arrow formats: the stream, which `datasets` writes, and the file, which Feather is."""
    from pyarrow import ipc

    with open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else reader


def _without_nulls(value: Any) -> Any:
    """The value without the nulls in its objects: a table gives every object all keys that an object of any row has."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.lower().endswith(".gz") else open(path, "rb")


def _decoded(path: Path, encoding: str, shown: str) -> Iterator[ReadRow]:
    suffix = file_type(path)
    newline = "" if suffix in (".csv", ".tsv") else None
    try:
        with io.TextIOWrapper(_bytes(path), encoding=encoding, newline=newline) as file:
            if file.read(1) != "\ufeff":  # a byte order mark is not text
                file.seek(0)
            yield from _READERS[suffix](file, shown)
    except UnicodeError:
        raise StageError(_undecodable(path, encoding)) from None


def _documents(file: TextIO, shown: str) -> Iterator[ReadRow]:
    """Documents are blocks of lines, separated by blank lines."""
    for filled, block in groupby(enumerate(file, 1), lambda numbered: bool(numbered[1].strip())):
        if filled:
            numbers, lines = zip(*block, strict=True)
            yield f"{shown}:{numbers[0]}", {"text": "".join(lines).strip()}


def _json(file: TextIO, shown: str) -> Iterator[ReadRow]:
    """The file is an array of objects, or has one object per line."""
    text = file.read()
    if text.lstrip()[:1] in ("{", ""):
        yield from _lines(io.StringIO(text), shown)
    else:
        yield from _array(text, shown)


def _array(text: str, shown: str) -> Iterator[ReadRow]:
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise StageError(f"{shown}:{line}: not valid JSON ({_why(error)})") from None
    if not isinstance(array, list):
        raise StageError(f"`{shown}` holds {type_in_words(array)}, not an array of objects")
    for number, value in enumerate(array, 1):
        yield f"{shown}: row {number}", _object(value)


def _jsonl(file: TextIO, shown: str) -> Iterator[ReadRow]:
    """The file has one object per line; an array of objects, as in a .json file, is read too."""
    start = [file.readline()]
    while start[-1] and not start[-1].strip():
        start.append(file.readline())
    first = start[-1].strip()
    if not first.startswith("["):
        yield from _lines(chain(start, file), shown)
        return
    rest = file.read()
    text = "".join(start) + rest
    if rest.strip() and first.endswith("]"):  # a list on each line: every line is a bad row
        yield from _lines(io.StringIO(text), shown)
    else:
        yield from _array(text, shown)


def _lines(lines: Iterable[str], shown: str) -> Iterator[ReadRow]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{shown}:{number}", _parsed(line.rstrip())


def _parsed(line: str) -> FileRow | RowError:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"not valid JSON ({_why(error)})")
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return RowError("the row is a list of rows, not an object; write one row a line")
    return _object(value)


def _object(value: object) -> FileRow | RowError:
    return value if isinstance(value, dict) else RowError(f"the row is {type_in_words(value)}, not an object")


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _csv(file: TextIO, shown: str) -> Iterator[ReadRow]:
    first = file.readline()
    delimiter = _delimiter(first)
    records = _records(chain([first], file), delimiter, shown)
    place, header = next(records, ("", []))
    if isinstance(header, RowError):
        raise StageError(f"{place}: {header}")
    names = [name.strip() for name in header]
    if double := [name for name in names if name and names.count(name) > 1]:
        raise StageError(f"{place}: the header names {listed(double[:1])} twice; rename one")
    for place, record in records:
        if isinstance(record, RowError):
            yield place, record
        elif len(record) != len(names):
            counts = f"{len(record)} fields where the header has {len(names)}"
            sign = {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]
            yield place, RowError(f"the row has {counts}; put a field that holds a {sign} in double quotes")
        else:
            yield place, dict(zip(names, record, strict=True))


def _delimiter(header: str) -> str:
    """The delimiter of a table: the first of comma, tab and semicolon that its header has; a comma if it has none."""
    bare = re.sub('"[^"]*"', "", header)
    return next((char for char in ",\t;" if char in bare), ",")


def _records(lines: Iterable[str], delimiter: str, shown: str) -> Iterator[tuple[str, list[str] | RowError]]:
    """The records of a table. Parsing is strict: otherwise a stray quote would join rows without an error."""
    csv.field_size_limit(_FIELD)
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        place = f"{shown}:{reader.line_num + 1}"
        try:
            record = next(reader, None)
        except csv.Error as error:
            yield place, RowError(f'not valid CSV ({error}); inside a quoted field write `"` as `""`')
            continue
        if record is None:
            return
        if any(field.strip() for field in record):
            yield place, record


_READERS = {".txt": _documents, ".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv}


# Encodings


def _detected(path: Path) -> str:
    """The encoding of the file's first lines; UTF-8 when no encoding fits, so that reading reports the bad byte."""
    with _bytes(path) as file:
        sample = file.read(_SAMPLE)
    if len(sample) == _SAMPLE:
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if _mostly_utf8(sample):
        return "utf-8"
    if _chinese(sample):
        return "gb18030"
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=list(_LIKELY)).best()
    return best.encoding if best else "utf-8"


def _mostly_utf8(sample: bytes) -> bool:
    """Whether a sample is UTF-8; a few broken bytes are errors in the file, not a sign of another encoding."""
    text = sample.decode("utf-8", "replace")
    return text.count("\ufffd") * 10 <= len(text) - len(text.encode("ascii", "ignore"))


def _chinese(sample: bytes) -> bool:
    """Whether a sample decodes as GB18030, mostly to common characters: text in another encoding does not.

    EUC-KR text is the exception, but nearly all of its characters are Hangul when it is decoded as EUC-KR.
    """
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    except UnicodeDecodeError:
        return False
    han = "".join(char for char in text if "一" <= char <= "鿿")
    common = len(han.encode("gb2312", "ignore")) // 2
    hangul = sum("가" <= char <= "힣" for char in sample.decode("euc_kr", "ignore"))
    return common > 0.65 * sum(char > "\x7f" for char in text) and hangul < 0.9 * len(han)


def _undecodable(path: Path, encoding: str) -> str:
    """The message that names the first byte of the file that the encoding cannot decode, and its line."""
    decoder, offset = codecs.getincrementaldecoder(encoding)(), 0
    with _bytes(path) as file:
        for number, line in enumerate(chain(file, [b""]), 1):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(line, final=not line)
            except UnicodeError as error:
                byte = offset - held + getattr(error, "start", 0)  # UTF-16 without a byte order mark has no `start`
                where = f"{path}:{number if line else number - 1}: byte {byte}"
                return f"{where} of the file is not {encoding}; fix it, or name the encoding with `encoding:`"
            offset += len(line)
    return f"`{path}` is not {encoding}; name its encoding with `encoding:`"
