"""The gateway as a process: it listens with TLS of its own, and speaks HTTP as Flower does."""

from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from metamoe.audit.gateway.fleet import LARGEST_REQUEST, RefusedError
from metamoe.audit.gateway.gateway import Gateway
from metamoe.audit.gateway.upstream import MEDIA_TYPE, PREFIX, Upstream, UpstreamError
from metamoe.common.bundle import bundle_hash


def application(gateway: Gateway, upstream: Upstream) -> FastAPI:
    """The web application: POST on the paths of Flower's Fleet API, and nothing else."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):  # type: ignore[no-untyped-def]
        yield
        upstream.close()
        gateway.save_traffic()

    app = FastAPI(openapi_url=None, lifespan=lifespan)

    @app.post(PREFIX + "{method}")
    async def answer(method: str, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_REQUEST:
                return Response(status_code=413)
        try:
            found = await run_in_threadpool(gateway.handle, method, request.headers, bytes(body))
        except RefusedError as error:
            return Response(str(error), error.status)
        except UpstreamError as error:
            return Response(error.body, error.status, media_type="application/json")
        return Response(found, media_type=MEDIA_TYPE)

    return app


def serve(folder: Path, superlink: str, host: str, port: int) -> None:
    """Stand between a client's SuperNode and the server until this process is ended.

    Args:
        folder: the client's, from ``metamoe deploy keys`` or ``metamoe client keys``.
        superlink: where the server is, HOST:PORT.
        host: where to listen.
        port: where to listen.

    Raises:
        InputFileError: a key, certificate or policy of the folder is not what it should be.
    """
    upstream = Upstream(superlink, folder / "ca.crt", folder / "node.key")
    gateway = Gateway(folder / "gateway", folder / "policy.toml", upstream, bundle_hash())
    uvicorn.run(
        application(gateway, upstream),
        host=host,
        port=port,
        ssl_certfile=folder / "gateway.crt",
        ssl_keyfile=str(folder / "gateway.key"),
        log_level="warning",
        access_log=False,
        server_header=False,
    )
