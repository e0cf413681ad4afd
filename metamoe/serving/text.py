"""Texts of one request: asked of the engine, and answered whole or as a stream."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest

from metamoe.common.model.generation import Request
from metamoe.serving.api import ChatAsked, CompletionAsked, error_body
from metamoe.serving.engine import Engine
from metamoe.serving.metrics import Metrics
from metamoe.writing import Piece

_LOOK = 1.0
"""Seconds after which it is looked whether whoever asked is still there."""


class Failed(Exception):
    """A request was taken and could not be computed."""


class Left(Exception):
    """Whoever asked is gone."""


@dataclass
class Answer:
    """The texts that a request asked for, as far as they are there.

    Attributes:
        asked: by whom.
        requests: a text each.
        experts: their names.
    """

    asked: CompletionAsked | ChatAsked
    requests: Sequence[Request]
    experts: Sequence[str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._pieces: list[list[Piece]] = [[] for _ in self.requests]
        self._chat = isinstance(self.asked, ChatAsked)

    async def pieces(self, engine: Engine, http: HttpRequest, metrics: Metrics) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all texts as they come; what is not waited for any more is forgotten by the engine.

        Raises:
            Busy: too many requests wait.
            Failed: they could not be computed.
            Left: whoever asked is gone.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | None]]()

        def deliver(number: int, piece: Piece | None) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, (number, piece))

        tickets = [
            (request, self.asked.stops, lambda piece, number=number: deliver(number, piece))
            for number, request in enumerate(self.requests)
        ]
        keys = engine.submit(tickets)
        try:
            while not all(own and own[-1].reason for own in self._pieces):
                try:
                    number, piece = await asyncio.wait_for(arrived.get(), _LOOK)
                except TimeoutError:
                    if await http.is_disconnected():
                        raise Left from None
                    continue
                if piece is None:
                    raise Failed
                self._pieces[number].append(piece)
                yield number, piece
        finally:
            engine.cancel(keys)
            for request, own in zip(self.requests, self._pieces, strict=True):
                metrics.computed(len(request.prompt), len(own), self.weights(own))

    def weights(self, own: Sequence[Piece]) -> dict[str, float]:
        """The mean weight of each expert that was asked for a text."""
        totals = [sum(piece.weights[k] for piece in own) for k in range(len(self.experts))]
        return {name: total / len(own) for name, total in zip(self.experts, totals, strict=True) if total}

    def usage(self) -> dict[str, int]:
        read, written = sum(len(r.prompt) for r in self.requests), sum(len(own) for own in self._pieces)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
        }

    def whole(self) -> dict[str, Any]:
        """All texts, when they are there; beside each its experts with their weights."""
        choices = []
        for number, own in enumerate(self._pieces):
            text = "".join(piece.text for piece in own)
            content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choice = {"index": number, **content, "logprobs": None, "finish_reason": own[-1].reason}
            choices.append(choice | {"metamoe": {"experts": self.weights(own)}})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._common(kind), "choices": choices, "usage": self.usage()}

    async def events(self, pieces: AsyncIterator[tuple[int, Piece]], first: tuple[int, Piece]) -> AsyncIterator[str]:
        """All texts as server-sent events; of what has begun, an error is one more event."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"

        def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
            return f"data: {json.dumps({**self._common(kind), 'choices': choices, **more})}\n\n"

        if self._chat:
            yield chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        try:
            yield self._event(chunk, *first)
            async for number, piece in pieces:
                yield self._event(chunk, number, piece)
        except Failed:
            yield f"data: {json.dumps(error_body('the text could not be computed', 'failed', 'server_error'))}\n\n"
            return
        except Left:
            return
        if self.asked.stream_options and self.asked.stream_options.include_usage:
            yield chunk([], usage=self.usage())
        yield "data: [DONE]\n\n"

    def _event(self, chunk: Any, number: int, piece: Piece) -> str:
        content = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
        choice: dict[str, Any] = {"index": number, **content, "logprobs": None, "finish_reason": piece.reason}
        if piece.reason:
            choice["metamoe"] = {"experts": self.weights(self._pieces[number])}
        return str(chunk([choice]))
