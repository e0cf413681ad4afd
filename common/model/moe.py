"""The unified model: a seed whose feed-forward sublayers are Mixtures of LoRA experts under a context-aware router.

Everything happens in one forward pass: base projections are computed once for all tokens, and the chosen experts' low-rank
terms are added to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP

from common import config
from common.data.tasks import class_logits
from common.model.lora import Expert, expert_layers
from common.model.routing import evidence_paths, masked_mean
from common.model.seed import Seed, share


@dataclass
class RoutingState:
    """What the layers of one forward pass share: the mask, the FFN inputs of the layers below those with experts, as far as a
    router looks at them, and every decision taken so far.
    """

    mask: Tensor | None = None
    below: list[Tensor] = field(default_factory=list)
    decisions: list[Tensor] = field(default_factory=list)


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
    layer's input (the paper) or that of every layer up to it, side by side.
    """

    def __init__(self, weights: RouterWeights, learn_biases: bool, learn_context: bool) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(weights.rows, dtype=torch.float32))
        self.biases = nn.Parameter(torch.tensor(weights.biases, dtype=torch.float32), requires_grad=learn_biases)
        self.context = nn.Parameter(torch.tensor(weights.context, dtype=torch.float32), requires_grad=learn_context)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """log pi for z [B, T, d] and a mask of real tokens [B, T]. [B, T, K]."""
        sequence = masked_mean(z, mask).unsqueeze(1)
        mixed = (1 - self.context) * z + self.context * sequence
        return torch.log_softmax(mixed @ self.rows.T + self.biases, dim=-1)

    def weights(self) -> RouterWeights:
        """The router as it is now."""
        rows, biases = (tensor.detach().numpy().copy() for tensor in (self.rows, self.biases))
        return RouterWeights(rows, biases, self.context.item())

    @torch.no_grad()
    def clamp_context(self) -> None:
        """Bring lambda back into [0, 1] after a step."""
        self.context.clamp_(0, 1)


class MoELayer(nn.Module):
    """A feed-forward sublayer with K low-rank experts: MoE(z_t) = sum over the top k of pi_p(z_t) FFN_p(z_t) (Eq. 6).

    FFN_p(z) = W2_p act(W1_p z + b1) + b2, with W_p = W + (alpha / r) B_p A_p. The second projection is linear, so the weighted
    sum over experts is taken before it and the base matrices are applied once, whatever k. A router with one row more than
    there are experts has the seed's own sublayer as its last expert.
    """

    def __init__(self, base: CLIPMLP, experts: Sequence[Expert], path: str, lora: config.Lora, router: config.Router) -> None:
        super().__init__()
        self.base = base
        self.scale = lora.alpha / lora.rank
        self.top_k = router.top_k
        self.renormalise = router.renormalise

        def stacked(name: str) -> nn.Parameter:
            return nn.Parameter(torch.stack([expert[f"{path}.{name}.weight"].float() for expert in experts]))

        self.a1, self.b1 = stacked("fc1.lora_A"), stacked("fc1.lora_B")
        self.a2, self.b2 = stacked("fc2.lora_A"), stacked("fc2.lora_B")
        # Set where this layer decides for itself; without one it follows the decision of the layer below.
        self.router: Router | None = None
        self.state = RoutingState()

    def forward(self, z: Tensor) -> Tensor:
        """z [B, T, d] -> [B, T, d]."""
        if self.router is not None:
            evidence = torch.cat([*self.state.below, z], dim=-1)
            self.state.decisions.append(self.router(evidence, self.state.mask))
        probabilities = self.state.decisions[-1].exp()
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        # Without the seed's column: it has no matrices, so where it is chosen nothing is added.
        gates = nn.functional.one_hot(chosen, probabilities.shape[-1])[..., : len(self.a1)].to(z.dtype)

        up = self.base.fc1(z)
        hidden, delta = torch.zeros_like(up), torch.zeros_like(z)
        for slot in range(self.top_k):
            gate, weight = gates[..., slot, :], weights[..., slot, None]
            one = weight * self.base.activation_fn(up + self._low_rank(z, self.a1, self.b1, gate))
            hidden = hidden + one
            delta = delta + self._low_rank(one, self.a2, self.b2, gate)
        down = nn.functional.linear(hidden, self.base.fc2.weight) + delta
        return down + weights.sum(dim=-1, keepdim=True) * self.base.fc2.bias

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        """(alpha / r) sum_p gate_p B_p A_p x for x [B, T, in]: all A at once, the others masked, then all B at once."""
        low = (x @ a.flatten(0, 1).T).unflatten(-1, a.shape[:2]) * gate.unsqueeze(-1)
        return self.scale * (low.flatten(-2) @ b.transpose(1, 2).flatten(0, 1))


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
        self.clip = share(seed.model)
        self.state = RoutingState()
        self.paths = expert_layers(seed, lora)
        for i, path in enumerate(self.paths):
            layer = MoELayer(cast(CLIPMLP, self.clip.get_submodule(path)), experts, path, lora, router)
            if i < len(routers):
                layer.router = Router(routers[i], router.rows != "dot", router.learn_context)
            self.clip.set_submodule(path, layer)
        self._observed: list[ObservedFFN] = []
        for path in evidence_paths(seed, lora, router)[0]:
            if path not in self.paths:
                observed = ObservedFFN(self.clip.get_submodule(path))
                self.clip.set_submodule(path, observed)
                self._observed.append(observed)

    @property
    def layers(self) -> list[MoELayer]:
        layers = [self.clip.get_submodule(path) for path in self.paths]
        return [layer for layer in layers if isinstance(layer, MoELayer)]

    @property
    def routers(self) -> list[Router]:
        return [layer.router for layer in self.layers if layer.router is not None]

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Pooled features [B, d], and log pi [B, T, K] of each layer that decides.

        Args:
            pixel_values: float32 [B, 3, H, W].
            mask: bool [B, T], true for tokens that count in the context; None for all.
        """
        state = RoutingState(mask)
        for layer in self.layers:
            layer.state = state
        for observed in self._observed:
            observed.state = state
        pooled = self.clip.vision_model(pixel_values=pixel_values).pooler_output
        return pooled, state.decisions

    def logits(self, pixel_values: Tensor, texts: Tensor) -> Tensor:
        """Class scores [B, C] of images against unit text features [C, p]."""
        pooled, _ = self(pixel_values)
        return class_logits(self.clip, pooled, texts)

    def experts(self) -> list[Expert]:
        """The experts' LoRA matrices as they are now, under their names in the adapter files."""
        parts = {"fc1.lora_A": "a1", "fc1.lora_B": "b1", "fc2.lora_A": "a2", "fc2.lora_B": "b2"}
        count = len(self.layers[0].a1)
        return [
            {
                f"{path}.{name}.weight": getattr(layer, attribute)[k].detach().clone()
                for path, layer in zip(self.paths, self.layers, strict=True)
                for name, attribute in parts.items()
            }
            for k in range(count)
        ]
