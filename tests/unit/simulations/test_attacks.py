"""Attacks on a small run: they find what is there to be found, and guess where nothing is."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.audit.verify import Verdict
from common.config import Settings, changed, to_toml
from common.data.datasets import load_private, load_public
from common.errors import InputFileError
from common.files import write_atomically
from common.model.lora import rounded
from common.model.seed import load_seed
from simulations import attacks
from simulations.attacks import _auc, _rate_at, attack, class_mix, confidence, likelihood_ratio, mean_error
from simulations.local import run_local
from tests.conftest import random_expert


def test_the_exact_mean_is_what_was_sent_and_noise_hides_it(small: Settings) -> None:
    seed, private, public = load_seed(small.seed_model), load_private(small, 0, "train"), load_public(small.data)
    assert mean_error(seed, small, 0, private, public) == 0
    noisy = [f"privacy.{key}" for key in ("vectors=gaussian", "min-samples=40", "epsilon=8")]
    some = mean_error(seed, changed(small, noisy), 0, private, public)
    more = mean_error(seed, changed(small, [*noisy, "privacy.epsilon=0.5"]), 0, private, public)
    assert 0 < some < more
    assert mean_error(seed, changed(small, ["proxies.selection=random"]), 0, private, public) is None


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


def test_areas_and_rates_by_hand() -> None:
    assert _auc([3.0, 4.0], [1.0, 2.0]) == 1
    assert _auc([1.0, 4.0], [2.0, 3.0]) == 0.5
    # One of these hundred is beyond 98.01, and so are three of the four.
    assert _rate_at(np.array([98.5, 99.5, 100.0, 1.0]), np.arange(100.0)) == 0.75


def test_the_likelihood_ratio_finds_members_of_an_overfitted_expert(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Confidences made by hand: three higher for samples that an expert was trained on, with noise of one."""
    seed, private, public = load_seed(small.seed_model), load_private(small, 0, "train"), load_public(small.data)
    held = load_private(small, 0, "test").select(range(40))
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
    assert [len(data) for data in trained_on] == [40] * 8
    assert likelihood_ratio(seed, small, 0, {}, private, held, private, public, 0, lambda *_: None) is None


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
