"""The unified model: a seed whose feed-forward sublayers are Mixtures of LoRA experts under a context-aware router.

Everything happens in one forward pass: base projections are computed once for all tokens, and the chosen experts' low-rank
terms are added to them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from metamoe.common import config
from metamoe.common.compute import full_precision
from metamoe.common.data.tasks import Batch
from metamoe.common.errors import ModelStructureError
from metamoe.common.model.ffn import form_of
from metamoe.common.model.inputs import Inputs, encode, masked_mean
from metamoe.common.model.lora import Expert, expert_layers
from metamoe.common.model.routing import evidence_paths
from metamoe.common.model.seed import Seed, share

_GROUPING = 48
"""Without gradients, N tokens are grouped by what was chosen of K experts where that makes at most K N / _GROUPING groups; else
all experts' terms are computed and masked. Measured; see docs/performance.md.
"""


@dataclass
class DecodingCache:
    """What a decoder keeps between the calls of one generation.

    Attributes:
        past: keys and values of attention.
        contexts: of each layer that decides, the sum of its context's inputs [B, E d] and their number [B, 1].
    """

    past: DynamicCache = field(default_factory=DynamicCache)
    contexts: list[tuple[Tensor, Tensor]] = field(default_factory=list)


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


def route_of(decision: Tensor, top_k: int, renormalise: bool) -> Route:
    """The route of a decision log pi [B, T, K]."""
    weights, chosen = decision.exp().topk(top_k, dim=-1)
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
    """

    mask: Tensor | None = None
    visible: Tensor | None = None
    held: bool = False
    below: list[Tensor] = field(default_factory=list)
    decisions: list[Tensor] = field(default_factory=list)
    route: Route = field(default_factory=lambda: Route(torch.empty(0), torch.empty(0)))
    cache: DecodingCache | None = None

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
            count = mask.sum(1, keepdim=True).to(z.dtype)
            total = context.squeeze(1) * count
        if self.cache:
            self.cache.contexts[number : number + 1] = [(total, count)]
        if self.held and self.mask is not None:
            z = torch.where(self.mask.unsqueeze(-1), z, context) if earlier is None else context.expand_as(z)
        self.decisions.append(router(z, context))


