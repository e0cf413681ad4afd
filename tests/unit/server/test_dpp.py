from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metamoe.server.dpp import greedy_map


def kernel(features: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return relevance[:, None] * (unit @ unit.T) * relevance[None, :]


def brute_force(features: np.ndarray, relevance: np.ndarray, count: int, ridge: float = 0.0) -> list[int]:
    """Greedy by evaluating every determinant."""
    matrix = kernel(features, relevance) + ridge * np.eye(len(features))
    picked: list[int] = []
    for _ in range(count):
        rest = [i for i in range(len(features)) if i not in picked]
        values = [np.linalg.slogdet(matrix[np.ix_([*picked, i], [*picked, i])])[1] for i in rest]
        picked.append(rest[int(np.argmax(values))])
    return picked


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(number: int, items: int, count: int) -> None:
    rng = np.random.default_rng(number)
    features, relevance = rng.normal(size=(items, 8)), rng.uniform(0.05, 1, items)
    count = min(count, items)
    assert greedy_map(features, relevance, count).tolist() == brute_force(features, relevance, count)


def test_first_two_of_a_small_case_are_the_best_pair() -> None:
    # Worked out by hand: r = 1, .9, .9; item 1 is parallel to item 0, item 2 orthogonal to it.
    features, relevance = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), np.array([1.0, 0.9, 0.9])
    assert greedy_map(features, relevance, 2).tolist() == [0, 2]
    matrix = kernel(features, relevance)
    best = max(combinations(range(3), 2), key=lambda s: np.linalg.det(matrix[np.ix_(s, s)]))
    assert best == (0, 2)


def test_relevance_and_diversity_both_count() -> None:
    features = np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    assert greedy_map(features, np.array([1.0, 1.0, 0.5]), 2).tolist() == [0, 2]
    assert greedy_map(features, np.array([1.0, 1.0, 1e-4]), 2).tolist() == [0, 1]


def test_beyond_the_rank_picks_are_distinct_and_follow_the_vanishing_ridge() -> None:
    rng = np.random.default_rng(3)
    features, relevance = rng.normal(size=(14, 4)), rng.uniform(0.3, 1, 14)
    picked = greedy_map(features, relevance, 9).tolist()
    assert len(set(picked)) == 9
    assert picked == brute_force(features, relevance, 9, ridge=1e-7)


def test_all_items_can_be_taken_whatever_the_rank() -> None:
    features = np.ones((50, 3))
    assert greedy_map(features, np.ones(50), 50).tolist() == list(range(50))


def test_relevance_of_very_different_size_does_no_harm() -> None:
    rng = np.random.default_rng(0)
    relevance = 10.0 ** rng.uniform(-120, 0, 200)
    picked = greedy_map(rng.normal(size=(200, 16)), relevance, 150)
    assert len(set(picked.tolist())) == 150
    assert picked[0] == relevance.argmax()


def test_many_more_items_than_dimensions() -> None:
    rng = np.random.default_rng(1)
    picked = greedy_map(rng.normal(size=(2_000, 64)).astype(np.float32), rng.uniform(0.1, 1, 2_000), 500)
    assert len(set(picked.tolist())) == 500


def test_bad_input_is_refused() -> None:
    ones = np.ones((3, 2))
    with pytest.raises(ValueError, match="4 items of 3"):
        greedy_map(ones, np.ones(3), 4)
    with pytest.raises(ValueError, match="positive"):
        greedy_map(ones, np.array([1.0, 0.0, 1.0]), 2)
    with pytest.raises(ValueError, match="finite"):
        greedy_map(np.full((3, 2), np.nan), np.ones(3), 2)
    with pytest.raises(ValueError, match="length zero"):
        greedy_map(np.zeros((3, 2)), np.ones(3), 2)


def plain(features: np.ndarray, relevance: np.ndarray, count: int) -> list[int]:
    """The definition with nothing saved: of all items left, the one with the largest residual, the lowest index first."""
    weighted = features / np.linalg.norm(features, axis=1, keepdims=True) * relevance[:, None]
    picked: list[int] = []
    for _ in range(count):
        span, _ = np.linalg.qr(weighted[picked].T) if picked else (np.zeros((features.shape[1], 0)), None)
        residuals = ((weighted - weighted @ span @ span.T) ** 2).sum(axis=1)
        residuals[picked] = -1
        picked.append(int(np.flatnonzero(residuals >= residuals.max() - 1e-12)[0]))
    return picked


# Not so small that relevances differ by no more than rounding: there, what ties is a matter of the order of sums.
slopes = st.just(0.0) | st.floats(1e-6, 8)


@given(st.integers(1, 400), st.integers(2, 40), st.integers(0, 10**6), slopes, st.sampled_from(["f2", "f4", "f8"]))
@settings(max_examples=60, deadline=None)
def test_looking_lazily_picks_what_looking_at_everything_picks(n: int, d: int, seed: int, slope: float, dtype: str) -> None:
    """With relevance from flat to steep, and every third item there twice."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)).astype(dtype)
    features[: n // 3] = features[n - n // 3 :]
    relevance = 1 / (1 + np.exp(-rng.normal(size=n) * slope))
    relevance[: n // 3] = relevance[n - n // 3 :]
    count = min(d // 2, n - n // 3)
    assert greedy_map(features, relevance, count).tolist() == plain(features.astype(np.float64), relevance, count)


def test_more_equal_items_than_are_compared_at_a_time_are_picked_by_index() -> None:
    rng = np.random.default_rng(5)
    features = np.repeat(rng.normal(size=(4, 32)), 500, axis=0)[rng.permutation(2_000)]
    picks = greedy_map(features, np.ones(2_000), 4)
    assert picks.tolist() == plain(features, np.ones(2_000), 4)


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_where_little_is_left_beside_those_picked_float32_does_not_decide(noise: float) -> None:
    rng = np.random.default_rng(6)
    features = rng.normal(size=(1_500, 5)) @ rng.normal(size=(5, 64)) + noise * rng.normal(size=(1_500, 64))
    relevance = rng.uniform(0.5, 1, 1_500)
    assert greedy_map(features, relevance, 40).tolist() == plain(features, relevance, 40)


@pytest.mark.parametrize("length", [1e-100, 1e-30, 1e30, 1e100])
def test_lengths_beyond_float32_change_nothing(length: float) -> None:
    rng = np.random.default_rng(7)
    features, relevance = rng.normal(size=(600, 48)), rng.uniform(0.5, 1, 600)
    assert (greedy_map(features * length, relevance, 30) == greedy_map(features, relevance, 30)).all()


def test_twenty_thousand_items_from_a_file_are_picked_as_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20_000, 32)).astype(np.float16)
    (tmp_path / "features").write_bytes(features.tobytes())
    mapped = np.memmap(tmp_path / "features", dtype=np.float16, mode="r", shape=features.shape)
    relevance = 1 / (1 + np.exp(-rng.normal(size=20_000) * 3))
    picks = greedy_map(mapped, relevance, 24)
    assert picks.tolist() == plain(features.astype(np.float64), relevance, 24)
