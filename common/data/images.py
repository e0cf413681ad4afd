"""Labelled images from folders, one for each class, or from a hub."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from metamoe.common.config import Data
from metamoe.common.data.hub import load_from_hub
from metamoe.common.errors import DataFormatError, InputFileError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
_PARTS = ("train", "validation", "test")
_VALIDATION_SHARE, _TEST_SHARE = 0.1, 0.2


def load_images(data: Data, name: str, split: str, hub: str) -> Dataset:
    """One part of a domain or of the public set: columns ``image`` (mode RGB, decoded when used) and ``label``.

    A set without a part for tests uses its validation part, and without that a fifth of a shuffle with seed 0; one without a
    part for validation uses the last tenth of what trains.

    Args:
        data: settings; ``data.folder`` says where to look: NAME/train/CLASS/*.png, NAME/test/CLASS/*.png.
        name: of the set, in ``data.folder``.
        split: "train", "validation" or "test".
        hub: its hub id, if there is no folder.

    Raises:
        InputFileError: there are no images.
        HubError: the hub does not give it.
        DataFormatError: it has no column for images or labels.
    """
    return _parts(data.folder, name, hub)[split]


def class_folders(folder: Path) -> list[str]:
    """Names of the classes in a folder with one for each, sorted."""
    return sorted(entry.name for entry in folder.glob("*") if entry.is_dir())


def classes_of_parts(folder: Path) -> list[str]:
    """Names of the classes in ``folder/train``, sorted; the folder's other parts have no others.

    Raises:
        InputFileError: there is none.
        DataFormatError: ``folder/validation`` or ``folder/test`` has another.
    """
    names, *others = (class_folders(folder / part) for part in _PARTS)
    if not names:
        raise InputFileError(f"{folder / 'train'} has no folder for a class; expected are files such as train/CLASS NAME/1.png")
    for part, found in zip(_PARTS[1:], others, strict=True):
        if unknown := sorted(set(found) - set(names)):
            raise DataFormatError(f"{folder / part} has the class {unknown[0]!r}, which {folder / 'train'} has not")
    return names


def image_files(folder: Path, names: list[str]) -> list[tuple[Path, int]]:
    """The image files of each class, with its number, in the order of their paths."""
    return [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in _SUFFIXES
    ]


def readable(file: Path) -> bool:
    """Whether a file is an image that can be decoded."""
    try:
        with PILImage.open(file) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError):
        return False
    return True


def image_dataset(files: list[tuple[Path, int]], names: list[str]) -> Dataset:
    """Files with their classes' numbers as a data set."""
    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": [str(f) for f, _ in files], "label": [label for _, label in files]}, features=features)


@lru_cache(maxsize=16)
def _parts(folder: str, name: str, hub: str) -> dict[str, Dataset]:
    found = _from_folder(Path(folder) / name) if folder else _from_hub(hub)
    rng = np.random.default_rng(0)
    if "test" not in found:
        if "validation" in found:
            found["test"] = found.pop("validation")
        else:
            order = rng.permutation(len(found["train"]))
            tested, train = np.split(order, [round(_TEST_SHARE * len(order))])
            found |= {"test": found["train"].select(np.sort(tested)), "train": found["train"].select(np.sort(train))}
    if "validation" not in found:
        order = rng.permutation(len(found["train"]))
        kept, train = np.split(order, [round(_VALIDATION_SHARE * len(order))])
        found |= {"validation": found["train"].select(np.sort(kept)), "train": found["train"].select(np.sort(train))}
    return found


def _from_folder(folder: Path) -> dict[str, Dataset]:
    names, parts = classes_of_parts(folder), {}
    for part in _PARTS:
        if files := image_files(folder / part, names):
            parts[part] = image_dataset(files, names)
    if "train" not in parts:
        raise InputFileError(f"{folder / 'train'} has no images in its folders")
    return parts


def _from_hub(hub: str) -> dict[str, Dataset]:
    found = load_from_hub(hub)
    parts = {}
    for part in _PARTS:
        if part in found:
            columns = found[part].features
            image = next((name for name in _IMAGE_COLUMNS if isinstance(columns.get(name), Image)), None)
            label = next((name for name in _LABEL_COLUMNS if isinstance(columns.get(name), ClassLabel)), None)
            if image is None or label is None:
                raise DataFormatError(
                    f"{hub}, {part} has the columns {sorted(columns)}; wanted are images in one of {list(_IMAGE_COLUMNS)} and "
                    f"class labels in one of {list(_LABEL_COLUMNS)}"
                )
            renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
            data = found[part].select_columns([image, label]).rename_columns(renamed)
            # A part without labels is for a contest, not for us.
            if min(data["label"], default=-1) >= 0:
                parts[part] = data.cast_column("image", Image(mode="RGB"))
    if "train" not in parts:
        raise DataFormatError(f"{hub} has the parts {sorted(found)}; a part 'train' is needed")
    return parts
