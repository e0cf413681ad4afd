"""Selecting proxies: the lazy greedy in feature space against the plain one with a full kernel matrix, and at the size of
ImageNet.
"""

import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from threadpoolctl import threadpool_limits

from metamoe.server.dpp import greedy_map

Row = dict[str, float | str]
_WIDTH, _PICKS, _CLUSTERS = 768, 500, 200
_IMAGENET = 1_281_167


def plain_greedy(features: np.ndarray, relevance: np.ndarray, count: int) -> np.ndarray:
    """Greedy MAP on the full kernel matrix L~ [n, n] (Chen et al. 2018, Algorithm 1): the peer."""
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    kernel = (unit @ unit.T) * relevance[:, None] * relevance[None, :]
    gains = np.diag(kernel).copy()
    rows = np.zeros((count, len(kernel)))
    picked: list[int] = []
    for step in range(count):
        best = int(gains.argmax())
        rows[step] = (kernel[best] - rows[:step, best] @ rows[:step]) / np.sqrt(gains[best])
        gains -= rows[step] ** 2
        gains[best] = -np.inf
        picked.append(best)
    return np.array(picked)


def selection_cost(items: int, repeats: int) -> dict[str, Row]:
    """CPU seconds and peak memory of both on the same features; they must pick the same.

    Args:
        items: n.
        repeats: runs of each, of which the fastest counts.
    """
    rng = np.random.default_rng(0)
    features = np.concatenate(list(_clustered(rng, items)))
    relevance = _relevance(rng, items)
    with threadpool_limits(1):
        picks = [choose(features, relevance, _PICKS) for choose in (greedy_map, plain_greedy)]
        if (picks[0] != picks[1]).any():
            raise AssertionError("the two pick other items")
        seconds = np.array(
            [
                [_seconds(lambda c=choose: c(features, relevance, _PICKS)) for choose in (greedy_map, plain_greedy)]
                for _ in range(repeats)
            ]
        )
        (ours, our_wall), (peer, peer_wall) = seconds.min(axis=0).tolist()
        memory = [_peak(lambda c=choose: c(features, relevance, _PICKS)) for choose in (greedy_map, plain_greedy)]
    return {
        f"selection, n = {items:,}, CPU": {"ours": ours, "peer": peer, "ratio": ours / peer, "unit": "s"},
        f"selection, n = {items:,}, wall": {"ours": our_wall, "peer": peer_wall, "ratio": our_wall / peer_wall, "unit": "s"},
        f"selection, n = {items:,}, memory": {
            "ours": memory[0] / 1e6,
            "peer": memory[1] / 1e6,
            "ratio": memory[0] / memory[1],
            "unit": "MB",
        },
    }


def imagenet_cost() -> dict[str, Row]:
    """CPU seconds and memory beyond the page cache for as many items as ImageNet has, float16 on disk, without a pool; beside
    the bars of 120 s and 1 GB. Relevance that does not fall off, or says nothing at all, leaves no item that need not be
    looked at.
    """
    rng = np.random.default_rng(0)
    rows: dict[str, Row] = {}
    with TemporaryDirectory() as folder, threadpool_limits(1):
        file = Path(folder) / "features"
        with file.open("wb") as opened:
            for block in _clustered(rng, _IMAGENET):
                opened.write(block.astype(np.float16).tobytes())
        features = np.memmap(file, dtype=np.float16, mode="r", shape=(_IMAGENET, _WIDTH))
        relevances = {
            "": _relevance(rng, _IMAGENET),
            ", relevance uniform in (0, 1)": rng.uniform(size=_IMAGENET),
            ", all as relevant": np.ones(_IMAGENET),
        }
        for kind, relevance in relevances.items():
            memory = _peak(lambda r=relevance: greedy_map(features, r, _PICKS))
            seconds, _ = _seconds(lambda r=relevance: greedy_map(features, r, _PICKS))
            name = f"selection, n = {_IMAGENET:,}{kind}"
            rows[f"{name}, CPU"] = {"ours": seconds, "peer": 120.0, "ratio": seconds / 120, "unit": "s"}
            rows[f"{name}, memory"] = {"ours": memory / 1e6, "peer": 1e3, "ratio": memory / 1e9, "unit": "MB"}
    return rows


def _clustered(rng: np.random.Generator, items: int) -> Iterator[np.ndarray]:
    """Unit features around random centres, in blocks, float32."""
    centres = rng.normal(size=(_CLUSTERS, _WIDTH))
    for start in range(0, items, 50_000):
        count = min(50_000, items - start)
        block = centres[rng.integers(_CLUSTERS, size=count)] + rng.normal(size=(count, _WIDTH))
        yield (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float32)


def _relevance(rng: np.random.Generator, items: int) -> np.ndarray:
    """As the logistic link gives it: about two thousand items near one, the others falling off."""
    scores = np.sort(rng.normal(size=items))[::-1] * 2
    edge = scores[min(2_000, items // 2)]
    return rng.permutation(1 / (1 + np.exp(-np.clip(scores - edge, -50, 50))))


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this process, and seconds on the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def _peak(run: Callable[[], object]) -> int:
    """Largest number of bytes that were allocated at a time; mapped files are not."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
