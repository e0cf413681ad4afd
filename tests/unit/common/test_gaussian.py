import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.covariance import OAS

from metamoe.common.fisher import fisher_rows
from metamoe.common.gaussian import (
    Coordinates,
    Moments,
    Shape,
    coordinates,
    denoised,
    merged_shape,
    oracle_shrunk,
    packed_shape,
    regularised,
    shape_of,
    unpacked_shape,
)

WIDTH = 6
PLAIN = Coordinates(np.zeros(2), np.eye(2))


def random_covariance(width: int, number: int) -> np.ndarray:
    rows = np.random.default_rng(number).normal(size=(2 * width, width)) * np.linspace(0.5, 3, width)
    return rows.T @ rows / len(rows)


def relative(values: np.ndarray) -> np.ndarray:
    return values - values[:, :1]


def skewed_coordinates() -> Coordinates:
    return Coordinates(np.arange(WIDTH, dtype=float), np.linalg.cholesky(random_covariance(WIDTH, 9)))


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_scores_are_log_likelihoods_of_the_regularised_gaussians(rank: int) -> None:
    white, rng = skewed_coordinates(), np.random.default_rng(0)
    means, x = rng.normal(size=(3, WIDTH)) * 2, rng.normal(size=(20, WIDTH)) * 3
    shapes = [shape_of(random_covariance(WIDTH, k), rank) for k in range(3)]
    found = regularised(means, shapes, white, rank or WIDTH, 0.3, 0.2, seed=True)
    within = np.mean([shape.covariance() for shape in shapes], axis=0)
    in_white = [0.8 * (0.7 * shape.covariance() + 0.3 * within) + 0.2 * np.eye(WIDTH) for shape in shapes]
    centres = [*means, white.centre]
    expected = [
        multivariate_normal(centre, white.factor @ covariance @ white.factor.T).logpdf(x)
        for centre, covariance in zip(centres, [*in_white, np.eye(WIDTH)], strict=True)
    ]
    np.testing.assert_allclose(relative(found.scores(found.seen(x))), relative(np.stack(expected, axis=1)), atol=1e-9)


def test_equal_covariances_give_fisher_rows() -> None:
    white, rng = skewed_coordinates(), np.random.default_rng(1)
    means, x = rng.normal(size=(3, WIDTH)), rng.normal(size=(20, WIDTH))
    rows, biases = fisher_rows(np.vstack([means, white.centre]), white.factor @ white.factor.T)
    public = Shape(np.eye(WIDTH), 0.0)
    for shapes in ([public, None, public], [None, None, None]):
        found = regularised(means, shapes, white, WIDTH, 0.5, 0.1, seed=True)
        np.testing.assert_allclose(relative(found.scores(found.seen(x))), relative(x @ rows.T + biases), atol=1e-9)


def test_regularisation_by_hand() -> None:
    """S_1 = diag(4, 1), S_2 = diag(2, 1), so S_within = diag(3, 1). With a = 1/2 and e = 1/5, S_1' = 4/5 diag(7/2, 1) + 1/5 I =
    diag(3, 1) and S_2' = 4/5 diag(5/2, 1) + 1/5 I = diag(11/5, 1). At (3, 2): -1/2 (9/3 + 4) - 1/2 log 3 for the one,
    -1/2 (4/2.2 + 4) - 1/2 log 2.2 for the other, whose mean is (1, 0), and -1/2 (9 + 4) for the seed.
    """
    shapes = [Shape(np.diag([2.0, 1.0]), 0.0), Shape(np.diag([np.sqrt(2), 1.0]), 0.0)]
    found = regularised(np.array([[0.0, 0.0], [1.0, 0.0]]), shapes, PLAIN, 2, 0.5, 0.2, seed=True)
    expected = [-3.5 - np.log(3) / 2, -0.5 * (4 / 2.2 + 4) - np.log(2.2) / 2, -6.5]
    np.testing.assert_allclose(found.scores(found.seen(np.array([[3.0, 2.0]])))[0], expected, atol=1e-12)


def test_a_client_without_a_shape_has_the_others_mean() -> None:
    shapes = [Shape(np.diag([2.0, 1.0]), 0.0), None]
    found = regularised(np.zeros((2, 2)), shapes, PLAIN, 2, 0.25, 0.0, seed=False)
    same = found.scores(found.seen(np.random.default_rng(0).normal(size=(5, 2))))
    np.testing.assert_allclose(same[:, 0], same[:, 1], atol=1e-12)


