"""One forward pass of the unified model against the dense seed: CPU seconds, wall seconds and FLOPs, at real shapes with random
weights.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from metamoe.common import config
from metamoe.common.compute import threads
from metamoe.common.gaussian import Coordinates, Shape, regularised
from metamoe.common.model.inputs import Inputs, encode, prompt_tokens
from metamoe.common.model.lora import expert_shapes
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import Quadratic, RouterWeights
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import evidence_width
from metamoe.common.presets import validated

Row = dict[str, float | str]
_CASES = ((3, 1), (3, 2), (30, 1), (30, 2))


def forward_cost(repeats: int = 10) -> dict[str, Row]:
    """CLIP ViT-B/32 with 16 images and a LLaMA 576 wide with 8 texts of 96 tokens, rank 16, for each number of experts and each
    top k; and once with all experts computed and masked in place of grouped tokens.

    Args:
        repeats: passes of each, in turn, of which the fastest counts.
    """
    rows: dict[str, Row] = {}
    for name, seed, inputs in (_clip(), _llama()):
        # A model that is being trained never groups.
        masked = unified_model(seed, 3, 2).requires_grad_(True)
        rows |= _compared(
            f"{name}, 3 experts, top-2, all experts computed and masked",
            lambda model=masked, x=inputs: model(x)[0],
            lambda model=seed.model, x=inputs: encode(model, x),
            repeats,
        )
        for experts, top_k in _CASES:
            unified = unified_model(seed, experts, top_k)
            rows |= _compared(
                f"{name}, {experts} experts, top-{top_k}",
                lambda model=unified, x=inputs: model(x)[0],
                lambda model=seed.model, x=inputs: encode(model, x),
                repeats,
            )
    return rows


def compiled_cost(repeats: int = 5) -> dict[str, Row]:
    """The unified model of :func:`forward_cost` with 3 experts, top-1, compiled by ``torch.compile``, beside itself as it is.

    Args:
        repeats: passes of each, in turn, of which the fastest counts. Compiling is not counted.
    """
    rows: dict[str, Row] = {}
    for name, seed, inputs in (_clip(), _llama()):
        unified = unified_model(seed, 3, 1)
        compiled = torch.compile(unified)
        with torch.inference_mode():
            compiled(inputs)
        rows |= _compared(
            f"{name}, 3 experts, top-1, compiled",
            lambda model=compiled, x=inputs: model(x)[0],
            lambda model=unified, x=inputs: model(x)[0],
            repeats,
        )
    return rows


def _llama() -> tuple[str, Seed, Inputs]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 1_000}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval().requires_grad_(False)
    ids = torch.randint(3, 1_000, (8, 96))
    return "LLaMA 576", Seed("random", llama, None, None), prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def _clip() -> tuple[str, Seed, Inputs]:
    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    clip = CLIPModel(CLIPConfig(vision_config={"patch_size": 32}, text_config=text)).eval().requires_grad_(False)
    return "CLIP-B/32", Seed("random", clip, None, None), torch.randn(16, 3, 224, 224)


def unified_model(seed: Seed, experts: int, top_k: int) -> UnifiedModel:
    """A unified model with random experts from layer 1 on, which decides once for a whole sample, by random Gaussians."""
    router = {"top-k": top_k, "renormalise": top_k > 1, "seed-expert": False}
    settings = validated({"clients": experts, "experts": {"max": experts}, "router": router, "lora": {"first-layer": 1}})
    generator = torch.Generator().manual_seed(0)
    made = [
        {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in expert_shapes(seed, settings.lora).items()}
        for _ in range(experts)
    ]
    rng = np.random.default_rng(0)
    width = evidence_width(seed, settings.lora, settings.router)
    # Means so near to each other, and one shape for all, so that samples go to different experts.
    means, rank = 0.01 * rng.normal(size=(experts, width)), settings.router.shape_rank
    shapes = [Shape(rng.normal(size=(rank, width)) / rank**0.5, 1.0)] * experts
    white = Coordinates(np.zeros(width), np.eye(width))
    found = regularised(means, shapes, white, rank, settings.router.shape_pooled, settings.router.shape_identity, seed=False)
    quadratic = Quadratic(found.centre, found.projection, found.scales, found.factors)
    routers = [RouterWeights(found.means, found.biases, settings.router.context, quadratic)]
    model = UnifiedModel(seed, made, config.Lora(first_layer=1), settings.router, routers)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def _compared(name: str, ours: Callable[[], Tensor], peer: Callable[[], Tensor], repeats: int) -> dict[str, Row]:
    flops = []
    for run in (ours, peer):
        with FlopCounterMode(display=False) as counter:
            run()
        flops.append(counter.get_total_flops())
    # Of two threads, one that waits for the other burns CPU time as if it worked.
    with threads(1):
        seconds = np.array([[_seconds(run) for run in (ours, peer)] for _ in range(repeats)]).min(axis=0)
    (our_cpu, our_wall), (peer_cpu, peer_wall) = seconds
    return {
        f"{name}, CPU": {"ours": our_cpu, "peer": peer_cpu, "ratio": our_cpu / peer_cpu, "unit": "s"},
        f"{name}, wall": {"ours": our_wall, "peer": peer_wall, "ratio": our_wall / peer_wall, "unit": "s"},
        f"{name}, FLOPs": {"ours": flops[0] / 1e9, "peer": flops[1] / 1e9, "ratio": flops[0] / flops[1], "unit": "G"},
    }


def _seconds(run: Callable[[], Tensor]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall
