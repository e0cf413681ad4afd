"""The differencing attack: a server asks in many runs for the mean of a part that its seed chooses, and solves for samples."""

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.audit.policy import DEFAULT, Policy, policy_text
from metamoe.common.compute import ON_CPU
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_domain, load_public, private_rows, public_fingerprint
from metamoe.common.data.tasks import features as features_of
from metamoe.common.errors import PolicyError
from metamoe.common.files import write_atomically
from metamoe.common.model.seed import load_seed, seed_at
from metamoe.common.model.vectors import all_evidence_paths
from metamoe.common.presets import changed
from metamoe.common.wire import ARRAYS, Envelope, RecordDict, Request, decode_terms, encode_reply, encode_request

_VECTOR = "seed-routing-vector"
_MORE = 1.2
"""Runs for each sample: with as many means as samples the system of equations has one solution, with some more a stable one."""
_PUBLIC = 2_000

UNRULED = DEFAULT.model_copy(
    update={
        "limits": DEFAULT.limits.model_copy(update={"max_distinct_statistics": 0}),
        "seed_models": "any",
        "public_sets": "any",
        "settings": "any",
    }
)
"""The product's policy without what it says of all runs together, as it was before it said so."""


@dataclass(frozen=True)
class Recovered:
    """What the server has in the end.

    Attributes:
        samples: private ones.
        runs: that it asked for.
        answered: with a mean; ``different`` of them.
        refused: by error, how often.
        nearest: share of the samples whose reconstruction is nearer to them than to any other sample.
        cosine: between reconstruction and truth, both from the private mean on; median.
        better: share of the samples that their reconstruction is nearer to than the mean is that one run sends.
    """

    samples: int
    runs: int
    answered: int
    different: int
    refused: dict[str, int]
    nearest: float
    cosine: float
    better: float


def differencing(settings: Settings, policy: Policy, progress: Callable[[int, int], None]) -> Recovered:
    """Ask client 0 under this policy, with each run's seed choosing another half of its samples, and solve for all of them.

    The client is the product's own, from the request to what leaves, but for one thing: what the seed model makes of each
    sample is computed once for all runs.

    Args:
        settings: of the first run; its built-in domain of client 0 is attacked.
        policy: the client's.
        progress: called with runs done and in all.
    """
    domain = load_domain(settings.data, settings.client_domain(0), "train")
    features = _features(settings)
    runs, part = int(len(domain) * _MORE), len(domain) // 2
    weights, means, refused = [], [], Counter[str]()
    with TemporaryDirectory() as folder:
        site = Site(0, Path(folder) / "state", policy=Path(folder) / "policy.toml", simulation=False)
        write_atomically(Path(folder) / "policy.toml", policy_text(policy))
        for run in range(runs):
            progress(run, runs)
            asked = changed(settings, [f"seed={run}", f"data.private-samples={part}"])
            row = np.zeros(len(domain))
            row[private_rows(asked, 0, domain)] = 1 / part
            try:
                reply = audited("profile", _request(asked), site, lambda content: _answer(content, features))
            except PolicyError as error:
                refused[_rule(str(error))] += 1
                continue
            weights.append(row)
            means.append(reply.array_records[ARRAYS][_VECTOR].numpy().astype(np.float64))
    progress(runs, runs)
    return _solved(features[:, -1], np.array(weights), np.array(means), _public_mean(settings), runs, dict(refused))


def _solved(
    truth: np.ndarray, weights: np.ndarray, means: np.ndarray, public: np.ndarray, runs: int, refused: dict[str, int]
) -> Recovered:
    """Least squares from what the server knows without: the mean of all answers, or without one the public mean."""
    known = means.mean(axis=0) if len(means) else public
    found = np.tile(known, (len(truth), 1))
    if len(means):
        found += np.linalg.lstsq(weights, means - known, rcond=None)[0]
    centred, own = found - truth.mean(axis=0), truth - truth.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(own, axis=1)
    squares = (found**2).sum(1)[:, None] - 2 * found @ truth.T + (truth**2).sum(1)
    error, before = np.linalg.norm(found - truth, axis=1), np.linalg.norm(known - truth, axis=1)
    return Recovered(
        samples=len(truth),
        runs=runs,
        answered=len(means),
        different=len(np.unique(means, axis=0)) if len(means) else 0,
        refused=refused,
        nearest=float((squares.argmin(axis=1) == np.arange(len(truth))).mean()),
        cosine=float(np.median((centred * own).sum(axis=1) / np.maximum(norms, 1e-12))),
        # By more than rounding.
        better=float((error < 0.999 * before).mean()),
    )


def _request(settings: Settings) -> RecordDict:
    seed = load_seed(settings.seed_model)
    envelope = Envelope(run=secrets.token_hex(16), message=secrets.token_hex(16))
    return encode_request(Request(settings, seed.fingerprint, public_fingerprint(settings.data), {}, envelope))


def _answer(content: RecordDict, features: np.ndarray) -> RecordDict:
    """What the client's app answers, from features that are computed already."""
    settings = decode_terms(content).settings
    rows = private_rows(settings, 0, load_domain(settings.data, settings.client_domain(0), "train"))
    means = features[rows].mean(axis=0).astype(np.float32)
    return encode_reply({"client": np.array(0), _VECTOR: means[-1], "seed-ffn-inputs": means[:-1]})


def _features(settings: Settings) -> np.ndarray:
    """float64 [N, P + 1, d], the embedding last."""
    seed = seed_at(settings.seed_model, ON_CPU)
    paths = all_evidence_paths(seed, settings.lora, settings.router)
    domain = load_domain(settings.data, settings.client_domain(0), "train")
    return torch.cat(list(features_of(seed, seed.model, paths, settings.data, domain))).double().numpy()


def _public_mean(settings: Settings) -> np.ndarray:
    seed, public = seed_at(settings.seed_model, ON_CPU), load_public(settings.data)
    part = public.select(range(min(_PUBLIC, len(public))))
    features = torch.cat(list(features_of(seed, seed.model, [], settings.data, part)))
    return features[:, -1].double().mean(dim=0).numpy()


def _rule(refusal: str) -> str:
    """What a refusal says of the rule, without the values."""
    rule = refusal.rpartition("(")[2].partition(")")[0]
    return f"{refusal.partition(' = ')[0]}: {rule}" if rule else refusal
