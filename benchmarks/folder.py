"""A folder of many pictures: what it costs to list it, to look at every picture, and to hash them, and how much memory."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from PIL import Image

from metamoe.common.config import Data
from metamoe.common.data.datasets import public_fingerprint
from metamoe.common.data.pictures import find_pictures
from metamoe.common.data.survey import survey

Row = dict[str, float | str]
_SIDE, _CLASSES = 64, 100
_MOMENT = 0.01


def folder_cost(count: int = 100_000) -> dict[str, Row]:
    """CPU seconds of each step, beside those of going through the folder or of decoding each file once and no more; and by how
    much memory grows, beside the pixels of all pictures. Each in a process of its own.
    """
    steps = {
        "listed": (_listed, _walked),
        "every one looked at": (_looked_at, _decoded),
        "hashed": (_hashed, _decoded),
        "hash asked for again": (_hashed, _walked),
    }
    pixels = count * _SIDE * _SIDE * 3
    rows: dict[str, Row] = {}
    with TemporaryDirectory() as folder:
        _draw(Path(folder) / "many", count)
        for name, (step, peer) in steps.items():
            (seconds, grown), (bare, _) = (_apart(each, folder) for each in (step, peer))
            what = f"{count:,} pictures, {name}"
            rows[f"{what}, CPU"] = {"ours": seconds, "peer": bare, "ratio": seconds / bare, "unit": "s"}
            rows[f"{what}, memory"] = {"ours": grown / 1e6, "peer": pixels / 1e6, "ratio": grown / pixels, "unit": "MB"}
    return rows


def _draw(folder: Path, count: int) -> None:
    """Pictures that all differ, in class folders of a part that trains."""
    ramp = np.linspace(0, 255, _SIDE, dtype=np.uint8)
    for number in range(count):
        place = folder / "train" / f"class {number % _CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.broadcast_to(ramp[:, None, None], (_SIDE, _SIDE, 3)).copy()
        pixels[0, :4, 0] = [number >> shift & 255 for shift in (0, 8, 16, 24)]
        Image.fromarray(pixels).save(place / f"{number}.png")


def _apart(step: Callable[[Data], None], folder: str) -> tuple[float, int]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measured, step, folder).result()


def _measured(step: Callable[[Data], None], folder: str) -> tuple[float, int]:
    # Nothing of it is left behind.
    os.environ["METAMOE_CACHE"] = str(Path(folder) / "cache")
    data = Data(source="images", folder=folder, public="many", domains=("many",))
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(_MOMENT):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    watching = threading.Thread(target=watch)
    watching.start()
    begin = time.process_time()
    step(data)
    seconds = time.process_time() - begin
    done.set()
    watching.join()
    return seconds, max(peak[0], process.memory_info().rss) - before


def _walked(data: Data) -> None:
    for file in (Path(data.folder) / data.public).rglob("*"):
        file.stat()


def _decoded(data: Data) -> None:
    for file in (Path(data.folder) / data.public).rglob("*.png"):
        with Image.open(file) as picture:
            picture.convert("RGB")


def _listed(data: Data) -> None:
    find_pictures(Path(data.folder) / data.public, data)


def _looked_at(data: Data) -> None:
    survey(find_pictures(Path(data.folder) / data.public, data), data)


def _hashed(data: Data) -> None:
    public_fingerprint(data)