def test_as_many_directions_as_there_are_are_the_whole() -> None:
    covariance = random_covariance(WIDTH, 3)
    for rank in (0, WIDTH, WIDTH + 5):
        shape = shape_of(covariance, rank)
        np.testing.assert_allclose(shape.covariance(), covariance, atol=1e-12)
        assert shape.rest == 0


def test_fewer_directions_keep_the_largest_and_the_trace() -> None:
    covariance = np.diag([9.0, 4.0, 2.0, 1.0])
    shape = shape_of(covariance, 2)
    np.testing.assert_allclose(shape.covariance(), np.diag([9, 4, 1.5, 1.5]), atol=1e-12)
    assert shape.factors.shape == (2, 4)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_streaming_is_two_passes(sizes: list[int], offset: float) -> None:
    samples = np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 3)) + offset
    moments = Moments(3)
    for batch in np.split(samples, np.cumsum(sizes)[:-1]):
        moments.add(batch)
    apart = samples - samples.mean(axis=0)
    np.testing.assert_allclose(moments.mean, samples.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance(), apart.T @ apart / len(samples), atol=1e-8)


@pytest.mark.parametrize("count", [2, 20, 500])
def test_shrinkage_is_that_of_oas(count: int) -> None:
    samples = np.random.default_rng(count).normal(size=(count, 8)) * np.linspace(1, 4, 8)
    apart = samples - samples.mean(axis=0)
    expected = OAS().fit(samples).covariance_
    np.testing.assert_allclose(oracle_shrunk(apart.T @ apart / count, count), expected, rtol=1e-9)


def test_one_sample_has_no_shape_and_gives_numbers() -> None:
    assert np.array_equal(oracle_shrunk(np.zeros((3, 3)), 1), np.zeros((3, 3)))


@pytest.mark.parametrize("rank", [0, 3])
def test_a_shape_survives_the_wire(rank: int) -> None:
    shape = shape_of(random_covariance(WIDTH, 4), rank)
    sent = packed_shape(shape)
    assert sent.dtype == np.float16
    assert sent.shape == ((19,) if rank else (21,))
    np.testing.assert_allclose(unpacked_shape(sent, rank, WIDTH).covariance(), shape.covariance(), rtol=4e-3, atol=4e-3)


def test_merged_clients_are_one_mixture() -> None:
    rng = np.random.default_rng(5)
    parts = [rng.normal(size=(50, WIDTH)) * k + k for k in (1, 2, 3)]
    means = np.stack([part.mean(axis=0) for part in parts])
    shapes = [shape_of(np.cov(part.T, bias=True), 0) for part in parts]
    together = np.cov(np.concatenate(parts).T, bias=True)
    np.testing.assert_allclose(merged_shape(means, shapes, 0).covariance(), together, atol=1e-9)


@pytest.mark.parametrize("width", [256, pytest.param(4_096, marks=pytest.mark.slow)])
def test_twenty_samples_of_many_features_give_no_false_certainty(width: int) -> None:
    """A client of 20 samples beside one of 200: unseen samples of each are its own, and public ones the seed's."""
    white, rng = Coordinates(np.zeros(width), np.eye(width)), np.random.default_rng(0)
    spread, shift = np.linspace(0.5, 2, width), np.full(width, 0.6)
    shapes, means = [], []
    for count, sign in ((20, 1), (200, -1)):
        moments = Moments(width)
        moments.add(rng.normal(size=(count, width)) * spread + sign * shift)
        shapes.append(shape_of(oracle_shrunk(moments.covariance(), moments.count), 8))
        means.append(moments.mean)
    found = regularised(np.stack(means), shapes, white, 8, 0.5, 0.1, seed=True)
    domains = [rng.normal(size=(50, width)) * spread + shift, rng.normal(size=(50, width)) * spread - shift]
    for own, unseen in enumerate([*domains, rng.normal(size=(50, width))]):
        values = found.scores(found.seen(unseen))
        assert np.isfinite(values).all()
        assert (values.argmax(axis=1) == own).all()


