"""Labelled images from folders, one for each class, from a table of paths and labels, or from a hub."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from datasets.features.features import register_feature
from PIL import Image as PILImage

from metamoe.common.config import Data
from metamoe.common.data.decode import read_picture, rgb
from metamoe.common.data.hub import load_from_hub
from metamoe.common.data.partition import OWNERS
from metamoe.common.data.pictures import IMAGE_COLUMNS, LABEL_COLUMNS, Pictures, find_pictures
from metamoe.common.data.splits import by_part
from metamoe.common.errors import DataFormatError


@dataclass
class Picture(Image):
    """A column of images, decoded when they are used as all others are: see ``pixels.py``."""

    background: str = "white"
    _type: str = field(default="Picture", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> PILImage.Image:  # noqa: ARG002
        if isinstance(value, PILImage.Image):
            return rgb(value, self.background)
        if value["bytes"] is not None:
            return read_picture(BytesIO(value["bytes"]), self.background, value["path"] or "an image of the set")
        with fsspec.open(value["path"]) as stream:
            return read_picture(stream, self.background, value["path"])


# A data set's Arrow table says of what kind its columns are, by this name. What can be registered may change with the library's
# next version, as a warning says to whoever starts a command; constraints and tests say so to us.
with warnings.catch_warnings(action="ignore", category=UserWarning):
    register_feature(Picture, "Picture")


def load_images(data: Data, name: str, split: str, hub: str) -> Dataset:
    """One part of a domain or of the public set: columns ``image`` (mode RGB, decoded when used) and ``label``.

    A set without a part for tests uses its validation part, and without that a part of a shuffle with seed 0; one without a
    part for validation uses a part of what trains (``data.splits``).

    Args:
        data: settings; ``data.folder`` says where to look: NAME/train/CLASS/*.png, NAME/test/CLASS/*.png, or NAME/train.csv.
        name: of the set, in ``data.folder``.
        split: "train", "validation" or "test".
        hub: its hub id, if there is no folder.

    Raises:
        InputFileError: there are no images.
        HubError: the hub does not give it.
        DataFormatError: it has no column for images or labels, or its classes are not clear.
    """
    return _parts(data, name, hub)[split]


def image_dataset(pictures: Sequence[tuple[Pictures, int]], names: Sequence[str], background: str) -> Dataset:
    """Image files, or images in bytes, with their classes' numbers as a data set."""
    features = Features({"image": Picture(background=background), "label": ClassLabel(names=list(names))})
    columns = {"image": [image for image, _ in pictures], "label": [label for _, label in pictures]}
    return Dataset.from_dict(columns, features=features)


@lru_cache(maxsize=16)
def _parts(data: Data, name: str, hub: str) -> dict[str, Dataset]:
    found = _from_folder(Path(data.folder) / name, data) if data.folder else _from_hub(hub, data)
    rng = np.random.default_rng(0)
    if "test" not in found:
        if "validation" in found:
            found["test"] = found.pop("validation")
        else:
            order = rng.permutation(len(found["train"]))
            tested, train = np.split(order, [round(data.splits.test_fraction * len(order))])
            found |= {"test": found["train"].select(np.sort(tested)), "train": found["train"].select(np.sort(train))}
    if "validation" not in found:
        order = rng.permutation(len(found["train"]))
        kept, train = np.split(order, [round(data.splits.validation_fraction * len(order))])
        found |= {"validation": found["train"].select(np.sort(kept)), "train": found["train"].select(np.sort(train))}
    return found


def _from_folder(folder: Path, data: Data) -> dict[str, Dataset]:
    found = find_pictures(folder, data)
    parts = {part: image_dataset(rows, found.names, data.background) for part, rows in found.parts.items() if rows}
    for part, owners in found.owners.items():
        if part in parts:
            parts[part] = parts[part].add_column(OWNERS, owners, feature=Value("string"))
    return parts


def _from_hub(hub: str, data: Data) -> dict[str, Dataset]:
    found = load_from_hub(hub)
    parts: dict[str, Dataset] = {}
    for part, names in by_part(found, data.splits, hub).items():
        whole = concatenate_datasets([found[name] for name in names])
        image = data.image_column or next((c for c in IMAGE_COLUMNS if isinstance(whole.features.get(c), Image)), "")
        label = data.label_column or next((c for c in LABEL_COLUMNS if c in whole.features), "")
        if not isinstance(whole.features.get(image), Image) or label not in whole.features:
            raise DataFormatError(
                f"{hub}, {part} has the columns {sorted(whole.features)}; wanted are images in one of {list(IMAGE_COLUMNS)} "
                f"(data.image-column = {data.image_column!r}) and classes in one of {list(LABEL_COLUMNS)} (data.label-column "
                f"= {data.label_column!r})"
            )
        owner = data.partition.column if data.partition.column in whole.features else ""
        named = {image: "image", label: "label"} | ({owner: OWNERS} if owner else {})
        if owner in (image, label):
            raise DataFormatError(f"data.partition.column = {owner!r} is the column of the images or the classes of {hub}")
        chosen = whole.select_columns([*named]).rename_columns({old: new for old, new in named.items() if old != new})
        if owner:
            chosen = chosen.cast_column(OWNERS, Value("string"))
        if not isinstance(chosen.features["label"], ClassLabel):
            chosen = chosen.cast_column("label", Value("string"))
        # A part without labels is for a contest, not for us.
        elif min(chosen["label"], default=-1) < 0:
            continue
        parts[part] = chosen.cast_column("image", Picture(background=data.background))
    if "train" not in parts:
        raise DataFormatError(f"{hub} has the parts {sorted(found)}; one to train on is needed: set data.splits.train")
    return _numbered(parts, hub)


def _numbered(parts: dict[str, Dataset], hub: str) -> dict[str, Dataset]:
    """Classes that are texts as numbers, the same in all parts."""
    if isinstance(parts["train"].features["label"], ClassLabel):
        return parts
    if any(None in part["label"] for part in parts.values()):
        raise DataFormatError(f"{hub} has samples without a label")
    classes = ClassLabel(names=sorted(set(parts["train"]["label"])))
    for name, part in parts.items():
        if unknown := sorted(set(part["label"]) - set(classes.names)):
            raise DataFormatError(f"{hub}, {name} has the class {unknown[0]!r}, which its part to train on has not")
    return {name: part.cast_column("label", classes) for name, part in parts.items()}
