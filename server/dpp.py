"""Greedy maximum a posteriori inference of a determinantal point process, in feature space (numpy only)."""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.linalg import solve_triangular

_ROUNDING = 1e-10
_TIE = 1e-13
"""Squared residuals, of at most one, that differ by less are equal: what the order of a sum can do."""
_FIRST, _BLOCK = 16, 4_096
"""Items looked at again at a time: few at first, as the best is likely among them."""


def greedy_map(features: np.ndarray, relevance: np.ndarray, count: int) -> np.ndarray:
    """Items picked one by one, each with the largest gain of log det L~_S, L~ = Diag(r) cos(z, z) Diag(r) (Eq. 2 to 5).

    With B = Diag(r) Z, Z the unit features, L~ = B B^T, so the gain of item i is log ||b_i - its projection on the span of
    those picked||^2, and there is never an n x n matrix. Gains only fall: what an item gained when it was last looked at bounds
    what it gains now, so only items whose bound reaches the best gain found are looked at again (lazy evaluation, Minoux 1978;
    for determinantal point processes Hemmi et al. 2022), many at a time.

    L~ has rank at most d. Once every remaining item lies, up to rounding, in the span of those picked, det L~_S is zero
    whatever comes next. Then the picks go on as with L~ + eps I for eps -> 0: det(L~_S + eps I) is, up to powers of eps,
    det(B_S^T B_S) on that span, and the gain of item i becomes log(1 + b_i^T (B_S^T B_S)^-1 b_i).

    Args:
        features: z, [n, d], rows not zero; any float dtype, in memory or memory-mapped. Up to rank d, memory beyond them is
            O(n + d m).
        relevance: r, [n], positive.
        count: m, at most n.

    Returns:
        int64 [m], distinct, in the order of picking; among equal gains the lowest index comes first.

    Raises:
        ValueError: more items are asked for than there are, or an input is not finite and positive.
    """
    if not 0 <= count <= len(features):
        raise ValueError(f"{count} items of {len(features)} cannot be picked")
    if len(relevance) != len(features) or not (np.isfinite(relevance).all() and (relevance > 0).all()):
        raise ValueError("relevance must be finite and positive, and there must be one for each item")
    norms = np.concatenate([np.linalg.norm(block.astype(np.float64), axis=1) for block in _blocks(features)] or [np.empty(0)])
    if not np.isfinite(norms).all():
        raise ValueError("features must be finite")
    if not norms.all():
        raise ValueError(f"item {int(norms.argmin())} has a feature of length zero")
    # The common factor 1 / max r changes every determinant alike and keeps the squares from underflow.
    scale = np.asarray(relevance, dtype=np.float64) / relevance.max(initial=np.finfo(float).tiny)
    weights = scale / norms

    def rows(items: np.ndarray | slice) -> np.ndarray:
        return features[items].astype(np.float64) * weights[items, None]

    picked, basis = _while_independent(rows, scale**2, count, features.shape[1])
    if len(picked) < count:
        starts = range(0, len(features), _BLOCK)
        coordinates = np.concatenate([rows(slice(start, start + _BLOCK)) @ basis.T for start in starts])
        picked = _within_span(coordinates, picked, count)
    return np.array(picked, dtype=np.int64)


def _blocks(features: np.ndarray) -> Iterator[np.ndarray]:
    return (features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK))


def _while_independent(
    rows: Callable[[np.ndarray], np.ndarray], lengths: np.ndarray, count: int, width: int
) -> tuple[list[int], np.ndarray]:
    """Picks by the squared residual d_i^2, while there is one above rounding; with them their orthonormal basis [rank, d].

    ``rows`` gives items' b, and ``lengths`` are their squared lengths r_i^2, given so that equal relevances tie exactly.
    """
    # Sorted by length, which no residual exceeds: items after the first ``known`` have never been looked at.
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    bounds, seen, known = lengths[order], np.zeros(len(lengths), dtype=np.int32), 0
    basis = np.empty((min(count, width), width))
    picked: list[int] = []
    while len(picked) < len(basis):
        done, size = len(picked), _FIRST
        while True:
            best = bounds[:known].max(where=seen[:known] == done, initial=-np.inf)
            reached = np.flatnonzero((seen[:known] < done) & (bounds[:known] >= best - _TIE))
            if not len(reached):
                # Nobody known may reach the best; an item that was never looked at may, being no shorter.
                if known == len(order) or bounds[known] < best - _TIE:
                    break
                known = min(len(order), known + size)
                continue
            if len(reached) > size:
                reached = np.sort(reached[np.argpartition(-bounds[reached], size)[:size]])
            bounds[reached] = _residuals(rows(order[reached]), bounds[reached], seen[reached], basis[:done])
            bounds[reached[bounds[reached] <= _ROUNDING * lengths[order[reached]]]] = -np.inf
            seen[reached] = done
            size = min(2 * size, _BLOCK)
        if best == -np.inf:
            break
        fresh = np.flatnonzero((seen[:known] == done) & (bounds[:known] >= best - _TIE))
        place = fresh[order[fresh].argmin()]
        direction = rows(order[place : place + 1])[0] / np.sqrt(lengths[order[place]])
        # A second Gram-Schmidt pass removes what rounding left of the first, where the first left little else.
        for _ in range(2):
            direction = direction - (basis[:done] @ direction) @ basis[:done]
            if np.linalg.norm(direction) > 0.5:
                break
        basis[done] = direction / np.linalg.norm(direction)
        picked.append(int(order[place]))
        bounds[place] = -np.inf
    return picked, basis[: len(picked)]


def _residuals(weighted: np.ndarray, bounds: np.ndarray, seen: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Squared residuals of rows whose bounds have seen the first ``seen`` directions of the basis, now that there are all."""
    residuals, missing = bounds.copy(), np.frexp(len(basis) - seen)[1]
    # Items that miss about as many directions, to a factor of two, go together: one that misses all costs no other anything.
    for group in np.unique(missing):
        items = np.flatnonzero(missing == group)
        first = int(seen[items].min())
        parts = weighted[items] @ basis[first:].T
        parts[np.arange(first, len(basis)) < seen[items, None]] = 0.0
        residuals[items] -= np.einsum("ij,ij->i", parts, parts)
    return residuals


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
