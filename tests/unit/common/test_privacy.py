"""The mathematics of differential privacy against known numbers, and against the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import norm

from metamoe.common.errors import InvalidSettingError
from metamoe.common.fisher import shrunk_covariance
from metamoe.common.presets import load_settings
from metamoe.common.privacy import (
    Mechanism,
    clipped,
    expert_mechanism,
    noise_multiplier,
    private_means,
    private_second_moment,
    second_moment_deviation,
    total_epsilon,
)
from tests.conftest import random_features


@pytest.mark.parametrize(("epsilon", "ratio"), [(1, 3.73), (2, 1.99), (4, 1.08), (8, 0.60)])
def test_the_noise_of_the_analytic_gaussian_mechanism(epsilon: float, ratio: float) -> None:
    assert noise_multiplier(epsilon, 1e-5) == pytest.approx(ratio, abs=0.005)


@pytest.mark.slow
@given(st.floats(0.05, 20), st.floats(1e-9, 1e-2))
@hypothesis_settings(max_examples=50, deadline=None)
def test_noise_and_accountant_agree(epsilon: float, delta: float) -> None:
    """The accountant, which integrates the privacy loss, gives back the epsilon that the noise was made for."""
    total = total_epsilon([Mechanism(noise_multiplier(epsilon, delta))], delta)
    assert total == pytest.approx(epsilon, rel=1e-3, abs=1e-3)


def test_gaussian_releases_add_up_in_squares() -> None:
    """By hand: noise s1 and s2 together are one release with 1/s^2 = 1/s1^2 + 1/s2^2."""
    together = total_epsilon([Mechanism(3.0), Mechanism(4.0)], 1e-5)
    assert together == pytest.approx(total_epsilon([Mechanism(2.4)], 1e-5), rel=1e-3)
    assert total_epsilon([], 1e-5) == 0


def test_sampling_helps_and_steps_cost() -> None:
    one, sampled, twice = Mechanism(2.0), Mechanism(2.0, 0.1), Mechanism(2.0, 1.0, 2)
    assert total_epsilon([sampled], 1e-5) < total_epsilon([one], 1e-5) < total_epsilon([twice], 1e-5)
    assert total_epsilon([twice], 1e-5) == pytest.approx(total_epsilon([one, one], 1e-5), rel=1e-3)


def test_the_experts_noise_is_what_its_epsilon_needs_and_knows_nothing_of_the_data() -> None:
    privacy = ["privacy.vectors=gaussian", "privacy.expert=dp-sgd", "privacy.expert-epsilon=3", "privacy.expert-epochs=2"]
    mechanism = expert_mechanism(load_settings("glyphs", privacy))
    # 250 of every 500 samples a step.
    assert (mechanism.sampling_rate, mechanism.steps) == (0.5, 4)
    assert 2.9 < total_epsilon([mechanism], 1e-5) <= 3


def test_clipping_by_hand() -> None:
    np.testing.assert_allclose(clipped(np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0), [[0.6, 0.8], [0.3, 0.4], [0, 0]])


def features(count: int, number: int) -> np.ndarray:
    """[count, 2, 6], not centred, with covariance of its own in each of the two."""
    shape = random_features(6, 6, 99)
    return (random_features(count * 2, 6, number) @ shape + 5).reshape(count, 2, 6)


def test_without_noise_and_clipping_the_release_is_the_mean() -> None:
    private, public = features(80, 1), features(300, 2)
    released = private_means(private, public, 1e6, 50, 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(released, private.mean(axis=0), atol=1e-9)


def test_one_record_moves_the_release_by_no_more_than_the_bound() -> None:
    """In units of the noise, with a record as far out as can be: |change| <= sensitivity = 2 B / minimum."""
    private, public = features(60, 1), features(300, 2)
    other = private.copy()
    other[7] += 1e6
    noisy = [private_means(data, public, 1.5, 50, 1e-12, np.random.default_rng(0)) for data in (private, other, private[:-1])]
    unit = [private_means(data, public, 1.5, 50, 0.0, np.random.default_rng(0)) for data in (private, other, private[:-1])]
    np.testing.assert_allclose(noisy, unit, atol=1e-9)
    factor, bound = whitening(public), 1.5 * np.sqrt(12)
    for changed in unit[1:]:
        assert 0 < np.linalg.norm(np.linalg.solve(factor, (changed - unit[0]).ravel())) <= 2 * bound / 50


def whitening(public: np.ndarray) -> np.ndarray:
    return np.linalg.cholesky(shrunk_covariance(public.reshape(len(public), -1)))


def test_the_noise_is_as_large_as_promised_and_does_not_depend_on_the_amount_of_data() -> None:
    """Over 400 releases the whitened noise has the standard deviation noise x 2 B / minimum, for 60 samples and for 600."""
    public = features(300, 2)
    factor = whitening(public)
    promised = 1.08 * 2 * np.sqrt(12) / 50
    for count in (60, 600):
        private = features(count, 1)
        exact = private_means(private, public, 1.0, 50, 0.0, np.random.default_rng(0))
        rng = np.random.default_rng(3)
        released = [(private_means(private, public, 1.0, 50, 1.08, rng) - exact).ravel() for _ in range(400)]
        noise = np.linalg.solve(factor, np.array(released).T)
        assert noise.std() == pytest.approx(promised, rel=0.05)
        # Normal: one in twenty is beyond 1.96 deviations.
        assert (np.abs(noise) > norm.ppf(0.975) * promised).mean() == pytest.approx(0.05, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["router.vectors=private", "privacy.vectors=gaussian"], "set router.vectors = seed or proxy"),
        (["proxies.relevance=classifier", "privacy.vectors=gaussian"], "set proxies.relevance = fisher"),
        (["privacy.expert=dp-sgd"], "set privacy.vectors = gaussian"),
        (
            ["privacy.expert=dp-sgd", "privacy.vectors=gaussian", "expert-training.samples=private"],
            "set expert-training.samples = aligned",
        ),
        (["privacy.delta=1"], "privacy.delta"),
    ],
)
def test_settings_that_would_promise_what_does_not_hold_are_refused(changes: list[str], reason: str) -> None:
    with pytest.raises(InvalidSettingError, match=reason):
        load_settings("glyphs", changes)


@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0.5, 3))
@hypothesis_settings(max_examples=50, deadline=None)
def test_one_record_moves_the_second_moment_by_no_more_than_the_bound(number: int, width: int, clip: float) -> None:
    """Replaced by one as far out as can be, or taken out: |change| <= sqrt(2) B^2 / minimum, which the worst case reaches."""
    rng = np.random.default_rng(0)
    samples = random_features(30, width, number) * 10
    bound = np.sqrt(2) * clip**2 * width / 30
    exact = private_second_moment(samples, clip, 30, 0.0, rng)
    other = samples.copy()
    # At right angles to the first, and far out.
    other[0] = np.linalg.svd(samples[:1])[2][-1] * 1e6
    replaced = np.linalg.norm(private_second_moment(other, clip, 30, 0.0, rng) - exact)
    fewer = np.linalg.norm(private_second_moment(np.concatenate([samples, other[:1]]), clip, 30, 0.0, rng) - exact)
    assert replaced <= bound * (1 + 1e-9)
    assert fewer <= bound * (1 + 1e-9)
    first = np.zeros((30, width))
    first[0, 0], first[1:, :] = 1e6, 0
    second = np.roll(first, 1, axis=1)
    one, two = (private_second_moment(samples, clip, 30, 0.0, rng) for samples in (first, second))
    assert np.linalg.norm(one - two) == pytest.approx(bound)


def test_the_second_moments_noise_is_as_large_as_promised() -> None:
    """Off the diagonal, where an entry counts twice, s / sqrt(2), and s on it, with s = noise x sqrt(2) B^2 / minimum."""
    width, promised = 40, 0.7 * np.sqrt(2) * 1.5**2 * 40 / 50
    samples = random_features(80, width)
    noise = private_second_moment(samples, 1.5, 50, 0.7, np.random.default_rng(3))
    noise -= private_second_moment(samples, 1.5, 50, 0.0, np.random.default_rng(3))
    np.testing.assert_array_equal(noise, noise.T)
    assert noise[np.triu_indices(width, 1)].std() == pytest.approx(promised / np.sqrt(2), rel=0.06)
    assert second_moment_deviation(width, 1.5, 50, 0.7) == pytest.approx(promised / np.sqrt(2))
    many = [private_second_moment(samples, 1.5, 50, 0.7, np.random.default_rng(k)).diagonal() for k in range(200)]
    assert np.std(many, axis=0).mean() == pytest.approx(promised, rel=0.05)


def test_mean_and_second_moment_together_spend_what_one_release_does() -> None:
    """Each with sqrt(2) times the noise, they are one release by the square law."""
    noise = noise_multiplier(4, 1e-5) * np.sqrt(2)
    assert total_epsilon([Mechanism(noise), Mechanism(noise)], 1e-5) == pytest.approx(4, rel=1e-3)
