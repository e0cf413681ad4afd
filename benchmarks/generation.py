"""Tokens a second of a unified model that goes on from prompts, by itself and behind its server, and the time to route one, at
the shape of SmolLM2-135M with random weights.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.forward import unified_model
from metamoe.common.compute import threads
from metamoe.common.config import Lora, Router
from metamoe.common.model.artifact import FORMAT, Loaded, Manifest
from metamoe.common.model.generation import Decoding, Request
from metamoe.common.model.inputs import encode, prompt_tokens
from metamoe.common.model.seed import Seed
from metamoe.serving.app import Limits, serving_app
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
    seed = _seed()
    llama = seed.model
    model, ids = unified_model(seed, 3, 2), torch.randint(3, 49_152, (32, _PROMPT))
    rows: dict[str, Row] = {}
    alone = 0.0
    for count in (1, 8, 32):
        ours, peer = _fastest(lambda n=count: _decoded(model, ids[:n]), lambda n=count: _generated(llama, ids[:n]), repeats)
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


def serving_cost(repeats: int = 2) -> dict[str, Row]:
    """The same model behind its server, asked by 1, 8 and 32 clients at once through the whole of the API, beside ``generate``
    for the seed. CPU time, of the clients too; one thread computes.

    Args:
        repeats: of each, in turn, of which the fastest counts.
    """
    seed = _seed()
    ids = torch.randint(3, 49_152, (32, _PROMPT))
    model = unified_model(seed, 3, 2)
    app = serving_app(Loaded(model, seed, _manifest()), "random", Limits())
    rows: dict[str, Row] = {}
    alone = 0.0
    with TestClient(app, base_url="http://localhost") as client, ThreadPoolExecutor(32) as pool:

        def asked(number: int) -> None:
            # A token a byte.
            prompt = f"{number:02}".ljust(_PROMPT, "x")
            body = {"model": "random", "prompt": prompt, "max_tokens": _NEW, "temperature": 0}
            usage = client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (_PROMPT, _NEW)

        for count in (1, 8, 32):
            ours, peer = _fastest(
                lambda n=count: list(pool.map(asked, range(n))),
                lambda n=count: _generated(seed.model, ids[:n]),
                repeats,
            )
            rate = count * _NEW / ours
            rows[f"served, {count} requests at once, against the seed's generate"] = _row(rate, count * _NEW / peer, "tokens/s")
            alone = alone or rate
            if count > 1:
                rows[f"served, {count} requests at once, against one"] = _row(rate, alone, "tokens/s")
    return rows


def _manifest() -> Manifest:
    return Manifest(
        format=FORMAT,
        seed_model="random",
        seed_fingerprint="0" * 64,
        experts=["one", "two", "three"],
        lora=Lora(first_layer=1),
        router=Router(top_k=2, seed_expert=False),
        prompt="{}",
        list_choices="always",
        prompt_tokens=_PROMPT,
        answer_tokens=_NEW,
        classes=[],
        files={},
    )


def _seed() -> Seed:
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "eos_token_id": None}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval().requires_grad_(False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every token is a text.
    words = [*letters, *(f"{letters[0]}{i}" for i in range(49_152 - len(letters)))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Seed("random", llama, PreTrainedTokenizerFast(tokenizer_object=tokenizer), None)


def _generated(llama: Any, ids: torch.Tensor) -> None:
    llama.generate(ids, attention_mask=torch.ones(ids.shape), max_new_tokens=_NEW, do_sample=False, pad_token_id=0)


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
