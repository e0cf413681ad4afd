"""Greedy maximum a posteriori inference of a determinantal point process, in feature space (numpy only)."""

import math

import numpy as np
from scipy.linalg import solve_triangular

_ROUNDING = 1e-10
_TIE = 1e-13
"""Squared residuals, of at most one, that differ by less are equal: what the order of a sum can do."""
_CANDIDATES, _BLOCK = 192, 4_096
"""Items that the plain greedy runs on, and items looked at again at a time."""
_COARSE, _COARSE_ERROR = 1e-2, 8 * 2.0**-24
"""Float32 will do where more than this share of an item's squared length is left. A product of unit vectors then errs by at
most _COARSE_ERROR sqrt(d), with a probability of 1 - 1e-13 (Higham and Mary 2019).
"""
_SMALL = 1e-2
"""Share of an item's squared length below which a second pass of Gram-Schmidt is needed."""
_CACHED = 256
"""Rows of float64 that stay in a core's cache."""
_OUT = np.iinfo(np.int32).max
"""Directions that an item has seen which is picked, or within rounding of the span of those picked."""


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
    norms = _norms(features)
    if not np.isfinite(norms).all():
        raise ValueError("features must be finite")
    if not norms.all():
        raise ValueError(f"item {int(norms.argmin())} has a feature of length zero")
    # The common factor 1 / max r changes every determinant alike and keeps the squares from underflow.
    scale = np.asarray(relevance, dtype=np.float64) / relevance.max(initial=np.finfo(float).tiny)
    items = _Items(features, scale / norms, scale**2)
    picked, basis = _while_independent(items, count)
    if len(picked) < count:
        starts = range(0, len(features), _BLOCK)
        coordinates = np.concatenate([items.rows(slice(start, start + _BLOCK)) @ basis.T for start in starts])
        picked = _within_span(coordinates, picked, count)
    return np.array(picked, dtype=np.int64)


def _norms(features: np.ndarray) -> np.ndarray:
    """Lengths in float64, [n]; by blocks that stay in the cache."""
    squares = np.empty(len(features))
    for start in range(0, len(features), _CACHED):
        block = features[start : start + _CACHED].astype(np.float64)
        squares[start : start + _CACHED] = np.einsum("ij,ij->i", block, block)
    return np.sqrt(squares)


class _Items:
    """What is known of every item: a bound on its squared residual, of at most r_i^2, with which directions of the basis it was
    made, and whether it is exact.

    A coarse bound is made of float32 products, at twice the speed, and keeps a margin for their rounding.
    """

    def __init__(self, features: np.ndarray, weights: np.ndarray, lengths: np.ndarray) -> None:
        self.features, self.weights, self.lengths = features, weights, lengths
        self.bounds, self.seen = lengths.copy(), np.zeros(len(lengths), dtype=np.int32)
        self.exact = np.zeros(len(lengths), dtype=bool)

    def rows(self, items: np.ndarray | slice) -> np.ndarray:
        """b = r z, float64 [len(items), d]."""
        return self.features[items].astype(np.float64) * self.weights[items, None]

    def largest(self, count: int) -> np.ndarray:
        """The items with the largest bounds."""
        rest = len(self.bounds) - count
        return np.argpartition(self.bounds, rest)[rest:] if rest > 0 else np.arange(len(self.bounds))

    def largest_but(self, items: np.ndarray) -> float:
        """The largest bound of all other items."""
        own = self.bounds[items]
        self.bounds[items] = -np.inf
        best = float(self.bounds.max())
        self.bounds[items] = own
        return best

    def within_reach(self, best: float, done: int) -> np.ndarray:
        """The items whose bounds reach the best, but are not exact beside all ``done`` directions."""
        (items,) = ((self.bounds >= best) & (self.bounds > -np.inf)).nonzero()
        return items[~(self.exact[items] & (self.seen[items] == done))]

    def settle(self, items: np.ndarray, residuals: np.ndarray, done: int) -> None:
        """Set exact residuals beside ``done`` directions. At rounding level an item is out."""
        out = residuals <= _ROUNDING * self.lengths[items]
        self.bounds[items], self.seen[items] = np.where(out, -np.inf, residuals), np.where(out, _OUT, done)
        self.exact[items] = True

    def look_again(self, items: np.ndarray, basis: np.ndarray, coarse_basis: np.ndarray, exactly: bool = False) -> None:
        """Bring bounds up to date with a basis [done, d], given in float64 and in float32."""
        for start in range(0, len(items), _BLOCK):
            block = items[start : start + _BLOCK]
            fine = exactly | (self.bounds[block] < _COARSE * self.lengths[block])
            coarse, block = block[~fine], block[fine]
            if len(coarse):
                self.bounds[coarse] -= self._captured(coarse, coarse_basis)
                self.seen[coarse], self.exact[coarse] = len(basis), False
            if len(block):
                anew = block[~self.exact[block]]
                self.bounds[anew], self.seen[anew] = self.lengths[anew], 0
                self.settle(block, self.bounds[block] - self._captured(block, basis), len(basis))

    def _captured(self, items: np.ndarray, basis: np.ndarray) -> np.ndarray:
        """Squared lengths of items' parts along those directions that they have not seen; from float32, at most that."""
        seen, captured = self.seen[items], np.empty(len(items))
        # Items that miss about as many directions, to a factor of two, go together: one that misses all costs others nothing.
        missing = np.frexp(len(basis) - seen)[1]
        # What float32 cannot hold is not captured.
        with np.errstate(over="ignore", invalid="ignore"):
            for group in np.flatnonzero(np.bincount(missing)):
                members = np.flatnonzero(missing == group)
                own = seen[members]
                first = int(own.min())
                parts = self.features[items[members]].astype(basis.dtype, copy=False) @ basis[first:].T
                if varied := int(own.max()) - first:
                    parts[:, :varied][np.arange(first, first + varied) < own[:, None]] = 0.0
                captured[members] = np.einsum("ij,ij->i", parts, parts)
        if basis.dtype == np.float64:
            return captured * self.weights[items] ** 2
        error = _COARSE_ERROR * np.sqrt((len(basis) - seen) * basis.shape[1] * self.lengths[items])
        lost = np.sqrt(np.where(np.isfinite(captured), captured, 0.0)) * self.weights[items] - error
        return np.maximum(lost, 0.0) ** 2


