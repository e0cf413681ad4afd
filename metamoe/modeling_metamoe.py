"""A unified model of MetaMoE-FL for transformers, in one file that needs nothing else of it.

``metamoe export --to transformers`` writes it beside the weights; ``from_pretrained(folder, trust_remote_code=True)`` runs it.

A frozen seed whose feed-forward sublayers have K low-rank experts under a context-aware router (MetaMoE: Jiang, Chen, Pan, ICML
2026, arXiv 2605.14289). On a CPU in float32 it computes, operation by operation, what the product does.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPOutput

_GROUPING = 48


class MetaMoEConfig(PreTrainedConfig):
    """``seed``: the seed's config as a dict; ``experts``: their names; ``lora`` and ``router``: settings; ``form``, ``paths``,
    ``observed``: names of a sublayer's parts, the sublayers that have experts, and those below at which the router looks;
    ``shapes``: of the routers' arrays, one dict for each that decides.
    """

    model_type = "metamoe"

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("seed", "lora", "router", "form"):
            setattr(self, name, kwargs.pop(name, {}))
        for name in ("experts", "paths", "observed", "shapes"):
            setattr(self, name, kwargs.pop(name, []))
        super().__post_init__(**kwargs)

    def seed_config(self) -> Any:
        """The seed's config."""
        return AutoConfig.for_model(**self.seed)

    def get_text_config(self, *_: Any, **__: Any) -> Any:
        """What a cache for generation goes by. It keeps all tokens: a sliding window is in the masks."""
        if not self.seed:
            return self
        config = self.seed_config()
        for name in ("sliding_window", "layer_types"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)
        return config


class Pass:
    """What the layers of one forward pass share: a token's place in ``mask`` [B, T] (None: all count), what it sees in
    ``visible`` [B, T, S] where every layer decides, FFN inputs of the layers ``below``, log pi of each decision, and of a
    generation the ``contexts`` so far: sums [B, D] and numbers [B, 1].
    """

    def __init__(self, mask: Tensor | None = None, visible: Tensor | None = None, contexts: list[Any] | None = None) -> None:
        self.mask, self.visible, self.contexts = mask, visible, contexts
        self.below: list[Tensor] = []
        self.decisions: list[Tensor] = []
        self.chosen = self.weights = torch.empty(0)
        self.groups: Any = None
        self.seed_alone = self.given = False
        self.slot: int | None = None

    def decide(self, router: "Router", z: Tensor, config: Any) -> None:
        """The next decision, on inputs z [B, T, D]."""
        number, contexts = len(self.decisions), self.contexts
        earlier = contexts[number] if contexts and number < len(contexts) else None
        if self.visible is not None:
            seen = self.visible[:, :, -z.shape[1] :]
            totals, counts = seen.float() @ z.float(), seen.sum(-1, keepdim=True).float()
            if earlier is not None:
                totals, counts = totals + earlier[0].unsqueeze(1), counts + earlier[1].unsqueeze(1)
            context, total, count = totals / counts, totals[:, -1], counts[:, -1]
        elif earlier is not None:
            total, count = earlier
            context = (total / count).unsqueeze(1)
        else:
            mask = torch.ones(z.shape[:2], device=z.device) if self.mask is None else self.mask
            context = masked_mean(z, self.mask).unsqueeze(1)
            count = mask.sum(1, keepdim=True).to(context.dtype)
            total = context.squeeze(1) * count
        if contexts is not None:
            contexts[number : number + 1] = [(total, count)]
        if self.mask is not None:
            z = torch.where(self.mask.unsqueeze(-1), z, context) if earlier is None else context.expand_as(z)
        self.decided(router(z, context), config)

    def decided(self, decision: Tensor, config: Any) -> None:
        """A decision log pi [B, T, K], and the experts that follow from it; with ``slot`` one of them alone."""
        self.decisions.append(decision)
        weights, chosen = decision.exp().topk(config["top_k"], dim=-1)
        if self.slot is not None:
            weights, chosen = torch.ones_like(weights[..., :1]), chosen[..., self.slot : self.slot + 1]
        elif config["renormalise"]:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        self.chosen, self.weights, self.groups = chosen, weights, None

    def grouped(self, length: int) -> Any:
        """Tokens in the order of what was chosen for them, back again, weights, each group's experts, and where it begins."""
        if self.groups is None:
            shape = (self.chosen.shape[0], length, self.chosen.shape[2])
            chosen, weights = (tensor.expand(shape).flatten(0, 1) for tensor in (self.chosen, self.weights))
            experts, group, sizes = torch.unique(chosen, dim=0, return_inverse=True, return_counts=True)
            order = group.argsort(stable=True)
            self.groups = order, order.argsort(), weights[order], experts.tolist(), [0, *sizes.cumsum(0).tolist()]
        return self.groups


