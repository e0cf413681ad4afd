"""Attacks on a small run: they find what is there to be found, and guess where nothing is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metamoe.audit import attacks
from metamoe.audit.attacks import (
    _auc,
    _rate_at,
    attack,
    class_mix,
    confidence,
    guess_errors,
    guessed_error,
    likelihood_ratio,
    mean_error,
    recovered_mean,
    shape_attack,
)
from metamoe.client.expert import expert_routing_vectors
from metamoe.common.audit.verify import Verdict
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private, load_public
from metamoe.common.errors import InputFileError
from metamoe.common.files import write_atomically
from metamoe.common.model.lora import rounded
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed, to_toml
from metamoe.simulations.local import run_local
from tests.conftest import random_expert


def test_the_exact_mean_is_what_was_sent_and_noise_hides_it(small: Settings) -> None:
    seed, private, public = load_seed(small.seed_model), load_private(small, 0, "train"), load_public(small.data)
    assert mean_error(seed, small, 0, private, public) == 0
    noisy = [f"privacy.{key}" for key in ("vectors=gaussian", "min-samples=40", "epsilon=8")]
    some = mean_error(seed, changed(small, noisy), 0, private, public)
    more = mean_error(seed, changed(small, [*noisy, "privacy.epsilon=0.5"]), 0, private, public)
    assert 0 < some < more
    nothing = changed(small, ["proxies.selection=random", "router.vectors=proxy", "router.seed-expert=false"])
    assert mean_error(seed, nothing, 0, private, public) is None
    # No mean is needed for proxies then, but one is sent for routing.
    assert mean_error(seed, changed(small, ["proxies.selection=random"]), 0, private, public) == 0


def test_a_mean_mixed_with_proxies_comes_apart_by_hand() -> None:
    """N = 100 samples of mean 3 and m = 50 proxies of mean 0 make e = 2."""
    e, proxy_mean, private_mean = np.full((1, 1), 2.0), np.zeros((1, 1)), np.full((1, 1), 3.0)
    assert recovered_mean(e, proxy_mean, 50 / 100) == 3
    assert recovered_mean(e, proxy_mean, 50 / 200) == 2.5
    # |N / N' - 1| / (1 + N / m), for guesses of half, all and three times N.
    errors = guess_errors(e, proxy_mean, private_mean, 50 / np.array([50, 100, 300]))
    np.testing.assert_allclose(errors, [1 / 3, 0, 2 / 9], atol=1e-12)


def test_routing_vectors_tell_the_private_mean_to_who_guesses_the_amount(small: Settings) -> None:
    """Half of the guesses are within a factor of two in N; with twice as many samples as proxies that is a sixth, or nearer."""
    settings = changed(small, ["router.vectors=private", "router.seed-expert=false"])
    seed, private = load_seed(settings.seed_model), load_private(settings, 0, "train")
    proxies = load_public(settings.data).select(range(20))
    expert = rounded(random_expert(seed, settings, 0))
    sent = expert_routing_vectors(seed, settings, expert, [private, proxies])
    error = guessed_error(seed, settings, 0, expert, sent, private, proxies)
    assert error == pytest.approx(0.5 / (1 + 40 / 20), abs=0.02)
    assert guessed_error(seed, settings, 0, expert, None, private, proxies) is None
    alone = changed(settings, ["expert-training.samples=private"])
    assert guessed_error(seed, alone, 0, expert, sent, private, proxies) is None


def test_the_mix_of_classes_is_found_where_proxies_are_the_private_data_themselves(small: Settings) -> None:
    settings = changed(small, ["seed-model=glyphs", "lora.first-layer=1"])
    seed, private = load_seed("glyphs"), load_private(settings, 0, "train")
    uneven = private.select(np.flatnonzero(np.isin(private["label"], [3, 3, 4])).tolist() + list(range(10)))
    correlation, top = class_mix(seed, settings, uneven, uneven)
    assert correlation is not None
    assert correlation > 0.5
    assert isinstance(top, bool)


def test_confidence_is_the_log_odds_of_the_true_class(small: Settings) -> None:
    """It rises with the probability, and an expert is surer of what it was trained on."""
    seed, private, public = load_seed(small.seed_model), load_private(small, 0, "train"), load_public(small.data)
    scores = confidence(seed, small, rounded(random_expert(seed, small, 0)), private, private, public)
    assert scores.shape == (40,)
    assert np.isfinite(scores).all()


def test_a_shape_of_few_samples_tells_them_from_others(small: Settings) -> None:
    seed, private, public = load_seed(small.seed_model), load_private(small, 0, "train"), load_public(small.data)
    few, others = private.select(range(6)), load_private(small, 0, "test")
    found = shape_attack(seed, small, 0, few, others, public)
    assert found is not None
    area, own, of_others = found
    # Six samples in 16 dimensions: they lie in the directions that are sent, others less so.
    assert area > 0.6
    assert own > of_others
    assert shape_attack(seed, changed(small, ["router.statistics=mean"]), 0, few, others, public) is None


def test_areas_and_rates_by_hand() -> None:
    assert _auc([3.0, 4.0], [1.0, 2.0]) == 1
    assert _auc([1.0, 4.0], [2.0, 3.0]) == 0.5
    # One of these hundred is beyond 98.01, and so are three of the four.
    assert _rate_at(np.array([98.5, 99.5, 100.0, 1.0]), np.arange(100.0)) == 0.75


def test_the_likelihood_ratio_finds_members_of_an_overfitted_expert(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Confidences made by hand: three higher for samples that an expert was trained on, with noise of one."""
    seed, private, public = load_seed(small.seed_model), load_private(small, 0, "train"), load_public(small.data)
    held = load_private(small, 0, "test")
    rng, trained_on = np.random.default_rng(0), []
    monkeypatch.setattr(
        attacks, "train_expert", lambda _s, _t, _c, samples, *_: trained_on.append(samples[0]) or len(trained_on) - 1
    )

    def made(_seed: object, _settings: object, expert: object, data: object, *_: object) -> np.ndarray:
        rows = {image.tobytes() for image in trained_on[expert]["image"]} if isinstance(expert, int) else members
        return np.array([3.0 * (image.tobytes() in rows) for image in data["image"]]) + rng.normal(size=len(data))

    members = {image.tobytes() for image in private["image"]}
    monkeypatch.setattr(attacks, "confidence", made)
    result = likelihood_ratio(seed, small, 0, {}, private, held, private, public, 8, lambda *_: None)
    assert result is not None
    assert _auc(*result) > 0.9
    # As many held-out samples as private ones are taken, and a shadow is trained on half of all.
    assert [len(scores) for scores in result] == [40, 40]
    assert [len(data) for data in trained_on] == [40] * 8
    assert likelihood_ratio(seed, small, 0, {}, private, held, private, public, 0, lambda *_: None) is None


