"""Pictures that stay at the hub: each is fetched when it is used, and none is kept on disk.

A set is its classes, which are read at once, and for each picture where it lies: a Parquet file, a group of its rows, and a
row. What is read in order, as an embedding does, fetches each group once.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import fsspec
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features
from PIL import Image as PILImage
from pyarrow import parquet

from metamoe.common.config import Data
from metamoe.common.data.columns import Picture, named_columns, register
from metamoe.common.data.hub import builder_of
from metamoe.common.data.splits import by_part
from metamoe.common.errors import DataFormatError, HubError
from metamoe.common.hub import HUB_FAILURES, hub_error


@dataclass
class Streamed(Picture):
    """A column of pictures that are fetched when they are used: the path is ``FILE::GROUP:ROW:COLUMN``."""

    _type: str = field(default="Streamed", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> PILImage.Image:
        if isinstance(value, PILImage.Image):
            return super().decode_example(value, token_per_repo_id)
        file, _, place = value["path"].rpartition("::")
        group, row, column = place.split(":", 2)
        try:
            found = _group(file, int(group), column)[int(row)].as_py()
        except (*HUB_FAILURES, pa.ArrowException) as error:
            raise HubError(f"{file}, group {group}, row {row} cannot be fetched: {error}") from error
        return super().decode_example({"bytes": found["bytes"], "path": value["path"]}, token_per_repo_id)


register(Streamed)


def file_of(path: str) -> str:
    """The Parquet file in which a picture lies."""
    return path.rpartition("::")[0]


def streamed_parts(hub: str, data: Data) -> dict[str, Dataset]:
    """The parts of an image set as ``images.py`` has them, of which nothing but the classes was fetched.

    Raises:
        HubError: the hub does not give it.
        DataFormatError: it is not in Parquet files, its classes are no numbers, or it lacks a column.
    """
    builder = builder_of(hub)
    if builder.name != "parquet":
        raise DataFormatError(f"data.streaming = true is for sets in Parquet files, and {hub} has {builder.name}")
    files = {str(name): list(map(str, found)) for name, found in builder.config.data_files.items()}
    parts = {}
    for part, names in by_part(files, data.splits, hub).items():
        try:
            parts[part] = _part([file for name in names for file in files[name]], builder.info.features, hub, data)
        except HUB_FAILURES as error:
            raise hub_error("data.public-hub", hub, error) from error
    if "train" not in parts:
        raise DataFormatError(f"{hub} has the parts {sorted(files)}; one to train on is needed: set data.splits.train")
    return parts


def _part(files: list[str], described: Features | None, hub: str, data: Data) -> Dataset:
    paths: list[str] = []
    labels: list[int] = []
    features = described
    for file in files:
        with fsspec.open(file) as stream, parquet.ParquetFile(stream) as table:
            features = features or Features.from_arrow_schema(table.schema_arrow)
            image, label = named_columns(features, hub, data)
            if not isinstance(features[label], ClassLabel):
                raise DataFormatError(
                    f"data.streaming = true needs numbered classes in {label!r}, and {hub} has {features[label]}"
                )
            for group in range(table.num_row_groups):
                found = table.read_row_group(group, columns=[label])[label].to_pylist()
                labels += found
                paths += [f"{file}::{group}:{row}:{image}" for row in range(len(found))]
    if features is None or min(labels, default=-1) < 0:
        raise DataFormatError(f"{hub} has pictures without a class, or none")
    columns = Features({"image": Streamed(background=data.background), "label": features[label]})
    return Dataset.from_dict({"image": paths, "label": labels}, features=columns)


@lru_cache(maxsize=2)
def _group(file: str, group: int, column: str) -> pa.ChunkedArray:
    with fsspec.open(file) as stream, parquet.ParquetFile(stream) as table:
        return table.read_row_group(group, columns=[column])[column]
