"""A client's own data: a folder of images by split and class, checked before anything is connected or trained.

DIR/train/CLASS NAME/*.png     private training images
DIR/test/CLASS NAME/*.png      images that the delivered model is evaluated on, here and nowhere else
DIR/validation/CLASS NAME/     only where settings ask for it
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from common.errors import PrivateDataError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class FolderReport:
    """What is in a client's data folder: images by split and class, and the files that cannot be used."""

    counts: dict[str, dict[str, int]]
    unreadable: list[Path]


def check_folder(folder: Path) -> FolderReport:
    """Open every image of a data folder once.

    Raises:
        PrivateDataError: there is no ``train`` with a class in it, ``test`` has a class that it has not, or the folder lies in
            a Flower app, whose files are packed up and sent.
    """
    _check_place(folder)
    names = _class_names(folder)
    counts: dict[str, dict[str, int]] = {}
    unreadable = []
    for split in ("train", "validation", "test"):
        if (folder / split).is_dir():
            counts[split] = dict.fromkeys(names, 0)
            for file, label in _files(folder, split, names):
                if _readable(file):
                    counts[split][names[label]] += 1
                else:
                    unreadable.append(file)
    return FolderReport(counts, unreadable)


def read_folder(folder: Path, split: str) -> Dataset:
    """The images of one split, in the order of their paths, decoded when they are used.

    Columns: ``image`` (mode RGB) and ``label`` (index into the sorted names of the folders in ``train``).

    Raises:
        PrivateDataError: as :func:`check_folder`; the split is empty; or an image in it cannot be read.
    """
    _check_place(folder)
    names = _class_names(folder)
    files = _files(folder, split, names)
    if not files:
        raise PrivateDataError(f"{folder / split} has no images; put them into one folder for each class")
    if bad := [file for file, _ in files if not _readable(file)]:
        raise PrivateDataError(f"{bad[0]} is not an image that can be read ({len(bad)} of {len(files)}); remove or replace it")
    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=names)})
    rows = {"image": [str(file) for file, _ in files], "label": [label for _, label in files]}
    return Dataset.from_dict(rows, features=features)


def _check_place(folder: Path) -> None:
    if not folder.is_dir():
        raise PrivateDataError(f"{folder} is not a folder")
    for parent in [folder.resolve(), *folder.resolve().parents]:
        project = parent / "pyproject.toml"
        if project.is_file() and _is_flower_app(project):
            raise PrivateDataError(
                f"{folder} lies in the Flower app {parent}: files there are packed into the app bundle and sent to every "
                "party; keep private data outside of it"
            )


def _is_flower_app(project: Path) -> bool:
    try:
        return "flwr" in tomllib.loads(project.read_text()).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False


def _class_names(folder: Path) -> list[str]:
    names = _folders(folder / "train")
    if not names:
        raise PrivateDataError(
            f"{folder / 'train'} has no folder for a class; expected are files such as train/CLASS NAME/1.png"
        )
    for split in ("validation", "test"):
        if unknown := sorted(set(_folders(folder / split)) - set(names)):
            raise PrivateDataError(f"{folder / split} has the class {unknown[0]!r}, which {folder / 'train'} has not")
    return names


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _files(folder: Path, split: str, names: list[str]) -> list[tuple[Path, int]]:
    return [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((folder / split / name).glob("*"))
        if file.suffix.lower() in _SUFFIXES
    ]


def _readable(file: Path) -> bool:
    try:
        with PILImage.open(file) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError):
        return False
    return True
