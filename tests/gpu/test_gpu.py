"""What a GPU computes, beside a CPU: every stage within stated tolerances. Without a GPU all of it is skipped.

``METAMOE_GPU_DRY=1`` has the CPU in the GPU's place, which shows no more than that these tests run.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metamoe.client.expert import train_expert
from metamoe.common.compute import ON_CPU, Place, device_of
from metamoe.common.config import Settings
from metamoe.common.curve import unwatched
from metamoe.common.data.datasets import load_private
from metamoe.common.data.metrics import answered
from metamoe.common.data.pixels import batches
from metamoe.common.data.tasks import class_names, features, samples_of
from metamoe.common.model.artifact import read_weights
from metamoe.common.model.moe import MoELayer, UnifiedModel
from metamoe.common.model.router import RouterWeights
from metamoe.common.model.seed import Seed, seed_at
from metamoe.common.presets import changed, load_settings, to_toml
from metamoe.server.unify import train_router
from metamoe.simulations.evaluate import dense
from metamoe.simulations.flower import run_flower
from metamoe.simulations.local import run_local
from metamoe.simulations.placement import placement_of
from metamoe.simulations.results import write_results
from tests.conftest import random_expert, random_features

DRY = os.environ.get("METAMOE_GPU_DRY") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not DRY, reason="no GPU is here: what a GPU computes was not looked at"
    ),
]
CLOSE = {"atol": 1e-3, "rtol": 1e-3}
"""Float32 on both: sums in another order, through a few layers."""


@pytest.fixture
def gpu() -> Place:
    return replace(ON_CPU, device=device_of("auto"))


@pytest.fixture
def reduced() -> Settings:
    changes = ["data.public-samples=600", "data.private-samples=120", "data.test-samples=60", "proxies.pool=200"]
    changes += ["proxies.count=30", "expert-training.epochs=2", "router-training.epochs=1", "privacy.min-samples=10"]
    return load_settings("glyphs", changes)


def unified(seed: Seed, settings: Settings, context: float) -> UnifiedModel:
    router = settings.router.model_copy(update={"context": context, "learn_context": context < 1, "evidence": "layer"})
    routers = [RouterWeights(random_features(4, seed.width), np.zeros(4), context)]
    experts = [{n: t / 20 for n, t in random_expert(seed, settings, k).items()} for k in range(3)]
    return UnifiedModel(seed, experts, settings.lora, router, routers).eval()


def test_features(reduced: Settings, gpu: Place) -> None:
    data = load_private(reduced, 0, "train")
    here, there = (
        torch.cat(list(features(seed, seed.model, seed.ffn_paths, reduced.data, data)))
        for seed in (seed_at("glyphs", ON_CPU), seed_at("glyphs", gpu))
    )
    torch.testing.assert_close(there, here, **CLOSE)


@pytest.mark.parametrize("context", [0.4, 1.0])
def test_a_forward_pass(reduced: Settings, gpu: Place, context: float) -> None:
    """Where tokens decide, and where a sample does; then each form against masking."""
    outputs = []
    for place in (ON_CPU, gpu):
        seed = seed_at("glyphs", place)
        pixels = next(batches(seed, load_private(reduced, 1, "train"), 16))
        model = unified(seed, reduced, context).requires_grad_(False)
        with torch.inference_mode():
            outputs.append(model(pixels)[0].cpu())
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    layer = model.layers[-1]
    z = torch.randn(16, 17, seed.width, device=seed.model.device)
    route = layer.state.route
    with torch.inference_mode():
        expected = layer._masked(z, route)
        torch.testing.assert_close(layer._grouped(z, route.groups(17)), expected, **CLOSE)
        if context == 1:
            torch.testing.assert_close(MoELayer._gathered(layer, z, route), expected, **CLOSE)


def direction(matrices: dict[str, Tensor]) -> Tensor:
    return torch.cat([matrix.float().flatten().cpu() for _, matrix in sorted(matrices.items())])


def test_an_expert_and_a_router(reduced: Settings, gpu: Place) -> None:
    data = load_private(reduced, 0, "train")
    own = changed(
        reduced, ["expert-training.optimizer=sgd", "expert-training.learning-rate=0.1", "router-training.optimizer=sgd"]
    )
    experts, routers = [], []
    for place in (ON_CPU, gpu):
        seed = seed_at("glyphs", place)
        expert = train_expert(seed, own, 0, [data], class_names(data), unwatched)
        experts.append(direction(expert))
        model = unified(seed, own, 0.4)
        train_router(model, seed, own, [data, data, data, data], unwatched)
        routers.append(
            torch.cat([model.routers[0].rows.detach().flatten().cpu(), model.routers[0].context.detach().cpu()[None]])
        )
    assert torch.nn.functional.cosine_similarity(*experts, dim=0) > 0.999
    torch.testing.assert_close(routers[1], routers[0], **CLOSE)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_bfloat16_beside_float32(reduced: Settings, gpu: Place, weights: str) -> None:
    """The same class for nearly all samples: 8 bits decide otherwise only where two classes are near."""
    data = load_private(reduced, 0, "train")
    answers = []
    for place in (gpu, replace(gpu, precision="bfloat16", weights=weights)):
        seed = seed_at("glyphs", place)
        samples = samples_of(seed, reduced.data, [data], class_names(data))
        with place.computing():
            answers.append(answered(dense(seed.model), samples).chosen)
    assert answers[0].eq(answers[1]).float().mean() > 0.95


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_whole_run_is_as_good_and_the_same_again(reduced: Settings, tmp_path: Path, precision: str) -> None:
    own = changed(reduced, [f"compute.precision={precision}"])
    averages = []
    for name, changes in (("gpu", []), ("again", []), ("cpu", ["compute.client-device=cpu", "compute.server-device=cpu"])):
        run_local(changed(own, changes), tmp_path / name)
        results = write_results(changed(own, changes), tmp_path / name, lambda _done, _total: None)
        averages.append(results["accuracy"]["metamoe"]["average"])
    hashes = [read_weights(tmp_path / name / "model")[0].model_hash for name in ("gpu", "again")]
    assert hashes[0] == hashes[1]
    # Two epochs over few images: where both end, each of 60 samples a domain can tip.
    assert averages[0] == pytest.approx(averages[2], abs=8)


def test_through_flower_and_ray_with_clients_on_the_card(reduced: Settings, tmp_path: Path) -> None:
    placement = placement_of(reduced, on_ray=True)
    assert DRY or placement.share == 0.5
    assert DRY or "clients compute on cuda" in placement.lines[1]
    (tmp_path / "settings.toml").write_text(to_toml(reduced))
    run_flower(reduced, tmp_path, placement=placement)
    summary = json.loads((tmp_path / "server" / "summary.json").read_text())
    assert len(summary["clients"]) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU's memory is not a device's")
def test_what_does_not_fit_is_computed_in_halves(reduced: Settings, gpu: Place) -> None:
    data = load_private(reduced, 0, "train")
    seed = seed_at("glyphs", gpu)
    samples = samples_of(seed, reduced.data, [data], class_names(data))
    expected = answered(dense(seed.model), samples).chosen
    torch.cuda.empty_cache()
    # Room for what is there and some megabytes more.
    share = (torch.cuda.memory_reserved(gpu.device) + 2**23) / torch.cuda.get_device_properties(gpu.device).total_memory
    torch.cuda.set_per_process_memory_fraction(share, gpu.device)
    try:
        assert torch.equal(answered(dense(seed.model), samples).chosen, expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu.device)
