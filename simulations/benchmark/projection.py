"""Where proxies lie beside private samples, in two dimensions: the counterpart of the paper's Figure 2."""

from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import TSNE

from metamoe.client.profile import profile
from metamoe.client.site import Site
from metamoe.common.compute import place_of, threads
from metamoe.common.config import Settings
from metamoe.common.curve import unwatched
from metamoe.common.data.datasets import load_private, load_public, public_fingerprint
from metamoe.common.data.tasks import features as features_of
from metamoe.common.model.seed import seed_at
from metamoe.common.model.vectors import all_evidence_paths
from metamoe.server.embedding import public_features
from metamoe.server.proxies import select_proxies

_SELECTIONS = ("random", "relevance", "dpp")
_PRIVATE = 300
_DIGITS = 3


def project(settings: Settings) -> dict[str, dict[str, list[list[float]]]]:
    """For each client, t-SNE coordinates of private samples (``"private"``, at most 300) and of the proxies that each way of
    selection picks, all in one map.
    """
    place = place_of(settings.compute, "server")
    seed, public = seed_at(settings.seed_model, place), load_public(settings.data)
    with threads(settings.compute.server_threads), place.computing():
        paths = all_evidence_paths(seed, settings.lora, settings.router)
        features = public_features(seed, settings.data, paths, public, public_fingerprint(settings.data), unwatched)
        private = [load_private(settings, client, "train") for client in range(settings.clients)]
        sites = [Site(client, Path()) for client in range(settings.clients)]
        by_gaussians = settings.proxies.relevance == "gaussian"
        profiles = {
            site.client: profile(seed, settings, site.client, data, public, site.noise(settings.seed, 1), shape=by_gaussians)
            for site, data in zip(sites, private, strict=True)
        }
        picked = {name: select_proxies(features, profiles, _selecting(settings, name)) for name in _SELECTIONS}
        maps = {}
        for client, name in enumerate(settings.client_names):
            rng = np.random.default_rng(client)
            sample = private[client].select(np.sort(rng.permutation(len(private[client]))[:_PRIVATE]))
            own = torch.cat(list(features_of(seed, seed.model, [], settings.data, sample)))[:, -1].numpy()
            groups = {"private": own} | {how: features[picked[how][client].ids, -1] for how in _SELECTIONS}
            maps[name] = _tsne(groups)
    return maps


def _selecting(settings: Settings, how: str) -> Settings:
    return settings.model_copy(update={"proxies": settings.proxies.model_copy(update={"selection": how})})


def _tsne(groups: dict[str, np.ndarray]) -> dict[str, list[list[float]]]:
    points = np.concatenate(list(groups.values()))
    flat = TSNE(metric="cosine", init="pca", perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(points)
    ends = np.cumsum([len(group) for group in groups.values()])[:-1]
    return {name: part.round(_DIGITS).tolist() for name, part in zip(groups, np.split(flat.astype(float), ends), strict=True)}
