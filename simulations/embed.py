"""Embedding the public set before a run, here or on a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import ray

from metamoe.common.compute import Place, place_of, threads
from metamoe.common.config import Settings
from metamoe.common.data.datasets import fingerprint, load_public, public_fingerprint
from metamoe.common.errors import PublicDataMismatchError, RunFailedError, SeedMismatchError
from metamoe.common.model.seed import load_seed, seed_at
from metamoe.common.model.vectors import all_evidence_paths
from metamoe.server.embedding import embed_shard, public_features

_WAITING = 4
"""Shards asked for, for each that is computed: results wait in memory until they are on disk here."""


def embed_public(settings: Settings, address: str | None, progress: Callable[[int, int], None]) -> Path:
    """Fill the cache with the features of the public set that a run with these settings needs.

    Args:
        settings: of the run.
        address: of a Ray cluster, each of whose machines has this product, the seed and the public set; None for this process.
        progress: called with samples done and in all.

    Returns:
        The file.

    Raises:
        RunFailedError: the cluster cannot be reached.
        SeedMismatchError, PublicDataMismatchError: a machine of the cluster has others.
    """
    place = place_of(settings.compute, "server")
    seed, public = seed_at(settings.seed_model, place), load_public(settings.data)
    paths = all_evidence_paths(seed, settings.lora, settings.router)
    compute = None if address is None else partial(_on_ray, settings, place, paths, address)
    with threads(settings.compute.server_threads), place.computing():
        found = public_features(seed, settings.data, paths, public, public_fingerprint(settings.data), progress, compute)
    return Path(str(found.filename))


def _on_ray(
    settings: Settings, place: Place, paths: list[str], address: str, missing: Sequence[range]
) -> Iterator[tuple[range, np.ndarray]]:
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunFailedError(f"--ray-address {address}: the cluster cannot be reached: {error}") from error
    try:
        # A task without a share of a GPU sees none, and would compute on the CPU without a word.
        gpus = int(place.device.type == "cuda")
        task = ray.remote(num_cpus=settings.compute.server_threads, num_gpus=gpus, max_retries=2)(_shard)
        seed, public = load_seed(settings.seed_model).fingerprint, load_public(settings.data)
        text = settings.model_dump_json()
        todo, running = list(missing), dict[ray.ObjectRef, range]()
        most = _WAITING * max(1, int(ray.cluster_resources().get("CPU", 1)) // settings.compute.server_threads)
        while todo or running:
            while todo and len(running) < most:
                rows = todo.pop(0)
                running[task.remote(text, paths, rows, seed, fingerprint(public.select(_ends(rows))))] = rows
            (done,), _ = ray.wait(list(running), num_returns=1)
            try:
                values = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                # The error itself, not what Ray makes of it.
                raise error.cause from error
            yield running.pop(done), values
    finally:
        ray.shutdown()


def _shard(text: str, paths: list[str], rows: range, seed_fingerprint: str, ends: str) -> np.ndarray:
    """One shard on a machine of the cluster, which must hold the same seed and public set."""
    settings = Settings.model_validate_json(text)
    place = place_of(settings.compute, "server")
    seed, public = seed_at(settings.seed_model, place), load_public(settings.data)
    if seed.fingerprint != seed_fingerprint:
        raise SeedMismatchError(f"the seed model here is {seed.fingerprint[:12]}, the driver's {seed_fingerprint[:12]}")
    if len(public) <= rows[-1] or fingerprint(public.select(_ends(rows))) != ends:
        raise PublicDataMismatchError(f"rows {rows.start} to {rows[-1]} of the public set are not the driver's on this machine")
    with threads(settings.compute.server_threads), place.computing():
        return embed_shard(seed, settings.data, paths, public, rows)


def _ends(rows: range) -> list[int]:
    """The first and the last row, by which another machine's copy is told from this one."""
    return [rows.start, rows[-1]]
