"""Data files: which files a path names, and the rows of a file as the file has them."""

import csv
import glob
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TextIO

from stages.data.compressed import COMPRESSED, DAMAGED, open_bytes, without_compression
from stages.data.encodings import detected, undecodable
from stages.data.formats._values import listed
from stages.data.json_rows import JsonFile, Part, ReadRow, grouped
from stages.data.row import RowError
from stages.runtime.errors import StageError, nearest
from stages.runtime.files import refuse_pointer

FILE_TYPES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
BINARY = (".parquet", ".arrow")  # read by pyarrow; all other types are text, which may be compressed
JSON = (".json", ".jsonl")
TABLES = (".csv", ".tsv", *BINARY)  # types in which every row has every column
SHOWN = 6  # data files that are named where the one that was meant is not known
_FIELD = 64 * 1024 * 1024  # the most characters in a CSV field; a quote that is never closed makes a longer one
OTHER_TYPES = {
    **dict.fromkeys((".md", ".markdown", ".rst"), "`cp {file} {stem}.txt` makes it a text, with its marks"),
    **dict.fromkeys(
        (".docx", ".odt", ".rtf", ".html", ".htm", ".epub"),
        "`pandoc {file} -t plain --wrap=none -o {stem}.txt` makes it a text",
    ),
    ".doc": "`soffice --headless --convert-to txt:Text {file}` makes it a text",
    ".pdf": "`pdftotext -layout {file} {stem}.txt` makes it a text",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save its sheet as `{stem}.csv`"),
    **dict.fromkeys((".ndjson", ".jsonlines"), "rename it to `{stem}.jsonl`"),
}
"""Types of files that people have: how one becomes a file that is read."""
# `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write these next to their .arrow files; none of them holds rows.
_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"

# Paths


def file_type(path: Path) -> str:
    """The type of a file by its name: `.csv` for `x.csv` and for `x.csv.gz`."""
    name = path.name.lower()
    inner = Path(without_compression(name)).suffix
    return Path(name).suffix if inner in BINARY else inner


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
            files = _saved(place) or sorted(file for file in place.iterdir() if is_data(file))
            if not files:
                raise StageError(f"`{path}` is a folder without data files; {_types()} files are read")
        elif not place.exists() and glob.has_magic(path):
            files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
            if not files:
                raise StageError(f"no file matches `{path}`")
        else:
            files = [place]
            if not place.is_file():
                if "\\" in path:
                    raise StageError(f"`{path}` does not exist; write folders with `/`: `{path.replace(chr(92), '/')}`")
                raise StageError(f"`{path}` does not exist{_data_near(place)}")
    except OSError as error:
        raise StageError(f"`{path}` cannot be read ({error.strerror or error})") from None
    for file in files:
        if file_type(file) not in FILE_TYPES:
            if (way := OTHER_TYPES.get(file.suffix.lower())) is not None:
                raise StageError(f"`{file}` is not read as it is; {way.format(file=file, stem=file.with_suffix(''))}")
            packed = f"{', '.join(COMPRESSED[:-1])} or {COMPRESSED[-1]}"
            raise StageError(f"`{file}` must be a {_types()} file; all but the last two may be compressed as {packed}")
    return files


def _saved(folder: Path) -> list[Path]:
    """The files with the rows of a folder that `Dataset.save_to_disk` wrote, in their order; empty for other folders.

    Raises:
        StageError: the folder holds several data sets, or its list of files cannot be used.
    """
    if (folder / _DICT).is_file():
        splits = [str(entry) for entry in sorted(folder.iterdir()) if (entry / _STATE).is_file()]
        raise StageError(f"`{folder}` holds a data set for each split; name one of {listed(splits)} as `path:`")
    if not ((folder / _STATE).is_file() and (folder / _INFO).is_file()):
        return []
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        mapped = bool(state.get("_indices_data_files"))
    except (ValueError, KeyError, TypeError, AttributeError):
        names, mapped = [], True
    if mapped or not names or any(Path(name).name != name for name in names):
        raise StageError(f"`{folder / _STATE}` does not list the data files; save the data set again, as .parquet")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise StageError(f"`{folder / missing[0]}`, which `{_STATE}` lists, does not exist; save the data set again")
    return [folder / name for name in names]


