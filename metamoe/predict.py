"""Asking a unified model about images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from metamoe.common.data.decode import DAMAGED, read_picture, rgb
from metamoe.common.data.pixels import pixel_values
from metamoe.common.errors import InputFileError
from metamoe.common.model.artifact import Loaded
from metamoe.common.model.batch import class_logits, text_features

ImageInput = str | PathLike[str] | Image.Image
"""An image file, or an image."""


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image with their probabilities, and each expert's share of its tokens, largest first."""

    image: ImageInput
    classes: list[tuple[str, float]]
    experts: list[tuple[str, float]]


def class_texts(loaded: Loaded, names: Sequence[str]) -> Tensor:
    """What images are compared with to choose among classes: the unit text features of their names. float32 [C, p].

    Raises:
        InputFileError: the model is one of text, or there is no name.
    """
    if not loaded.seed.is_image_model:
        raise InputFileError("this model is one of text; ask it with 'metamoe generate'")
    if not names:
        raise InputFileError("there is no class to choose among; give the names of some")
    with loaded.seed.place.computing():
        return text_features(loaded.seed, names, loaded.manifest.prompt)


@torch.inference_mode()
def predict_images(
    loaded: Loaded, images: Iterable[ImageInput], names: Sequence[str], texts: Tensor, top: int
) -> Iterator[Prediction]:
    """Predictions for images, one at a time.

    Args:
        loaded: the model.
        images: files, or images.
        names: of the C classes to choose among.
        texts: their features, see :func:`class_texts`.
        top: how many classes to name.

    Raises:
        InputFileError: a file is not a readable image.
    """
    experts = loaded.manifest.expert_names
    for image in images:
        pixels = pixel_values(loaded.seed, [read_image(image, loaded.manifest.background)])
        with loaded.seed.place.computing():
            scores, decisions = loaded.model.answers(pixels, partial(class_logits, loaded.model.backbone, texts=texts))
            probabilities = scores.softmax(1)[0]
        best = probabilities.topk(min(top, len(names)))
        chosen = torch.cat([decision.argmax(-1).flatten() for decision in decisions])
        shares = torch.bincount(chosen, minlength=len(experts)) / len(chosen)
        yield Prediction(
            image,
            [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)],
            sorted(zip(experts, shares.tolist(), strict=True), key=lambda pair: -pair[1]),
        )


def read_image(image: ImageInput, background: str) -> Image.Image:
    """An image in mode RGB, as models are trained on it: see ``common/data/decode.py``.

    Raises:
        InputFileError: it cannot be read.
    """
    if not isinstance(image, Image.Image):
        return read_picture(image, background)
    try:
        return rgb(image, background)
    except DAMAGED as error:
        raise InputFileError(f"{image} cannot be read as an image: {error}") from error


def read_class_names(path: Path) -> list[str]:
    """Class names from a text file, one a line, blank lines left out.

    Raises:
        InputFileError: it cannot be read or names no class.
    """
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"--classes {path} cannot be read: {error}") from error
    if not names:
        raise InputFileError(f"--classes {path} names no class")
    return list(dict.fromkeys(names))
