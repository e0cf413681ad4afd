import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError
from metamoe.common.gaussian import Shape
from metamoe.common.model.seed import Seed
from metamoe.common.presets import changed, validated
from metamoe.server.experts import store_expert, stored_expert
from metamoe.server.merging import Contribution, clusters, merge, merged_expert, merged_selection
from metamoe.server.proxies import Selection
from tests.conftest import random_expert, random_features


def selection(*ids: int) -> Selection:
    scores = np.array(ids, dtype=float)
    return Selection(np.array(ids), scores, scores / 100)


def stored(folder: Path, seed: Seed, settings: Settings, expert: dict[str, torch.Tensor]) -> Path:
    store_expert(folder, seed, settings.lora, {name: matrix.half().numpy() for name, matrix in expert.items()})
    return folder


def test_clients_are_grouped_by_distance() -> None:
    points = np.array([[0.0, 0.0], [10.0, 0.0], [0.2, 0.1], [10.0, 0.3], [0.0, 50.0]])
    assert clusters(points, 3) == [[0, 2], [1, 3], [4]]
    assert clusters(points, 1) == [[0, 1, 2, 3, 4]]
    assert clusters(points, 5) == [[0], [1], [2], [3], [4]]


def test_a_merged_expert_is_the_mean_where_its_rank_can_hold_it(seed: Seed, settings: Settings, tmp_path: Path) -> None:
    # Three experts with the same A: the mean of B_k A is (mean of B_k) A, of rank 2 itself.
    experts = [random_expert(seed, settings, k) for k in range(3)]
    for expert in experts[1:]:
        expert |= {name: matrix for name, matrix in experts[0].items() if ".lora_A." in name}
    merged = merged_expert([stored(tmp_path / str(k), seed, settings, e) for k, e in enumerate(experts)], 2)
    assert {name: m.shape for name, m in merged.items()} == {name: m.shape for name, m in experts[0].items()}
    for name in (name for name in merged if ".lora_A." in name):
        other = name.replace(".lora_A.", ".lora_B.")
        mean = sum(expert[other] @ expert[name] for expert in experts) / 3
        torch.testing.assert_close(merged[other].float() @ merged[name].float(), mean, atol=5e-3, rtol=1e-2)


def test_a_merged_expert_keeps_the_largest_singular_values(seed: Seed, settings: Settings, tmp_path: Path) -> None:
    # One expert writes 4 into the first row, the other 2 into the second: the mean is diag(2, 1), and of rank one diag(2, 0).
    one, two = ({name: torch.zeros_like(m) for name, m in random_expert(seed, settings, 0).items()} for _ in range(2))
    for expert, row, value in ((one, 0, 4.0), (two, 1, 2.0)):
        for name, matrix in expert.items():
            matrix[(0, row) if ".lora_A." in name else (row, 0)] = 1.0 if ".lora_A." in name else value
    folders = [stored(tmp_path / "one", seed, settings, one), stored(tmp_path / "two", seed, settings, two)]
    name = next(name for name in one if ".lora_A." in name)
    for rank, diagonal in ((2, [2.0, 1.0]), (1, [2.0, 0.0])):
        merged = merged_expert(folders, rank)
        mean = (merged[name.replace(".lora_A.", ".lora_B.")] @ merged[name]).float()
        expected = torch.zeros_like(mean)
        expected[0, 0], expected[1, 1] = diagonal
        torch.testing.assert_close(mean, expected, atol=1e-3, rtol=0)


def test_proxies_of_a_group_are_taken_in_turn_and_none_twice() -> None:
    merged = merged_selection([selection(5, 6, 7), selection(6, 8, 9)], 4)
    assert merged.ids.tolist() == [5, 6, 8, 7]
    assert merged.scores.tolist() == [5.0, 6.0, 8.0, 7.0]
    assert merged.relevance.tolist() == [0.05, 0.06, 0.08, 0.07]


def contributions(folder: Path, seed: Seed, settings: Settings, vectors: list[np.ndarray | None]) -> list[Contribution]:
    return [
        Contribution(
            f"c-{k}", stored(folder / f"c-{k}", seed, settings, random_expert(seed, settings, k)), v, selection(k, k + 10)
        )
        for k, v in enumerate(vectors)
    ]


