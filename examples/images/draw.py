"""Draws signs and flags of two organisations, and a public set with some of both: python draw.py FOLDER."""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 48
SIGNS, FLAGS = ("CIRCLE", "SQUARE", "TRIANGLE"), ("BANDS ACROSS", "BANDS DOWN", "CROSS")


def draw(name: str, rng: random.Random) -> Image.Image:
    """A picture of a class, in colours, place and size of its own."""
    colour, ground = (tuple(rng.randrange(low, low + 100) for _ in range(3)) for low in rng.sample((0, 155), 2))
    image = Image.new("RGB", (SIZE, SIZE), ground)
    pen = ImageDraw.Draw(image)
    x, y = rng.randrange(4, 14), rng.randrange(4, 14)
    across = rng.randrange(22, 34)
    match name:
        case "CIRCLE":
            pen.ellipse((x, y, x + across, y + across), fill=colour)
        case "SQUARE":
            pen.rectangle((x, y, x + across, y + across), fill=colour)
        case "TRIANGLE":
            pen.polygon(((x, y + across), (x + across, y + across), (x + across / 2, y)), fill=colour)
        case "BANDS ACROSS":
            for top in range(x, SIZE, 16):
                pen.rectangle((0, top, SIZE, top + 7), fill=colour)
        case "BANDS DOWN":
            for left in range(x, SIZE, 16):
                pen.rectangle((left, 0, left + 7, SIZE), fill=colour)
        case "CROSS":
            pen.rectangle((0, y + 8, SIZE, y + 15), fill=colour)
            pen.rectangle((x + 8, 0, x + 15, SIZE), fill=colour)
    return image


def main(folder: Path) -> None:
    """Fill the folder: of each class a hundred pictures for its owner, fifty for the public set, ten of each for testing."""
    rng = random.Random(0)
    for domain, names, count in (("signs", SIGNS, 100), ("flags", FLAGS, 100), ("public", SIGNS + FLAGS, 50)):
        for name in names:
            for part, wanted in (("train", count), ("test", 10)):
                place = folder / domain / part / name
                place.mkdir(parents=True, exist_ok=True)
                for number in range(wanted):
                    draw(name, rng).save(place / f"{number}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
