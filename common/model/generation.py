"""Going on from prompts with a unified decoder, one token at a time, many prompts at once.

Keys and values of what is behind are kept, and of each router one vector and a count: the sum of its context. Routing that is
decided once is decided on the prompt and holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from metamoe.common.model.inputs import Tokens, prompt_tokens
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import DecodingCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: at temperature 0 the most likely; else drawn out of the likeliest that have ``top_p``
    together. The draws follow from ``seed`` alone, whatever is computed beside them; None is another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, at least one; how many new tokens at most; and how they are chosen."""

    prompt: Sequence[int]
    most: int
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Step:
    """What a request got.

    Attributes:
        token: the new token; None where the text ends.
        routing: log pi [G, K] of the layers that decide, where it was predicted.
        reason: why it is the last, "stop" where the text ends and "length" at its largest number of tokens; None if it is not.
    """

    token: int | None
    routing: Tensor
    reason: Literal["stop", "length"] | None


class _Row:
    """A request on its way."""

    def __init__(self, key: int, request: Request, device: torch.device) -> None:
        self.key, self.made, self.last = key, 0, 0
        self.most, self.length = request.most, len(request.prompt)
        chosen = request.sampling
        self.warp: LogitsProcessorList | None = None
        if chosen.temperature > 0:
            self.warp = LogitsProcessorList([TemperatureLogitsWarper(chosen.temperature), TopPLogitsWarper(chosen.top_p)])
            self.draws = torch.Generator(device)
            if chosen.seed is None:
                self.draws.seed()
            else:
                self.draws.manual_seed(chosen.seed)

    def next(self, logits: Tensor, likeliest: int) -> int:
        """The next token, out of logits [V]."""
        if self.warp is None:
            return likeliest
        warped = self.warp(torch.empty(1, 0, dtype=torch.long), logits.float()[None])  # type: ignore[arg-type]
        return int(torch.multinomial(warped.softmax(-1)[0], 1, generator=self.draws))


class Decoding:
    """Requests that are computed together; they may join and leave between steps.

    Args:
        model: made from a decoder.
        ends: tokens that end a text.
    """

    def __init__(self, model: UnifiedModel, ends: frozenset[int]) -> None:
        self._model, self._ends = model, ends
        self._device = model.backbone.device
        self._rows: list[_Row] = []
        self._cache = DecodingCache()
        # Of what is kept, the tokens that are no padding: [B, S].
        self._real = torch.empty(0, 0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def add(self, requests: Mapping[int, Request]) -> dict[int, Step]:
        """Compute prompts, and have them join; each one's first step."""
        rows = [_Row(key, request, self._device) for key, request in requests.items()]
        width = max(row.length for row in rows)
        ids = torch.tensor([[0] * (width - len(request.prompt)) + list(request.prompt) for request in requests.values()])
        real = torch.tensor([[False] * (width - row.length) + [True] * row.length for row in rows])
        cache = DecodingCache()
        encoded, decisions = self._model(prompt_tokens(ids, real), cache=cache)
        self._cache = _joined(self._cache, cache) if self._rows else cache
        longest = max(self._real.shape[1], width)
        self._real = torch.cat([F.pad(part, (longest - part.shape[1], 0)) for part in (self._real, real) if len(part)])
        self._rows += rows
        return self._chosen(rows, encoded, decisions)

    @torch.inference_mode()
    def step(self) -> dict[int, Step]:
        """One more token for every request."""
        self._real = F.pad(self._real, (0, 1), value=True)
        inputs = Tokens(
            ids=torch.tensor([[row.last] for row in self._rows]),
            positions=torch.tensor([[row.length + row.made - 1] for row in self._rows]),
            visible=self._real[:, None],
            prompt=torch.zeros(len(self._rows), 1, dtype=torch.bool),
        )
        encoded, decisions = self._model(inputs, cache=self._cache)
        return self._chosen(list(self._rows), encoded, decisions)

    def drop(self, keys: set[int]) -> None:
        """Have requests leave; those whose last step was given have left already."""
        kept = [i for i, row in enumerate(self._rows) if row.key not in keys]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        if not kept:
            self._cache, self._real = DecodingCache(), torch.empty(0, 0, dtype=torch.bool)
            return
        real, rows = self._real[kept], torch.tensor(kept, device=self._device)
        # What is padding for all that are left is let go.
        padding = int(real.any(0).int().argmax())
        self._real = real[:, padding:]
        self._cache.past.batch_select_indices(rows)
        for layer in _layers(self._cache):
            layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]
        self._cache.contexts = [(total[rows], count[rows]) for total, count in self._cache.contexts]
        if self._cache.decision is not None:
            self._cache.decision = self._cache.decision[rows]

    def _chosen(self, rows: list[_Row], encoded: Tensor, decisions: list[Tensor]) -> dict[int, Step]:
        logits = self._model.backbone.lm_head(encoded[:, -1])
        routing = torch.stack([decision[:, -1] for decision in decisions], dim=1)
        steps: dict[int, Step] = {}
        for number, (row, likeliest) in enumerate(zip(rows, logits.argmax(1).tolist(), strict=True)):
            token = row.next(logits[number], likeliest)
            row.made, row.last = row.made + 1, token
            if token in self._ends:
                steps[row.key] = Step(None, routing[number], "stop")
            else:
                steps[row.key] = Step(token, routing[number], "length" if row.made == row.most else None)
        self.drop({key for key, step in steps.items() if step.reason})
        return steps


def _layers(cache: DecodingCache) -> list[Any]:
    """Of each layer its ``keys`` and ``values``, [B, heads, S, width]."""
    return cache.past.layers


def _joined(one: DecodingCache, two: DecodingCache) -> DecodingCache:
    """Two caches as that of one batch, the shorter padded on the left."""
    length = max(one.past.get_seq_length(), two.past.get_seq_length())

    def together(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, length - part.shape[2], 0)) for part in (a, b)])

    for a, b in zip(_layers(one), _layers(two), strict=True):
        a.keys, a.values = together(a.keys, b.keys), together(a.values, b.values)
    contexts = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in zip(one.contexts, two.contexts, strict=True)]
    decided = None if one.decision is None or two.decision is None else torch.cat([one.decision, two.decision])
    return DecodingCache(one.past, contexts, decided)
