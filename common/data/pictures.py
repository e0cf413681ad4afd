"""Where a set's pictures are, and of which class each is: by folders, or by a table."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from metamoe.common.config import Data
from metamoe.common.data.folders import class_folders, classes_of_parts, list_pictures, part_folders
from metamoe.common.data.splits import PARTS, by_part, part_of
from metamoe.common.data.tables import read_rows, tables_in
from metamoe.common.errors import DataFormatError, InputFileError

IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "path", "file", "image_path")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category")
_SPLIT_COLUMN = "split"

Pictures = str | dict[str, Any]
"""The path of an image, or its bytes as Parquet files of image sets have them: ``bytes`` and ``path``."""


@dataclass(frozen=True)
class Found:
    """The pictures of a set by part, each with the number of its class among ``names``, and what was not taken for one.

    Attributes:
        owners: by part, what each picture's row has in the column ``data.partition.column``, None where there is none; empty
            without that setting.
    """

    names: list[str]
    parts: dict[str, list[tuple[Pictures, int]]]
    ignored: dict[str, list[Path]]
    owners: dict[str, list[str | None]] = field(default_factory=dict)


class _Row(NamedTuple):
    """What a table says of a picture."""

    image: Pictures
    label: str
    split: str | None
    owner: str | None


def find_pictures(folder: Path, data: Data) -> Found:
    """The pictures of a set in a folder, which has ``train`` with a folder for each class, or folders of at least two classes
    alone, or tables of paths and labels.

    Tables are files named after the set's parts, such as ``train.csv`` and ``test.csv``, or one of any name, which may have a
    column ``split``.

    Raises:
        InputFileError: there are no pictures to train on, or a file cannot be read.
        DataFormatError: a class is unclear, or a table lacks a column, or names a picture that is not there.
    """
    tables = tables_in(folder)
    parts = part_folders(folder, data.splits) if not any(part_of(table.name, data.splits) for table in tables) else {}
    if tables and not (parts.get("train") and class_folders(parts["train"])):
        return _by_tables(folder, tables, data)
    if not parts and len(class_folders(folder)) > 1:
        # Not divided: as a table or a file of questions that is not, all of it trains but for what is cut off.
        parts = {"train": folder}
    names = classes_of_parts(folder, parts)
    pictures: dict[str, list[tuple[Pictures, int]]] = {}
    ignored: dict[str, list[Path]] = defaultdict(list)
    for part, place in parts.items():
        listing = list_pictures(place, names)
        pictures[part] = [(str(file), label) for file, label in listing.pictures]
        for kind, files in listing.ignored.items():
            ignored[kind] += files
    if not pictures["train"]:
        raise InputFileError(f"{parts['train']} has no images in its folders")
    return Found(names, pictures, dict(ignored))


def pictures_at(place: Path, data: Data) -> Found:
    """Pictures that are not divided into parts: a folder with one for each class, or a table. Errors as
    :func:`find_pictures`.
    """
    if place.is_file():
        rows = _table(place, data)
        names = _names([row.label for row in rows], str(place))
        return Found(names, {"test": [(row.image, names.index(row.label)) for row in rows]}, {})
    names = list(class_folders(place))
    listing = list_pictures(place, names)
    return Found(names, {"test": [(str(file), label) for file, label in listing.pictures]}, listing.ignored)


def _by_tables(folder: Path, tables: Sequence[Path], data: Data) -> Found:
    named = by_part(tables, data.splits, str(folder)) if len(tables) > 1 else {}
    if len(tables) > 1 and "train" not in named:
        raise InputFileError(
            f"{folder} has the tables {[table.name for table in tables]}, of which none is to train on; name one train.csv, or "
            "set data.splits.train"
        )
    rows: dict[str, list[_Row]] = {part: [] for part in PARTS}
    for part, files in (named or {"train": list(tables)}).items():
        for file in files:
            for row in _table(file, data):
                own = part if row.split is None or named else part_of(row.split, data.splits)
                if own is None:
                    raise DataFormatError(f"{file} has the {_SPLIT_COLUMN} {row.split!r}; known are train, validation and test")
                rows[own].append(row)
    if not rows["train"]:
        raise InputFileError(f"{folder} has no pictures to train on in its tables")
    names = _names([row.label for row in rows["train"]], str(folder))
    number = {name: i for i, name in enumerate(names)}
    for part, found in rows.items():
        if unknown := sorted({row.label for row in found} - set(names)):
            raise DataFormatError(f"{folder}: {part} has the class {unknown[0]!r}, which what trains has not")
    pictures = {part: [(row.image, number[row.label]) for row in found] for part, found in rows.items() if found}
    owners = {part: [row.owner for row in found] for part, found in rows.items() if data.partition.column}
    return Found(names, pictures, {}, owners)


def _table(file: Path, data: Data) -> list[_Row]:
    found = []
    for place, row in read_rows(file):
        image = _column(row, data.image_column, IMAGE_COLUMNS, "data.image-column", place)
        label = _column(row, data.label_column, LABEL_COLUMNS, "data.label-column", place)
        if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
            raise DataFormatError(f"{place}: the label {label!r} is neither text nor a whole number")
        split = row.get(_SPLIT_COLUMN)
        name = unicodedata.normalize("NFC", str(label).strip())
        owner = owner_of(row, data.partition.column)
        found.append(_Row(_image(image, file.parent, place), name, None if split is None else str(split), owner))
    return found


def owner_of(row: Any, column: str) -> str | None:
    """What a row has in the column by which a set is divided, as text; None if that is nothing."""
    value = row.get(column) if column else None
    return None if value is None or value == "" else str(value)


def _column(row: Any, given: str, usual: Sequence[str], setting: str, place: str) -> Any:
    name = given or next((name for name in usual if name in row), None)
    if name not in row:
        wanted = f"{setting} = {given!r}" if given else f"one of {list(usual)}, or set {setting}"
        raise DataFormatError(f"{place} has the columns {sorted(map(str, row))}; wanted is {wanted}")
    return row[name]


def _image(value: Any, folder: Path, place: str) -> Pictures:
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return {"bytes": value["bytes"], "path": None}
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DataFormatError(f"{place}: the image {value!r} is no path")
    path = PurePath(value.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise DataFormatError(f"{place}: {value!r} has to be a path within {folder}, where the table is")
    if not (folder / path).is_file():
        raise DataFormatError(f"{place}: {folder / path} is not there")
    return str(folder / path)


def _names(labels: Sequence[str], where: str) -> list[str]:
    names = sorted(set(labels))
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(name.casefold(), name)) != name:
            raise DataFormatError(
                f"{where} has the classes {other!r} and {name!r}, which differ in case alone; write them alike"
            )
    return names
