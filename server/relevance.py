"""Relevance r(x): how much a public sample looks like a client's private data (numpy only)."""

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, softmax

from metamoe.common.fisher import fisher_rows
from metamoe.common.gaussian import Gaussians

_SHARD = 4_096


def fisher_discriminants(
    private_means: np.ndarray, public_mean: np.ndarray, covariance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds that a sample is a client's rather than public, for Gaussians with one covariance and equal priors.

    s_p(x) = w_p.x + b_p with w_p = S_0^-1 (mu_p - mu_0), b_p = -1/2 (mu_p + mu_0).w_p (Fisher's discriminant).

    Args:
        private_means: mu_p, the clients' seed routing vectors, [K, d].
        public_mean: mu_0, [d].
        covariance: S_0, shrunk, [d, d].

    Returns:
        w, float64 [K, d], and b, float64 [K].
    """
    rows, biases = fisher_rows(np.vstack([private_means, public_mean]), covariance)
    return rows[:-1] - rows[-1], biases[:-1] - biases[-1]


def linear_scores(features: np.ndarray, rows: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """s_p(x) = w_p.x + b_p for every public sample and every client; the samples are read once, a shard at a time.

    Args:
        features: the seed's embeddings z of the public samples, [n, d], in memory or memory-mapped.
        rows: w, [K, d].
        biases: b, [K].

    Returns:
        float64 [K, n].
    """
    scores = np.empty((len(rows), len(features)))
    for start in range(0, len(features), _SHARD):
        shard = features[start : start + _SHARD].astype(np.float64)
        scores[:, start : start + len(shard)] = rows @ shard.T
    scores += biases[:, None]
    return scores


def density_scores(features: np.ndarray, gaussians: Gaussians) -> np.ndarray:
    """Log-odds that a sample is a client's rather than public, for a Gaussian each: s_p(x) = log N_p(x) - log N_0(x); the
    samples are read once, a shard at a time.

    Args:
        features: what shapes are of, of the public samples, [n, ...], in memory or memory-mapped.
        gaussians: the clients' and, last, the public one.

    Returns:
        float64 [K, n].
    """
    scores = np.empty((len(gaussians.means) - 1, len(features)))
    for start in range(0, len(features), _SHARD):
        shard = features[start : start + _SHARD]
        found = gaussians.scores(gaussians.seen(shard.reshape(len(shard), -1).astype(np.float64)))
        scores[:, start : start + len(shard)] = (found[:, :-1] - found[:, -1:]).T
    return scores


def logistic_link(scores: np.ndarray, expected: int) -> np.ndarray:
    """Relevance in (0, 1] out of log-odds: r = sigmoid(s + c), the prior log-odds c being such that the sum of r is
    ``expected``.

    How many public samples resemble a domain is not known; ``expected`` is the size of the pool that is wanted, so that r
    falls from one to zero about its edge, however far the domain lies from everything public.

    Args:
        scores: float64 [n].
        expected: between 1 and n - 1.

    Returns:
        float64 [n], in the order of the scores.
    """
    low, high = -scores.max() - 50.0, -scores.min() + 50.0
    prior = brentq(lambda c: expit(scores + c).sum() - expected, low, high)
    return expit(scores + prior)


def tempered_weights(scores: np.ndarray, share: float) -> np.ndarray:
    """Importance weights of samples in a mean that is to stand for the client's: w proportional to exp(t s).

    With t = 1 and Fisher's log-odds these are density ratios of the client's Gaussian to the public one. A few samples would
    then carry everything, so t in [0, 1] is the largest at which the effective sample size 1 / sum w^2 is at least
    ``share`` of their number.

    Args:
        scores: s, log-odds, float64 [m].
        share: of the m samples, in (0, 1].

    Returns:
        float64 [m], with sum one.
    """

    def weights(temperature: float) -> np.ndarray:
        return softmax(temperature * scores)

    def excess(temperature: float) -> float:
        return 1 / float((weights(temperature) ** 2).sum()) - share * len(scores)

    return weights(1.0 if excess(1.0) >= 0 else brentq(excess, 0.0, 1.0)) if share < 1 else weights(0.0)
