"""Experts by DP-SGD: they train, gradients are clipped one by one, and the noise is there."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from metamoe.client.answer import answer
from metamoe.client.dp_sgd import train_with_privacy
from metamoe.client.site import Site, site_of
from metamoe.common.config import Settings
from metamoe.common.curve import unwatched
from metamoe.common.data.datasets import label_space, load_private, load_public
from metamoe.common.data.image_batches import all_pixels
from metamoe.common.data.tasks import class_names, labels_in
from metamoe.common.errors import PrivateDataError
from metamoe.common.model.batch import class_logits, text_features
from metamoe.common.model.inputs import embed
from metamoe.common.model.lora import Expert, rounded, with_lora
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed
from metamoe.common.privacy import Mechanism
from metamoe.common.wire import Request
from tests.conftest import random_expert

PRIVATE = ["privacy.vectors=gaussian", "privacy.expert=dp-sgd", "privacy.min-samples=30", "privacy.expert-batch-size=40"]


@pytest.fixture
def private(small: Settings) -> Settings:
    return changed(small, [*PRIVATE, "privacy.expert-epochs=2"])


def trained(settings: Settings, noise: float, steps: int, **privacy: float) -> tuple[Expert, Expert]:
    """The warm start, and what one client's training made of it."""
    settings = changed(settings, [f"privacy.{key.replace('_', '-')}={value}" for key, value in privacy.items()])
    seed, data = load_seed(settings.seed_model), load_private(settings, 0, "train")
    start = rounded(random_expert(seed, settings, 0))
    space = label_space(class_names(data), class_names(load_public(settings.data)))
    mechanism, rng = Mechanism(noise, 1.0, steps), np.random.default_rng(0)
    return start, train_with_privacy(seed, settings, data, space, start, mechanism, rng, unwatched)


def loss(settings: Settings, expert: Expert) -> float:
    seed, data = load_seed(settings.seed_model), load_private(settings, 0, "train")
    space = label_space(class_names(data), class_names(load_public(settings.data)))
    texts = text_features(seed, space, settings.data.prompt)
    with torch.inference_mode():
        model = with_lora(seed, settings.lora, expert)
        logits = class_logits(model, embed(model, all_pixels(seed, [data])[:]), texts)
        return F.cross_entropy(logits, labels_in(data, space)).item()


def test_it_trains(private: Settings) -> None:
    """All matrices move, and the loss falls: not what silently happens where per-sample gradients miss LoRA."""
    start, expert = trained(private, 0.1, 12, expert_learning_rate=2e-2)
    assert start.keys() == expert.keys()
    assert all((start[name] != expert[name]).any() for name in start)
    assert loss(private, expert) < loss(private, start) - 0.2


def test_one_step_is_the_mean_of_clipped_gradients(private: Settings) -> None:
    """By hand: each sample's gradient by itself, clipped, summed, divided by the public number; AdamW goes by its sign."""
    start, expert = trained(private, 1e-9, 1, expert_clip=1e-3, expert_learning_rate=1e-2)
    seed, data = load_seed(private.seed_model), load_private(private, 0, "train")
    space = label_space(class_names(data), class_names(load_public(private.data)))
    texts, pixels, labels = text_features(seed, space, private.data.prompt), all_pixels(seed, [data])[:], labels_in(data, space)
    model = with_lora(seed, private.lora, start)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for row in range(len(labels)):
        logits = class_logits(model, embed(model, pixels[row : row + 1]), texts)
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels[row : row + 1]), list(named.values()))
        length = torch.sqrt(sum((g**2).sum() for g in gradients))
        assert length > 1e-3
        for name, gradient in zip(named, gradients, strict=True):
            total[name] += gradient * 1e-3 / length
    for name, gradient in total.items():
        key = name.replace(".default", "")
        moved = expert[key].float() - start[key].float()
        sure = gradient.abs() > 1e-7
        assert sure.any()
        np.testing.assert_array_equal(torch.sign(moved[sure]), -torch.sign(gradient[sure]))


def test_noise_drowns_what_is_learnt(private: Settings) -> None:
    start, quiet = trained(private, 0.1, 12, expert_learning_rate=2e-2)
    _, loud = trained(private, 1e4, 12, expert_learning_rate=2e-2)
    assert loss(private, quiet) < loss(private, start) < loss(private, loud)


