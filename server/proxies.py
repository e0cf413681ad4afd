"""Stage 1 at the server: from a client's seed routing vector to its proxies."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from common.config import Proxies
from common.data.tasks import batches
from common.errors import ProxyCountError
from common.files import cache_folder, write_atomically
from common.fisher import shrunk_covariance
from common.model.seed import Seed, embed
from server.dpp import greedy_map
from server.relevance import fisher_scores, logistic_link

_BATCH = 256


@dataclass(frozen=True)
class Selection:
    """Proxies of one client, in the order in which they were picked: row numbers in the public set, log-odds, relevance."""

    ids: np.ndarray
    scores: np.ndarray
    relevance: np.ndarray


@torch.inference_mode()
def public_features(seed: Seed, public: Dataset, fingerprint: str, progress: Callable[[int, int], None]) -> np.ndarray:
    """The seed's embedding of every public sample, computed once for this seed and this public set. float32 [n, d],
    memory-mapped.
    """
    # Library and threads belong to the key: they decide the last digits.
    made_by = f"{seed.fingerprint} {fingerprint} {torch.__version__} {torch.get_num_threads()}"
    key = hashlib.sha256(made_by.encode()).hexdigest()[:32]
    file = cache_folder() / "embeddings" / f"{key}.f32"
    shape = (len(public), seed.width)
    if not file.is_file() or file.stat().st_size != 4 * shape[0] * shape[1]:
        # In one block: small results kept between large temporaries would hold the heap open, by hundreds of megabytes.
        features, done = np.empty(shape, dtype=np.float32), 0
        for batch in batches(seed, public, _BATCH):
            features[done : done + len(batch)] = embed(seed.model, batch).numpy()
            done += len(batch)
            progress(done, len(public))
        write_atomically(file, features.tobytes())
    return np.memmap(file, dtype=np.float32, mode="r", shape=shape)


def select_proxies(features: np.ndarray, routing_vectors: list[np.ndarray], settings: Proxies) -> list[Selection]:
    """Proxies for each client: relevance by Fisher's discriminant, the most relevant as pool, a greedy DPP within it.

    Args:
        features: the seed's embeddings of the public set, [n, d].
        routing_vectors: each client's seed routing vector, [d].
        settings: count and pool.

    Raises:
        ProxyCountError: the public set is not larger than the pool.
    """
    if settings.pool >= len(features):
        raise ProxyCountError(
            f"proxies.pool = {settings.pool} is not less than the {len(features)} samples of the public set; lower it"
        )
    features = np.asarray(features, dtype=np.float64)
    public_mean, covariance = features.mean(axis=0), shrunk_covariance(features)
    selections = []
    for vector in routing_vectors:
        scores = fisher_scores(features, vector, public_mean, covariance)
        relevance = logistic_link(scores, settings.pool)
        # A stable sort: among equal scores the lowest row comes first, on every machine.
        pool = np.argsort(-scores, kind="stable")[: settings.pool]
        ids = pool[greedy_map(features[pool], relevance[pool], settings.count)]
        selections.append(Selection(ids, scores[ids], relevance[ids]))
    return selections


def selection_record(selection: Selection) -> dict[str, list[float] | list[int]]:
    """A selection as it stands in proxies.json."""
    return {
        "ids": selection.ids.tolist(),
        "scores": [round(float(s), 6) for s in selection.scores],
        "relevance": [float(f"{r:.6g}") for r in selection.relevance],
    }
