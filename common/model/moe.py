"""The unified model: a seed whose feed-forward sublayers are Mixtures of LoRA experts under a context-aware router.

Everything happens in one forward pass: base projections are computed once for all tokens, and the chosen experts' low-rank
terms are added to them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from metamoe.common import config
from metamoe.common.errors import ModelStructureError
from metamoe.common.model.batch import Batch
from metamoe.common.model.ffn import form_of
from metamoe.common.model.gaussian_router import router_of
from metamoe.common.model.inputs import Inputs, embed, encode
from metamoe.common.model.lora import Expert, expert_layers
from metamoe.common.model.router import DecodingCache, Groups, Route, Router, RouterWeights, RoutingState, route_of
from metamoe.common.model.seed import Seed, share
from metamoe.common.model.vectors import evidence_paths

_GROUPING = 48
"""On a CPU, N tokens are grouped by what was chosen of K experts where that makes at most K N / _GROUPING groups; else all
experts' terms are computed and masked. Measured; see docs/performance.md.
"""
_MASKING = 0.25
"""On another device, what grouping has to know would have to be waited for. There, terms of all experts are masked that cost at
most this share of the sublayer's own products; not measured.
"""


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
        self.seed_expert = router.seed_expert

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
        state = self.state
        if state.seed_alone:
            out: Tensor = self.base(z)
            return out
        if self.router is not None and not state.given:
            state.decide(self.router, torch.cat([*state.below, z], dim=-1))
            state.route = route_of(state.decisions[-1], self.top_k, self.renormalise, state.slot)
        route = state.route
        if z.requires_grad or route.weights.requires_grad or self.a[self.form.down].requires_grad:
            return self._masked(z, route)
        if z.device.type != "cpu":
            if route.chosen.shape[1] == 1:
                return self._gathered(z, route)
            if self._share_of_masking() <= _MASKING:
                return self._masked(z, route)
        groups = route.groups(z.shape[1])
        few = len(groups.experts) * _GROUPING <= self.count * len(groups.order)
        return self._grouped(z, groups) if few else self._masked(z, route)

    def _share_of_masking(self) -> float:
        """What all experts' terms of a linear map cost, beside its own product: K r (d + h) / (d h)."""
        _, rank, wide = self.a[self.form.down].shape
        narrow = self.b[self.form.down].shape[1]
        return self.count * rank * (narrow + wide) / (narrow * wide)

    def _gathered(self, z: Tensor, route: Route) -> Tensor:
        """Where a sample's tokens share their experts: each sample's own matrices, gathered, and multiplied sample by sample.
        Nothing of it has to be known on the host.
        """
        chosen, weights = route.chosen[:, 0], route.weights[:, 0, :, None, None]
        # The seed has no matrices: any others, and nothing of them.
        real = (chosen < self.count)[:, :, None, None] if self.seed_expert else None
        index = chosen.clamp(max=self.count - 1).flatten() if self.seed_expert else chosen.flatten()
        ups = {name: getattr(self.base, name)(z) for name in self.form.ups}
        # As they are multiplied: what is gathered is as many copies as there are samples.
        dtype = next(iter(ups.values())).dtype
        a, b = ({n: m.to(dtype)[index].unflatten(0, chosen.shape) for n, m in part.items()} for part in (self.a, self.b))

        def low(x: Tensor, name: str, slot: int) -> Tensor:
            """A x of the expert in this slot, [B, T, r]."""
            found = x @ a[name][:, slot].mT
            return found if real is None else found * real[:, slot].to(found.dtype)

        def plus(out: Tensor, low: Tensor, name: str, slot: int) -> Tensor:
            """out + (alpha / r) B low, of the expert in this slot."""
            return torch.baddbmm(out, low, b[name][:, slot].mT, alpha=self.scale)

        total, lows, count = torch.zeros(()), [], chosen.shape[1]
        for slot in range(count):
            own = [plus(up, low(z, name, slot), name, slot) for name, up in ups.items()]
            value = self.form.hidden(self.base, own)
            if count > 1:
                value = value * weights[:, slot].to(value.dtype)
            total = total + value if slot else value
            lows.append(low(value, self.form.down, slot))
        down = getattr(self.base, self.form.down)
        out = nn.functional.linear(total, down.weight)
        for slot, own_low in enumerate(lows):
            out = plus(out, own_low, self.form.down, slot)
        if down.bias is None:
            return out if count > 1 else out * weights[:, 0].to(out.dtype)
        if count == 1:
            return (out + down.bias) * weights[:, 0].to(out.dtype)
        return out + (weights.sum(dim=1) * down.bias).to(out.dtype)

    def _masked(self, z: Tensor, route: Route) -> Tensor:
        """All experts' A at once, the results of those not chosen masked, then all their B at once."""
        # Without the seed's column: it has no matrices, so where it is chosen nothing is added.
        gates = nn.functional.one_hot(route.chosen, self.count + 1)[..., : self.count, None]
        ups = {name: getattr(self.base, name)(z) for name in self.form.ups}
        low = {name: self._all_a(z, name) for name in ups}
        hidden, low_down = [], []
        for slot in range(route.chosen.shape[-1]):
            gate, weight = gates[..., slot, :, :], route.weights[..., slot, None]
            own = [up + self._all_b(low[name] * gate.to(low[name].dtype), name) for name, up in ups.items()]
            value = self.form.hidden(self.base, own)
            hidden.append(weight.to(value.dtype) * value)
            low_down.append(self._all_a(hidden[-1], self.form.down))
            low_down[-1] = low_down[-1] * gate.to(low_down[-1].dtype)
        down = getattr(self.base, self.form.down)
        out = nn.functional.linear(sum(hidden[1:], hidden[0]), down.weight)
        out = out + self._all_b(sum(low_down[1:], low_down[0]), self.form.down)
        return out if down.bias is None else out + (route.weights.sum(dim=-1, keepdim=True) * down.bias).to(out.dtype)

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
        count = groups.weights.shape[-1]
        for slot in range(count):
            own = ups if slot == count - 1 else {name: up.clone() for name, up in ups.items()}
            for name, up in own.items():
                for expert, rows in groups.slices(slot):
                    if expert < self.count:
                        self._add(up[rows], tokens[rows] @ self.a[name][expert].T, name, expert)
            hidden = self.form.hidden(self.base, list(own.values()))
            weights = groups.weights[:, slot, None]
            for expert, rows in groups.slices(slot):
                if expert < self.count:
                    low = hidden[rows] @ self.a[self.form.down][expert].T
                    added.append((rows, expert, low if count == 1 else low.mul_(weights[rows])))
            if slot:
                total.addcmul_(hidden, weights)
            else:
                # The one weight of top-1 is left for the end.
                total = hidden if count == 1 else hidden.mul_(weights)
        out = nn.functional.linear(total, down.weight)
        for rows, expert, low in added:
            self._add(out[rows], low, self.form.down, expert)
        if count == 1:
            out = (out if down.bias is None else out.add_(down.bias)).mul_(groups.weights)
        elif down.bias is not None:
            out.add_(groups.weights.sum(dim=-1, keepdim=True) * down.bias)
        return out[groups.back].view_as(z)

    def _add(self, out: Tensor, low: Tensor, name: str, expert: int) -> None:
        """Add (alpha / r) B low to out, in place, which autocast does not see."""
        torch.addmm(out, low, self.b[name][expert].T.to(out.dtype), alpha=self.scale, out=out)


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
            ``router.decide`` is "once"; or the one that decides on the embedding.
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
        self._settings = router
        # Of text, a decision that is taken once is taken on the prompt and held.
        self._once = router.decide == "once"
        self._decider = router_of(routers[0], router) if router.decide == "embedding" else None
        self.paths = expert_layers(seed, lora)
        for i, path in enumerate(self.paths):
            layer = MoELayer(self.backbone.get_submodule(path), experts, path, lora, router)
            if i < len(routers) and self._decider is None:
                layer.router = router_of(routers[i], router)
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
        if self._decider is not None:
            return [self._decider]
        return [layer.router for layer in self.layers if layer.router is not None]

    def forward(
        self,
        inputs: Inputs,
        mask: Tensor | None = None,
        cache: DecodingCache | None = None,
        slot: int | None = None,
        decision: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What :func:`metamoe.common.model.inputs.encode` gives, and log pi [B, T, K] of each layer that decides.

        Args:
            inputs: pixel values or text.
            mask: bool [B, T], true for an image's tokens that count in the context; None for all.
            cache: of a generation; for text.
            slot: which of the chosen experts runs alone; None for all of them, mixed in the layers.
            decision: log pi [B, 1, K], if it has been decided before.
        """
        inputs = inputs.to(self.backbone.device)
        if isinstance(inputs, Tensor):
            state = RoutingState(mask)
        elif self._once:
            state = RoutingState(inputs.prompt, held=True, cache=cache)
        else:
            state = RoutingState(visible=inputs.visible, cache=cache)
        state.slot = slot
        if decision is None and self._decider is not None:
            decision = self._decided(self._decider, inputs) if cache is None or cache.decision is None else cache.decision
            if cache is not None:
                cache.decision = decision
        if decision is not None:
            state.decisions.append(decision)
            state.route = route_of(decision, self._settings.top_k, self._settings.renormalise, slot)
            state.given = True
        self._share(state)
        return encode(self.backbone, inputs, cache.past if cache else None), state.decisions

    def _share(self, state: RoutingState) -> None:
        for layer in self.layers:
            layer.state = state
        for observed in self._observed:
            observed.state = state

    def _decided(self, router: Router, inputs: Inputs) -> Tensor:
        """log pi [B, 1, K] on the seed's embedding."""
        self._share(RoutingState(seed_alone=True))
        with torch.no_grad():
            embedding = embed(self.backbone, inputs)
        decision: Tensor = router(embedding.unsqueeze(1))
        return decision

    def answers(self, inputs: Inputs, scores: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Scores of the model's answers, and log pi of each layer that decides.

        Where experts are mixed in the layers, the scores of what the one pass gives. Where their answers are mixed: the
        logarithms of sum_p pi_p softmax(s_p) over the top k experts, s_p the scores of expert p alone and pi renormalised
        (c-BTM: Gururangan et al. 2023).

        Args:
            inputs: pixel values or text.
            scores: of what :meth:`forward` gives, [B, C].
        """
        if self._settings.mixing == "layers":
            encoded, decisions = self(inputs)
            return scores(encoded), decisions
        known, logs, decisions = None, [], list[Tensor]()
        for slot in range(self._settings.top_k):
            encoded, decisions = self(inputs, slot=slot, decision=known)
            known = decisions[0]
            logs.append(scores(encoded).log_softmax(-1))
        weights = route_of(decisions[0], self._settings.top_k, True).weights.squeeze(1)
        return torch.logsumexp(torch.stack(logs, -1) + weights.log().unsqueeze(1), -1), decisions

    def scores(self, batch: Batch) -> Tensor:
        """Scores of every class or choice [B, C]."""
        return self.answers(batch.inputs, partial(batch.scores, self.backbone))[0]

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
