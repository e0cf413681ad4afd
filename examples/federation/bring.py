"""What three organisations have: python bring.py DRAWN CLIENTS, of what ../images/draw.py has drawn.

North has photographs as a telephone stores them, on their side, with the orientation in EXIF. South has scans of 16 bits, in
grey. East has one folder of files, and tables that say what is on them.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

_ORIENTATION, _TURN_RIGHT = 0x0112, 6


def photograph(picture: Image.Image, file: Path) -> None:
    exif = Image.Exif()
    exif[_ORIENTATION] = _TURN_RIGHT
    picture.rotate(90, expand=True).save(file.with_suffix(".jpg"), exif=exif, quality=95)


def scan(picture: Image.Image, file: Path) -> None:
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(file)


def main(drawn: Path, clients: Path) -> None:
    """Fill the data folders of three clients."""
    for client, domain, save in (("client-0", "signs", photograph), ("client-1", "flags", scan)):
        for file in sorted((drawn / domain).rglob("*.png")):
            place = clients / client / "data" / file.relative_to(drawn / domain)
            place.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(file) as picture:
                save(picture, place)
    east = clients / "client-2" / "data"
    for part in ("train", "test"):
        with (east / f"{part}.csv").open("w", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(["file", "category"])
            for number, file in enumerate(sorted((drawn / "public" / part).rglob("*.png"))):
                name = f"files/{part}-{number}.png"
                (east / name).parent.mkdir(exist_ok=True)
                (east / name).write_bytes(file.read_bytes())
                rows.writerow([name, file.parent.name])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
