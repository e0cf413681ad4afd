"""Labelled images from folders, one for each class, from a table of paths and labels, or from a hub."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from metamoe.common.config import Data
from metamoe.common.data.columns import Picture, named_columns
from metamoe.common.data.hub import load_from_hub
from metamoe.common.data.partition import OWNERS
from metamoe.common.data.pictures import Pictures, find_pictures
from metamoe.common.data.splits import by_part
from metamoe.common.data.stream import streamed_parts
from metamoe.common.errors import DataFormatError


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
    if data.folder:
        found = _from_folder(Path(data.folder) / name, data)
    else:
        streamed = data.streaming and hub == data.public_hub
        found = streamed_parts(hub, data) if streamed else _from_hub(hub, data)
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
        image, label = named_columns(whole.features, f"{hub}, {part}", data)
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
