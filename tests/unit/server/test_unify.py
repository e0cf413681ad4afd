"""The routers as they start, and what trains them."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_public
from metamoe.common.data.pixels import batches
from metamoe.common.fisher import fisher_rows, shrunk_covariance
from metamoe.common.gaussian import Gaussians, Shape
from metamoe.common.model.gaussian_router import GaussianRouter
from metamoe.common.model.lora import with_lora
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import batch_features
from metamoe.common.presets import changed
from metamoe.server.relevance import tempered_weights
from metamoe.server.unify import initial_routers, odds_that_keep, router_samples
from tests.conftest import random_expert, random_features

CLIENTS = 2
PUBLIC = 300


def routers(seed: Seed, settings: Settings, vectors: list, **given: object) -> list:
    experts = [random_expert(seed, settings, k) for k in range(CLIENTS)]
    public = given.get("public")
    proxies = given.get("proxies", [None] * CLIENTS)
    return initial_routers(seed, settings, public, proxies, given.get("scores", [None] * CLIENTS), experts, vectors)


@pytest.fixture
def two(small: Settings) -> Settings:
    return changed(small, ["clients=2", "lora.first-layer=1", "router.statistics=mean"])


def public_inputs(layers: int) -> np.ndarray:
    return random_features(PUBLIC * layers, 16).reshape(PUBLIC, layers, 16) + 1


def test_dot_products_are_the_vectors_side_by_side_and_the_public_mean(seed: Seed, two: Settings) -> None:
    public, vectors = public_inputs(2), [random_features(2, 16, k) for k in range(CLIENTS)]
    (router,) = routers(seed, changed(two, ["router.rows=dot"]), vectors, public=public)
    np.testing.assert_allclose(router.rows[:2], np.stack(vectors).reshape(2, 32))
    # Fewer public samples than would be drawn: the mean is that of all.
    np.testing.assert_allclose(router.rows[2], public.mean(axis=0).ravel())
    assert not router.biases.any()
    assert router.context == two.router.context


def test_the_odds_that_keep_public_samples_are_a_quantile_of_the_experts_lead() -> None:
    # Two equal experts lead the seed by log 2 + 0, 1, ..., 4.
    scores = np.array([[3.0, 3.0, 3.0 - lead] for lead in range(5)])
    assert odds_that_keep(scores, 0.75) == pytest.approx(np.log(2) + 3)
    assert odds_that_keep(scores, 1.0) == pytest.approx(np.log(2) + 4)


def test_by_shapes_the_seed_keeps_98_of_100_public_samples(seed: Seed, small: Settings) -> None:
    settings = changed(small, ["clients=2", "lora.first-layer=1", "router.shape-rank=3"])
    public, vectors = public_inputs(2), [random_features(2, 16, k) for k in range(CLIENTS)]
    narrow = Shape(np.full((3, 32), 0.1), 0.2)
    experts = [random_expert(seed, settings, k) for k in range(CLIENTS)]
    (router,) = initial_routers(seed, settings, public, [None] * 2, [None] * 2, experts, vectors, [narrow, narrow])
    assert router.quadratic is not None
    made = GaussianRouter(router, settings.router)
    with torch.inference_mode():
        found = made.scored(torch.tensor(public.reshape(PUBLIC, 1, 32), dtype=torch.float32))[:, 0]
    stays = found[:, -1] >= found[:, :-1].logsumexp(1)
    # 2% of 300 are six.
    assert int((~stays).sum()) == 6


def test_a_public_set_that_is_like_a_domain_takes_no_more_than_a_fifth_of_it(seed: Seed, small: Settings) -> None:
    """Two clients whose Gaussians are nearly the public one: to keep 98% of the public samples would leave them nothing."""
    settings = changed(small, ["clients=2", "lora.first-layer=1"])
    public = public_inputs(2)
    middle = public.mean(axis=0)
    alike, experts = Shape(np.eye(32), 0.0), [random_expert(seed, settings, k) for k in range(CLIENTS)]
    vectors = [middle + 0.1, middle - 0.1]
    (router,) = initial_routers(seed, settings, public, [None] * 2, [None] * 2, experts, vectors, [alike, alike])
    assert router.quadratic is not None
    found = Gaussians(means=router.rows, biases=router.biases, **vars(router.quadratic))

    def lost(seen: np.ndarray) -> float:
        scores = found.scores(seen)
        return float((scores[:, -1] > logsumexp(scores[:, :-1], axis=1)).mean())

    own = [lost(found.drawn(k, 4_000, np.random.default_rng(7))) for k in range(CLIENTS)]
    assert max(own) == pytest.approx(0.2, abs=0.03)
    assert lost(found.seen(public.reshape(PUBLIC, 32))) < 0.5


def test_fisher_rows_are_of_the_evidence_as_a_whole_with_a_prior_on_the_seed(seed: Seed, two: Settings) -> None:
    public, vectors = public_inputs(2), [random_features(2, 16, k) for k in range(CLIENTS)]
    flat = public.reshape(PUBLIC, 32)
    rows, biases = fisher_rows(np.stack([*(v.ravel() for v in vectors), flat.mean(axis=0)]), shrunk_covariance(flat))
    (router,) = routers(seed, changed(two, ["router.seed-log-odds=-3"]), vectors, public=public)
    np.testing.assert_allclose(router.rows, rows)
    np.testing.assert_allclose(router.biases, biases + np.array([0, 0, -3]))
    (without,) = routers(seed, changed(two, ["router.seed-expert=false"]), vectors, public=public)
    np.testing.assert_allclose(without.rows, rows[:2])
    np.testing.assert_allclose(without.biases, biases[:2])


def test_each_layer_that_decides_has_the_rows_of_its_own_vectors(seed: Seed, two: Settings) -> None:
    settings = changed(
        two,
        ["router.decide=per-layer", "router.evidence=layer", "router.vectors=private", "router.rows=dot", "lora.first-layer=0"],
    )
    vectors, public = [random_features(2, 16, k) for k in range(CLIENTS)], public_inputs(2)
    lower, upper = routers(seed, settings, vectors, public=public)
    for layer, router in enumerate((lower, upper)):
        np.testing.assert_allclose(router.rows[:2], [v[layer] for v in vectors])
        np.testing.assert_allclose(router.rows[2], public[:, layer].mean(axis=0))


@pytest.mark.parametrize("weights", ["equal", "relevance"])
def test_without_vectors_they_are_means_over_the_proxies(seed: Seed, two: Settings, weights: str) -> None:
    settings = changed(
        two, ["router.vectors=proxy", f"router.proxy-weights={weights}", "router.rows=dot", "router.seed-expert=false"]
    )
    public = load_public(settings.data)
    proxies = [public.select(range(k * 10, k * 10 + 10)) for k in range(CLIENTS)]
    scores = [random_features(10, 1, k).ravel() * 5 for k in range(CLIENTS)]
    (router,) = routers(seed, settings, [None] * CLIENTS, proxies=proxies, scores=scores)
    for k in range(CLIENTS):
        model = with_lora(seed, settings.lora, random_expert(seed, settings, k))
        parts = [batch_features(model, seed.ffn_paths, part) for part in batches(seed, proxies[k])]
        features = torch.cat(parts).double().numpy()[:, :-1]
        own = tempered_weights(scores[k], 0.5 if weights == "relevance" else 1.0)
        np.testing.assert_allclose(router.rows[k], np.einsum("n,npd->pd", own, features).ravel(), atol=1e-6)


def test_fresh_rows_are_small_and_random(seed: Seed, two: Settings) -> None:
    (router,) = routers(seed, changed(two, ["router.rows=fresh"]), [None] * CLIENTS)
    assert router.rows.shape == (3, 32)
    assert 0.01 < router.rows.std() < 0.03
    (other,) = routers(seed, changed(two, ["router.rows=fresh", "seed=1"]), [None] * CLIENTS)
    assert not np.allclose(router.rows, other.rows)


def test_the_seed_learns_from_random_public_samples(two: Settings) -> None:
    public = load_public(two.data)
    proxies = [public.select(range(20)), public.select(range(20, 40))]
    samples = router_samples(two, public, proxies)
    assert samples[:2] == proxies
    assert [len(data) for data in samples] == [20, 20, 20]
    assert len(router_samples(changed(two, ["router.seed-expert=false"]), public, proxies)) == 2
    (random,) = router_samples(changed(two, ["router-training.samples=public"]), public, proxies)
    assert len(random) == 40