def test_the_public_set_is_white_in_its_coordinates() -> None:
    public = np.random.default_rng(2).normal(size=(4_000, WIDTH)) * np.linspace(0.8, 1.2, WIDTH) + 5
    white = coordinates(public).white(public)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(white.T), np.eye(WIDTH), atol=0.05)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_gaussian_draws_has_its_mean_and_covariance(rank: int) -> None:
    white = skewed_coordinates()
    shapes = [shape_of(random_covariance(WIDTH, k), rank) for k in range(2)]
    means = np.random.default_rng(1).normal(size=(2, WIDTH))
    found = regularised(means, shapes, white, WIDTH, 0.5, 0.1, seed=True)
    drawn = found.drawn(1, 200_000, np.random.default_rng(2))
    mean, covariance = found.seen(means[1]), found.projection @ white.factor
    within = np.mean([shape.covariance() for shape in shapes], axis=0)
    own = 0.9 * (0.5 * shapes[1].covariance() + 0.5 * within) + 0.1 * np.eye(WIDTH)
    expected = covariance @ own @ covariance.T
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.02)
    assert np.linalg.norm(np.cov(drawn.T) - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_points_lie_apart_as_the_gaussians_do(rank: int) -> None:
    white, rng = skewed_coordinates(), np.random.default_rng(5)
    means = rng.normal(size=(4, WIDTH))
    shapes = [shape_of(random_covariance(WIDTH, k), rank) for k in range(4)]
    points = regularised(means, shapes, white, rank or WIDTH, 0.3, 0.2, seed=False).points()
    own = [0.8 * (0.7 * shape.covariance() + 0.3 * within(shapes)) + 0.2 * np.eye(WIDTH) for shape in shapes]
    inverse = np.linalg.inv(np.mean(own, axis=0))
    centres = white.white(means)
    for i in range(4):
        for j in range(4):
            apart, change = centres[i] - centres[j], inverse @ (own[i] - own[j])
            expected = apart @ inverse @ apart + 0.5 * np.trace(change @ change)
            assert np.square(points[i] - points[j]).sum() == pytest.approx(expected, abs=1e-8)


def test_points_of_gaussians_that_differ_little_are_their_divergence_apart() -> None:
    """KL(1 | 2) + KL(2 | 1) = 1/2 d' (P_1 + P_2) d + 1/2 tr (P_1 S_2 + P_2 S_1 - 2 I), P = S^-1."""
    base, step = random_covariance(WIDTH, 0), random_covariance(WIDTH, 1) * 1e-3
    shapes, means = [shape_of(base, 0), shape_of(base + step, 0)], np.array([np.zeros(WIDTH), np.full(WIDTH, 1e-3)])
    identity = Coordinates(np.zeros(WIDTH), np.eye(WIDTH))
    points = regularised(means, shapes, identity, WIDTH, 0.1, 0.0, seed=False).points()
    own = [0.9 * shape.covariance() + 0.1 * within(shapes) for shape in shapes]
    one, two = map(np.linalg.inv, own)
    apart = means[1] - means[0]
    expected = 0.5 * apart @ (one + two) @ apart
    expected += 0.5 * (np.trace(one @ own[1]) + np.trace(two @ own[0])) - WIDTH
    assert np.square(points[0] - points[1]).sum() == pytest.approx(expected, rel=1e-3)


def within(shapes: list[Shape]) -> np.ndarray:
    return np.mean([shape.covariance() for shape in shapes], axis=0)


def test_some_of_several_gaussians_score_as_they_do_among_all() -> None:
    white, x = skewed_coordinates(), np.random.default_rng(2).normal(size=(5, WIDTH))
    shapes = [shape_of(random_covariance(WIDTH, k), 2) for k in range(3)]
    found = regularised(np.eye(3, WIDTH), shapes, white, 2, 0.3, 0.2, seed=True)
    seen = found.seen(x)
    np.testing.assert_array_equal(found.of([2, 0]).scores(seen), found.scores(seen)[:, [2, 0]])


def test_of_noise_alone_nothing_is_left_but_the_mean_variance() -> None:
    free = np.random.default_rng(0).normal(size=(200, 200)) * 0.1
    found = denoised(np.eye(200) * 3 + (free + free.T) / np.sqrt(2), 0.1)
    # Eigenvalues of noise alone reach 2 x 0.1 x sqrt(200), give or take little.
    assert np.abs(np.linalg.eigvalsh(found) - 3).max() < 0.5


def test_what_stands_out_of_the_noise_comes_back_nearer_to_the_truth() -> None:
    free = np.random.default_rng(1).normal(size=(200, 200)) * 0.1
    truth = np.eye(200) + 8 * np.outer(np.eye(200)[0], np.eye(200)[0])
    noisy = truth + (free + free.T) / np.sqrt(2)
    found = denoised(noisy, 0.1)
    assert np.linalg.norm(found - truth) < 0.3 * np.linalg.norm(noisy - truth)
    assert found[0, 0] == pytest.approx(9, abs=0.6)
    assert np.linalg.eigvalsh(denoised(-truth, 0.1)).min() == 0
