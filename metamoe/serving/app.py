"""The server's paths."""

import asyncio
import base64
import binascii
import io
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image, UnidentifiedImageError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from metamoe.common.data.decode import read_picture
from metamoe.common.errors import InputFileError, MetaMoEError
from metamoe.common.model.artifact import Loaded
from metamoe.common.model.batch import text_features
from metamoe.predict import Prediction, predict_images
from metamoe.serving.api import ChatAsked, ClassifyAsked, CompletionAsked, error_body
from metamoe.serving.engine import Busy, Engine
from metamoe.serving.gate import Gate
from metamoe.serving.metrics import Metrics
from metamoe.serving.text import Answer, Failed, Left
from metamoe.writing import Messages, Writing, longest_text, text_request

_LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        at_once: texts that are computed together.
        queue: texts, or requests about images, that may wait beside them.
        length: tokens of a prompt and its answer together; 0 is what the seed can read.
        body: bytes of a request.
    """

    at_once: int = 32
    queue: int = 256
    length: int = 0
    body: int = 4 * 2**20


def serving_app(loaded: Loaded, name: str, limits: Limits, token: str = "", loopback: bool = True) -> FastAPI:
    """The server of one model.

    Args:
        loaded: the model.
        name: under which it is asked.
        limits: of requests.
        token: that is wanted; empty for none.
        loopback: whether it listens to this machine alone; then a page in a browser that calls it by another name is refused.
    """
    images = loaded.seed.is_image_model
    manifest = loaded.manifest
    engine = None if images else Engine(loaded, limits.at_once, limits.queue)
    # One thread for what is neither computed by the engine nor quick: tokenizing, and images.
    beside, waiting = ThreadPoolExecutor(1), [0]
    metrics = Metrics(lambda: engine.load if engine else (min(1, waiting[0]), max(0, waiting[0] - 1)))
    texts: list[Any] = []
    length = min(limits.length or 2**62, 2**62 if images else longest_text(loaded))

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        if engine:
            engine.start()
        yield
        if engine:
            await asyncio.to_thread(engine.stop)
        beside.shutdown(cancel_futures=True)

    app = FastAPI(title=name, lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, token=token, body=limits.body)
    if loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK)

    @app.middleware("http")
    async def counted(request: Request, call_next: Callable[[Request], Any]) -> Response:
        begun = time.monotonic()
        answer: Response = await call_next(request)
        route = request.scope.get("route")
        metrics.answered(getattr(route, "path", "other"), answer.status_code, time.monotonic() - begun)
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(f"{place or 'body'}: {first['msg']}", "invalid_value", param=place or None), 400)

    @app.exception_handler(MetaMoEError)
    async def not_taken(_request: Request, error: MetaMoEError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "invalid_value"), 400)

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> JSONResponse:
        kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return JSONResponse(error_body(str(error.detail), code, kind), error.status_code, error.headers)

    async def aside(call: Callable[..., Any], *arguments: Any) -> Any:
        if waiting[0] > limits.queue:
            raise Busy
        waiting[0] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(beside, call, *arguments)
        finally:
            waiting[0] -= 1

    @app.exception_handler(Busy)
    async def busy(_request: Request, _error: Busy) -> JSONResponse:
        body = error_body(f"{limits.queue} requests wait already; ask again later", "busy", "server_error")
        return JSONResponse(body, 429, {"Retry-After": "1"})

    def known(model: str) -> None:
        if model != name:
            raise HTTPException(404, f"there is no model {model!r}; there is {name!r}")

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = engine is None or engine.alive
        return JSONResponse({"status": "ok" if alive else "the thread that computes has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def card() -> dict[str, Any]:
        own = {"model": manifest.model_hash, "experts": manifest.expert_names}
        return {"id": name, "object": "model", "created": 0, "owned_by": "metamoe", "metamoe": own}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model}")
    async def model_card(model: str) -> dict[str, Any]:
        known(model)
        return card()

    async def texts_of(
        http: Request, asked: CompletionAsked | ChatAsked, prompts: list[str | Messages], most: int | None
    ) -> Response:
        known(asked.model)
        if engine is None:
            raise InputFileError("this model is one of images; ask it at /v1/classify")
        how = Writing(
            max_tokens=most or min(256, max(1, length // 2)),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            stop=asked.stops,
            truncate=asked.truncate,
        )
        requests = [await aside(text_request, loaded, prompt, how, length) for prompt in prompts]
        answer = Answer(asked, requests, manifest.expert_names)
        pieces = answer.pieces(engine, http, metrics)
        try:
            # An error before the first piece is an answer of its own, streamed or not.
            first = await anext(pieces)
            if asked.stream:
                return StreamingResponse(answer.events(pieces, first), media_type="text/event-stream")
            async for _ in pieces:
                pass
        except Failed as error:
            raise HTTPException(500, "the text could not be computed; the server's log has why") from error
        except Left:
            return Response(status_code=499)
        return JSONResponse(answer.whole())

    @app.post("/v1/completions")
    async def completions(http: Request, asked: CompletionAsked) -> Response:
        return await texts_of(http, asked, list(asked.prompts), asked.max_tokens)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request, asked: ChatAsked) -> Response:
        messages = [message.plain() for message in asked.messages]
        return await texts_of(http, asked, [messages], asked.max_completion_tokens or asked.max_tokens)

    def classified(asked: ClassifyAsked) -> list[Prediction]:
        if not images:
            raise InputFileError("this model is one of text; ask it at /v1/completions")
        names = list(dict.fromkeys(asked.classes)) if asked.classes else manifest.classes
        if not asked.classes and not texts:
            texts.append(text_features(loaded.seed, names, manifest.prompt))
        own = text_features(loaded.seed, names, manifest.prompt) if asked.classes else texts[0]
        read = [image_of(number, text, manifest.background) for number, text in enumerate(asked.images)]
        return list(predict_images(loaded, read, names, own, asked.top))

    @app.post("/v1/classify")
    async def classify(asked: ClassifyAsked) -> dict[str, Any]:
        known(asked.model)
        found: list[Prediction] = await aside(classified, asked)
        data = [
            {
                "index": number,
                "classes": [{"name": own, "probability": probability} for own, probability in one.classes],
                "metamoe": {"experts": {expert: share for expert, share in one.experts if share}},
            }
            for number, one in enumerate(found)
        ]
        return {"object": "list", "model": name, "data": data}

    return app


def image_of(number: int, text: str, background: str) -> Image.Image:
    """An image out of base64 or a data URL.

    Raises:
        InputFileError: it is none.
    """
    try:
        content = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputFileError(f"images[{number}] is no image in base64: {error}") from error
    try:
        return read_picture(io.BytesIO(content), background, f"images[{number}]")
    except InputFileError as error:
        # Pillow's own words name an object in memory.
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise InputFileError(f"images[{number}] is no image of a kind that is known") from error
        raise
