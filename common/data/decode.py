"""From a file to pixels: the one way for training, embedding, evaluating and asking.

The first page or frame is used, turned as EXIF says; what is transparent is put on a background; CMYK becomes RGB, and no
colour profile is applied. Of 16 bits the upper 8 are used, and so of 12 in a TIFF. Floating-point values have to lie from 0,
black, to 1, white. Other numbers have a range that nobody knows, and are refused.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass
from os import PathLike
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageOps

from metamoe.common.errors import InputFileError

DAMAGED = (
    *(OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError),
    *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow's readers raise on damaged files."""

_PHOTOMETRIC, _BITS = 262, 258
_ORIENTATION = 274
_FLAT = 4
"""Levels of 255 between the darkest and the brightest value, below which nothing is to be seen."""


@dataclass(frozen=True)
class Looked:
    """What was found in an image file: SHA-256 of size and pixels, and what is unusual about it."""

    digest: str
    unusual: list[str]


def read_picture(file: str | PathLike[str] | BinaryIO, background: str, place: str = "") -> Image.Image:
    """An image file's first page or frame in mode RGB.

    Args:
        file: its path or its bytes.
        background: colour behind what is transparent.
        place: where it is, for errors; its path if there is one.

    Raises:
        InputFileError: it cannot be decoded, or the range of its values cannot be known.
    """
    try:
        with Image.open(file) as opened:
            return rgb(opened, background)
    except DAMAGED as error:
        raise InputFileError(f"{place or file} cannot be read as an image: {error}") from error


def look_at(file: PathLike[str] | BinaryIO, background: str, place: str = "") -> Looked:
    """Decode an image file, and say what is unusual about it; arguments as of :func:`read_picture`.

    Raises:
        InputFileError: as :func:`read_picture`.
    """
    try:
        with Image.open(file) as opened:
            # Before it is loaded, when some are turned.
            turned = opened.getexif().get(_ORIENTATION, 1) != 1
            picture = rgb(opened, background)
            unusual = ["turned as EXIF says"] if turned else []
            unusual += _unusual(opened)
    except DAMAGED as error:
        raise InputFileError(f"{place or file} cannot be read as an image: {error}") from error
    if np.ptp(np.asarray(picture).reshape(-1, 3), axis=0).max() < _FLAT:
        unusual.append("of one colour, or nearly")
    return Looked(hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest(), unusual)


def rgb(image: Image.Image, background: str) -> Image.Image:
    """An image as people see it, in mode RGB; the image itself is left as it is.

    Raises:
        ValueError: the range of its values cannot be known, or its colours not be converted.
    """
    # What is known of the file is lost with the first copy.
    tags = getattr(image, "tag_v2", {})
    inverted = image.format in ("JPEG", "MPO") and "adobe" not in image.info
    scaled = image.format == "PPM"
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":
        upright = _grey(upright, tags.get(_BITS, (16,))[0], scaled, negative=tags.get(_PHOTOMETRIC) == 0)
    if upright.mode == "CMYK" and inverted:
        # Pillow takes every such JPEG for one of Adobe's, which holds its colours inverted.
        upright = ImageChops.invert(upright)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    over = upright.convert("LA" if upright.mode == "La" else "RGBA").convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, background), over).convert("RGB")


def _grey(image: Image.Image, bits: int, scaled: bool, negative: bool) -> Image.Image:
    """Numbers of more than 8 bits as grey values, mode L, or LA where one of them stands for what is transparent."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"it has floating-point values from {low:g} to {high:g}, and what is black and what is white cannot be known; "
                "save them from 0 to 1, or as 8 or 16 bits"
            )
        found = np.round(255 * values).astype(np.uint8)
    elif image.mode.startswith("I;16") or scaled:
        found = (values >> (4 if bits == 12 else 8)).clip(0, 255).astype(np.uint8)
    else:
        raise ValueError("it has integers of 32 bits, or signed ones, whose range cannot be known; save 8 or 16 bits")
    grey = Image.fromarray(255 - found if negative else found)
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    return Image.merge("LA", [grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))])


def _unusual(image: Image.Image) -> list[str]:
    """What is unusual about an image that was loaded; after this it may be at another page."""
    kinds = {"F": "with floating-point values", "I": "with 16 bits", "P": "with a palette", "C": "in CMYK"}
    found = [kinds[image.mode[0]]] if image.mode[0] in kinds else []
    if image.has_transparency_data and rgb(image, "white").tobytes() != rgb(image, "black").tobytes():
        found.append("transparent in places")
    try:
        if getattr(image, "n_frames", 1) > 1:
            found.append("of several pages or frames, the first of which is used")
    except DAMAGED:
        found.append("damaged behind its first page or frame")
    return found
