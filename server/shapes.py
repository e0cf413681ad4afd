"""Each client's Gaussian, from the means and the shape that it sent (numpy only)."""

from collections.abc import Mapping, Sequence

import numpy as np

from metamoe.common.config import Router, Settings
from metamoe.common.gaussian import Coordinates, Gaussians, Shape, regularised, shape_rank, unpacked_shape


def sent_means(profile: Mapping[str, np.ndarray], settings: Settings) -> np.ndarray:
    """The means of what decisions look at in the frozen seed, as a client sent them, [P, d]."""
    return profile["seed-routing-vector"][None] if settings.router.decide == "embedding" else profile["seed-ffn-inputs"]


def sent_shape(profile: Mapping[str, np.ndarray], settings: Settings) -> Shape | None:
    """The shape that a client sent, in the coordinates in which the public set is white; None if it sent none."""
    if "seed-shape" not in profile:
        return None
    return unpacked_shape(profile["seed-shape"], settings.router.shape_rank, sent_means(profile, settings).size)


def client_gaussians(
    means: np.ndarray, shapes: Sequence[Shape | None], white: Coordinates, router: Router, seed: bool
) -> Gaussians:
    """The clients' regularised Gaussians (:func:`metamoe.common.gaussian.regularised`), by the settings.

    Args:
        means: of what decisions look at, [K, D].
        shapes: the clients'.
        white: the public set's white coordinates.
        router: of the settings.
        seed: whether the public Gaussian comes last.
    """
    rank = shape_rank(router.shape_rank, means.shape[1])
    return regularised(means, shapes, white, rank, router.shape_pooled, router.shape_identity, seed)
