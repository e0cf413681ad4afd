"""Fisher's linear discriminant with a shrunk covariance: the one idea behind relevance and routing (numpy only)."""

import numpy as np


def shrunk_covariance(features: np.ndarray) -> np.ndarray:
    """Covariance S_0 of ``features`` [n, d], shrunk towards a multiple of the identity (Ledoit and Wolf, 2004). float64
    [d, d].
    """
    # Not before it is needed: loading scikit-learn takes most of a second.
    from sklearn.covariance import LedoitWolf

    return LedoitWolf().fit(np.asarray(features, dtype=np.float64)).covariance_


def fisher_rows(means: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminants of classes with the given means and one common covariance.

    W = M S_0^-1 and b = -1/2 diag(M W^T): ``x @ W.T + b`` is, up to a constant shared by the classes, the log-likelihood
    of x under N(M_k, S_0), so its softmax is the posterior under equal priors.

    Args:
        means: M, [K, d].
        covariance: S_0, positive definite, [d, d].

    Returns:
        W, float64 [K, d], and b, float64 [K].
    """
    # Not before it is needed: commands that count no scores load this file too.
    from scipy.linalg import cho_factor, cho_solve

    means = np.asarray(means, dtype=np.float64)
    rows = cho_solve(cho_factor(covariance), means.T).T
    return rows, -0.5 * np.einsum("kd,kd->k", means, rows)
