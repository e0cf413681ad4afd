import numpy as np
import pytest

from metamoe.common.config import Settings
from metamoe.common.errors import ProxyCountError
from metamoe.common.fisher import shrunk_covariance
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
    selections = select_proxies(FEATURES, PROFILES, selecting(selection="relevance"))
    for selection in selections.values():
        assert (np.diff(selection.scores) <= 0).all()
    # Towards its own mean: along the first axis up, along the second down.
    assert FEATURES[selections[0].ids, 0].mean() > FEATURES[:, 0].mean() + 1
    assert FEATURES[selections[1].ids, 1].mean() < FEATURES[:, 1].mean() - 1


def test_a_dpp_stays_in_the_pool_and_is_more_diverse() -> None:
    def volume(ids: np.ndarray) -> float:
        unit = FEATURES[ids[:5]] / np.linalg.norm(FEATURES[ids[:5]], axis=1, keepdims=True)
        return float(np.linalg.slogdet(unit @ unit.T)[1])

    pool = select_proxies(FEATURES, PROFILES, selecting(selection="relevance", count=40))
    dpp = select_proxies(FEATURES, PROFILES, selecting())
    for client in PROFILES:
        assert set(dpp[client].ids) <= set(pool[client].ids)
        assert volume(dpp[client].ids) > volume(pool[client].ids)


def test_random_ones_need_nothing_of_a_client_and_differ_between_clients() -> None:
    first, second = select_proxies(FEATURES, {0: {}, 1: {}}, selecting(selection="random")).values()
    assert len(set(first.ids)) == len(set(second.ids)) == 8
    assert set(first.ids) != set(second.ids)
    # The same ones when the other client is missing.
    again = select_proxies(FEATURES, {1: {}}, selecting(selection="random"))
    assert (again[1].ids == second.ids).all()


def test_a_classifiers_log_odds_are_used_as_they_are() -> None:
    # w = (0, 0, 1, 0, 0), b = -2.
    profile = {"relevance-classifier": np.array([0, 0, 1, 0, 0, -2], dtype=np.float32)}
    selection = select_proxies(FEATURES, {0: profile}, selecting(relevance="classifier", selection="relevance"))[0]
    np.testing.assert_array_equal(selection.ids, np.argsort(-FEATURES[:, 2], kind="stable")[:8])
    np.testing.assert_allclose(selection.scores, FEATURES[selection.ids, 2] - 2)


def test_a_pool_as_large_as_the_public_set_is_refused() -> None:
    with pytest.raises(ProxyCountError, match="200 samples"):
        select_proxies(FEATURES, PROFILES, selecting(pool=200))


def test_candidates_may_be_the_whole_public_set() -> None:
    selections = select_proxies(FEATURES, PROFILES, selecting(candidates="all", pool=4, count=3))
    for client, selection in selections.items():
        public = FEATURES.astype(np.float64)
        rows, biases = fisher_discriminants(
            PROFILES[client]["seed-routing-vector"][None], public.mean(0), shrunk_covariance(public)
        )
        relevance = logistic_link(linear_scores(public, rows, biases)[0], 4)
        np.testing.assert_array_equal(selection.ids, greedy_map(public, relevance, 3))


def test_how_many_clients_scores_are_in_memory_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = select_proxies(FEATURES, PROFILES, selecting())
    monkeypatch.setattr(proxies, "_SCORES", 1)
    done: list[tuple[int, int]] = []
    one_by_one = select_proxies(FEATURES, PROFILES, selecting(), lambda *counts: done.append(counts))
    assert done == [(1, 2), (2, 2)]
    for client, selection in together.items():
        np.testing.assert_array_equal(one_by_one[client].ids, selection.ids)
        np.testing.assert_allclose(one_by_one[client].scores, selection.scores, rtol=1e-12)
