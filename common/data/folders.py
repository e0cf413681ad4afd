"""Pictures in folders, one for each class, and what else lies there.

A class is a folder's name in Unicode's form NFC. A picture in a folder within it is of that class too. What a system puts there
of its own accord is no picture, whatever it is called.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metamoe.common.config import Splits
from metamoe.common.data.splits import by_part
from metamoe.common.errors import DataFormatError, InputFileError

SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".jp2"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
}
_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found"}


@dataclass(frozen=True)
class Listing:
    """Pictures with the number of their class, and files that are none, by what they are."""

    pictures: list[tuple[Path, int]]
    ignored: dict[str, list[Path]] = field(default_factory=dict)


def class_folders(folder: Path) -> dict[str, Path]:
    """The folders of the classes in a folder, by their names in NFC, sorted.

    Raises:
        DataFormatError: two names differ in case or in Unicode's form alone.
    """
    found: dict[str, Path] = {}
    alike: dict[str, Path] = {}
    for entry in sorted(folder.glob("*")):
        if not entry.is_dir() or _system(entry.name):
            continue
        name = unicodedata.normalize("NFC", entry.name)
        if (other := alike.setdefault(name.casefold(), entry).name) != entry.name:
            raise DataFormatError(
                f"{folder} has the folders {other!r} and {entry.name!r}, which are one class to some systems; "
                "give one of them another name, or put all of it into one"
            )
        found[name] = entry
    return dict(sorted(found.items()))


def part_folders(folder: Path, splits: Splits) -> dict[str, Path]:
    """The folders of a set's parts: one called train, and what there is of validation and test.

    Raises:
        DataFormatError: two are the same part, or there is none of a name that the settings give.
    """
    places = [entry for entry in sorted(folder.glob("*")) if entry.is_dir() and not _system(entry.name)]
    parts = by_part(places, splits, str(folder))
    for part, found in parts.items():
        if len(found) > 1:
            raise DataFormatError(f"{found[0]} and {found[1]} are both of the part {part}; set data.splits.{part}")
    return {part: found[0] for part, found in parts.items()}


def classes_of_parts(folder: Path, parts: Mapping[str, Path]) -> list[str]:
    """Names of the classes in the part that trains, sorted; the other parts have no others.

    Raises:
        InputFileError: there is none.
        DataFormatError: another part has one that is not there.
    """
    train = parts.get("train", folder / "train")
    names = list(class_folders(train))
    if not names:
        raise InputFileError(
            f"{train} has no folder for a class; expected are files such as train/CLASS NAME/1.png, or a table of "
            "paths and labels, train.csv"
        )
    for part, place in parts.items():
        if unknown := sorted(set(class_folders(place)) - set(names)):
            raise DataFormatError(f"{place} has the class {unknown[0]!r}, which {train} has not; is {part} what it is?")
    return names


def list_pictures(folder: Path, names: Sequence[str]) -> Listing:
    """The pictures of each class in the order of their paths, and all that is no picture, or in no class."""
    pictures: list[tuple[Path, int]] = []
    ignored: dict[str, list[Path]] = defaultdict(list)
    places = class_folders(folder)
    for label, name in enumerate(names):
        for file in sorted(_files(places[name])) if name in places else ():
            if kind := _no_picture(file, folder):
                ignored[kind].append(file)
            else:
                pictures.append((file, label))
    for entry in sorted(folder.glob("*")):
        if entry.is_file():
            ignored[_no_picture(entry, folder) or "in no folder of a class"].append(entry)
    return Listing(pictures, dict(ignored))


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if not file.is_dir()]


def _no_picture(file: Path, folder: Path) -> str | None:
    if any(map(_system, file.relative_to(folder).parts)):
        return "of the system"
    suffix = file.suffix.lower()
    return None if suffix in SUFFIXES else f"not pictures that can be read ({suffix or 'no suffix'})"


def _system(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM
