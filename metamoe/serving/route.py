"""The router by itself, before an engine that serves the experts as LoRA adapters by their names."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import httpx
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from metamoe.common.errors import InvalidSettingError, MetaMoEError, first_problem
from metamoe.common.model.artifact import Loaded, Manifest
from metamoe.common.model.inputs import prompt_tokens
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import DecodingCache
from metamoe.common.model.seed import Seed
from metamoe.serving.api import ChatAsked, CompletionAsked, error_body
from metamoe.serving.gate import Gate
from metamoe.writing import Messages, Writing, longest_text, text_request

_TIMEOUT = httpx.Timeout(600, connect=10)


def inexact(manifest: Manifest) -> str:
    """Why an engine's answers differ from the unified model's; empty where they do not.

    Raises:
        InvalidSettingError: it is not decided once, below the experts.
    """
    router = manifest.router
    if router.decide != "once":
        why = "every layer asks other experts, and an engine serves one a prompt"
        if router.decide == "embedding":
            why = "it is decided at the seed's end, which costs as much as the answer"
        raise InvalidSettingError(f"router.decide = {router.decide}: {why}; it takes a model with router.decide = once")
    if router.top_k > 1:
        return f"router.top-k = {router.top_k}: the engine asks the first of {router.top_k} experts alone"
    if not router.renormalise:
        return "router.renormalise = false: the engine gives an expert the weight 1"
    if router.context != 1 or router.learn_context:
        return "router.context is not fixed at 1: tokens of a prompt may ask other experts than what follows it"
    return ""


class PromptRouter:
    """The seed up to where it is decided, and the decision.

    Args:
        seed: of the model; it is not changed.
        model: the unified model; of its layers those above the deciding one are let go.
        names: of what the router chooses among.
    """

    def __init__(self, seed: Seed, model: UnifiedModel, names: list[str]) -> None:
        self._model, self._names = model, names
        last = seed.ffn_paths.index(model.paths[0])
        model.backbone.model.layers = model.backbone.model.layers[: last + 1]
        model.paths = model.paths[:1]

    @torch.inference_mode()
    def expert(self, prompt: list[int]) -> str:
        """The expert that what follows a prompt asks first."""
        ids, cache = torch.tensor([prompt]), DecodingCache()
        self._model(prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool)), cache=cache)
        total, count = cache.contexts[0]
        context = (total / count).unsqueeze(1)
        return self._names[int(self._model.routers[0](context, context).argmax())]


Routing = Callable[[str | Messages], str]
"""Names the expert for a prompt or a chat."""


def prompt_routing(loaded: Loaded, length: int) -> Routing:
    """Routes prompts of at most so many tokens; 0 is what the seed can read. The model is changed: its upper layers go."""
    router = PromptRouter(loaded.seed, loaded.model, loaded.manifest.expert_names)
    limit = min(length or 2**62, longest_text(loaded))

    def routed(prompt: str | Messages) -> str:
        with loaded.seed.place.computing():
            return router.expert(list(text_request(loaded, prompt, Writing(max_tokens=1), limit).prompt))

    return routed


def routing_app(name: str, engine: httpx.AsyncClient, route: Routing, base: str, body: int) -> FastAPI:
    """The proxy.

    Args:
        name: the name under which the model is asked.
        engine: an HTTP client of the engine; closed at the end.
        route: names the expert.
        base: the engine's name for the seed without an adapter.
        body: largest request, in bytes.
    """

    beside = ThreadPoolExecutor(1)

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        beside.shutdown(cancel_futures=True)
        await engine.aclose()

    app = FastAPI(title=name, lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, token="", body=body)

    def refused(message: str, code: str, status: int) -> JSONResponse:
        return JSONResponse(error_body(message, code), status)

    async def passed(request: Request, form: type[CompletionAsked] | type[ChatAsked]) -> Response:
        content = await request.body()
        try:
            asked: Any = json.loads(content)
        except (ValueError, RecursionError) as error:
            return refused(f"the body is no JSON: {error}", "invalid_value", 400)
        if not isinstance(asked, dict):
            return refused("the body is no JSON object", "invalid_value", 400)
        try:
            # What is routed is checked; what the engine takes beside it is the engine's to judge.
            known = {key: value for key, value in asked.items() if key in ("model", "prompt", "messages")}
            checked = form.model_validate(known)
        except ValidationError as error:
            return refused(first_problem(error), "invalid_value", 400)
        if checked.model != name:
            return refused(f"there is no model {checked.model!r}; there is {name!r}", "not_found", 404)
        if isinstance(checked, CompletionAsked) and not isinstance(checked.prompt, str):
            return refused("prompt: one text a request can be routed", "invalid_value", 400)
        try:
            told = checked.prompts[0] if isinstance(checked, CompletionAsked) else [m.plain() for m in checked.messages]
            expert = await asyncio.get_running_loop().run_in_executor(beside, route, told)
        except MetaMoEError as error:
            return refused(str(error), "invalid_value", 400)
        sent = engine.build_request(
            "POST", request.url.path, json={**asked, "model": base if expert == "seed" else expert}, timeout=_TIMEOUT
        )
        try:
            answer = await engine.send(sent, stream=True)
        except httpx.HTTPError as error:
            return refused(f"the engine cannot be reached: {error}", "engine", 502)

        async def content_of() -> AsyncIterator[bytes]:
            try:
                async for part in answer.aiter_bytes():
                    yield part
            finally:
                await answer.aclose()

        headers = {"x-metamoe-expert": expert, "content-type": answer.headers.get("content-type", "application/json")}
        return StreamingResponse(content_of(), answer.status_code, headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "metamoe"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await passed(request, CompletionAsked)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await passed(request, ChatAsked)

    return app
