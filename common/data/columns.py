"""Columns of image sets: pictures that are decoded when they are used, and which column is what."""

import warnings
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import fsspec
from datasets import Features, Image
from datasets.features.features import register_feature
from PIL import Image as PILImage

from metamoe.common.config import Data
from metamoe.common.data.decode import read_picture, rgb
from metamoe.common.data.pictures import IMAGE_COLUMNS, LABEL_COLUMNS
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


def register(kind: type[Picture]) -> None:
    """Make a kind of column known to the library: a data set's Arrow table says of what kind its columns are, by this name.

    What can be registered may change with the library's next version, as a warning says to whoever starts a command;
    constraints and tests say so to us.
    """
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        register_feature(kind, kind.__name__)


register(Picture)


def named_columns(features: Features, where: str, data: Data) -> tuple[str, str]:
    """Which columns of a hub set have the images and the classes.

    Raises:
        DataFormatError: it lacks one.
    """
    image = data.image_column or next((name for name in IMAGE_COLUMNS if isinstance(features.get(name), Image)), "")
    label = data.label_column or next((name for name in LABEL_COLUMNS if name in features), "")
    if not isinstance(features.get(image), Image) or label not in features:
        raise DataFormatError(
            f"{where} has the columns {sorted(features)}; wanted are images in one of {list(IMAGE_COLUMNS)} "
            f"(data.image-column = {data.image_column!r}) and classes in one of {list(LABEL_COLUMNS)} (data.label-column "
            f"= {data.label_column!r})"
        )
    return image, label
