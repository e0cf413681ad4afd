"""Relevance r(x): how much a public sample looks like a client's private data (numpy only)."""

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, softmax

from common.fisher import fisher_rows


def fisher_scores(
    features: np.ndarray, private_mean: np.ndarray, public_mean: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """Log-odds that a sample is the client's rather than public, for Gaussians with one covariance and equal priors.

    s(x) = w.x + b with w = S_0^-1 (mu_p - mu_0), b = -1/2 (mu_p + mu_0).w (Fisher's discriminant).

    Args:
        features: the seed's embeddings z of the public samples, [n, d].
        private_mean: mu_p, the client's seed routing vector, [d].
        public_mean: mu_0, [d].
        covariance: S_0, shrunk, [d, d].

    Returns:
        float64 [n].
    """
    rows, biases = fisher_rows(np.stack([private_mean, public_mean]), covariance)
    return features @ (rows[0] - rows[1]) + (biases[0] - biases[1])


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
