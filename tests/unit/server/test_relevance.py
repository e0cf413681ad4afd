import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from metamoe.common.fisher import fisher_rows, shrunk_covariance
from metamoe.server.relevance import fisher_discriminants, linear_scores, logistic_link, tempered_weights
from tests.conftest import random_features


def test_scores_of_a_hand_computed_case() -> None:
    # S_0 = diag(1, 4), mu_p = (2, 4), mu_0 = (0, 0): w = (2, 1), b = -1/2 (2*2 + 4*1) = -4.
    covariance = np.diag([1.0, 4.0])
    features = np.array([[0.0, 0.0], [2.0, 4.0], [1.0, 2.0], [3.0, -1.0]])
    rows, biases = fisher_discriminants(np.array([[2.0, 4.0], [0.0, 0.0]]), np.zeros(2), covariance)
    np.testing.assert_allclose(rows, [[2.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(biases, [-4.0, 0.0])
    np.testing.assert_allclose(linear_scores(features, rows, biases), [[-4.0, 4.0, 0.0, 1.0], [0.0] * 4])


def test_scores_are_the_log_odds_of_gaussians() -> None:
    from scipy.stats import multivariate_normal

    covariance = np.array([[2.0, 0.5], [0.5, 1.0]])
    features = random_features(20, 2)
    expected = multivariate_normal([1, -1], covariance).logpdf(features) - multivariate_normal([0.5, 2], covariance).logpdf(
        features
    )
    discriminant = fisher_discriminants(np.array([[1, -1]]), np.array([0.5, 2]), covariance)
    np.testing.assert_allclose(linear_scores(features, *discriminant), [expected])


def test_scores_of_a_file_are_computed_in_constant_memory(tmp_path: Path) -> None:
    features = random_features(60_000, 64).astype(np.float16)
    (tmp_path / "features").write_bytes(features.tobytes())
    mapped = np.memmap(tmp_path / "features", dtype=np.float16, mode="r", shape=features.shape)
    rows, biases = random_features(2, 64, 1), np.array([1.0, -2.0])
    tracemalloc.start()
    scores = linear_scores(mapped, rows, biases)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(scores, rows @ features.T.astype(np.float64) + biases[:, None])
    # What is returned, and copies of two shards; the features in float64 would be 31 MB.
    assert peak < scores.nbytes + 6e6


def test_rows_and_biases_of_a_hand_computed_case() -> None:
    rows, biases = fisher_rows(np.array([[1.0, 2.0], [0.0, -2.0]]), np.diag([0.5, 2.0]))
    np.testing.assert_allclose(rows, [[2.0, 1.0], [0.0, -1.0]])
    np.testing.assert_allclose(biases, [-2.0, -1.0])


def test_covariance_is_invertible_with_fewer_samples_than_dimensions() -> None:
    assert np.linalg.eigvalsh(shrunk_covariance(random_features(5, 20))).min() > 0


def test_link_keeps_the_order_and_sums_to_the_pool() -> None:
    scores = random_features(1_000, 1)[:, 0] * 300 - 5_000
    relevance = logistic_link(scores, 50)
    assert relevance.sum() == pytest.approx(50, abs=1e-3)
    assert (np.diff(relevance[np.argsort(scores)]) >= 0).all()
    assert np.isfinite(np.log(relevance[np.argsort(-scores)[:50]])).all()


def test_tempered_weights_keep_the_effective_sample_size() -> None:
    scores = random_features(50, 1).ravel() * 20
    for share in (0.1, 0.5, 0.9):
        weights = tempered_weights(scores, share)
        assert weights.sum() == pytest.approx(1)
        assert 1 / (weights**2).sum() == pytest.approx(share * 50, rel=1e-6)
        # The more relevant weighs more.
        assert (np.diff(weights[np.argsort(scores)]) >= 0).all()
    np.testing.assert_allclose(tempered_weights(scores, 1.0), 1 / 50)


def test_weights_of_a_hand_computed_case_are_density_ratios() -> None:
    # exp(s) = 1 : 3, far from the bound of a half, so the temperature stays at one.
    np.testing.assert_allclose(tempered_weights(np.array([0.0, np.log(3)]), 0.5), [0.25, 0.75])
    # Nothing to tell them apart.
    np.testing.assert_allclose(tempered_weights(np.zeros(4), 0.5), 0.25)
