"""What a unified decoder goes on to say, as text: prompts and chats in, pieces of text out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from metamoe.ask import prompt_ids
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.model.artifact import Loaded, Manifest
from metamoe.common.model.generation import Decoding, Request, Sampling, Step
from metamoe.common.model.router import route_of

Messages = Sequence[Mapping[str, str]]
"""A chat: messages with ``role`` (system, user, assistant) and ``content``."""


@dataclass(frozen=True)
class Writing:
    """How a text goes on.

    Attributes:
        max_tokens: how many new tokens at most.
        temperature: 0 takes the most likely token each time; above it one is drawn.
        top_p: drawn out of the likeliest tokens that have this probability together.
        seed: of the draws; None for others each time.
        stop: texts before which it ends.
        truncate: a prompt that is too long with its new tokens loses its beginning; else it is refused.

    Raises:
        InvalidSettingError: one of them is out of its bounds.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = field(default=())
    truncate: bool = False

    def __post_init__(self) -> None:
        for name, value, fine, needed in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1 is needed"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100 is allowed"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1 is allowed"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "0 to 2^63 - 1 is allowed"),
            ("stop", list(self.stop), all(self.stop), "an empty text cannot be stopped at"),
        ):
            if not fine:
                raise InvalidSettingError(f"{name} = {value}: {needed}")


@dataclass(frozen=True)
class Piece:
    """Some text that is new, with the weight of each expert by which its token was computed; why it is the last, if it is."""

    text: str
    weights: list[float]
    reason: Literal["stop", "length"] | None


class TextStream:
    """Steps of a request as pieces of text.

    A token can be a part of a letter, and what ends with the beginning of a stop text can go on either way: both are held back
    until it is known.
    """

    def __init__(self, loaded: Loaded, stop: Sequence[str]) -> None:
        self._tokenizer = loaded.seed.tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._manifest, self._stop, self._held = loaded.manifest, stop, ""
        self._made: list[int] = []
        self._streamed = 0

    def piece(self, step: Step) -> Piece:
        """What a step adds; nothing is asked of the stream after the last."""
        new = ""
        if step.token is not None:
            self._made.append(step.token)
            new = self._decoder.step(self._tokenizer, step.token) or ""
        self._streamed += len(new)
        if step.reason:
            # A letter that is not whole is shown as what it is.
            new += self._tokenizer.decode(self._made, skip_special_tokens=True)[self._streamed :]
        self._held += new
        weights = expert_weights(step.routing, self._manifest)
        if found := [at for at in map(self._held.find, self._stop) if at >= 0]:
            return Piece(self._held[: min(found)], weights, "stop")
        keep = 0 if step.reason else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Piece(text, weights, step.reason)


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def expert_weights(routing: torch.Tensor, manifest: Manifest) -> list[float]:
    """The weight of each expert [K] in the highest layer that decides, out of log pi [G, K]; zero for those not asked."""
    route = route_of(routing[-1], manifest.router.top_k, manifest.router.renormalise)
    weights = torch.zeros(routing.shape[1]).scatter(0, route.chosen.cpu(), route.weights.float().cpu())
    return [float(weight) for weight in weights]


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """The tokens that end a text: those of the tokenizer and of the model's own generation settings."""
    settings = getattr(loaded.seed.model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return frozenset(token for token in (*listed, loaded.seed.tokenizer.eos_token_id) if token is not None)


def longest_text(loaded: Loaded) -> int:
    """Tokens of a prompt and what follows together, at most: the positions that the seed was made for."""
    return int(loaded.seed.model.config.max_position_embeddings)


def text_request(loaded: Loaded, prompt: str | Messages, how: Writing, limit: int | None = None) -> Request:
    """A prompt, or a chat, as what can be computed.

    Args:
        loaded: a model of text.
        prompt: a text, or a chat that is put into the seed's template.
        how: it goes on.
        limit: of prompt and new tokens together; None for the seed's.

    Raises:
        InputFileError: the model is one of images, the prompt is empty or too long, or the seed's tokenizer has no template for
            such a chat.
    """
    check_text(loaded)
    tokenizer = loaded.seed.tokenizer
    if isinstance(prompt, str):
        ids = prompt_ids(loaded, prompt)
    elif tokenizer.chat_template is None:
        raise InputFileError("the seed's tokenizer has no chat template; give a prompt as one text")
    else:
        try:
            text: Any = tokenizer.apply_chat_template([dict(m) for m in prompt], add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise InputFileError(f"the seed's chat template does not take these messages: {error}") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = (limit or longest_text(loaded)) - how.max_tokens
    if len(ids) > room:
        if not how.truncate or room < 1:
            raise InputFileError(
                f"a prompt of {len(ids)} tokens and max_tokens = {how.max_tokens} are more than {room + how.max_tokens} "
                "together; shorten it, lower max_tokens, or truncate, which keeps the prompt's end"
            )
        ids = ids[-room:]
    return Request(ids, how.max_tokens, Sampling(how.temperature, how.top_p, how.seed))


def check_text(loaded: Loaded) -> None:
    """Raises InputFileError if the model is one of images."""
    if loaded.seed.is_image_model:
        raise InputFileError("this model is one of images; ask it with 'metamoe predict'")


class Writer:
    """Requests on their way to text, so many at once at most; as one comes to its end, the next that waits joins.

    Args:
        loaded: a model of text.
        at_once: how many are computed together.
    """

    def __init__(self, loaded: Loaded, at_once: int) -> None:
        self._loaded, self._at_once = loaded, at_once
        self._decoding = Decoding(loaded.model, end_tokens(loaded))
        self._waiting: dict[int, Request] = {}
        self._streams: dict[int, TextStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def computed(self) -> int:
        """How many are computed at the moment; the others wait."""
        return len(self._decoding)

    def put(self, key: int, request: Request, stop: Sequence[str]) -> None:
        """Have a request wait for its turn, which ends before one of these texts."""
        self._waiting[key], self._streams[key] = request, TextStream(self._loaded, stop)

    def drop(self, key: int) -> None:
        """Forget a request, wherever it is."""
        self._streams.pop(key, None)
        if self._waiting.pop(key, None) is None:
            self._decoding.drop({key})

    def advance(self) -> list[tuple[int, Piece]]:
        """One more piece for every request that is computed, and the first for those that join."""
        # Around each step alone: whoever reads on meanwhile computes as before.
        with self._loaded.seed.place.computing():
            steps = self._decoding.step() if len(self._decoding) else {}
            joining = list(self._waiting)[: self._at_once - len(self._decoding)]
            if joining:
                steps |= self._decoding.add({key: self._waiting.pop(key) for key in joining})
        pieces = [(key, self._streams[key].piece(step)) for key, step in steps.items()]
        for key, piece in pieces:
            if piece.reason:
                self.drop(key)
        return pieces


def written(
    loaded: Loaded, prompts: Sequence[str | Messages], how: Writing = Writing(), at_once: int = 32
) -> Iterator[tuple[int, Piece]]:
    """What the model goes on to say: the number of a prompt and its next piece, many prompts at once.

    Raises:
        InputFileError: see :func:`text_request`; before anything is computed.
    """
    writer = Writer(loaded, at_once)
    for number, request in enumerate([text_request(loaded, prompt, how) for prompt in prompts]):
        writer.put(number, request, how.stop)
    while len(writer):
        yield from writer.advance()
