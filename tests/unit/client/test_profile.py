import numpy as np

from metamoe.client.profile import relevance_classifier
from tests.conftest import random_features


def test_the_classifier_points_from_public_to_private_whatever_their_numbers() -> None:
    """Two Gaussians of unit covariance, 6 apart along the first axis: the best classifier is x_1 > 3."""
    shift = np.array([6.0, 0.0, 0.0])
    for private, public in ((400, 400), (100, 1_600)):
        values = relevance_classifier(random_features(private, 3, 0) + shift, random_features(public, 3, 1))
        weights, bias = values[:-1], values[-1]
        assert weights[0] / np.linalg.norm(weights) > 0.95
        # Where its log-odds are zero along the axis.
        np.testing.assert_allclose(-bias / weights[0], 3.0, atol=0.5)
