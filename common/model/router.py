"""The context-aware router: what it decides on, which experts follow from that, and what the layers of one pass share."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from metamoe.common import config
from metamoe.common.compute import full_precision
from metamoe.common.model.inputs import masked_mean


@dataclass
class DecodingCache:
    """What a decoder keeps between the calls of one generation.

    Attributes:
        past: keys and values of attention.
        contexts: of each layer that decides, the sum of its context's inputs [B, E d] and their number [B, 1].
        decision: log pi [B, 1, K], where it was decided before the experts ran.
    """

    past: DynamicCache = field(default_factory=DynamicCache)
    contexts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    decision: Tensor | None = None


@dataclass(frozen=True)
class Groups:
    """Tokens by the experts that were chosen for them.

    Attributes:
        order: int64 [N], tokens so that those with the same experts follow each other.
        back: int64 [N], its inverse.
        weights: [N, k], in that order.
        experts: of each group, the chosen experts [k].
        starts: where each group begins, and N.
    """

    order: Tensor
    back: Tensor
    weights: Tensor
    experts: list[list[int]]
    starts: list[int]

    def slices(self, slot: int) -> Iterator[tuple[int, slice]]:
        """Each group's expert in one of its k slots, and its tokens."""
        return ((e[slot], slice(*ends)) for e, ends in zip(self.experts, pairwise(self.starts), strict=True))


@dataclass
class Route:
    """The experts chosen for each token, int64 [B, T, k], and their weights [B, T, k]; [B, 1, k] where a sample's tokens share
    them.
    """

    chosen: Tensor
    weights: Tensor
    _groups: Groups | None = None

    def groups(self, length: int) -> Groups:
        """The tokens of sequences of this length, grouped; found once for all layers that follow a decision."""
        if self._groups is None:
            shape = (self.chosen.shape[0], length, self.chosen.shape[2])
            chosen, weights = (tensor.expand(shape).flatten(0, 1) for tensor in (self.chosen, self.weights))
            experts, group, sizes = torch.unique(chosen, dim=0, return_inverse=True, return_counts=True)
            order = group.argsort(stable=True)
            starts = [0, *sizes.cumsum(0).tolist()]
            self._groups = Groups(order, order.argsort(), weights[order], experts.tolist(), starts)
        return self._groups


def route_of(decision: Tensor, top_k: int, renormalise: bool, slot: int | None = None) -> Route:
    """The route of a decision log pi [B, T, K]: to the ``top_k`` most likely experts, or to one of those alone."""
    weights, chosen = decision.exp().topk(top_k, dim=-1)
    if slot is not None:
        return Route(chosen[..., slot : slot + 1], torch.ones_like(weights[..., :1]))
    return Route(chosen, weights / weights.sum(dim=-1, keepdim=True) if renormalise else weights)


@dataclass
class RoutingState:
    """What the layers of one forward pass share.

    Attributes:
        mask: bool [B, T], the tokens whose mean is the context; None for all. Of text these are the prompt's.
        visible: bool [B, T, S], for text whose layers decide each for itself: a token's context is the mean over those it sees.
        held: whether a decision holds for what comes after the prompt, whatever that is: for text that is decided once.
        below: the FFN inputs of the layers below those with experts, as far as a router looks at them.
        decisions: every decision so far, log pi [B, T, K], or [B, 1, K] where all tokens of a sample share it.
        route: what follows from the last of them.
        cache: of a generation.
        given: whether the decision is there before the layers run.
        slot: which of the chosen experts runs alone; None for all of them, mixed.
        seed_alone: whether no expert runs at all.
    """

    mask: Tensor | None = None
    visible: Tensor | None = None
    held: bool = False
    below: list[Tensor] = field(default_factory=list)
    decisions: list[Tensor] = field(default_factory=list)
    route: Route = field(default_factory=lambda: Route(torch.empty(0), torch.empty(0)))
    cache: DecodingCache | None = None
    given: bool = False
    slot: int | None = None
    seed_alone: bool = False

    def decide(self, router: "Router", z: Tensor) -> None:
        """Take the next decision, on the inputs z [B, T, E d]."""
        number = len(self.decisions)
        earlier = self.cache.contexts[number] if self.cache and number < len(self.cache.contexts) else None
        if self.visible is not None:
            context, total, count = _running_mean(z, self.visible[:, :, -z.shape[1] :], earlier)
        elif earlier is not None:
            total, count = earlier
            context = (total / count).unsqueeze(1)
        else:
            context = masked_mean(z, self.mask).unsqueeze(1)
            mask = self.mask if self.mask is not None else torch.ones(z.shape[:2], device=z.device)
            count = mask.sum(1, keepdim=True).to(context.dtype)
            total = context.squeeze(1) * count
        if self.cache:
            self.cache.contexts[number : number + 1] = [(total, count)]
        if self.held and self.mask is not None:
            z = torch.where(self.mask.unsqueeze(-1), z, context) if earlier is None else context.expand_as(z)
        self.decisions.append(router(z, context))


