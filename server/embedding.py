"""How the seed sees the public set: computed once, in shards, on disk."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock

from metamoe.common.config import Data
from metamoe.common.data.tasks import features
from metamoe.common.files import cache_folder
from metamoe.common.model.seed import Seed

SHARD = 4_096
"""Samples of a shard: what is lost at most when an embedding is stopped."""

Compute = Callable[[Sequence[range]], Iterable[tuple[range, np.ndarray]]]
"""Computes shards, each a range of rows, and yields them as they are done, in any order."""


def public_features(
    seed: Seed,
    data: Data,
    paths: list[str],
    public: Dataset,
    fingerprint: str,
    progress: Callable[[int, int], None],
    compute: Compute | None = None,
) -> np.memmap:
    """Features of every public sample, computed once for this seed and this public set.

    They are written to disk shard by shard: memory does not grow with the set, and what is stopped goes on where it was.

    Args:
        seed: the seed.
        data: settings of the data.
        paths: sublayers whose mean inputs are wanted beside the embedding.
        public: the public set.
        fingerprint: its content hash.
        progress: called with samples done and in all.
        compute: who computes the shards; None for this process.

    Returns:
        float32 [n, len(paths) + 1, d], memory-mapped: see :func:`metamoe.common.model.vectors.batch_features`.
    """
    # Library and threads belong to the key: they decide the last digits.
    made_by = f"{seed.fingerprint} {paths} {fingerprint} {torch.__version__} {torch.get_num_threads()}"
    if not seed.is_image_model:
        made_by += f" {data.prompt_tokens}"
    made_by += seed.computed_by
    file = cache_folder() / "embeddings" / f"{hashlib.sha256(made_by.encode()).hexdigest()[:32]}.f32"
    partial_file, log = file.with_suffix(".partial"), file.with_suffix(".shards")
    shape = (len(public), len(paths) + 1, seed.width)
    size = 4 * int(np.prod(shape))
    file.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that need it, one computes it.
    with FileLock(f"{file}.lock"):
        if not file.is_file() or file.stat().st_size != size:
            if not partial_file.is_file() or partial_file.stat().st_size != size:
                log.unlink(missing_ok=True)
            done = {int(line) for line in log.read_text().split()} if log.is_file() else set()
            missing = [rows for rows in shards(len(public)) if rows.start not in done]
            written = np.memmap(partial_file, np.float32, "r+" if done else "w+", shape=shape)
            counted = len(public) - sum(map(len, missing))
            progress(counted, len(public))
            for rows, values in (compute or partial(_here, seed, data, paths, public))(missing):
                written[rows.start : rows.stop] = values
                written.flush()
                # Only now: a shard that is on record is on disk.
                with log.open("a") as stream:
                    stream.write(f"{rows.start}\n")
                    stream.flush()
                    os.fsync(stream.fileno())
                counted += len(rows)
                progress(counted, len(public))
            del written
            partial_file.replace(file)
            log.unlink()
    return np.memmap(file, np.float32, "r", shape=shape)


def shards(count: int) -> list[range]:
    """``count`` samples in shards."""
    return [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]


def embed_shard(seed: Seed, data: Data, paths: list[str], public: Dataset, rows: range) -> np.ndarray:
    """Features of some rows of the public set. float32 [len(rows), len(paths) + 1, d]."""
    # Filled, not collected: small results kept between large temporaries would hold the heap open.
    found, done = np.empty((len(rows), len(paths) + 1, seed.width), dtype=np.float32), 0
    for part in features(seed, seed.model, paths, data, public.select(rows)):
        found[done : done + len(part)] = part.numpy()
        done += len(part)
    return found


def _here(
    seed: Seed, data: Data, paths: list[str], public: Dataset, missing: Sequence[range]
) -> Iterator[tuple[range, np.ndarray]]:
    for rows in missing:
        yield rows, embed_shard(seed, data, paths, public, rows)