def test_a_step_without_samples_is_a_step_of_noise(private: Settings) -> None:
    seed, data = load_seed(private.seed_model), load_private(private, 0, "train")
    space = label_space(class_names(data), class_names(load_public(private.data)))
    start = rounded(random_expert(seed, private, 0))
    nobody = Mechanism(1.0, 1e-12, 2)
    expert = train_with_privacy(seed, private, data, space, start, nobody, np.random.default_rng(0), unwatched)
    assert all((start[name] != expert[name]).any() for name in start)


def request(settings: Settings) -> Request:
    arrays = {"proxies": np.arange(settings.proxies.count)}
    from metamoe.common.data.datasets import public_fingerprint

    return Request(settings, load_seed(settings.seed_model).fingerprint, public_fingerprint(settings.data), arrays)


def test_a_client_with_too_few_samples_refuses(private: Settings, tmp_path: Path) -> None:
    settings = changed(private, ["privacy.min-samples=41"])
    for kind in ("profile", "expert"):
        with pytest.raises(PrivateDataError, match=r"40 private training samples are less than privacy.min-samples = 41"):
            answer(kind, request(settings), Site(0, tmp_path))


def test_noise_is_the_simulations_own_or_the_operating_systems(private: Settings, tmp_path: Path) -> None:
    """The run's seed comes from the server: a client that is not simulated must not take its noise from it."""
    simulated = [Site(0, tmp_path / str(i)) for i in range(2)]
    deployed = [site_of({"partition-id": 0, "state-dir": str(tmp_path / f"d{i}")}, {}) for i in range(2)]
    sent = [
        [answer("profile", request(private), site)["seed-routing-vector"] for site in sites] for sites in (simulated, deployed)
    ]
    np.testing.assert_array_equal(*sent[0])
    assert (sent[1][0] != sent[1][1]).all()
    assert (sent[1][0] != sent[0][0]).all()


def test_a_private_expert_is_not_taken_for_another(private: Settings, tmp_path: Path) -> None:
    site = Site(0, tmp_path)
    first = answer("expert", request(private), site)
    again = answer("expert", request(private), site)
    other = answer("expert", request(changed(private, ["privacy.expert-epsilon=3"])), site)
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_stopped_it_goes_on_with_the_same_samples_and_noise(private: Settings, tmp_path: Path, stop: int) -> None:
    """Another stream of random numbers, as a deployed client has in another process, changes nothing of what was begun."""
    # Within an epoch a state is due at once.
    settings = changed(private, ["expert-training.checkpoint-minutes=1e-9"])
    seed, data = load_seed(settings.seed_model), load_private(settings, 0, "train")
    start = rounded(random_expert(seed, settings, 0))
    space = label_space(class_names(data), class_names(load_public(settings.data)))
    taken: list[int] = []

    def run(kept: Path | None, number: int, until: int | None = None) -> Expert:
        def progress(step: int, _total: int, **_: object) -> None:
            if step == until:
                raise KeyboardInterrupt
            taken.append(step)

        rng = np.random.default_rng(number)
        return train_with_privacy(seed, settings, data, space, start, Mechanism(1.0, 0.5, 12), rng, progress, kept)

    whole = run(None, 0)
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 0, stop)
    rest = run(tmp_path, 1)
    assert all(torch.equal(rest[name], whole[name]) for name in whole)
    assert taken == list(range(13))


def test_its_curve_has_each_steps_loss_and_validation_by_epochs(private: Settings) -> None:
    settings = changed(private, ["expert-training.evaluate-every=1"])
    seed, data = load_seed(settings.seed_model), load_private(settings, 0, "train")
    held_out = load_private(settings, 0, "validation").select(range(20))
    space = label_space(class_names(data), class_names(held_out), class_names(load_public(settings.data)))
    told: list[tuple[int, dict[str, float]]] = []

    def run(validation: Dataset | None) -> Expert:
        start, rng = rounded(random_expert(seed, settings, 0)), np.random.default_rng(0)
        progress = lambda done, _total, *, metrics: told.append((done, dict(metrics)))  # noqa: E731
        return train_with_privacy(
            seed, settings, data, space, start, Mechanism(1.0, 0.5, 6), rng, progress, validation=validation
        )

    watched = run(held_out)
    assert [done for done, metrics in told if "validation-accuracy" in metrics] == [3, 6]
    assert all(metrics["loss"] > 0 for _, metrics in told[1:])
    unseen = run(None)
    assert all(torch.equal(watched[name], unseen[name]) for name in watched)
