"""The parts of a data set: which name is which part, and what becomes one where there is none."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from metamoe.common.config import Splits
from metamoe.common.errors import DataFormatError

PARTS = ("train", "validation", "test")
_USUAL = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}

_Place = TypeVar("_Place", str, Path)


def part_of(name: str, splits: Splits) -> str | None:
    """Which part a folder, a file or a part of a hub set is by its name; None if it is none.

    A file's name may say more: ``train-00000-of-00002.parquet`` and ``cosmosqa_train.jsonl.gz`` are of ``train``.
    """
    named = {part: getattr(splits, part) for part in PARTS}
    stem = name.split(".")[0]
    words = {stem.lower(), *re.split(r"[\W_]+", stem.lower())}
    found = [
        part
        for part, given in named.items()
        if (given in (name, stem) or stem.startswith(f"{given}-0") if given else words & set(_USUAL[part]))
    ]
    # What a setting names is nothing else.
    exact = [part for part in found if named[part]]
    return exact[0] if exact else found[0] if len(found) == 1 else None


def by_part(places: Iterable[_Place], splits: Splits, where: str) -> dict[str, list[_Place]]:
    """Folders, files or parts of a hub set by the part that they are, in the order of ``PARTS``.

    Raises:
        DataFormatError: there is none of a name that the settings give.
    """
    found: dict[str, list[_Place]] = {part: [] for part in PARTS}
    names = []
    for place in places:
        name = place.name if isinstance(place, Path) else place
        names.append(name)
        if part := part_of(name, splits):
            found[part].append(place)
    for part, there in found.items():
        if (given := getattr(splits, part)) and not there:
            raise DataFormatError(f"data.splits.{part} = {given!r}: {where} has only {', '.join(sorted(names)) or 'nothing'}")
    return {part: there for part, there in found.items() if there}
