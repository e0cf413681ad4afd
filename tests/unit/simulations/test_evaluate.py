"""Each way of using experts, against its definition."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private
from metamoe.common.data.metrics import accuracy
from metamoe.common.data.tasks import ImageSamples
from metamoe.common.model.batch import ImageBatch
from metamoe.common.model.inputs import embed
from metamoe.common.model.lora import with_lora
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import RouterWeights
from metamoe.common.model.seed import Seed
from metamoe.common.presets import changed
from metamoe.simulations.benchmark import fedavg
from metamoe.simulations.clients import client_accuracy
from metamoe.simulations.evaluate import EvaluationSet, domains_of, ensemble, mean_decision, own_share, soup
from tests.conftest import random_expert, random_features, random_pixels


def test_btm_is_the_mean_of_probabilities() -> None:
    # softmax(0, ln 3) = (1/4, 3/4), softmax(0, 0) = (1/2, 1/2), softmax(ln 4, 0) = (4/5, 1/5).
    members = [torch.log(torch.tensor([[1.0, 3.0]])), torch.zeros(1, 2), torch.log(torch.tensor([[4.0, 1.0]]))]
    scores = ensemble([lambda _batch, member=member: member for member in members])
    expected = [(1 / 4 + 1 / 2 + 4 / 5) / 3, (3 / 4 + 1 / 2 + 1 / 5) / 3]
    torch.testing.assert_close(scores(ImageBatch(torch.zeros(1), torch.zeros(1), torch.zeros(1))), torch.tensor([expected]))


def test_the_decision_of_a_sample_is_the_mean_over_its_tokens(seed: Seed, settings: Settings) -> None:
    routers = [RouterWeights(random_features(3, seed.width) * 2, np.zeros(3), settings.router.context)]
    experts = [random_expert(seed, settings, k) for k in range(3)]
    model = UnifiedModel(seed, experts, settings.lora, settings.router, routers).eval()
    batch = ImageBatch(random_pixels(3), torch.zeros(3), torch.zeros(1))
    with torch.inference_mode():
        _, decisions = model(batch.inputs)
        found = mean_decision(decisions[0], batch.inputs)
    # Every token has its own.
    assert decisions[0].shape[1] > 1
    torch.testing.assert_close(found, decisions[0].exp().mean(1))
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_a_soup_is_the_dense_model_with_the_mean_weights(seed: Seed, settings: Settings) -> None:
    experts = [random_expert(seed, settings, k) for k in range(2)]
    merged, lora = soup(experts, settings.lora)
    # Two experts of rank 2 with alpha 4: W + 1/2 (2 B_1 A_1 + 2 B_2 A_2).
    path = seed.ffn_paths[0] + ".fc1"
    expected = sum(expert[f"{path}.lora_B.weight"] @ expert[f"{path}.lora_A.weight"] for expert in experts)
    got = merged[f"{path}.lora_B.weight"] @ merged[f"{path}.lora_A.weight"] * (lora.alpha / lora.rank)
    torch.testing.assert_close(got, expected)
    # The soup of one is that one.
    alone, same = soup(experts[:1], settings.lora)
    pixels = random_pixels(3)
    with torch.inference_mode():
        one, other = (embed(with_lora(seed, lora, e), pixels) for lora, e in ((same, alone), (settings.lora, experts[0])))
        torch.testing.assert_close(one, other)


def test_accuracy_of_a_hand_computed_case() -> None:
    images = ImageSamples(torch.arange(5.0).reshape(5, 1), torch.tensor([0, 1, 1, 0, 1]), torch.zeros(2), at_once=2)
    # Class 1 from 2 on: right are 0, 2 and 4.
    right = accuracy(lambda batch: torch.cat([2 - batch.inputs - 0.5, batch.inputs - 2 + 0.5], dim=1), images)
    assert right == pytest.approx(60.0)


def test_a_share_counts_every_expert_of_the_own_domain(settings: Settings) -> None:
    six = settings.model_copy(update={"clients": 6})
    images = EvaluationSet("greek, blur", "greek", ImageSamples(torch.zeros(1), torch.zeros(1), torch.zeros(1)))
    # Clients 1 and 4 have greek; two layers decide.
    shares = [[0.1, 0.2, 0.1, 0.1, 0.3, 0.2], [0.0, 0.5, 0.0, 0.0, 0.5, 0.0]]
    owners = [domains_of(six, name, {}) for name in six.client_names]
    assert own_share(owners, images, shares) == pytest.approx((0.5 + 1.0) / 2)
    # An expert that two clients share is of both their domains, and the seed of none.
    merged = {"digits-1-and-1-more": ["digits-1", "greek-1"]}
    owners = [domains_of(six, name, merged) for name in ("digits-1-and-1-more", "arrows-1", "seed")]
    assert owners == [{"digits", "greek"}, {"arrows"}, set()]
    assert own_share(owners, images, [[0.7, 0.2, 0.1]]) == pytest.approx(0.7)


def test_federated_averaging_goes_on_after_the_last_round(
    seed: Seed, small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(small, ["expert-training.epochs=3"])
    private = [load_private(small, client, "train") for client in range(2)]
    whole = fedavg.federated_average(seed, settings, private, private[0], 3)
    train, rounds = fedavg.train_expert, []

    def dying(*arguments, **more):
        rounds.append(arguments[2])
        if len(rounds) == 4:
            raise KeyboardInterrupt
        return train(*arguments, **more)

    monkeypatch.setattr(fedavg, "train_expert", dying)
    with pytest.raises(KeyboardInterrupt):
        fedavg.federated_average(seed, settings, private, private[0], 3, tmp_path / "round")
    rest = fedavg.federated_average(seed, settings, private, private[0], 3, tmp_path / "round")
    # Two trained in the first round, the second was stopped in the middle and trained again, and the third.
    assert rounds == [0, 1, 0, 1, 0, 1, 0, 1]
    assert all(torch.equal(rest[name], whole[name]) for name in whole)


def test_federated_averaging_is_the_mean_weighted_by_samples_round_by_round(
    seed: Seed, small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is replaced by adding a known number; the averaging is Flower's own."""
    seen = []

    told = []

    def note(*at, metrics):
        told.append((*at, metrics))

    def train(_seed, settings, client, samples, _space, progress, start):
        seen.append((client, len(samples[0]), settings.expert_training.epochs))
        progress(1, 2, metrics={"loss": 9.0})
        progress(2, 2, metrics={"loss": 1.0 + client})
        return {name: (matrix + 1 + client).half() for name, matrix in start.items()}

    monkeypatch.setattr(fedavg, "train_expert", train)
    settings = changed(small, ["expert-training.epochs=4"])
    private = [load_private(small, 0, "train"), load_private(small, 1, "train").select(range(10))]
    result = fedavg.federated_average(
        seed, settings, private, private[0], 2, progress=lambda *at, metrics: told.append((*at, metrics))
    )
    # 40 samples move by 1 and 10 by 2 in each of two rounds: (40 * 1 + 10 * 2) / 50 = 1.2, and B starts at zero.
    matrix = result[f"{seed.ffn_paths[1]}.fc1.lora_B.weight"]
    torch.testing.assert_close(matrix, torch.full_like(matrix, 2.4), atol=2e-3, rtol=0)
    assert seen == [(0, 40, 2), (1, 10, 2), (0, 40, 2), (1, 10, 2)]
    # The loss is of each client's last epoch, weighted alike; the rate falls over the rounds.
    rate = settings.expert_training.learning_rate
    expected = [(1, 2, {"loss": 1.2, "learning-rate": rate}), (2, 2, {"loss": 1.2, "learning-rate": rate / 2})]
    assert [(*at, pytest.approx(metrics)) for *at, metrics in told] == expected


def test_a_client_s_accuracy_is_by_its_own_classes() -> None:
    # Class 0: 3 of 4 right; class 1: 1 of 2; class 2 is not tested.
    right = np.array([True, True, True, False, True, False])
    tests = [(right, np.array([0, 0, 0, 0, 1, 1]))]
    assert client_accuracy(np.array([1, 0, 0]), tests) == pytest.approx(75)
    assert client_accuracy(np.array([0, 7, 0]), tests) == pytest.approx(50)
    # Three parts of 75 and one of 50; what is not tested says nothing.
    assert client_accuracy(np.array([3, 1, 9]), tests) == pytest.approx(68.75)
    for counts in (np.array([0, 0, 9]), np.zeros(0, dtype=int)):
        assert client_accuracy(counts, tests) == pytest.approx(100 * 4 / 6)
