"""Decisions by the clients' shapes: from what they send to the router, through a whole run."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from metamoe.client.answer import answer
from metamoe.client.app import respond
from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.audit.policy import SIMULATION, policy_text
from metamoe.common.audit.verify import Verdict, check_ledger, worst
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private, load_public, public_fingerprint
from metamoe.common.data.tasks import features
from metamoe.common.gaussian import public_coordinates, unpacked_shape
from metamoe.common.model.artifact import load_model
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed
from metamoe.common.wire import Kind, RecordDict, Request
from metamoe.server.stages import run_stages
from metamoe.simulations.local import run_local

SHAPE = ["router.statistics=shape"]
ON_EMBEDDING = [*SHAPE, "router.decide=embedding"]
ANSWERS = ["router.mixing=answers", "router.context=1", "router.learn-context=false"]


@pytest.mark.parametrize("changes", [SHAPE, [*ON_EMBEDDING, "router.shape-rank=4"]])
def test_a_client_sends_the_covariance_of_its_samples(small: Settings, tmp_path: Path, changes: list[str]) -> None:
    settings = changed(small, changes)
    seed = load_seed(settings.seed_model)
    request = Request(settings, seed.fingerprint, public_fingerprint(settings.data), {})
    sent = answer("profile", request, Site(0, tmp_path, simulation=True))

    def seen(data: Dataset) -> np.ndarray:
        parts = features(seed, seed.model, seed.ffn_paths[:2], settings.data, data)
        whole = np.concatenate([part.double().numpy() for part in parts])
        return whole[:, -1] if settings.router.decide == "embedding" else whole[:, :2].reshape(len(whole), 32)

    white = public_coordinates(seen(load_public(settings.data)))
    covariance = np.cov(white.white(seen(load_private(settings, 0, "train"))).T, bias=True)
    found = unpacked_shape(sent["seed-shape"], settings.router.shape_rank, len(covariance)).covariance()
    # The trace survives shrinkage and the cut to a few directions.
    np.testing.assert_allclose(np.trace(found), np.trace(covariance), rtol=1e-2)
    assert np.linalg.norm(found - covariance) < 0.5 * np.linalg.norm(covariance)
    assert np.linalg.eigvalsh(found).min() > 0


@pytest.mark.parametrize(
    "changes",
    [
        SHAPE,
        [*ON_EMBEDDING, *ANSWERS],
        [*ON_EMBEDDING, "router.shape-rank=3", "experts.max=2"],
        ["router.decide=embedding", "router.statistics=mean"],
    ],
)
def test_a_run_decides_by_shapes(small: Settings, tmp_path: Path, changes: list[str]) -> None:
    settings = changed(small, changes)
    run_local(settings, tmp_path)
    summary = json.loads((tmp_path / "server" / "summary.json").read_text())
    assert summary["mean_alone"] == []
    loaded = load_model(tmp_path / "model")
    assert loaded.manifest.format == 6
    (router,) = [router.weights() for router in loaded.model.routers]
    assert (router.quadratic is not None) == ("router.statistics=mean" not in changes)
    names = [artifact["name"] for client in summary["clients"] for artifact in client["artifacts"]]
    assert names.count("seed-shape") == (3 if router.quadratic else 0)
    assert ("seed-ffn-inputs" in names) == (settings.router.decide == "once")


def test_the_run_goes_on_with_the_mean_of_a_client_whose_policy_allows_no_shape(small: Settings, tmp_path: Path) -> None:
    settings, strict = changed(small, SHAPE), tmp_path / "policy.toml"
    rules = {kind: rule for kind, rule in SIMULATION.allow.items() if kind != "seed-shape"}
    strict.write_text(policy_text(SIMULATION.model_copy(update={"allow": rules})))
    sites = [Site(k, tmp_path / "clients", policy=strict if k == 1 else None) for k in range(3)]

    def ask(kind: Kind, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, RecordDict]]:
        for client, content in requests.items():
            yield client, audited(kind, content, sites[client], partial(respond, kind, site=sites[client]))

    run_stages(settings, range(3), ask, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "server" / "summary.json").read_text())
    assert summary["mean_alone"] == ["greek"]
    sent = [[artifact["name"] for artifact in client["artifacts"]] for client in summary["clients"]]
    assert ["seed-shape" in names for names in sent] == [True, False, True]
    (router,) = [router.weights() for router in load_model(tmp_path / "run" / "model").model.routers]
    # In place of its own covariance it has that of the others, which needs no factors.
    assert [bool(factors.any()) for factors in router.quadratic.factors] == [True, False, True, False]
    assert worst(check_ledger(sites[1].audit).findings) is Verdict.FINE


def test_proxies_by_gaussians_need_no_mean_of_the_embedding(small: Settings, tmp_path: Path) -> None:
    run_local(changed(small, ["proxies.relevance=gaussian"]), tmp_path)
    clients = json.loads((tmp_path / "server" / "summary.json").read_text())["clients"]
    names = {artifact["name"] for client in clients for artifact in client["artifacts"]}
    assert {name for name in names if ".lora_" not in name} == {"client", "seed-ffn-inputs", "seed-shape"}
