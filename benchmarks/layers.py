"""Where can it be decided? The share of test samples that means, or means and shapes, of one layer's mean FFN input, or of the
embedding, send to their own domain's expert, for every layer of the frozen seed::

    python -m benchmarks.layers --preset smollm2-qa --data-dir DIR

Only what the seed makes of the samples is looked at, so no expert is trained. The clients' statistics are those that they would
send, and the seed is one of the choices, as the preset's router has them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table

from metamoe.common.compute import place_of, threads
from metamoe.common.config import Settings
from metamoe.common.data.datasets import evaluation_sets, load_private, load_public
from metamoe.common.data.tasks import features
from metamoe.common.fisher import fisher_rows, shrunk_covariance
from metamoe.common.gaussian import Gaussians, oracle_shrunk, public_coordinates, shape_of
from metamoe.common.model.seed import Seed, seed_at
from metamoe.common.presets import load_settings
from metamoe.server.unify import FISHER_ODDS, initial_routers

Decider = Callable[[np.ndarray], np.ndarray]
"""Scores [N, K + 1] of features [N, d]."""


def main(
    preset: Annotated[str, typer.Option(help="Name of a preset or a TOML file of settings.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where domains and public set lie.")] = None,
) -> None:
    """Print a table: a row for each layer, two columns for each domain."""
    settings = load_settings(preset, [f"data.folder={data_dir}"] if data_dir else [])
    place = place_of(settings.compute, "server")
    seed, tests = seed_at(settings.seed_model, place), evaluation_sets(settings.data)
    private = {name: load_private(settings, client, "train") for client, name in enumerate(settings.client_names)}
    with threads(settings.compute.server_threads), place.computing():
        sets = [load_public(settings.data), *private.values(), *tests.values()]
        public, *features = (_features(seed, settings, data) for data in track(sets, "what the seed makes of all samples"))
    private_features, test_features = features[: len(private)], features[len(private) :]
    columns = [f"{domain}, {by}" for domain in tests for by in ("means", "shapes")]
    table = Table("decided at", *columns, title="share of samples at their own domain's expert")
    names = [*(f"layer {number}" for number in range(len(seed.ffn_paths))), "embedding"]
    for layer, name in enumerate(names):
        own = [values[:, layer] for values in private_features]
        deciders = [_by_means(settings, public[:, layer], own), _by_shapes(seed, settings, public[:, layer], own)]
        shares = []
        for domain, values in zip(tests, test_features, strict=True):
            right = [client for client in range(settings.clients) if settings.client_domain(client) == domain.partition(",")[0]]
            shares += [f"{np.isin(decide(values[:, layer]).argmax(axis=1), right).mean():.3f}" for decide in deciders]
        table.add_row(name, *shares)
    Console().print(table)


def _by_means(settings: Settings, public: np.ndarray, private: Sequence[np.ndarray]) -> Decider:
    means = np.stack([*(own.mean(axis=0) for own in private), public.mean(axis=0)])
    rows, biases = fisher_rows(means, shrunk_covariance(public))
    odds = settings.router.seed_log_odds
    biases[-1] += FISHER_ODDS if odds == "auto" else odds
    return lambda values: values @ rows.T + biases


def _by_shapes(seed: Seed, settings: Settings, public: np.ndarray, private: Sequence[np.ndarray]) -> Decider:
    white = public_coordinates(public)
    covariances = [oracle_shrunk(np.cov(white.white(own).T, bias=True), len(own)) for own in private]
    shapes = [shape_of(covariance, settings.router.shape_rank) for covariance in covariances]
    means = [own.mean(axis=0)[None] for own in private]
    (router,) = initial_routers(seed, settings, public[:, None], [], [], [], means, shapes)
    assert router.quadratic is not None
    found = Gaussians(means=router.rows, biases=router.biases, **vars(router.quadratic))
    return lambda values: found.scores(found.seen(values))


def _features(seed: Seed, settings: Settings, data: Dataset) -> np.ndarray:
    """float64 [N, L + 1, d]."""
    return torch.cat(list(features(seed, seed.model, seed.ffn_paths, settings.data, data))).double().numpy()


if __name__ == "__main__":
    typer.run(main)