class Router(nn.Module):
    """log pi = log softmax of z~ W^T + b, or of Gaussian log-likelihoods, with z~ = (1 - lambda) z + lambda context."""

    rows: Tensor
    biases: Tensor
    context: Tensor
    centre: Tensor
    projection: Tensor
    scales: Tensor
    factors: Tensor

    def __init__(self, shapes: dict[str, list[int]], config: Any, experts: int) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        self.gaussian, self.temperature, self.experts = "factors" in shapes, config["temperature"], experts
        self.context_alone = config["context_alone"]

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """log pi [B, T, K] of z [B, T, D] in their context [B, 1 or T, D]."""
        with torch.autocast(z.device.type, enabled=False):
            z, context = z.float(), context.float()
            mixed = context if self.context_alone else (1 - self.context) * z + self.context * context
            if self.gaussian:
                own = ((mixed - self.centre) @ self.projection.T).unsqueeze(-2) - self.rows
                near = torch.einsum("...kd,krd->...kr", own, self.factors)
                scores = 0.5 * (near.square().sum(-1) - (own * self.scales).square().sum(-1)) + self.biases
            else:
                scores = mixed @ self.rows.T + self.biases
            if self.temperature != 1:
                experts, seed = scores[..., : self.experts], scores[..., self.experts :]
                shares = torch.log_softmax(experts / self.temperature, dim=-1)
                scores = torch.cat([experts.logsumexp(dim=-1, keepdim=True) + shares, seed], dim=-1)
            return torch.log_softmax(scores, dim=-1)


class Observed(nn.Module):
    """A sublayer below those with experts, at whose input a router looks."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.shared = base, Pass()

    def forward(self, z: Tensor) -> Tensor:
        self.shared.below.append(z)
        return self.base(z)


class MoELayer(nn.Module):
    """sum over the chosen p of pi_p FFN_p(z), FFN_p with W + (alpha / r) B_p A_p for every linear map W."""

    def __init__(self, base: nn.Module, config: MetaMoEConfig, router: Router | None) -> None:
        super().__init__()
        self.base, self.config, self.count = base, config.router, len(config.experts)
        self.ups, self.down, self.activation = config.form["ups"], config.form["down"], config.form["activation"]
        rank = config.lora["rank"]
        self.scale = config.lora["alpha"] / rank
        maps = {name: getattr(base, name) for name in [*self.ups, self.down]}
        self.a, self.b = (
            nn.ParameterDict({n: nn.Parameter(torch.zeros(shape(m)), requires_grad=False) for n, m in maps.items()})
            for shape in (lambda m: (self.count, rank, m.in_features), lambda m: (self.count, m.out_features, rank))
        )
        if router is not None:
            self.router = router
        self.decides, self.shared = router is not None, Pass()

    def forward(self, z: Tensor) -> Tensor:
        """z [B, T, d] -> [B, T, d]."""
        shared = self.shared
        if shared.seed_alone:
            return self.base(z)
        if self.decides and not shared.given:
            shared.decide(self.router, torch.cat([*shared.below, z], dim=-1), self.config)
        if z.device.type == "cpu" and not z.requires_grad and z.dtype == torch.float32:
            order, back, weights, experts, starts = shared.grouped(z.shape[1])
            if len(experts) * _GROUPING <= self.count * len(order):
                return self._grouped(z, order, back, weights, experts, list(pairwise(starts)))
        return self._masked(z)

    def _hidden(self, ups: list[Tensor]) -> Tensor:
        value = getattr(self.base, self.activation)(ups[0])
        for other in ups[1:]:
            value = value * other
        return value

    def _masked(self, z: Tensor) -> Tensor:
        """All experts' A at once, what was not chosen masked, then all their B at once."""
        gates = nn.functional.one_hot(self.shared.chosen, self.count + 1)[..., : self.count, None]
        ups = {name: getattr(self.base, name)(z) for name in self.ups}
        low = {name: self._all_a(z, name) for name in ups}
        hidden, low_down = [], []
        for slot in range(self.shared.chosen.shape[-1]):
            gate, weight = gates[..., slot, :, :], self.shared.weights[..., slot, None]
            value = self._hidden([up + self._all_b(low[name] * gate.to(low[name].dtype), name) for name, up in ups.items()])
            hidden.append(weight.to(value.dtype) * value)
            low_down.append(self._all_a(hidden[-1], self.down))
            low_down[-1] = low_down[-1] * gate.to(low_down[-1].dtype)
        down = getattr(self.base, self.down)
        out = nn.functional.linear(sum(hidden[1:], hidden[0]), down.weight)
        out = out + self._all_b(sum(low_down[1:], low_down[0]), self.down)
        return out if down.bias is None else out + (self.shared.weights.sum(dim=-1, keepdim=True) * down.bias).to(out.dtype)

    def _all_a(self, x: Tensor, name: str) -> Tensor:
        return (x @ self.a[name].flatten(0, 1).T).unflatten(-1, self.a[name].shape[:2])

    def _all_b(self, low: Tensor, name: str) -> Tensor:
        return self.scale * (low.flatten(-2) @ self.b[name].transpose(1, 2).flatten(0, 1))

    def _grouped(self, z: Tensor, order: Tensor, back: Tensor, weights: Tensor, experts: Any, spans: Any) -> Tensor:
        """Tokens of the same experts as one slice, to which the experts' terms are added in place."""
        groups = [(own, slice(*span)) for own, span in zip(experts, spans, strict=True)]
        tokens, count = z.flatten(0, 1)[order], weights.shape[-1]
        ups = {name: getattr(self.base, name)(tokens) for name in self.ups}
        down, total, added = getattr(self.base, self.down), torch.zeros(()), []
        for slot in range(count):
            own = ups if slot == count - 1 else {name: up.clone() for name, up in ups.items()}
            for name, up in own.items():
                for expert, rows in ((chosen[slot], rows) for chosen, rows in groups if chosen[slot] < self.count):
                    self._add(up[rows], tokens[rows] @ self.a[name][expert].T, name, expert)
            hidden, weight = self._hidden(list(own.values())), weights[:, slot, None]
            for expert, rows in ((chosen[slot], rows) for chosen, rows in groups if chosen[slot] < self.count):
                low = hidden[rows] @ self.a[self.down][expert].T
                added.append((rows, expert, low if count == 1 else low.mul_(weight[rows])))
            if slot:
                total.addcmul_(hidden, weight)
            else:
                total = hidden if count == 1 else hidden.mul_(weight)
        out = nn.functional.linear(total, down.weight)
        for rows, expert, low in added:
            self._add(out[rows], low, self.down, expert)
        if count == 1:
            out = (out if down.bias is None else out.add_(down.bias)).mul_(weights)
        elif down.bias is not None:
            out.add_(weights.sum(dim=-1, keepdim=True) * down.bias)
        return out[back].view_as(z)

    def _add(self, out: Tensor, low: Tensor, name: str, expert: int) -> None:
        torch.addmm(out, low, self.b[name][expert].T, alpha=self.scale, out=out)


