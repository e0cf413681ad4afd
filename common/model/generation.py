"""Going on from a prompt with a unified decoder, one token at a time."""

from collections.abc import Iterator

import torch

from metamoe.common.model.inputs import Tokens, prompt_tokens
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import DecodingCache


@torch.inference_mode()
def generate(model: UnifiedModel, prompt: list[int], end: int | None, most: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Greedy decoding: the most likely next token, again and again.

    Keys and values of what is behind are kept, and of each router one vector and a count: the sum of its context. Routing that
    is decided once is decided on the prompt and holds.

    Args:
        model: made from a decoder.
        prompt: token ids, at least one.
        end: the token that ends a text; None for none.
        most: how many tokens at most.

    Yields:
        Each new token, and log pi [G, K] of the layers that decide, where it was predicted.
    """
    ids = torch.tensor([prompt])
    cache = DecodingCache()
    inputs = prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    for length in range(len(prompt) + 1, len(prompt) + 1 + most):
        encoded, decisions = model(inputs, cache=cache)
        token = int(model.backbone.lm_head(encoded[0, -1]).argmax())
        if token == end:
            return
        yield token, torch.stack([decision[0, -1] for decision in decisions])
        inputs = Tokens(
            ids=torch.tensor([[token]]),
            positions=torch.tensor([[length - 1]]),
            visible=torch.ones(1, 1, length, dtype=torch.bool),
            prompt=torch.zeros(1, 1, dtype=torch.bool),
        )
