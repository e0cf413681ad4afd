"""Tokens a second of a unified model that goes on from prompts, and the time to route one, at the shape of SmolLM2-135M with
random weights.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.forward import unified_model
from metamoe.common.compute import threads
from metamoe.common.model.generation import Decoding, Request
from metamoe.common.model.inputs import encode, prompt_tokens
from metamoe.common.model.seed import Seed
from metamoe.serving.route import PromptRouter

Row = dict[str, float | str]
_PROMPT, _NEW = 64, 16


def generation_cost(repeats: int = 3) -> dict[str, Row]:
    """A unified model of 3 experts, top-2, beside transformers' own ``generate`` for its seed, with 1, 8 and 32 prompts of 64
    tokens at once and 16 new tokens each; and routing a prompt by itself beside the seed's pass over it. CPU time of one
    thread.

    Args:
        repeats: of each, in turn, of which the fastest counts.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "eos_token_id": None}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval().requires_grad_(False)
    seed = Seed("random", llama, None, None)
    model, ids = unified_model(seed, 3, 2), torch.randint(3, 49_152, (32, _PROMPT))
    rows: dict[str, Row] = {}
    alone = 0.0
    for count in (1, 8, 32):
        ours, peer = _fastest(
            lambda n=count: _decoded(model, ids[:n]),
            lambda n=count: llama.generate(
                ids[:n], attention_mask=torch.ones(n, _PROMPT), max_new_tokens=_NEW, do_sample=False, pad_token_id=0
            ),
            repeats,
        )
        rate = count * _NEW / ours
        rows[f"generation, {count} at once, against the seed's generate"] = _row(rate, count * _NEW / peer, "tokens/s")
        alone = alone or rate
        if count > 1:
            rows[f"generation, {count} at once, against one"] = _row(rate, alone, "tokens/s")
    inputs = prompt_tokens(ids[:1], torch.ones(1, _PROMPT, dtype=torch.bool))
    router = PromptRouter(seed, unified_model(seed, 3, 2), ["one", "two", "three"])
    ours, peer = _fastest(lambda: router.expert(ids[0].tolist()), lambda: encode(llama, inputs), 10 * repeats)
    rows["routing a prompt, against the seed's pass over it"] = _row(1_000 * ours, 1_000 * peer, "ms")
    return rows


def _row(ours: float, peer: float, unit: str) -> Row:
    return {"ours": ours, "peer": peer, "ratio": ours / peer, "unit": unit}


def _decoded(model: Any, ids: torch.Tensor) -> None:
    decoding = Decoding(model, frozenset())
    decoding.add({i: Request(row, _NEW) for i, row in enumerate(ids.tolist())})
    while len(decoding):
        decoding.step()


@torch.inference_mode()
def _fastest(ours: Callable[[], object], peer: Callable[[], object], repeats: int) -> tuple[float, float]:
    best = [float("inf")] * 2
    with threads(1):
        for _ in range(repeats):
            for number, run in enumerate((ours, peer)):
                begun = time.process_time()
                run()
                best[number] = min(best[number], time.process_time() - begun)
    return best[0], best[1]