def test_as_many_experts_as_the_settings_allow(seed: Seed, settings: Settings, tmp_path: Path) -> None:
    bounded = validated(settings.model_dump() | {"clients": 4, "experts": {"max": 2}, "proxies": {"count": 3, "pool": 10}})
    vectors = [np.full((1, 16), value) for value in (0.0, 9.0, 0.1, 0.2)]
    features = random_features(300, 32).reshape(300, 2, 16)
    sent = contributions(tmp_path, seed, bounded, vectors)
    parts, merged = merge(sent, bounded, seed, features)
    assert merged == {"c-0-and-2-more": ["c-0", "c-2", "c-3"]}
    assert [part.name for part in parts] == ["c-0-and-2-more", "c-1"]
    np.testing.assert_allclose(parts[0].vectors, np.full((1, 16), 0.1))
    assert parts[0].selection.ids.tolist() == [0, 2, 3]
    assert parts[1] is sent[1]
    expert, _ = stored_expert(parts[0].folder)
    assert {m.dtype for m in expert.values()} == {torch.float16}


def test_distances_are_in_units_of_the_public_spread(seed: Seed, settings: Settings, tmp_path: Path) -> None:
    # Along the first axis, where public data is 100 times wider, a distance of 10 is less than one of 2 along the second.
    bounded = validated(settings.model_dump() | {"clients": 4, "experts": {"max": 2}, "proxies": {"count": 3, "pool": 10}})
    vectors = [np.zeros((1, 16)) for _ in range(4)]
    for k, (first, second) in enumerate([(0, 0), (10, 0), (0, 2), (10, 2)]):
        vectors[k][0, :2] = first, second
    sent = contributions(tmp_path, seed, bounded, vectors)
    _, merged = merge(sent, bounded, seed, random_features(300, 32).reshape(300, 2, 16))
    assert list(merged.values()) == [["c-0", "c-2"], ["c-1", "c-3"]]
    wide = random_features(300, 32).reshape(300, 2, 16) * np.array([100.0] + [1.0] * 15)
    for part in sent:
        shutil.rmtree(part.folder.parent / f"{part.name}-and-1-more", ignore_errors=True)
    _, merged = merge(sent, bounded, seed, wide)
    assert list(merged.values()) == [["c-0", "c-1"], ["c-2", "c-3"]]


def test_by_gaussians_clients_of_one_mean_are_grouped_by_their_shapes(seed: Seed, settings: Settings, tmp_path: Path) -> None:
    bounded = validated(settings.model_dump() | {"clients": 4, "experts": {"max": 2}, "proxies": {"count": 3, "pool": 10}})
    bounded = changed(bounded, ["router.vectors=seed"])
    public = random_features(300, 32).reshape(300, 2, 16)
    # The first and the last scatter along one axis, the others along another.
    shapes = [Shape(np.eye(16)[[axis]] * size, 0.1) for axis, size in ((0, 2.0), (1, 2.0), (1, 2.2), (0, 2.2))]
    sent = contributions(tmp_path, seed, bounded, [np.zeros((1, 16)) + 0.01 * k for k in range(4)])
    sent = [replace(part, shape=shape) for part, shape in zip(sent, shapes, strict=True)]
    parts, merged = merge(sent, bounded, seed, public)
    assert list(merged.values()) == [["c-0", "c-3"], ["c-1", "c-2"]]
    # A merged shape scatters as its members do on average.
    assert parts[0].shape.covariance()[0, 0] == pytest.approx((2.0**2 + 2.2**2) / 2 + 0.1, abs=0.02)


def test_nothing_is_merged_where_there_is_room(seed: Seed, settings: Settings, tmp_path: Path) -> None:
    sent = contributions(tmp_path, seed, settings, [None, None, None])
    assert merge(sent, settings, seed, np.zeros((1, 1, 16))) == (sent, {})


def test_clients_that_sent_no_vectors_are_compared_by_their_proxies(seed: Seed, settings: Settings, tmp_path: Path) -> None:
    bounded = changed(settings, ["experts.max=2", "router.vectors=proxy"])
    features = np.zeros((30, 1, 16)) + random_features(30, 16)[:, None] * 1e-3
    features[[1, 11]] += 5
    parts, merged = merge(contributions(tmp_path, seed, bounded, [None, None, None]), bounded, seed, features)
    assert merged == {"c-0-and-1-more": ["c-0", "c-2"]}
    assert parts[0].vectors is None


@pytest.mark.parametrize(("allowed", "fine"), [(2, False), (3, True)])
def test_no_more_experts_can_be_chosen_than_there_are(allowed: int, fine: bool) -> None:
    values = {"clients": 5, "experts": {"max": allowed}, "router": {"top-k": 4}}
    if fine:
        assert validated(values).experts.max == 3
    else:
        with pytest.raises(InvalidSettingError, match=r"top-k = 4 is more than the 3 experts of experts.max = 2"):
            validated(values)