def is_saved_metadata(path: Path) -> bool:
    """Whether a file describes a data set that `save_to_disk` wrote, and holds no rows."""
    return path.name in (_STATE, _INFO, _DICT) and any((path.parent / name).is_file() for name in (_STATE, _DICT))


def is_data(path: Path) -> bool:
    """Whether a path is a file of a known type that is not hidden."""
    return file_type(path) in FILE_TYPES and not path.name.startswith(".") and path.is_file()


def _types() -> str:
    return f"{', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]}"


def _data_near(place: Path) -> str:
    """The data file or folder that was meant, as a clause; the first data files in the folder where none is near."""
    if not place.parent.is_dir():
        return f"; there is no folder `{place.parent}`"
    entries = sorted(entry for entry in place.parent.iterdir() if not entry.name.startswith("."))
    files = [entry.name for entry in entries if is_data(entry)]
    known = files if file_type(place) in FILE_TYPES else [entry.name for entry in entries if entry.is_dir()] + files
    by_stem = {name.partition(".")[0]: name for name in reversed(known)}
    near = did_you_mean(place.name.partition(".")[0], by_stem)
    if near:
        return f"; did you mean `{by_stem[near.split('`')[1]]}`?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"; there is {listed(known[:SHOWN])}{more}" if known else "; its folder has no data files"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The clause `; did you mean …?` with the nearest name; empty when no name is near."""
    clause = nearest(word, names)
    return clause if clause.startswith("; did you mean") else ""


# Rows


@dataclass(frozen=True)
class HowToRead:
    """How to read the rows of a file."""

    encoding: str | None = None
    """None: it is detected."""
    key: str | None = None
    """The key of the list of rows in a JSON file that is one object."""
    columns: Collection[str] = ()
    """Columns of which every row has all. They tell a row from an object that holds a list of rows."""


def parts(path: Path, how: HowToRead, told: Callable[[str], None]) -> Iterator[Part]:
    """The rows of a file in parts, each row with its place; a bad row does not end the iteration.

    Another process may ask a part for its rows. `told` is called with what a reader of the plan should know.

    Raises:
        StageError: the rest of the file cannot be read.
    """
    shown, kind = str(path), file_type(path)
    try:
        refuse_pointer(path)
        if how.key is not None and kind not in JSON:
            raise StageError(f"`rows: {how.key}` names a key of a JSON file, and `{path}` is none; remove `rows:`")
        if kind in BINARY:
            yield from grouped(_table(path, shown))
            return
        encoding = how.encoding or detected(path)
        try:
            yield from _text_parts(path, encoding, how, told)
        except UnicodeError:
            raise StageError(undecodable(path, encoding)) from None
    except DAMAGED as error:
        raise StageError(_incomplete(path, error)) from None
    except OSError as error:
        if path.suffix.lower() in COMPRESSED and error.errno is None:
            raise StageError(_incomplete(path, error)) from None
        raise StageError(f"`{path}` cannot be read ({error.strerror or error})") from None


def _incomplete(path: Path, error: Exception) -> str:
    return f"`{path}` is not a complete {path.suffix.lower()} file ({error}); compress it again"


def _text_parts(path: Path, encoding: str, how: HowToRead, told: Callable[[str], None]) -> Iterator[Part]:
    shown, kind = str(path), file_type(path)
    if kind in JSON:
        file = JsonFile(shown, lambda: _opened(path, encoding), how.key, how.columns, told)
        yield from file.parts(one_a_line=kind == ".jsonl")
        return
    with _opened(path, encoding, newline=None if kind == ".txt" else "") as text:
        yield from grouped(_documents(text, shown) if kind == ".txt" else _csv(text, shown))


def _opened(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    """The text of a file, without a byte order mark."""
    for begin in (0, 1):
        file = io.TextIOWrapper(open_bytes(path), encoding=encoding, newline=newline)
        try:
            if begin == 1 or file.read(1) == "\ufeff":  # a byte order mark is not text
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    raise AssertionError


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


def _documents(file: TextIO, shown: str) -> Iterator[ReadRow]:
    """Documents are blocks of lines, separated by blank lines."""
    for filled, block in groupby(enumerate(file, 1), lambda numbered: bool(numbered[1].strip())):
        if filled:
            numbers, lines = zip(*block, strict=True)
            yield f"{shown}:{numbers[0]}", {"text": "".join(lines).strip()}


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
        if any(map(str.strip, record)):
            yield place, record
