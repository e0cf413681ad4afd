"""Stage 1 at the client: what it says about its private samples, as the frozen seed sees them."""

import numpy as np
import torch
from datasets import Dataset

from metamoe.common.compute import derived_seed
from metamoe.common.config import Settings
from metamoe.common.data.tasks import features
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import all_evidence_paths
from metamoe.common.privacy import private_means, vectors_mechanism

_STAGE = 1
_PUBLIC_SAMPLES = 2_000


def profile(
    seed: Seed, settings: Settings, client: int, private: Dataset, public: Dataset, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Everything that a client can say in stage 1; what of it is sent, the settings decide (``common/wire.py``).

    Args:
        seed: the frozen seed.
        settings: the run's.
        client: the client's number.
        private: its training samples.
        public: the public set.
        rng: where noise comes from, if the settings ask for differential privacy.

    Returns:
        ``seed-routing-vector`` [d]: mu_p, the mean of the seed's embedding over the private samples; ``seed-ffn-inputs``
        [P, d]: the means of the FFN inputs at which routers look; ``relevance-classifier`` [d + 1], only if the settings
        ask for it: see :func:`relevance_classifier`. float32.
    """
    features = _features(seed, settings, private)
    if settings.privacy.vectors == "gaussian":
        others = _features(seed, settings, _public_sample(settings, client, public))
        noise = vectors_mechanism(settings).noise_multiplier
        means = private_means(features, others, settings.privacy.clip, settings.privacy.min_samples, noise, rng)
    else:
        means = features.mean(axis=0)
    arrays = {"seed-routing-vector": means[-1], "seed-ffn-inputs": means[:-1]}
    if settings.proxies.relevance == "classifier":
        others = _features(seed, settings, _public_sample(settings, client, public))
        arrays["relevance-classifier"] = relevance_classifier(features[:, -1], others[:, -1])
    return {name: array.astype(np.float32) for name, array in arrays.items()}


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
