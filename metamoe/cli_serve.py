"""The commands that serve a unified model, or its router alone."""

import ipaddress
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metamoe.common.errors import InvalidSettingError
from metamoe.options import Device, Precise, Precision, log

if TYPE_CHECKING:
    from fastapi import FastAPI


def serve(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model, e.g. runs/demo/model.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at; another than this machine's own wants a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes one that is free.")] = 8000,
    name: Annotated[str, typer.Option(help="Name under which the model is asked.")] = "metamoe",
    token: Annotated[
        str, typer.Option(envvar="METAMOE_TOKEN", help="Wanted of every request. (default: none on loopback, else a new one)")
    ] = "",
    at_once: Annotated[int, typer.Option(min=1, help="Texts that are computed together.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are refused with 429.")] = 256,
    max_length: Annotated[int, typer.Option(min=0, help="Tokens of a prompt and its answer; 0 is what the seed can read.")] = 0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 4 * 2**20,
    device: Device = "auto",
    precision: Precise = Precision.float32,
) -> None:
    """Serve a unified model by the OpenAI API: texts at /v1/completions and /v1/chat/completions, images at /v1/classify,
    metrics at /metrics. Every answer names the experts that were asked and their weights. Ends by Ctrl-C, when requests that
    are computed have their answers.
    """
    loopback = is_loopback(host)
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise InvalidSettingError("metamoe serve needs the extra serve: pip install 'metamoe-fl[serve]'") from error
    from metamoe.model import load
    from metamoe.serving.app import Limits, serving_app

    if not loopback and not token:
        token = secrets.token_urlsafe(32)
        log.info("a token is wanted of every request (METAMOE_TOKEN sets one of your own): %s", token)
    app = serving_app(
        load(model, device, precision.value).loaded, name, Limits(at_once, queue, max_length, max_body), token, loopback
    )
    _listen(app, host, port, name)


def route(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model made from a decoder.")],
    engine: Annotated[
        str, typer.Option(metavar="URL", help="Of an engine that serves the experts, e.g. http://127.0.0.1:8001.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes one that is free.")] = 8000,
    name: Annotated[str, typer.Option(help="Name under which the model is asked.")] = "metamoe",
    base: Annotated[str, typer.Option(help="The engine's name for the seed without an adapter.")] = "seed",
    engine_key: Annotated[str, typer.Option(envvar="METAMOE_ENGINE_KEY", help="Token that the engine wants.")] = "",
    max_length: Annotated[int, typer.Option(min=0, help="Tokens of a prompt; 0 is what the seed can read.")] = 0,
    device: Device = "auto",
    precision: Precise = Precision.float32,
) -> None:
    """Stand before an engine that serves LoRA adapters by their names (vLLM, SGLang, LoRAX), and send each prompt to the
    expert that the router chooses. The engine is started by what 'metamoe export MODEL --to adapters' prints. Listens to this
    machine alone.
    """
    import httpx

    from metamoe.model import load
    from metamoe.serving.route import inexact, prompt_routing, routing_app
    from metamoe.writing import check_text

    try:
        url = httpx.URL(engine)
    except httpx.InvalidURL as error:
        raise InvalidSettingError(f"--engine {engine}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidSettingError(f"--engine {engine}: give where it listens, such as http://127.0.0.1:8001")
    loaded = load(model, device, precision.value).loaded
    check_text(loaded)
    if why := inexact(loaded.manifest):
        log.warning("answers differ from the unified model's: %s", why)
    headers = {"Authorization": f"Bearer {engine_key}"} if engine_key else {}
    client = httpx.AsyncClient(base_url=url, headers=headers, trust_env=False)
    app = routing_app(name, client, prompt_routing(loaded, max_length), base, 4 * 2**20)
    _listen(app, "127.0.0.1", port, name)


def _listen(app: "FastAPI", host: str, port: int, name: str) -> None:
    """Serve until asked to end; requests under way have half a minute."""
    import uvicorn

    settings = uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=30, server_header=False)
    server = uvicorn.Server(settings)
    try:
        with settings.bind_socket() as socket:
            # Whoever asks as soon as it is said waits, and is not turned away.
            socket.listen(settings.backlog)
            log.info("%s is served at http://%s:%s/v1", name, host, socket.getsockname()[1])
            server.run([socket])
    except KeyboardInterrupt:
        # Raised again by uvicorn when all is at its end, as asked.
        return


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own.

    Raises:
        InvalidSettingError: it is no address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise InvalidSettingError(f"--host {host}: give an IP address, such as 127.0.0.1 or 0.0.0.0") from error