def _running_mean(z: Tensor, visible: Tensor, earlier: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over all that each token sees, of these z [B, T, d] and of earlier ones; the last token's sum and count."""
    with full_precision(z.device):
        totals, counts = visible.float() @ z.float(), visible.sum(-1, keepdim=True).float()
    if earlier is not None:
        totals, counts = totals + earlier[0].unsqueeze(1), counts + earlier[1].unsqueeze(1)
    return totals / counts, totals[:, -1], counts[:, -1]


@dataclass(frozen=True)
class Quadratic:
    """What makes a router's scores quadratic; see :class:`metamoe.common.gaussian.Gaussians`, whose means are then its rows:
    centre [D], projection [D, D], scales [K, D], factors [K, r, D].
    """

    centre: np.ndarray
    projection: np.ndarray
    scales: np.ndarray
    factors: np.ndarray


@dataclass(frozen=True)
class RouterWeights:
    """A router as numbers: rows W [K, D] over the D = E d features it looks at (E FFN inputs, or the embedding), biases b [K],
    lambda, and for Gaussian rows the rest of them.
    """

    rows: np.ndarray
    biases: np.ndarray
    context: float
    quadratic: Quadratic | None = None


class Router(nn.Module):
    """Context-aware routing probabilities (Jiang et al. 2026, 3.4 and Eq. 7).

    z~_t = (1 - lambda) z_t + lambda z_x with z_x the mean of the layer's own inputs over the sequence, and
    pi(z_t) = softmax(z~_t W^T + b) over the K experts. W holds routing vectors (b = 0: the paper) or Fisher rows. z_t is the
    layer's input (the paper) or that of every layer up to it, side by side. With a temperature T, the experts share what the
    seed leaves of pi by softmax(scores / T) among themselves.
    """

    def __init__(self, weights: RouterWeights, settings: config.Router) -> None:
        super().__init__()
        learn_biases, learn_context = settings.rows != "dot", settings.learn_context
        self.rows = nn.Parameter(torch.tensor(weights.rows, dtype=torch.float32))
        self.biases = nn.Parameter(torch.tensor(weights.biases, dtype=torch.float32), requires_grad=learn_biases)
        self.context = nn.Parameter(torch.tensor(weights.context, dtype=torch.float32), requires_grad=learn_context)
        self._context_alone = weights.context == 1 and not learn_context
        self._temperature, self._experts = settings.temperature, len(weights.rows) - settings.seed_expert

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log pi [B, T, K] of tokens z [B, T, E d] in their context, [B, 1, E d] or [B, T, E d]; without one, in the mean of
        all. Where lambda is fixed at 1 and the context the same for all tokens, it is [B, 1, K].
        """
        if context is None:
            context = z.mean(dim=1, keepdim=True)
        # In full precision, whatever the rest has: a decision between near experts hangs on few digits.
        with full_precision(z.device):
            z, context = z.float(), context.float()
            mixed = context if self._context_alone else (1 - self.context) * z + self.context * context
            scores = self.scored(mixed)
            if self._temperature != 1:
                experts, seed = scores[..., : self._experts], scores[..., self._experts :]
                shares = torch.log_softmax(experts / self._temperature, dim=-1)
                scores = torch.cat([experts.logsumexp(dim=-1, keepdim=True) + shares, seed], dim=-1)
            return torch.log_softmax(scores, dim=-1)

    def scored(self, mixed: Tensor) -> Tensor:
        """Scores [B, T, K] of z~ [B, T, D]: z~ W^T + b."""
        return mixed @ self.rows.T + self.biases

    def weights(self) -> RouterWeights:
        """The router as it is now."""
        rows, biases = (tensor.detach().cpu().numpy().copy() for tensor in (self.rows, self.biases))
        return RouterWeights(rows, biases, self.context.item())

    @torch.no_grad()
    def clamp_context(self) -> None:
        """Bring lambda back into [0, 1] after a step."""
        self.context.clamp_(0, 1)
