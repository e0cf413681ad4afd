import numpy as np
import pytest
from scipy.stats import multivariate_normal

from metamoe.common.config import Settings
from metamoe.common.errors import ProxyCountError
from metamoe.common.fisher import shrunk_covariance
from metamoe.common.gaussian import coordinates, packed_shape, shape_of
from metamoe.common.presets import validated
from metamoe.server import proxies
from metamoe.server.dpp import greedy_map
from metamoe.server.proxies import select_proxies
from metamoe.server.relevance import fisher_discriminants, linear_scores, logistic_link
from tests.conftest import random_features


def selecting(**changes: object) -> Settings:
    return validated({"proxies": {"count": 8, "pool": 40} | changes})


FEATURES = random_features(200, 5) + 2
SHIFTS = np.eye(5)[0] * 3, -np.eye(5)[1] * 3
PROFILES = {client: {"seed-routing-vector": FEATURES.mean(0) + shift} for client, shift in enumerate(SHIFTS)}


def test_by_relevance_alone_are_the_most_relevant_in_their_order() -> None:
    selections = select_proxies(FEATURES[:, None], PROFILES, selecting(selection="relevance"))
    for selection in selections.values():
        assert (np.diff(selection.scores) <= 0).all()
    # Towards its own mean: along the first axis up, along the second down.
    assert FEATURES[selections[0].ids, 0].mean() > FEATURES[:, 0].mean() + 1
    assert FEATURES[selections[1].ids, 1].mean() < FEATURES[:, 1].mean() - 1


def test_a_dpp_stays_in_the_pool_and_is_more_diverse() -> None:
    def volume(ids: np.ndarray) -> float:
        unit = FEATURES[ids[:5]] / np.linalg.norm(FEATURES[ids[:5]], axis=1, keepdims=True)
        return float(np.linalg.slogdet(unit @ unit.T)[1])

    pool = select_proxies(FEATURES[:, None], PROFILES, selecting(selection="relevance", count=40))
    dpp = select_proxies(FEATURES[:, None], PROFILES, selecting())
    for client in PROFILES:
        assert set(dpp[client].ids) <= set(pool[client].ids)
        assert volume(dpp[client].ids) > volume(pool[client].ids)


def test_random_ones_need_nothing_of_a_client_and_differ_between_clients() -> None:
    first, second = select_proxies(FEATURES[:, None], {0: {}, 1: {}}, selecting(selection="random")).values()
    assert len(set(first.ids)) == len(set(second.ids)) == 8
    assert set(first.ids) != set(second.ids)
    # The same ones when the other client is missing.
    again = select_proxies(FEATURES[:, None], {1: {}}, selecting(selection="random"))
    assert (again[1].ids == second.ids).all()


def test_a_classifiers_log_odds_are_used_as_they_are() -> None:
    # w = (0, 0, 1, 0, 0), b = -2.
    profile = {"relevance-classifier": np.array([0, 0, 1, 0, 0, -2], dtype=np.float32)}
    selection = select_proxies(FEATURES[:, None], {0: profile}, selecting(relevance="classifier", selection="relevance"))[0]
    np.testing.assert_array_equal(selection.ids, np.argsort(-FEATURES[:, 2], kind="stable")[:8])
    np.testing.assert_allclose(selection.scores, FEATURES[selection.ids, 2] - 2)


def test_a_pool_as_large_as_the_public_set_is_refused() -> None:
    with pytest.raises(ProxyCountError, match="200 samples"):
        select_proxies(FEATURES[:, None], PROFILES, selecting(pool=200))


def test_candidates_may_be_the_whole_public_set() -> None:
    selections = select_proxies(FEATURES[:, None], PROFILES, selecting(candidates="all", pool=4, count=3))
    for client, selection in selections.items():
        public = FEATURES.astype(np.float64)
        rows, biases = fisher_discriminants(
            PROFILES[client]["seed-routing-vector"][None], public.mean(0), shrunk_covariance(public)
        )
        relevance = logistic_link(linear_scores(public, rows, biases)[0], 4)
        np.testing.assert_array_equal(selection.ids, greedy_map(public, relevance, 3))


def test_how_many_clients_scores_are_in_memory_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = select_proxies(FEATURES[:, None], PROFILES, selecting())
    monkeypatch.setattr(proxies, "_SCORES", 1)
    done: list[tuple[int, int]] = []
    one_by_one = select_proxies(FEATURES[:, None], PROFILES, selecting(), lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]
    for client, selection in together.items():
        np.testing.assert_array_equal(one_by_one[client].ids, selection.ids)
        np.testing.assert_allclose(one_by_one[client].scores, selection.scores, rtol=1e-12)


@pytest.mark.parametrize("decide", ["once", "embedding"])
def test_relevance_is_the_likelihood_ratio_of_the_gaussians(decide: str) -> None:
    settings = validated(
        {
            "proxies": {"count": 8, "pool": 40, "relevance": "gaussian", "selection": "relevance"},
            "router": {"decide": decide, "shape-pooled": 0, "shape-identity": 0.2, "shape-rank": 0},
        }
    )
    features = random_features(200, 8).reshape(200, 2, 4)
    own = features[:, -1] if decide == "embedding" else features[:, 0]
    white, name = coordinates(own), "seed-routing-vector" if decide == "embedding" else "seed-ffn-inputs"
    means = [own.mean(0) + 1, own.mean(0)]
    covariances = [np.diag([4.0, 1.0, 1.0, 0.25]), np.eye(4) * 0.25]
    profiles = {
        k: {name: mean if decide == "embedding" else mean[None], "seed-shape": packed_shape(shape_of(covariance, 0))}
        for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True))
    }
    found = select_proxies(features, profiles, settings)
    public = multivariate_normal(white.centre, white.factor @ white.factor.T).logpdf(own)
    for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        regularised = white.factor @ (0.8 * covariance + 0.2 * np.eye(4)) @ white.factor.T
        ratio = multivariate_normal(mean, regularised).logpdf(own) - public
        np.testing.assert_array_equal(found[k].ids, np.argsort(-ratio, kind="stable")[:8])
        np.testing.assert_allclose(found[k].scores, ratio[found[k].ids], atol=1e-3)
