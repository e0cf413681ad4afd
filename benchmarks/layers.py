"""Where can it be decided? The share of test samples that Fisher rows on one layer's mean FFN input, or on the embedding, send
to their own domain's expert, for every layer of the frozen seed::

    python -m benchmarks.layers --preset smollm2-qa --data-dir DIR

Only what the seed makes of the samples is looked at, so no expert is trained. Routing vectors are the clients' private means,
and the seed is one of the choices, as the preset's router has them.
"""

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
from metamoe.common.model.seed import Seed, seed_at
from metamoe.common.presets import load_settings
from metamoe.server.unify import FISHER_ODDS


def main(
    preset: Annotated[str, typer.Option(help="Name of a preset or a TOML file of settings.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where domains and public set lie.")] = None,
) -> None:
    """Print a table: a row for each layer, a column for each domain."""
    settings = load_settings(preset, [f"data.folder={data_dir}"] if data_dir else [])
    place = place_of(settings.compute, "server")
    seed, tests = seed_at(settings.seed_model, place), evaluation_sets(settings.data)
    private = {name: load_private(settings, client, "train") for client, name in enumerate(settings.client_names)}
    with threads(settings.compute.server_threads), place.computing():
        sets = [load_public(settings.data), *private.values(), *tests.values()]
        public, *features = (_features(seed, settings, data) for data in track(sets, "what the seed makes of all samples"))
    means = np.stack([values.mean(axis=0) for values in features[: len(private)]])
    table = Table("decided at", *tests, title="share of samples at their own domain's expert")
    names = [*(f"layer {number}" for number in range(len(seed.ffn_paths))), "embedding"]
    for layer, name in enumerate(names):
        rows, biases = fisher_rows(
            np.concatenate([means[:, layer], public[:, layer].mean(axis=0, keepdims=True)]), shrunk_covariance(public[:, layer])
        )
        odds = settings.router.seed_log_odds
        biases[-1] += FISHER_ODDS if odds == "auto" else odds
        shares = []
        for domain, values in zip(tests, features[len(private) :], strict=True):
            chosen = (values[:, layer] @ rows.T + biases).argmax(axis=1)
            own = [client for client in range(settings.clients) if settings.client_domain(client) == domain.partition(",")[0]]
            shares.append(f"{np.isin(chosen, own).mean():.3f}")
        table.add_row(name, *shares)
    Console().print(table)


def _features(seed: Seed, settings: Settings, data: Dataset) -> np.ndarray:
    """float64 [N, L + 1, d]."""
    return torch.cat(list(features(seed, seed.model, seed.ffn_paths, settings.data, data))).double().numpy()


if __name__ == "__main__":
    typer.run(main)
