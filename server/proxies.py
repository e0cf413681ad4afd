"""Stage 1 at the server: from what a client says about its data to its proxies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metamoe.common.compute import derived_seed, threads
from metamoe.common.config import Proxies, Settings
from metamoe.common.errors import ProxyCountError
from metamoe.common.files import read_json, write_json
from metamoe.common.fisher import shrunk_covariance
from metamoe.common.gaussian import public_coordinates
from metamoe.common.model.vectors import evidence_of
from metamoe.server.dpp import greedy_map
from metamoe.server.relevance import density_scores, fisher_discriminants, linear_scores, logistic_link
from metamoe.server.shapes import client_gaussians, sent_means, sent_shape

KEPT = "server/kept-proxies.json"
"""In a run's folder: the proxies of clients that keep those of an earlier run, chosen from another public set."""
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
        features: the public samples' mean FFN inputs in the seed, and last their embedding, [n, P + 1, d].
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
    embeddings, clients = features[:, -1], list(profiles)
    scores_of = _scores(features, [profiles[client] for client in clients], settings)
    selections = {}
    # Many clients' scores out of one reading of the public set, as long as memory for them is bounded.
    group = max(1, _SCORES // len(features))
    for first in range(0, len(clients), group):
        part = range(first, min(first + group, len(clients)))
        found = scores_of(part)
        # Many small products: a second thread costs more than it saves.
        with threads(1):
            for client, scores in zip((clients[k] for k in part), found, strict=True):
                selections[client] = _selected(embeddings, scores, proxies)
                progress(len(selections), len(clients))
    return selections


def _scores(
    features: np.ndarray, profiles: Sequence[Mapping[str, np.ndarray]], settings: Settings
) -> Callable[[Sequence[int]], np.ndarray]:
    """How the public samples' log-odds [K, n] are found for some of the clients, given by their places among the profiles."""
    relevance, embeddings = settings.proxies.relevance, features[:, -1]
    if relevance == "gaussian":
        evidence = evidence_of(features, settings.router)
        white = public_coordinates(evidence)
        means = np.stack([sent_means(profile, settings).ravel() for profile in profiles])
        shapes = [sent_shape(profile, settings) for profile in profiles]
        gaussians = client_gaussians(means, shapes, white, settings.router, seed=True)
        return lambda clients: density_scores(evidence, gaussians.of([*clients, len(profiles)]))
    if relevance == "fisher":
        means = np.stack([profile["seed-routing-vector"] for profile in profiles])
        sample = embeddings[:: -(-len(features) // _COVARIANCE_SAMPLES)]
        public = embeddings.mean(axis=0, dtype=np.float64)
        rows, biases = fisher_discriminants(means, public, shrunk_covariance(sample))
    else:
        classifiers = np.stack([profile["relevance-classifier"] for profile in profiles]).astype(np.float64)
        rows, biases = classifiers[:, :-1], classifiers[:, -1]
    return lambda clients: linear_scores(embeddings, rows[clients], biases[clients])


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


def kept_selections(out: Path) -> dict[str, Selection]:
    """By their names the clients of a run that keep proxies, with row numbers in the run's own public set."""
    return read_selections(out / KEPT) if (out / KEPT).is_file() else {}


def read_selections(file: Path) -> dict[str, Selection]:
    """What :func:`write_selections` wrote, by the clients' names."""
    return {
        name: Selection(*(np.array(values[part], dtype) for part, dtype in _PARTS.items()))
        for name, values in read_json(file)["clients"].items()
    }