def test_shadows_of_an_expert_with_privacy_are_trained_with_privacy(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one warm start on the proxies alone, and each with noise of its own."""
    private_too = [
        "privacy.vectors=gaussian",
        "privacy.expert=dp-sgd",
        "privacy.min-samples=30",
        "privacy.expert-batch-size=30",
    ]
    settings = changed(small, [*private_too, "privacy.expert-epochs=1"])
    seed, public = load_seed(settings.seed_model), load_public(settings.data)
    private, held, proxies = load_private(settings, 0, "train"), load_private(settings, 0, "test"), public.select(range(20))
    calls, plain, dp = [], attacks.train_expert, attacks.train_with_privacy

    def warm(*arguments: object) -> object:
        calls.append([len(data) for data in arguments[3]])
        return plain(*arguments)

    def shadow(*arguments: object) -> object:
        calls.append(dp(*arguments))
        return calls[-1]

    monkeypatch.setattr(attacks, "train_expert", warm)
    monkeypatch.setattr(attacks, "train_with_privacy", shadow)
    expert = rounded(random_expert(seed, settings, 0))
    assert likelihood_ratio(seed, settings, 0, expert, private, held, proxies, public, 2, lambda *_: None) is not None
    assert calls[0] == [20]
    first, second = calls[1:]
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_run_is_attacked_and_the_figures_are_kept(small: Settings, tmp_path: Path, run_metamoe) -> None:
    write_atomically(tmp_path / "settings.toml", to_toml(small))
    with pytest.raises(InputFileError, match="not the folder of a finished simulation"):
        attack(tmp_path, 0, lambda *_: None)
    run_local(small, tmp_path)
    assert run_metamoe("audit", "attack", str(tmp_path), "--shadows", "0") == Verdict.FINE
    written = json.loads((tmp_path / "attack.json").read_text())
    assert written["privacy"]["vectors"] == "none"
    assert set(written["clients"]) == set(small.client_names)
    assert all(0 <= client["loss_auc"] <= 1 for client in written["clients"].values())
    assert run_metamoe("audit", "attack", str(tmp_path), "--shadows", "0", "--client", "greek") == Verdict.FINE
    assert set(json.loads((tmp_path / "attack.json").read_text())["clients"]) == {"greek"}
    assert run_metamoe("audit", "attack", str(tmp_path), "--client", "thai") == InputFileError.exit_code