class MetaMoEModel(PreTrainedModel):
    """What models of text and of images have in common."""

    config_class = MetaMoEConfig
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MetaMoEConfig) -> None:
        super().__init__(config)
        kind = AutoModel if config.seed["model_type"] == "clip" else AutoModelForCausalLM
        self.seed = kind.from_config(config.seed_config())
        routers = [Router(shapes, config.router, len(config.experts)) for shapes in config.shapes]
        on_embedding = config.router["decide"] == "embedding"
        if on_embedding:
            self.router = routers.pop()
        # A list that torch does not look into: the seed has them already.
        self.sublayers: list[Any] = []
        for i, path in enumerate(config.paths):
            layer = MoELayer(self.seed.get_submodule(path), config, routers[i] if i < len(routers) else None)
            self.sublayers.append(layer)
            self.seed.set_submodule(path, layer)
        for path in config.observed:
            self.sublayers.append(Observed(self.seed.get_submodule(path)))
            self.seed.set_submodule(path, self.sublayers[-1])
        self.on_embedding = on_embedding
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Everything is loaded."""

    def share(self, shared: Pass) -> Pass:
        """Have all layers of the next pass share this."""
        for layer in self.sublayers:
            layer.shared = shared
        return shared


class MetaMoEForCausalLM(MetaMoEModel, GenerationMixin):
    """A model of text. What is given in the first call is the prompt, on which routing that is decided once is decided."""

    def get_input_embeddings(self) -> nn.Module:
        return self.seed.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.seed.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of tokens [B, T] after those in the cache, with padding (on either side) zero in the mask [B, S]."""
        past = DynamicCache() if use_cache and past_key_values is None else past_key_values
        behind = 0 if past is None else past.get_seq_length()
        length = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(len(input_ids), behind + length, device=input_ids.device)
        real = attention_mask.bool()
        seen = torch.ones(behind + length, behind + length, dtype=torch.bool, device=real.device).tril()[behind:]
        itself = torch.eye(behind + length, dtype=torch.bool, device=real.device)[behind:]
        visible, own = (seen & real[:, None]) | itself, real[:, behind:]
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, behind:]
        contexts = None if past is None else past.__dict__.setdefault("metamoe_contexts", [])
        if self.config.router["decide"] == "per-layer":
            shared = Pass(visible=visible, contexts=contexts)
        else:
            shared = Pass(own, contexts=contexts)
        if self.on_embedding:
            self._decide_on_embedding(shared, past, (input_ids, visible, positions, own))
        self.share(shared)
        hidden = self._encode(input_ids, visible, positions, past)
        logits = self.seed.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.seed_config().vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)

    def _decide_on_embedding(self, shared: Pass, past: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        decision = None if past is None else getattr(past, "metamoe_decision", None)
        if decision is None:
            ids, visible, positions, own = inputs
            self.share(Pass()).seed_alone = True
            embedding = masked_mean(self._encode(ids, visible, positions, None), own).unsqueeze(1)
            decision = self.router(embedding, embedding.mean(dim=1, keepdim=True))
            if past is not None:
                past.metamoe_decision = decision
        shared.decided(decision, self.config.router)
        shared.given = True

    def _encode(self, ids: Tensor, visible: Tensor, positions: Tensor, past: Any) -> Tensor:
        config = self.seed.config
        window = getattr(config, "sliding_window", None)
        masks: Any = self._added(visible)
        if window is not None and visible.shape[-1] > window:
            masks = self._added(visible & (visible.flip(-1).cumsum(-1).flip(-1) <= window))
            if getattr(config, "layer_types", None) is not None:
                masks = {"full_attention": self._added(visible), "sliding_attention": masks}
        found = self.seed.model(
            input_ids=ids, attention_mask=masks, position_ids=positions, past_key_values=past, use_cache=past is not None
        )
        return found.last_hidden_state

    def _added(self, seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=self.seed.dtype, device=seen.device)
        return zeros.masked_fill(~seen, torch.finfo(zeros.dtype).min).unsqueeze(1)

    def _reorder_cache(self, past: Any, beams: Tensor) -> Any:
        """Of a beam search, the beams that go on."""
        past.reorder_cache(beams)
        past.metamoe_contexts = [(total[beams], count[beams]) for total, count in past.metamoe_contexts]
        if hasattr(past, "metamoe_decision"):
            past.metamoe_decision = past.metamoe_decision[beams]
        return past


class MetaMoEForImages(MetaMoEModel):
    """A model of images, which names them by texts: CLIP whose vision tower has experts."""

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """Image features [B, p] of pixels [B, 3, H, W]. Of ``router.mixing = answers`` there are none: see :meth:`forward`."""
        if self.config.router["mixing"] == "answers":
            raise ValueError("this model mixes its experts' answers, and has no image features; give it texts too")
        return self.seed.visual_projection(self._pooled(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """Text features [C, p]."""
        return self.seed.get_text_features(input_ids, attention_mask=attention_mask).pooler_output

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CLIPOutput:
        """Scores of texts [C, L] for images [B, 3, H, W]: ``logits_per_image`` [B, C]."""
        texts = nn.functional.normalize(self.get_text_features(input_ids, attention_mask).float(), dim=1)
        config = self.config.router
        if config["mixing"] == "layers":
            scores = self._scores(self._pooled(pixel_values), texts)
        else:
            first = self._pooled(pixel_values, slot=0)
            decision = self.sublayers[0].shared.decisions[0]
            pooled = [first, *(self._pooled(pixel_values, slot, decision) for slot in range(1, config["top_k"]))]
            logs = torch.stack([self._scores(one, texts).log_softmax(-1) for one in pooled], -1)
            weights = decision.exp().topk(config["top_k"], dim=-1).values
            weights = (weights / weights.sum(dim=-1, keepdim=True)).squeeze(1)
            scores = torch.logsumexp(logs + weights.log().unsqueeze(1), -1)
        return CLIPOutput(logits_per_image=scores, logits_per_text=scores.T)

    def _scores(self, pooled: Tensor, texts: Tensor) -> Tensor:
        images = nn.functional.normalize(self.seed.visual_projection(pooled).float(), dim=1)
        return self.seed.logit_scale.exp() * images @ texts.T

    def _pooled(self, pixels: Tensor, slot: int | None = None, decision: Tensor | None = None) -> Tensor:
        """What the vision tower makes of images [B, d], all chosen experts mixed or one of them alone."""
        if self.on_embedding and decision is None:
            self.share(Pass()).seed_alone = True
            embedding = self.seed.vision_model(pixel_values=pixels).pooler_output.float().unsqueeze(1)
            decision = self.router(embedding, embedding.mean(dim=1, keepdim=True))
        shared = self.share(Pass())
        shared.slot = slot
        if decision is not None:
            shared.decided(decision, self.config.router)
            shared.given = True
        return self.seed.vision_model(pixel_values=pixels).pooler_output


def masked_mean(z: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens [B, T, d] that are in the mask [B, T], in float32. [B, d]."""
    if mask is None:
        return z.mean(dim=1, dtype=torch.float32)
    weights = mask.to(z).unsqueeze(-1)
    return (z * weights).sum(dim=1, dtype=torch.float32) / weights.sum(dim=1, dtype=torch.float32).clamp(min=1)
