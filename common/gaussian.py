"""A client's shape: the covariance of its features, estimated, made small, and regularised for Gaussian scores (numpy only)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metamoe.common.fisher import shrunk_covariance

_SAMPLES = 4_000
_ROWS = 32


@dataclass(frozen=True)
class Coordinates:
    """In which the public set is white: y = L^-1 (x - c), with its mean c [D] and S_0 = L L', its shrunk covariance."""

    centre: np.ndarray
    factor: np.ndarray

    def white(self, features: np.ndarray) -> np.ndarray:
        """Features [n, D] in these coordinates. float64."""
        # Not before it is needed: commands that count no scores load this file too.
        from scipy.linalg import solve_triangular

        return solve_triangular(self.factor, (features - self.centre).T, lower=True).T


@dataclass(frozen=True)
class Shape:
    """A covariance S = F' F + v I in white coordinates: factors F [r, D], and v, the variance in all other directions."""

    factors: np.ndarray
    rest: float

    def covariance(self) -> np.ndarray:
        """S, float64 [D, D]."""
        factors = self.factors.astype(np.float64)
        return factors.T @ factors + self.rest * np.eye(factors.shape[1])


@dataclass(frozen=True)
class Gaussians:
    """K Gaussians in a form that costs little to score: with y = A (x - c), A [D, D], common to all,

    -1/2 (x - m_k)' S_k^-1 (x - m_k) - 1/2 log det S_k = -1/2 |s_k (y - mu_k)|^2 + 1/2 |H_k (y - mu_k)|^2 + b_k,

    up to a constant shared by all: their means mu [K, D], inverse deviations s [K, D] and factors H [K, r, D] in these
    coordinates, b [K]. float64.
    """

    centre: np.ndarray
    projection: np.ndarray
    means: np.ndarray
    scales: np.ndarray
    factors: np.ndarray
    biases: np.ndarray

    def of(self, rows: Sequence[int]) -> "Gaussians":
        """Some of them, in this order."""
        own = (part[list(rows)] for part in (self.means, self.scales, self.factors, self.biases))
        return Gaussians(self.centre, self.projection, *own)

    def seen(self, features: np.ndarray) -> np.ndarray:
        """Features [n, D] in the coordinates y."""
        return (features - self.centre) @ self.projection.T

    def scores(self, seen: np.ndarray) -> np.ndarray:
        """The log-likelihoods of y [n, D], up to a constant shared by all. float64 [n, K]."""
        apart = (seen - mean for mean in self.means)
        terms = zip(apart, self.scales, self.factors, self.biases, strict=True)
        return np.stack([0.5 * (np.square(y @ h.T).sum(1) - np.square(y * s).sum(1)) + b for y, s, h, b in terms], axis=1)

    def drawn(self, k: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Samples y as the k-th Gaussian has them. float64 [count, D]."""
        variances, root, spread = self._spread(k)
        own = rng.normal(size=(count, len(variances))) * np.sqrt(variances)
        return self.means[k] + own + rng.normal(size=(count, len(spread))) @ root.T @ spread

    def points(self) -> np.ndarray:
        """Points [K, K] whose squared distances are those of the Gaussians,

        (mu_i - mu_j)' S^-1 (mu_i - mu_j) + 1/2 tr (S^-1 (S_i - S_j))^2, S = diag(the mean of S_k),

        which is their symmetric Kullback-Leibler divergence to second order where they differ little from S. float64.
        """
        spreads = [self._spread(k) for k in range(len(self.means))]
        factors = np.stack([root.T @ spread for _, root, spread in spreads])
        variances = np.stack([own for own, _, _ in spreads])
        mean = (variances + np.square(factors).sum(1)).mean(0)
        factors /= np.sqrt(mean)
        variances /= mean
        means = self.means / np.sqrt(mean)
        products = means @ means.T
        width = len(mean)
        # Of all covariances a few rows at a time: nothing as large as K of them is in memory.
        for start in range(0, width, _ROWS):
            rows = np.arange(start, min(start + _ROWS, width))
            blocks = factors[:, :, rows].transpose(0, 2, 1) @ factors
            blocks[:, np.arange(len(rows)), rows] += variances[:, rows]
            flat = blocks.reshape(len(blocks), -1)
            products += 0.5 * flat @ flat.T
        centre = np.eye(len(products)) - 1 / len(products)
        values, vectors = np.linalg.eigh(centre @ products @ centre)
        return vectors * np.sqrt(np.maximum(values, 0))

    def _spread(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """V, L and W = H V of the k-th Gaussian's covariance V + V H' (I - H V H')^-1 H V = V + W' L L' W, V = diag(s_k^-2)."""
        variances, factors = self.scales[k] ** -2.0, self.factors[k]
        spread = factors * variances
        return variances, np.linalg.cholesky(np.linalg.inv(np.eye(len(factors)) - spread @ factors.T)), spread


def coordinate_rows(count: int) -> np.ndarray:
    """Which of ``count`` public samples both sides make the white coordinates from: the same in every run, so that a shape is a
    statistic of a client's samples and the public set alone. int64, ascending.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:_SAMPLES])


def coordinates(public: np.ndarray) -> Coordinates:
    """White coordinates by public features [n, D]."""
    public = np.asarray(public, dtype=np.float64)
    return Coordinates(public.mean(axis=0), np.linalg.cholesky(shrunk_covariance(public)))


def public_coordinates(public: np.ndarray) -> Coordinates:
    """The white coordinates of a public set.

    Args:
        public: what decisions look at, of all public samples, [n, ...], in memory or memory-mapped.
    """
    rows = coordinate_rows(len(public))
    return coordinates(public[rows].reshape(len(rows), -1))


class Moments:
    """Mean and covariance of samples that come in batches: one pass, and D^2 + D numbers of memory, whatever their number.

    Batches are joined by the parallel algorithm of Chan, Golub and LeVeque (1979): sums of squares about the mean so far, so
    that nothing cancels however far from zero the samples lie. float64.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, batch: np.ndarray) -> None:
        """Take in samples [B, D], at least one."""
        batch = np.asarray(batch, dtype=np.float64)
        mean = batch.mean(axis=0)
        centred, step = batch - mean, mean - self.mean
        total = self.count + len(batch)
        self._scatter += centred.T @ centred
        self._scatter += np.outer(step, step) * (self.count * len(batch) / total)
        self.mean = self.mean + step * (len(batch) / total)
        self.count = total

    def covariance(self) -> np.ndarray:
        """The samples' covariance [D, D], divided by their number."""
        return self._scatter / self.count


def oracle_shrunk(covariance: np.ndarray, count: int) -> np.ndarray:
    """A covariance estimated from few samples, shrunk towards a multiple of the identity (OAS: Chen, Wiesel, Eldar and Hero,
    IEEE Trans. Signal Processing 2010, Eq. 23): (1 - p) S + p tr(S)/D I, with

    p = min(1, (a + t^2) / ((n + 1) (a - t^2 / D))), a the mean of S's squared entries and t = tr(S) / D.

    Args:
        covariance: S, [D, D].
        count: n, of samples.
    """
    width = len(covariance)
    spread, middle = np.mean(covariance**2), np.trace(covariance) / width
    excess = (count + 1) * (spread - middle**2 / width)
    share = 1.0 if excess <= 0 else min(1.0, (spread + middle**2) / excess)
    return (1 - share) * covariance + share * middle * np.eye(width)


def denoised(covariance: np.ndarray, deviation: float) -> np.ndarray:
    """A covariance under symmetric Gaussian noise, by shrinkage of its eigenvalues: about their mean, l becomes
    sign(l) sqrt(l^2 - 4 D t^2), or zero where noise alone reaches, which is best in Frobenius' norm for large D (Gavish and
    Donoho, "Optimal shrinkage of singular values", IEEE Trans. Information Theory 2017); and none is below zero.

    Args:
        covariance: as released, [D, D].
        deviation: t, the standard deviation of the noise off the diagonal.
    """
    width = len(covariance)
    values, vectors = np.linalg.eigh(covariance)
    middle = max(float(values.mean()), 0.0)
    apart = values - middle
    kept = np.sign(apart) * np.sqrt(np.maximum(np.square(apart) - 4 * width * deviation**2, 0))
    return (vectors * np.maximum(middle + kept, 0)) @ vectors.T


def shape_of(covariance: np.ndarray, rank: int) -> Shape:
    """A covariance [D, D], positive definite, in as many directions as are sent.

    Args:
        covariance: S.
        rank: r principal directions, and the mean variance of all others; 0, or D and more: all of it, as the triangular
            factor F of S = F' F.
    """
    width = len(covariance)
    if shape_rank(rank, width) == width:
        return Shape(np.linalg.cholesky(covariance).T, 0.0)
    variances, directions = np.linalg.eigh(covariance)
    rest = max(float(variances[:-rank].mean()), 0.0)
    kept = np.sqrt(np.maximum(variances[-rank:] - rest, 0))
    return Shape((directions[:, -rank:] * kept).T, rest)


def shape_rank(rank: int, width: int) -> int:
    """How many factors a shape of features of this width has: ``rank``, or all where that is 0 or more than there are."""
    return rank if 0 < rank < width else width


def shape_size(rank: int, width: int) -> int:
    """Numbers of a shape as it is sent."""
    return rank * width + 1 if 0 < rank < width else width * (width + 1) // 2


def packed_shape(shape: Shape) -> np.ndarray:
    """A shape as it is sent: F and the square root of v, r D + 1 numbers; of a triangular F the upper half, row by row,
    D (D + 1) / 2 numbers. float16.
    """
    count, width = shape.factors.shape
    if count == width:
        return shape.factors[np.triu_indices(width)].astype(np.float16)
    return np.append(shape.factors.ravel(), np.sqrt(shape.rest)).astype(np.float16)


def unpacked_shape(sent: np.ndarray, rank: int, width: int) -> Shape:
    """What :func:`packed_shape` made, with the ``rank`` of the settings. float64."""
    numbers = sent.astype(np.float64)
    if 0 < rank < width:
        return Shape(numbers[:-1].reshape(rank, width), float(numbers[-1] ** 2))
    whole = np.zeros((width, width))
    whole[np.triu_indices(width)] = numbers
    return Shape(whole, 0.0)


def merged_shape(means: np.ndarray, shapes: Sequence[Shape], rank: int) -> Shape:
    """The shape of equal parts of several clients: the mean of their covariances, and the covariance of their means.

    Args:
        means: theirs, in white coordinates, [M, D].
        shapes: theirs.
        rank: see :func:`shape_of`.
    """
    apart = means - means.mean(axis=0)
    whole = np.mean([shape.covariance() for shape in shapes], axis=0) + apart.T @ apart / len(means)
    return shape_of(whole, rank)


def regularised(
    means: np.ndarray,
    shapes: Sequence[Shape | None],
    white: Coordinates,
    rank: int,
    pooled: float,
    identity: float,
    seed: bool,
) -> Gaussians:
    """Gaussians of clients whose covariances are regularised (Friedman, "Regularized discriminant analysis", JASA 1989):

    S_k' = (1 - e) ((1 - a) S_k + a S_within) + e I in white coordinates, S_within the mean of the clients' S_k,

    and, where it is wanted, last the public Gaussian, which is N(0, I) there. A client without a shape has S_within in its
    place; if nobody has one, all have I, and the scores differ by Fisher's linear discriminants.

    With S_within = Q diag(w) Q', S_k = F_k' F_k + v_k I and y in the coordinates of Q, S_k' is diagonal but for r directions,
    and its inverse follows by Woodbury's identity.

    Args:
        means: of the clients' features, as they are, [K, D].
        shapes: of the clients, in white coordinates.
        white: those.
        rank: r, of factors that each Gaussian has.
        pooled: a.
        identity: e.
        seed: whether the public Gaussian comes last.
    """
    from scipy.linalg import solve_triangular

    width = means.shape[1]
    known = [shape for shape in shapes if shape is not None]
    within = np.mean([shape.covariance() for shape in known], axis=0) if known else np.eye(width)
    values, turn = np.linalg.eigh(within)
    values = np.maximum(values, 0)
    count = len(means) + seed
    scales, factors, biases = np.ones((count, width)), np.zeros((count, rank, width)), np.zeros(count)
    centres = np.zeros((count, width))
    centres[: len(means)] = white.white(np.asarray(means, dtype=np.float64)) @ turn
    for k, shape in enumerate(shapes):
        own, rest = (0.0, 0.0) if shape is None else ((1 - identity) * (1 - pooled), shape.rest)
        diagonal = (1 - identity - own) * values + identity + own * rest
        scales[k] = 1 / np.sqrt(diagonal)
        biases[k] = -0.5 * np.log(diagonal).sum()
        if shape is not None:
            directions = np.sqrt(own) * shape.factors @ turn
            scaled = directions / diagonal
            # S^-1 = B^-1 - B^-1 G' (I + G B^-1 G')^-1 G B^-1, B the diagonal and G the directions.
            lower = np.linalg.cholesky(np.eye(len(directions)) + scaled @ directions.T)
            factors[k, : len(directions)] = solve_triangular(lower, scaled, lower=True)
            biases[k] -= np.log(np.diag(lower)).sum()
    projection = solve_triangular(white.factor, turn, lower=True, trans="T").T
    return Gaussians(white.centre, projection, centres, scales, factors, biases)