def _running_mean(z: Tensor, visible: Tensor, earlier: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over all that each token sees, of these z [B, T, d] and of earlier ones; the last token's sum and count."""
    totals, counts = visible.to(z.dtype) @ z, visible.sum(-1, keepdim=True).to(z.dtype)
    if earlier is not None:
        totals, counts = totals + earlier[0].unsqueeze(1), counts + earlier[1].unsqueeze(1)
    return totals / counts, totals[:, -1], counts[:, -1]


@dataclass(frozen=True)
class RouterWeights:
    """A layer's router as numbers: rows W [K, E d] over the E FFN inputs it looks at, biases b [K], lambda."""

    rows: np.ndarray
    biases: np.ndarray
    context: float


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
            scores = mixed @ self.rows.T + self.biases
            if self._temperature != 1:
                experts, seed = scores[..., : self._experts], scores[..., self._experts :]
                shares = torch.log_softmax(experts / self._temperature, dim=-1)
                scores = torch.cat([experts.logsumexp(dim=-1, keepdim=True) + shares, seed], dim=-1)
            return torch.log_softmax(scores, dim=-1)

    def weights(self) -> RouterWeights:
        """The router as it is now."""
        rows, biases = (tensor.detach().cpu().numpy().copy() for tensor in (self.rows, self.biases))
        return RouterWeights(rows, biases, self.context.item())

    @torch.no_grad()
    def clamp_context(self) -> None:
        """Bring lambda back into [0, 1] after a step."""
        self.context.clamp_(0, 1)


class MoELayer(nn.Module):
    """A feed-forward sublayer with K low-rank experts: MoE(z_t) = sum over the top k of pi_p(z_t) FFN_p(z_t) (Eq. 6).

    FFN_p has W_p = W + (alpha / r) B_p A_p in the place of every linear map W of the seed's FFN. The map down is linear, so the
    weighted sum over experts is taken before it and the base matrices are applied once, whatever k. A router with one row more
    than there are experts has the seed's own sublayer as its last expert.
    """

    def __init__(self, base: nn.Module, experts: Sequence[Expert], path: str, lora: config.Lora, router: config.Router) -> None:
        super().__init__()
        form = form_of(base)
        if form is None:
            raise ModelStructureError(f"{path} is no feed-forward sublayer")
        self.base, self.form = base, form
        self.scale = lora.alpha / lora.rank
        self.top_k = router.top_k
        self.renormalise = router.renormalise

        def stacked(matrix: str) -> nn.ParameterDict:
            """For each linear map, all experts' matrices [K, ...]."""
            return nn.ParameterDict(
                {
                    name: nn.Parameter(torch.stack([expert[f"{path}.{name}.{matrix}.weight"].float() for expert in experts]))
                    for name in form.linears
                }
            )

        self.a, self.b = stacked("lora_A"), stacked("lora_B")
        self.count = len(experts)
        # Set where this layer decides for itself; without one it follows the decision of the layer below.
        self.router: Router | None = None
        self.state = RoutingState()

    def forward(self, z: Tensor) -> Tensor:
        """z [B, T, d] -> [B, T, d]."""
        if self.router is not None:
            self.state.decide(self.router, torch.cat([*self.state.below, z], dim=-1))
            self.state.route = route_of(self.state.decisions[-1], self.top_k, self.renormalise)
        route = self.state.route
        if z.requires_grad or route.weights.requires_grad or self.a[self.form.down].requires_grad:
            return self._masked(z, route)
        groups = route.groups(z.shape[1])
        few = len(groups.experts) * _GROUPING <= self.count * len(groups.order)
        return self._grouped(z, groups) if few else self._masked(z, route)

    def _masked(self, z: Tensor, route: Route) -> Tensor:
        """All experts' A at once, the results of those not chosen masked, then all their B at once."""
        # Without the seed's column: it has no matrices, so where it is chosen nothing is added.
        gates = nn.functional.one_hot(route.chosen, self.count + 1)[..., : self.count, None].to(z.dtype)
        ups = {name: getattr(self.base, name)(z) for name in self.form.ups}
        low = {name: self._all_a(z, name) for name in ups}
        hidden, low_down = [], []
        for slot in range(self.top_k):
            gate, weight = gates[..., slot, :, :], route.weights[..., slot, None]
            own = [up + self._all_b(low[name] * gate, name) for name, up in ups.items()]
            hidden.append(weight * self.form.hidden(self.base, own))
            low_down.append(self._all_a(hidden[-1], self.form.down) * gate)
        down = getattr(self.base, self.form.down)
        out = nn.functional.linear(sum(hidden[1:], hidden[0]), down.weight)
        out = out + self._all_b(sum(low_down[1:], low_down[0]), self.form.down)
        return out if down.bias is None else out + route.weights.sum(dim=-1, keepdim=True) * down.bias

    def _all_a(self, x: Tensor, name: str) -> Tensor:
        """A_p x of every expert, [B, T, K, r]."""
        a = self.a[name]
        return (x @ a.flatten(0, 1).T).unflatten(-1, a.shape[:2])

    def _all_b(self, low: Tensor, name: str) -> Tensor:
        """(alpha / r) sum_p B_p low_p for low [B, T, K, r]."""
        return self.scale * (low.flatten(-2) @ self.b[name].transpose(1, 2).flatten(0, 1))

    def _grouped(self, z: Tensor, groups: Groups) -> Tensor:
        """Tokens in the order of what was chosen for them, so that those with the same experts are one slice, to which the
        experts' terms are added in place.
        """
        tokens = z.flatten(0, 1)[groups.order]
        ups = {name: getattr(self.base, name)(tokens) for name in self.form.ups}
        down = getattr(self.base, self.form.down)
        total, added = torch.zeros(()), list[tuple[slice, int, Tensor]]()
        for slot in range(self.top_k):
            own = ups if slot == self.top_k - 1 else {name: up.clone() for name, up in ups.items()}
            for name, up in own.items():
                for expert, rows in groups.slices(slot):
                    if expert < self.count:
                        self._add(up[rows], tokens[rows] @ self.a[name][expert].T, name, expert)
            hidden = self.form.hidden(self.base, list(own.values()))
            weights = groups.weights[:, slot, None]
            for expert, rows in groups.slices(slot):
                if expert < self.count:
                    low = hidden[rows] @ self.a[self.form.down][expert].T
                    added.append((rows, expert, low if self.top_k == 1 else low.mul_(weights[rows])))
            if slot:
                total.addcmul_(hidden, weights)
            else:
                # The one weight of top-1 is left for the end.
                total = hidden if self.top_k == 1 else hidden.mul_(weights)
        out = nn.functional.linear(total, down.weight)
        for rows, expert, low in added:
            self._add(out[rows], low, self.form.down, expert)
        if self.top_k == 1:
            out = (out if down.bias is None else out.add_(down.bias)).mul_(groups.weights)
        elif down.bias is not None:
            out.add_(groups.weights.sum(dim=-1, keepdim=True) * down.bias)
        return out[groups.back].view_as(z)

    def _add(self, out: Tensor, low: Tensor, name: str, expert: int) -> None:
        """Add (alpha / r) B low to out, in place."""
        torch.addmm(out, low, self.b[name][expert].T, alpha=self.scale, out=out)


class ObservedFFN(nn.Module):
    """A sublayer of the seed below those with experts, whose input a router above it looks at."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.state = RoutingState()

    def forward(self, z: Tensor) -> Tensor:
        self.state.below.append(z)
        return self.base(z)


class UnifiedModel(nn.Module):
    """One model out of K experts that share a frozen seed.

    Args:
        seed: the seed model; its weights are shared, not copied.
        experts: the K experts' LoRA matrices.
        lora: their shape.
        router: how to route.
        routers: initial router of each layer that decides, lowest first: every layer with experts, or only the lowest if
            ``router.decide`` is "once".
    """

    def __init__(
        self,
        seed: Seed,
        experts: Sequence[Expert],
        lora: config.Lora,
        router: config.Router,
        routers: Sequence[RouterWeights],
    ) -> None:
        super().__init__()
        self.backbone = share(seed.model)
        # Of text, a decision that is taken once is taken on the prompt and held.
        self._once = router.decide == "once"
        self.paths = expert_layers(seed, lora)
        for i, path in enumerate(self.paths):
            layer = MoELayer(self.backbone.get_submodule(path), experts, path, lora, router)
            if i < len(routers):
                layer.router = Router(routers[i], router)
            self.backbone.set_submodule(path, layer)
        self._observed: list[ObservedFFN] = []
        for path in evidence_paths(seed, lora, router)[0]:
            if path not in self.paths:
                observed = ObservedFFN(self.backbone.get_submodule(path))
                self.backbone.set_submodule(path, observed)
                self._observed.append(observed)
        self.to(seed.model.device)

    @property
    def layers(self) -> list[MoELayer]:
        layers = [self.backbone.get_submodule(path) for path in self.paths]
        return [layer for layer in layers if isinstance(layer, MoELayer)]

    @property
    def routers(self) -> list[Router]:
        return [layer.router for layer in self.layers if layer.router is not None]

    def forward(
        self, inputs: Inputs, mask: Tensor | None = None, cache: DecodingCache | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What :func:`metamoe.common.model.inputs.encode` gives, and log pi [B, T, K] of each layer that decides.

        Args:
            inputs: pixel values or text.
            mask: bool [B, T], true for an image's tokens that count in the context; None for all.
            cache: of a generation; for text.
        """
        inputs = inputs.to(self.backbone.device)
        if isinstance(inputs, Tensor):
            state = RoutingState(mask)
        elif self._once:
            state = RoutingState(inputs.prompt, held=True, cache=cache)
        else:
            state = RoutingState(visible=inputs.visible, cache=cache)
        for layer in self.layers:
            layer.state = state
        for observed in self._observed:
            observed.state = state
        return encode(self.backbone, inputs, cache.past if cache else None), state.decisions

    def scores(self, batch: Batch) -> Tensor:
        """Scores of every class or choice [B, C]."""
        return batch.scores(self.backbone, self(batch.inputs)[0])

    def experts(self) -> list[Expert]:
        """The experts' LoRA matrices as they are now, under their names in the adapter files."""
        return [
            {
                f"{path}.{name}.{matrix}.weight": parameters[name][k].detach().cpu().clone()
                for path, layer in zip(self.paths, self.layers, strict=True)
                for matrix, parameters in (("lora_A", layer.a), ("lora_B", layer.b))
                for name in layer.form.linears
            }
            for k in range(self.layers[0].count)
        ]
