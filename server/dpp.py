"""Greedy maximum a posteriori inference of a determinantal point process, in feature space (numpy only)."""

import numpy as np
from scipy.linalg import solve_triangular

_ROUNDING = 1e-10


def greedy_map(features: np.ndarray, relevance: np.ndarray, count: int) -> np.ndarray:
    """Items picked one by one, each with the largest gain of log det L~_S, L~ = Diag(r) cos(z, z) Diag(r) (Eq. 2 to 5).

    With B = Diag(r) Z, Z the unit features, L~ = B B^T, so the gain of item i is log ||b_i - its projection on the span of
    those picked||^2: a Gram-Schmidt step for each pick, O(n d) each, and never an n x n matrix.

    L~ has rank at most d. Once every remaining item lies, up to rounding, in the span of those picked, det L~_S is zero
    whatever comes next. Then the picks go on as with L~ + eps I for eps -> 0: det(L~_S + eps I) is, up to powers of eps,
    det(B_S^T B_S) on that span, and the gain of item i becomes log(1 + b_i^T (B_S^T B_S)^-1 b_i).

    Args:
        features: z, [n, d], rows not zero; any float dtype.
        relevance: r, [n], positive.
        count: m, at most n.

    Returns:
        int64 [m], distinct, in the order of picking; among equal gains the lowest index comes first.

    Raises:
        ValueError: more items are asked for than there are, or an input is not finite and positive.
    """
    if not 0 <= count <= len(features):
        raise ValueError(f"{count} items of {len(features)} cannot be picked")
    if len(relevance) != len(features) or not (
        np.isfinite(features).all() and np.isfinite(relevance).all() and (relevance > 0).all()
    ):
        raise ValueError("features must be finite, relevance finite and positive, and there must be one for each item")
    unit = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(unit, axis=1)
    if not norms.all():
        raise ValueError(f"item {int(norms.argmin())} has a feature of length zero")
    # The common factor 1 / max r changes every determinant alike and keeps the squares from underflow.
    scale = relevance / relevance.max(initial=np.finfo(float).tiny)
    weighted = unit * (scale / norms)[:, None]
    picked, basis = _while_independent(weighted, scale**2, count)
    if len(picked) < count:
        picked = _within_span(weighted @ basis.T, picked, count)
    return np.array(picked, dtype=np.int64)


def _while_independent(weighted: np.ndarray, lengths: np.ndarray, count: int) -> tuple[list[int], np.ndarray]:
    """Picks by the squared residual d_i^2, while there is one above rounding; with them their orthonormal basis [rank, d].

    ``lengths`` are the squared lengths r_i^2 of the rows, given so that equal relevances tie exactly.
    """
    residuals = lengths.copy()
    basis = np.empty((min(count, weighted.shape[1]), weighted.shape[1]))
    picked: list[int] = []
    while len(picked) < len(basis):
        candidates = np.where(residuals > _ROUNDING * lengths, residuals, -1.0)
        candidates[picked] = -1.0
        best = int(candidates.argmax())
        if candidates[best] <= 0:
            break
        done = basis[: len(picked)]
        direction = weighted[best] / np.sqrt(lengths[best])
        # Twice is enough: a second Gram-Schmidt pass removes what rounding left of the first.
        for _ in range(2):
            direction = direction - done.T @ (done @ direction)
        basis[len(picked)] = direction / np.linalg.norm(direction)
        residuals -= (weighted @ basis[len(picked)]) ** 2
        picked.append(best)
    return picked, basis[: len(picked)]


def _within_span(coordinates: np.ndarray, picked: list[int], count: int) -> list[int]:
    """Further picks by b_i^T (B_S^T B_S)^-1 b_i, in coordinates [n, rank] of the picked items' span."""
    picked = list(picked)
    # In the order of picking, Gram-Schmidt coordinates are triangular: C_S = L. With h_i = L^-T c_i the matrix to invert
    # starts as the identity, so that relevances of very different size do no harm.
    whitened = solve_triangular(np.tril(coordinates[picked]), coordinates.T, lower=True, trans="T").T
    inverse = np.eye(len(picked))
    leverage = np.einsum("nd,nd->n", whitened, whitened)
    while len(picked) < count:
        leverage[picked] = -1.0
        best = int(leverage.argmax())
        step = inverse @ whitened[best]
        # Sherman and Morrison: (G + h h^T)^-1 = G^-1 - G^-1 h h^T G^-1 / (1 + h^T G^-1 h).
        scale = 1.0 + whitened[best] @ step
        inverse -= np.outer(step, step) / scale
        leverage -= (whitened @ step) ** 2 / scale
        picked.append(best)
    return picked
