"""Differential privacy: clipping, the Gaussian mechanism, and what several releases spend together.

Everything here is about one record of one client being in its data or not, or being another one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from metamoe.common.config import Settings
from metamoe.common.fisher import shrunk_covariance


@dataclass(frozen=True)
class Mechanism:
    """A Gaussian mechanism, applied ``steps`` times to a Poisson sample of rate ``sampling_rate``; noise in units of the
    sensitivity.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1


@lru_cache(maxsize=64)
def noise_multiplier(epsilon: float, delta: float) -> float:
    """sigma / sensitivity of the analytic Gaussian mechanism: the least noise that is (epsilon, delta)-private.

    The root of delta = Phi(1/(2 s) - epsilon s) - e^epsilon Phi(-1/(2 s) - epsilon s) in s (Balle and Wang 2018, Theorem 8).
    """
    # Here and below not before it is needed: every command reads policies, few of them count epsilons.
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def excess(log_s: float) -> float:
        s = math.exp(log_s)
        near, far = 0.5 / s - epsilon * s, -0.5 / s - epsilon * s
        return math.exp(log_ndtr(near)) - math.exp(epsilon + log_ndtr(far)) - delta

    return math.exp(brentq(excess, -20.0, 20.0, xtol=1e-12))


def total_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """The epsilon, at this delta, of all these releases together (composition of privacy loss distributions; one record added
    or removed). Zero for none.
    """
    # Slow to import, and only who counts needs it.
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    if not mechanisms:
        return 0.0
    accountant = PLDAccountant()
    for mechanism in mechanisms:
        event = GaussianDpEvent(mechanism.noise_multiplier)
        sampled = PoissonSampledDpEvent(mechanism.sampling_rate, event) if mechanism.sampling_rate < 1 else event
        accountant.compose(SelfComposedDpEvent(sampled, mechanism.steps))
    return float(accountant.get_epsilon(delta))


def vectors_mechanism(settings: Settings) -> Mechanism:
    """The one release of stage 1, with ``privacy.vectors = gaussian``."""
    privacy = settings.privacy
    return Mechanism(noise_multiplier(privacy.epsilon, privacy.delta))


def expert_mechanism(settings: Settings) -> Mechanism:
    """Training of an expert, with ``privacy.expert = dp-sgd``; nothing in it depends on how much data a client has."""
    privacy = settings.privacy
    rate = min(1.0, privacy.expert_batch_size / privacy.min_samples)
    steps = math.ceil(privacy.expert_epochs / rate)
    return Mechanism(_calibrated(privacy.expert_epsilon, privacy.expert_delta, rate, steps), rate, steps)


@lru_cache(maxsize=16)
def _calibrated(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier with which all steps together are (epsilon, delta)-private, to a hundredth."""
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        return total_epsilon([Mechanism(math.exp(log_noise), rate, steps)], delta) - epsilon

    return math.exp(brentq(excess, math.log(0.3), math.log(1_000.0), xtol=0.005)) * 1.005


def clipped(rows: np.ndarray, bound: float) -> np.ndarray:
    """Each row scaled down to a Euclidean norm of at most ``bound``. [N, D]."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows * np.minimum(1.0, bound / np.maximum(norms, 1e-12))


def private_means(
    private: np.ndarray, public: np.ndarray, clip: float, minimum: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Means of private features in one release of the Gaussian mechanism.

    A sample's P features, side by side, are centred and whitened by the mean and the shrunk covariance of public ones, which
    cost nothing: so the noise is smallest where the router looks closest. What comes out is clipped to B = clip sqrt(P d), and
    its mean gets Gaussian noise of standard deviation noise x 2 B / minimum. Replacing, adding or removing one of N >= minimum
    samples moves the mean by at most 2 B / N; as the noise goes by ``minimum``, it does not tell N.

    Args:
        private: [N, P, d].
        public: [n, P, d].
        clip: bound in units of the root mean square of the whitened public features.
        minimum: a public lower bound on N.
        noise: standard deviation in units of the sensitivity.
        rng: where noise comes from.

    Returns:
        float64 [P, d].
    """
    from scipy.linalg import solve_triangular

    shape = private.shape[1:]
    own, others = (features.reshape(len(features), -1).astype(np.float64) for features in (private, public))
    centre, factor = others.mean(axis=0), np.linalg.cholesky(shrunk_covariance(others))
    bound = clip * math.sqrt(len(centre))
    mean = clipped(solve_triangular(factor, (own - centre).T, lower=True).T, bound).mean(axis=0)
    mean += rng.normal(scale=noise * 2 * bound / minimum, size=mean.shape)
    return (centre + factor @ mean).reshape(shape)


def private_second_moment(white: np.ndarray, clip: float, minimum: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """The second moment (1/N) sum y y' of private samples in one release of the Gaussian mechanism (Dwork, Talwar, Thakurta and
    Zhang, "Analyze Gauss", STOC 2014).

    Samples are clipped to B = clip sqrt(D). Replacing, adding or removing one of N >= minimum moves the moment by at most
    sqrt(2) B^2 / N in Frobenius' norm, in which an entry off the diagonal counts twice: so those get Gaussian noise of standard
    deviation s / sqrt(2), those on it s, s = noise x sqrt(2) B^2 / minimum.

    Args:
        white: in coordinates in which the public set is white, [N, D].
        clip: bound in units of the root mean square of the public features there.
        minimum: a public lower bound on N.
        noise: standard deviation in units of the sensitivity.
        rng: where noise comes from.

    Returns:
        float64 [D, D], symmetric.
    """
    own = clipped(white, clip * math.sqrt(white.shape[1]))
    free = rng.normal(scale=second_moment_deviation(white.shape[1], clip, minimum, noise), size=(white.shape[1],) * 2)
    return own.T @ own / len(own) + (free + free.T) / math.sqrt(2)


def second_moment_deviation(width: int, clip: float, minimum: int, noise: float) -> float:
    """The standard deviation of :func:`private_second_moment`'s noise off the diagonal."""
    return noise * clip**2 * width / minimum
