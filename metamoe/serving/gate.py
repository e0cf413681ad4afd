"""What a request must be before anything of it is read: from one who knows the token, and no larger than is allowed."""

import hmac
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metamoe.serving.api import error_body


class Gate:
    """ASGI middleware: refuses with 401 and 413, and hands on bodies that are whole.

    Args:
        app: behind it.
        token: that a request must bring as ``Authorization: Bearer``, but for ``/health``; empty for none.
        body: largest, in bytes.
    """

    def __init__(self, app: ASGIApp, token: str, body: int) -> None:
        self.app, self.body = app, body
        self.expected = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.expected and scope["path"] != "/health" and not hmac.compare_digest(given, self.expected):
            await _refuse(send, 401, "this server wants a token: give it as api_key", "invalid_api_key")
            return
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.body:
                await _refuse(send, 413, f"the body is larger than the {self.body} bytes that are allowed", "body_too_large")
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, again, send)


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error_body(message, code)).encode()})
