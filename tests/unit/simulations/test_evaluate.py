"""Each way of using experts, against its definition."""

import numpy as np
import pytest
import torch

from common.config import Settings
from common.data.datasets import load_private
from common.model.lora import with_lora
from common.model.seed import Seed, embed
from simulations.evaluate import ImageSet, dense, ensemble, own_share, percent_right, soup
from simulations.fedavg import federated_average
from tests.conftest import random_expert, random_pixels


def test_btm_is_the_mean_of_probabilities() -> None:
    # softmax(0, ln 3) = (1/4, 3/4), softmax(0, 0) = (1/2, 1/2), softmax(ln 4, 0) = (4/5, 1/5).
    members = [torch.log(torch.tensor([[1.0, 3.0]])), torch.zeros(1, 2), torch.log(torch.tensor([[4.0, 1.0]]))]
    scores = ensemble([lambda _pixels, _texts, member=member: member for member in members])
    expected = [(1 / 4 + 1 / 2 + 4 / 5) / 3, (3 / 4 + 1 / 2 + 1 / 5) / 3]
    torch.testing.assert_close(scores(torch.zeros(1), torch.zeros(1)), torch.tensor([expected]))


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


def test_percent_right_of_a_hand_computed_case() -> None:
    images = ImageSet("a", "a", torch.arange(5.0).reshape(5, 1), torch.tensor([0, 1, 1, 0, 1]), torch.zeros(2))
    # Class 1 from 2 on: right are 0, 2 and 4.
    right = percent_right(lambda pixels, _texts: torch.cat([2 - pixels - 0.5, pixels - 2 + 0.5], dim=1), images)
    assert right == pytest.approx(60.0)


def test_a_share_counts_every_expert_of_the_own_domain(settings: Settings) -> None:
    six = settings.model_copy(update={"clients": 6})
    images = ImageSet("greek, blur", "greek", torch.zeros(1), torch.zeros(1), torch.zeros(1))
    # Clients 1 and 4 have greek; two layers decide.
    shares = [[0.1, 0.2, 0.1, 0.1, 0.3, 0.2], [0.0, 0.5, 0.0, 0.0, 0.5, 0.0]]
    assert own_share(six, images, shares) == pytest.approx((0.5 + 1.0) / 2)


def test_federated_averaging_weighs_by_samples_and_one_client_is_itself(seed: Seed, small: Settings) -> None:
    private = [load_private(small, client, "train") for client in range(2)]
    uneven = [private[0], private[1].select(range(10))]

    def average(data: list) -> dict[str, np.ndarray]:
        result = federated_average(seed, small, data, private[0], 1, lambda _done, _total: None)
        return {name: tensor.numpy() for name, tensor in result.items()}

    both, first = average(uneven), average(uneven[:1])
    # Client 1 alone cannot be asked for by its number, so it is solved for: (40 w_1 + 10 w_2) / 50.
    name = next(n for n in both if n.endswith("fc1.lora_B.weight"))
    second = (50 * both[name] - 40 * first[name]) / 10
    assert np.abs(first[name]).max() > 0
    assert not np.allclose(second, first[name], atol=1e-3)
    equal = average([private[0], private[1]])[name]
    assert not np.allclose(equal, both[name], atol=1e-5)
    unmoved = dense(seed.model)(random_pixels(1), torch.randn(3, 8))
    assert unmoved.shape == (1, 3)
