"""A folder of many pictures: what it costs to list it, to look at every picture, and to hash them, and how much memory."""

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from metamoe.common.config import Data
from metamoe.common.data.datasets import public_fingerprint
from metamoe.common.data.pictures import find_pictures
from metamoe.common.data.survey import survey

Row = dict[str, float | str]
_SIDE, _CLASSES = 64, 100


def folder_cost(count: int = 100_000) -> dict[str, Row]:
    """CPU seconds and the growth of memory of each step, in a process of its own each, beside the pixels of all pictures."""
    with TemporaryDirectory() as folder:
        _draw(Path(folder) / "many", count)
        rows: dict[str, Row] = {}
        steps = {"listed": _listed, "every one looked at": _looked_at, "hashed": _hashed, "hashed again": _hashed}
        for name, step in steps.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                seconds, grown = pool.submit(_measured, step, folder).result()
            pixels = count * _SIDE * _SIDE * 3
            what = f"{count:,} pictures, {name}"
            rows[f"{what}, CPU"] = {"ours": seconds, "peer": count / 1_000, "ratio": seconds / (count / 1_000), "unit": "s"}
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


def _measured(step: Callable[[Data], None], folder: str) -> tuple[float, int]:
    # Nothing of it is left behind.
    os.environ["METAMOE_CACHE"] = str(Path(folder) / "cache")
    data = Data(source="images", folder=folder, public="many", domains=("many",))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    step(data)
    return time.process_time() - begin, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _listed(data: Data) -> None:
    find_pictures(Path(data.folder) / data.public, data)


def _looked_at(data: Data) -> None:
    survey(find_pictures(Path(data.folder) / data.public, data), data)


def _hashed(data: Data) -> None:
    public_fingerprint(data)
