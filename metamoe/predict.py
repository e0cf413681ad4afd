"""Asking a unified model about image files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from metamoe.common.data.tasks import pixel_values
from metamoe.common.errors import InputFileError
from metamoe.common.model.artifact import Loaded
from metamoe.common.model.batch import class_logits, text_features


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image with their probabilities, and each expert's share of its tokens, largest first."""

    image: Path
    classes: list[tuple[str, float]]
    experts: list[tuple[str, float]]


@torch.inference_mode()
def predict_images(loaded: Loaded, images: Sequence[Path], names: Sequence[str], top: int) -> Iterator[Prediction]:
    """Predictions for image files, one at a time.

    Raises:
        InputFileError: a file is not a readable image.
    """
    texts = text_features(loaded.seed, names, loaded.manifest.prompt)
    experts = loaded.manifest.expert_names
    for path in images:
        pooled, decisions = loaded.model(pixel_values(loaded.seed, [read_image(path)]))
        probabilities = class_logits(loaded.model.backbone, pooled, texts).softmax(1)[0]
        best = probabilities.topk(min(top, len(names)))
        chosen = torch.cat([decision.argmax(-1).flatten() for decision in decisions])
        shares = torch.bincount(chosen, minlength=len(experts)) / len(chosen)
        yield Prediction(
            path,
            [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)],
            sorted(zip(experts, shares.tolist(), strict=True), key=lambda pair: -pair[1]),
        )


def read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise InputFileError(f"{path} cannot be read as an image: {error}") from error


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
