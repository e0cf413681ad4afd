"""A router whose experts are Gaussians, each with a covariance of its own."""

import torch
from torch import Tensor

from metamoe.common import config
from metamoe.common.model.router import Quadratic, Router, RouterWeights


class GaussianRouter(Router):
    """Routing by the log-likelihoods of Gaussians, regularised and low in rank: the terms of
    :class:`metamoe.common.gaussian.Gaussians`. Rows are means in its coordinates; with the biases, they alone are trained.

    A decision costs D^2 + K r D, whatever the length of the sequence, where it is taken once a sequence.
    """

    def __init__(self, weights: RouterWeights, settings: config.Router) -> None:
        super().__init__(weights, settings)
        assert weights.quadratic is not None
        for name, array in vars(weights.quadratic).items():
            self.register_buffer(name, torch.tensor(array, dtype=torch.float32))

    def scored(self, mixed: Tensor) -> Tensor:
        """Scores [B, T, K] of z~ [B, T, D]."""
        centre, projection, scales, factors = self._quadratic()
        own = ((mixed - centre) @ projection.T).unsqueeze(-2) - self.rows
        near = torch.einsum("...kd,krd->...kr", own, factors)
        return 0.5 * (near.square().sum(-1) - (own * scales).square().sum(-1)) + self.biases

    def weights(self) -> RouterWeights:
        """The router as it is now."""
        linear = super().weights()
        quadratic = Quadratic(*(tensor.cpu().numpy().copy() for tensor in self._quadratic()))
        return RouterWeights(linear.rows, linear.biases, linear.context, quadratic)

    def _quadratic(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in ("centre", "projection", "scales", "factors")]


def router_of(weights: RouterWeights, settings: config.Router) -> Router:
    """A router with these weights."""
    return Router(weights, settings) if weights.quadratic is None else GaussianRouter(weights, settings)