def _while_independent(items: _Items, count: int) -> tuple[list[int], np.ndarray]:
    """Picks by the squared residual d_i^2, while there is one above rounding; with them their orthonormal basis [rank, d].

    The items with the largest bounds are candidates together: the plain greedy runs on their small residual kernel for as long
    as nobody else's bound reaches the best of them.
    """
    width, size = items.features.shape[1], min(_CANDIDATES, len(items.lengths))
    basis = np.empty((min(count, width), width))
    coarse_basis = np.empty(basis.shape, dtype=np.float32)
    candidates, place_of = np.full(size, -1), np.full(len(items.lengths), -1, dtype=np.int32)
    weighted, coordinates, kernel = np.zeros((size, width)), np.zeros((size, len(basis))), np.zeros((size, size))
    factor = np.empty((size, size))
    picked: list[int] = []

    def admit(places: np.ndarray, admitted: np.ndarray) -> None:
        place_of[candidates[places]] = -1
        candidates[places], place_of[admitted] = admitted, places
        new = items.rows(admitted)
        own = new @ basis[: len(picked)].T
        weighted[places], coordinates[places, : len(picked)] = new, own
        rows = new @ weighted.T - own @ coordinates[:, : len(picked)].T
        kernel[places], kernel[:, places] = rows, rows.T

    while len(picked) < len(basis):
        done = len(picked)
        # 1. Candidates: the items with the largest bounds, once all of these are up to date. Who was one before has coordinates
        # and a row of the residual kernel already.
        wide = 3 * size
        while (items.seen[top := items.largest(size)] < done).any():
            again = items.largest(wide)
            items.look_again(again[items.seen[again] < done], basis[:done], coarse_basis[:done])
            wide *= 2
        known = place_of[top]
        leave = np.ones(size, dtype=bool)
        leave[known[known >= 0]] = False
        admit(leave.nonzero()[0], top[known < 0])
        still = items.seen[candidates] != _OUT
        items.settle(candidates[still], kernel.diagonal()[still], done)
        best, others = items.bounds[candidates].max(), items.largest_but(candidates)
        # 2. The next pick. If others may reach the best candidate, they are looked at exactly.
        if others >= best - _TIE:
            while done and len(reached := items.within_reach(best - _TIE, done)):
                items.look_again(reached[:_BLOCK], basis[:done], coarse_basis[:done], exactly=True)
                best = max(best, items.bounds[reached[:_BLOCK]].max())
            best = items.bounds.max()
        if best == -np.inf:
            break
        pick = int(np.flatnonzero(items.bounds >= best - _TIE)[0])
        if place_of[pick] < 0:
            admit(items.bounds[candidates].argmin(keepdims=True), np.array([pick]))
            others = items.largest_but(candidates)
        # 3. Greedy among the candidates, by rows of the Cholesky factor of their residual kernel.
        gains, floor, places = items.bounds[candidates], _ROUNDING * items.lengths[candidates], [int(place_of[pick])]
        while True:
            place, taken = places[-1], len(places)
            row = kernel[place] - factor[: taken - 1, place] @ factor[: taken - 1]
            row /= math.sqrt(gains[place])
            factor[taken - 1] = row
            gains -= row * row
            gains[place] = -np.inf
            best = gains.max()
            if best - _TIE <= others or done + taken == len(basis):
                break
            (tied,) = (gains >= best - _TIE).nonzero()
            place = tied[0] if len(tied) == 1 else tied[candidates[tied].argmin()]
            if gains[place] <= floor[place]:
                break
            places.append(int(place))
        # 4. Their directions: L^-1 (B_S - its projection).
        new = slice(done, done + len(places))
        items.settle(candidates, gains, new.stop)
        coordinates[:, new] = factor[: len(places)].T
        kernel -= factor[: len(places)].T @ factor[: len(places)]
        lower = factor[: len(places), places].T
        directions = np.linalg.inv(lower) @ (weighted[places] - coordinates[places, :done] @ basis[:done])
        if (lower.diagonal() ** 2 < _SMALL * items.lengths[candidates[places]]).any():
            # A second pass removes what rounding left of the first, where the first left little else.
            directions -= (directions @ basis[:done].T) @ basis[:done]
            directions = np.linalg.inv(np.linalg.cholesky(directions @ directions.T)) @ directions
        basis[new] = coarse_basis[new] = directions
        picked += candidates[places].tolist()
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
