"""A contact sheet: some pictures of a set as a model sees them."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw

from metamoe.common.data.images import image_dataset
from metamoe.common.data.pictures import Found, Pictures
from metamoe.common.data.pixels import cut
from metamoe.common.data.survey import Survey, named_pictures
from metamoe.common.errors import InputFileError
from metamoe.common.model.seed import Seed

_COLUMNS, _MOST, _OF_EACH = 8, 48, 3
_SIDE, _LETTERS = 144, 22


def contact_sheet(found: Found, looked: Survey, seed: Seed, background: str, file: Path) -> int:
    """Write a PNG file of pictures as the seed's image processor gives them to the model, each with its class and file: first
    one of everything that is unusual, then some of each class.

    Returns:
        How many there are on it.

    Raises:
        InputFileError: the file cannot be written, or there is no picture.
    """
    chosen = list(islice(_chosen(found, looked), _MOST))
    if not chosen:
        raise InputFileError(f"there is no picture to show in {file}")
    data = image_dataset([(image, label) for _, image, label in chosen], found.names, background)
    rows = -(-len(chosen) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * (_SIDE + 8), rows * (_SIDE + 36)), "#d0d4d8")
    draw = ImageDraw.Draw(sheet)
    for number, (name, _, label) in enumerate(chosen):
        pixels = Image.fromarray(cut(seed, [data[number]["image"]])[0].permute(1, 2, 0).numpy())
        left, top = 4 + number % _COLUMNS * (_SIDE + 8), 4 + number // _COLUMNS * (_SIDE + 36)
        sheet.paste(pixels.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top))
        for line, text in enumerate((found.names[label], Path(name).name)):
            draw.text((left, top + _SIDE + 2 + 14 * line), _short(text), "black")
    try:
        sheet.save(file, "PNG")
    except OSError as error:
        raise InputFileError(f"{file} cannot be written: {error}") from error
    return len(chosen)


def _chosen(found: Found, looked: Survey) -> Iterator[tuple[str, Pictures, int]]:
    first = {files[0] for files in looked.unusual.values()}
    broken = set(looked.unreadable)
    pictures = [(name, image, label) for _, name, image, label in named_pictures(found) if name not in broken]
    yield from (picture for picture in pictures if picture[0] in first)
    shown: Counter[int] = Counter()
    for picture in pictures:
        if picture[0] not in first and shown[picture[2]] < _OF_EACH:
            shown[picture[2]] += 1
            yield picture


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else f"…{text[1 - _LETTERS :]}"
