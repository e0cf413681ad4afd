"""Stage 1 at the client: what it says about its private samples, as the frozen seed sees them."""

import math

import numpy as np
import torch
from datasets import Dataset

from metamoe.common.compute import derived_seed
from metamoe.common.config import Privacy, Settings
from metamoe.common.data.tasks import features
from metamoe.common.gaussian import (
    Coordinates,
    Moments,
    coordinate_rows,
    coordinates,
    denoised,
    oracle_shrunk,
    packed_shape,
    shape_of,
)
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import all_evidence_paths, evidence_of
from metamoe.common.privacy import private_means, private_second_moment, second_moment_deviation, vectors_mechanism

_STAGE = 1
_PUBLIC_SAMPLES = 2_000
_AT_ONCE = 1_000


def profile(
    seed: Seed,
    settings: Settings,
    client: int,
    private: Dataset,
    public: Dataset,
    rng: np.random.Generator,
    shape: bool = False,
) -> dict[str, np.ndarray]:
    """Everything that a client can say in stage 1; what of it is sent, the settings decide (``common/wire.py``).

    Args:
        seed: the frozen seed.
        settings: the run's.
        client: the client's number.
        private: its training samples.
        public: the public set.
        rng: where noise comes from, if the settings ask for differential privacy.
        shape: whether the shape is wanted, for which the seed sees a part of the public set too.

    Returns:
        ``seed-routing-vector`` [d]: mu_p, the mean of the seed's embedding over the private samples; ``seed-ffn-inputs``
        [P, d]: the means of the FFN inputs at which routers look; ``relevance-classifier`` [d + 1], only if the settings ask
        for it: see :func:`relevance_classifier`; all float32. And ``seed-shape``, float16, the covariance of what decisions
        look at in coordinates in which the public set is white: see :func:`metamoe.common.gaussian.packed_shape`.
    """
    features, privacy = _features(seed, settings, private), settings.privacy
    # Mean and second moment, in units of their sensitivities side by side, are one release of sensitivity sqrt(2).
    noise = vectors_mechanism(settings).noise_multiplier * math.sqrt(1 + shape) if privacy.vectors == "gaussian" else 0.0
    if privacy.vectors == "gaussian":
        others = _features(seed, settings, _public_sample(settings, client, public))
        means = private_means(features, others, privacy.clip, privacy.min_samples, noise, rng)
    else:
        means = features.mean(axis=0)
    arrays = {"seed-routing-vector": means[-1], "seed-ffn-inputs": means[:-1]}
    if settings.proxies.relevance == "classifier":
        others = _features(seed, settings, _public_sample(settings, client, public))
        arrays["relevance-classifier"] = relevance_classifier(features[:, -1], others[:, -1])
    sent = {name: array.astype(np.float32) for name, array in arrays.items()}
    if not shape:
        return sent
    white = coordinates(client_evidence(seed, settings, public.select(coordinate_rows(len(public)))))
    looked_at = _evidence(features, settings)
    if privacy.vectors == "gaussian":
        about = white.white(_evidence(means[None], settings))
        covariance = _noisy_covariance(white.white(looked_at), about[0], privacy, noise, rng)
    else:
        covariance = _covariance(looked_at, white)
    return sent | {"seed-shape": packed_shape(shape_of(covariance, settings.router.shape_rank))}


def _covariance(looked_at: np.ndarray, white: Coordinates) -> np.ndarray:
    """The covariance over the private samples [N, D] in white coordinates, shrunk as far as their number asks for. [D, D]."""
    moments = Moments(len(white.centre))
    for start in range(0, len(looked_at), _AT_ONCE):
        moments.add(white.white(looked_at[start : start + _AT_ONCE]))
    return oracle_shrunk(moments.covariance(), moments.count)


def _noisy_covariance(
    white: np.ndarray, mean: np.ndarray, privacy: Privacy, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """The same from the released second moment and the released mean [D]: what is done to them spends nothing. [D, D]."""
    second = private_second_moment(white, privacy.clip, privacy.min_samples, noise, rng)
    deviation = second_moment_deviation(len(mean), privacy.clip, privacy.min_samples, noise)
    return denoised(second - np.outer(mean, mean), deviation)


def client_evidence(seed: Seed, settings: Settings, data: Dataset) -> np.ndarray:
    """What decisions look at, of samples in the frozen seed. float64 [N, D]."""
    return _evidence(_features(seed, settings, data), settings)


def _evidence(features: np.ndarray, settings: Settings) -> np.ndarray:
    """What decisions look at, [N, D]."""
    return evidence_of(features, settings.router).reshape(len(features), -1)


def _public_sample(settings: Settings, client: int, public: Dataset) -> Dataset:
    rng = np.random.default_rng(derived_seed(settings.seed, _STAGE, client))
    return public.select(np.sort(rng.permutation(len(public))[:_PUBLIC_SAMPLES]))


def relevance_classifier(private: np.ndarray, public: np.ndarray) -> np.ndarray:
    """Logistic regression of private against public embeddings (Jiang et al. 2026, Appendix A), both classes of equal weight.

    Args:
        private, public: embeddings [N, d] and [n, d].

    Returns:
        w and b side by side, [d + 1]: w.z + b are the log-odds that z is private.
    """
    # Not before it is needed, which by default it is not.
    from sklearn.linear_model import LogisticRegression

    both = np.concatenate([private, public])
    labels = np.repeat([1, 0], [len(private), len(public)])
    head = LogisticRegression(class_weight="balanced", max_iter=1_000).fit(both, labels)
    return np.append(head.coef_[0], head.intercept_[0])


def _features(seed: Seed, settings: Settings, data: Dataset) -> np.ndarray:
    paths = all_evidence_paths(seed, settings.lora, settings.router)
    return torch.cat(list(features(seed, seed.model, paths, settings.data, data))).double().numpy()
