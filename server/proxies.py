"""Stage 1 at the server: from what a client says about its data to its proxies."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock

from common.compute import derived_seed, threads
from common.config import Data, Proxies, Settings
from common.data.tasks import input_batches
from common.errors import ProxyCountError
from common.files import cache_folder, write_atomically
from common.fisher import shrunk_covariance
from common.model.routing import sample_features
from common.model.seed import Seed
from server.dpp import greedy_map
from server.relevance import fisher_discriminants, linear_scores, logistic_link

_STAGE = 1
_COVARIANCE_SAMPLES = 50_000
_SCORES = 2**23
"""Scores in memory at a time."""


@dataclass(frozen=True)
class Selection:
    """Proxies of one client, in the order in which they were picked: row numbers in the public set, log-odds, relevance."""

    ids: np.ndarray
    scores: np.ndarray
    relevance: np.ndarray


def public_features(
    seed: Seed, data: Data, paths: list[str], public: Dataset, fingerprint: str, progress: Callable[[int, int], None]
) -> np.ndarray:
    """How the seed sees every public sample, computed once for this seed and this public set.

    Args:
        seed: the seed.
        data: settings of the data.
        paths: sublayers whose mean inputs are wanted beside the embedding.
        public: the public set.
        fingerprint: its content hash.
        progress: called with samples done and in all.

    Returns:
        float32 [n, len(paths) + 1, d], memory-mapped: see :func:`common.model.routing.sample_features`.
    """
    # Library and threads belong to the key: they decide the last digits.
    made_by = f"{seed.fingerprint} {paths} {fingerprint} {torch.__version__} {torch.get_num_threads()}"
    if not seed.is_image_model:
        made_by += f" {data.prompt_tokens}"
    key = hashlib.sha256(made_by.encode()).hexdigest()[:32]
    file = cache_folder() / "embeddings" / f"{key}.f32"
    shape = (len(public), len(paths) + 1, seed.width)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that need it, one computes it.
    with FileLock(f"{file}.lock"):
        if not file.is_file() or file.stat().st_size != 4 * np.prod(shape):
            # In one block: small results kept between large temporaries would hold the heap open, by hundreds of megabytes.
            features, done = np.empty(shape, dtype=np.float32), 0
            for part in sample_features(seed.model, paths, input_batches(seed, data, public)):
                features[done : done + len(part)] = part.numpy()
                done += len(part)
                progress(done, len(public))
            write_atomically(file, features.tobytes())
    return np.memmap(file, dtype=np.float32, mode="r", shape=shape)


def select_proxies(
    features: np.ndarray,
    profiles: Mapping[int, Mapping[str, np.ndarray]],
    settings: Settings,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[int, Selection]:
    """Proxies for each client: relevance out of what it sent, the most relevant as pool, a greedy DPP within it.

    Args:
        features: the seed's embeddings of the public set, [n, d].
        profiles: arrays of stage 1 by the client's number.
        settings: of the run.
        progress: called with clients done and in all.

    Raises:
        ProxyCountError: the public set is not larger than the pool.
    """
    proxies = settings.proxies
    if proxies.pool >= len(features):
        raise ProxyCountError(
            f"proxies.pool = {proxies.pool} is not less than the {len(features)} samples of the public set; lower it"
        )
    if proxies.selection == "random":
        return {client: _random(len(features), proxies.count, settings.seed, client) for client in profiles}
    clients = list(profiles)
    if proxies.relevance == "fisher":
        means = np.stack([profiles[client]["seed-routing-vector"] for client in clients])
        sample = features[:: -(-len(features) // _COVARIANCE_SAMPLES)]
        rows, biases = fisher_discriminants(means, features.mean(axis=0, dtype=np.float64), shrunk_covariance(sample))
    else:
        classifiers = np.stack([profiles[client]["relevance-classifier"] for client in clients]).astype(np.float64)
        rows, biases = classifiers[:, :-1], classifiers[:, -1]
    selections = {}
    # Many clients' scores out of one reading of the public set, as long as memory for them is bounded.
    group = max(1, _SCORES // len(features))
    for first in range(0, len(clients), group):
        part = slice(first, first + group)
        found = linear_scores(features, rows[part], biases[part])
        # Many small products: a second thread costs more than it saves.
        with threads(1):
            for client, scores in zip(clients[part], found, strict=True):
                selections[client] = _selected(features, scores, proxies)
                progress(len(selections), len(clients))
    return selections


def _selected(features: np.ndarray, scores: np.ndarray, proxies: Proxies) -> Selection:
    """The proxies of a client whose log-odds are known."""
    relevance = logistic_link(scores, proxies.pool)
    # A stable sort: among equal scores the lowest row comes first, on every machine.
    pool = np.argsort(-scores, kind="stable")[: proxies.pool]
    if proxies.selection == "dpp":
        ids = pool[greedy_map(features[pool], relevance[pool], proxies.count)]
    else:
        ids = pool[: proxies.count]
    return Selection(ids, scores[ids], relevance[ids])


def _random(size: int, count: int, seed: int, client: int) -> Selection:
    """Samples that nothing speaks for: log-odds zero, relevance a half."""
    ids = np.random.default_rng(derived_seed(seed, _STAGE, client)).permutation(size)[:count]
    return Selection(ids, np.zeros(count), np.full(count, 0.5))


def selection_record(selection: Selection) -> dict[str, list[float] | list[int]]:
    """A selection as it stands in proxies.json."""
    return {
        "ids": selection.ids.tolist(),
        "scores": [round(float(s), 6) for s in selection.scores],
        "relevance": [float(f"{r:.6g}") for r in selection.relevance],
    }
