"""Rows of a file: JSON, JSON lines, CSV or Parquet, as other programs write them."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from pyarrow import parquet

from metamoe.common.errors import DataFormatError, InputFileError

Row = Mapping[str, Any]
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Each but Parquet may end in .gz."""

_BATCH = 1_000


def table_kind(file: Path) -> str | None:
    """The ending by which a table is read, such as ".csv"; None for other files."""
    name = file.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind) and not name.startswith(".")), None)


def tables_in(folder: Path) -> list[Path]:
    """The tables that lie in a folder, by their names."""
    return sorted(file for file in folder.glob("*") if table_kind(file) and file.is_file())


def read_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a table one by one, each with where it is, for errors.

    Text is UTF-8, or UTF-16 with a byte order mark; lines end in any usual way. A cell of a CSV file is text.

    Raises:
        InputFileError: the file cannot be read.
        DataFormatError: it is not what its name says.
    """
    kind = table_kind(file)
    try:
        if kind == ".parquet":
            yield from _parquet(file)
        elif kind:
            with _text(file, newline="" if kind in (".csv", ".tsv") else None) as stream:
                reader = {".json": _json, ".csv": _csv, ".tsv": _csv}.get(kind, _lines)
                yield from reader(stream, file)
        else:
            raise InputFileError(f"{file} is none of {', '.join(KINDS)} (or one of them with .gz after it)")
    except UnicodeDecodeError as error:
        raise InputFileError(f"{file} cannot be read: it is not UTF-8 ({error}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputFileError(f"{file} cannot be read: {error}") from error


def _text(file: Path, newline: str | None) -> TextIO:
    stream = gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")  # noqa: SIM115
    try:
        mark = stream.read(2)
        stream.seek(0)
    except BaseException:
        stream.close()
        raise
    encoding = "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return io.TextIOWrapper(stream, encoding, newline=newline)  # type: ignore[arg-type]


def _lines(stream: TextIO, file: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            place = f"{file}, line {number}"
            yield place, _object(_parsed(line, place), place)


def _json(stream: TextIO, file: Path) -> Iterator[tuple[str, Row]]:
    """A list of objects, an object with one such list in it, or, as some write it, JSON lines."""
    text = stream.read()
    try:
        whole = _parsed(text, str(file))
    except DataFormatError:
        if "\n" not in text.strip():
            raise
        yield from _lines(io.StringIO(text), file)
        return
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = lists[0] if len(lists) == 1 else [whole]
    if not isinstance(whole, list):
        raise DataFormatError(f"{file} is neither a list of JSON objects nor an object with one in it")
    for number, row in enumerate(whole, start=1):
        place = f"{file}, entry {number}"
        yield place, _object(row, place)


def _csv(stream: TextIO, file: Path) -> Iterator[tuple[str, Row]]:
    header = stream.readline()
    delimiter = max("\t,;", key=header.count)
    try:
        names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
        if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise DataFormatError(f"{file}, line 1 has to name every column once, and is {header.strip()!r}")
        names = [name.strip() for name in names]
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        for cells in reader:
            if not cells:
                continue
            place = f"{file}, line {reader.line_num + 1}"
            if len(cells) != len(names):
                raise DataFormatError(f"{place} has {len(cells)} cells for the {len(names)} columns {names}")
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataFormatError(f"{file} is not CSV: {error}") from error


def _parquet(file: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pa.ArrowException, OverflowError, MemoryError) as error:
        raise InputFileError(f"{file} cannot be read: {error}") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{place} is not JSON: {error}") from error


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataFormatError(f"{place} is not a JSON object")
    return row
