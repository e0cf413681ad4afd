"""Stage 1 at the server: from what a client says about its data to its proxies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metamoe.common.compute import derived_seed, threads
from metamoe.common.config import Proxies, Settings
from metamoe.common.errors import ProxyCountError
from metamoe.common.files import read_json, write_json
from metamoe.common.fisher import shrunk_covariance
from metamoe.server.dpp import greedy_map
from metamoe.server.relevance import fisher_discriminants, linear_scores, logistic_link

_STAGE = 1
_COVARIANCE_SAMPLES = 50_000
_LEAST = 1e-100
_PARTS = {"ids": np.int64, "scores": np.float64, "relevance": np.float64}
_SCORES = 2**23
"""Scores in memory at a time."""


@dataclass(frozen=True)
class Selection:
    """Proxies of one client, in the order in which they were picked: row numbers in the public set, log-odds, relevance."""

    ids: np.ndarray
    scores: np.ndarray
    relevance: np.ndarray


def check_pool(proxies: Proxies, public: int) -> None:
    """Raise unless a public set of this many samples is larger than the pool.

    Raises:
        ProxyCountError: it is not.
    """
    if proxies.pool >= public:
        raise ProxyCountError(
            f"proxies.pool = {proxies.pool} is not less than the {public} samples of the public set; lower it"
        )


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
    check_pool(proxies, len(features))
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
    if proxies.selection == "dpp" and proxies.candidates == "all":
        # Far from the domain, a sigmoid is zero.
        ids = greedy_map(features, np.maximum(relevance, _LEAST), proxies.count)
    elif proxies.selection == "dpp":
        ids = pool[greedy_map(features[pool], relevance[pool], proxies.count)]
    else:
        ids = pool[: proxies.count]
    return Selection(ids, scores[ids], relevance[ids])


def _random(size: int, count: int, seed: int, client: int) -> Selection:
    """Samples that nothing speaks for: log-odds zero, relevance a half."""
    ids = np.random.default_rng(derived_seed(seed, _STAGE, client)).permutation(size)[:count]
    return Selection(ids, np.zeros(count), np.full(count, 0.5))


def write_selections(file: Path, public: str, selections: Mapping[str, Selection]) -> None:
    """Write proxies.json: for each client, by name, row numbers in the public set (whose hash is ``public``), log-odds and
    relevance, to their last digit.
    """
    clients = {name: {part: getattr(s, part).tolist() for part in _PARTS} for name, s in selections.items()}
    write_json(file, {"public": public, "clients": clients})


def read_selections(file: Path) -> dict[str, Selection]:
    """What :func:`write_selections` wrote, by the clients' names."""
    return {
        name: Selection(*(np.array(values[part], dtype) for part, dtype in _PARTS.items()))
        for name, values in read_json(file)["clients"].items()
    }
