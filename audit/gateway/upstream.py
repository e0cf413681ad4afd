"""The one way to the server: every request is made here, signed with the node's key, and every byte on the socket counted.

Flower's SuperNode signs a time stamp, not what it sends, so a request made anew carries as good a signature; and none of the
client's own bytes: no header, no time stamp, no signature that could be chosen to say something.
"""

import ssl
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpcore
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from google.protobuf.message import DecodeError, Message

from metamoe.common.errors import InputFileError

MEDIA_TYPE = "application/protobuf"
PREFIX = "/v1/fleet/"
LARGEST_ANSWER = 64_000_000
"""Bytes: an app bundle has at most 10 MB, an object 5 MB."""
_SECONDS = 30.0
_RECORD = 16_384
_Answer = TypeVar("_Answer", bound=Message)


@dataclass
class Traffic:
    """Bytes that went over the network, TLS and all: what the other end of the sockets received and sent."""

    sent: int = 0
    received: int = 0


class UpstreamError(Exception):
    """The server did not answer, or answered with an error: its status, and its body for the SuperNode."""

    def __init__(self, status: int, body: bytes = b"") -> None:
        super().__init__(f"the server answers with status {status}")
        self.status, self.body = status, body


class Upstream:
    """The server's Fleet API, over TLS.

    Args:
        address: HOST:PORT.
        authority: file with the certificate that vouches for the server.
        key: file with the node's private key.

    Raises:
        InputFileError: a file is not what it should be.
    """

    def __init__(self, address: str, authority: Path, key: Path) -> None:
        self.traffic = Traffic()
        self._key = _read_key(key)
        self.public_key = public_key_to_bytes(self._key.public_key())
        self._origin = f"https://{address}"
        try:
            context = ssl.create_default_context(cafile=str(authority))
        except (OSError, ssl.SSLError) as error:
            raise InputFileError(f"{authority} is no certificate: {error}") from error
        self._pool = httpcore.ConnectionPool(ssl_context=context, network_backend=_Backend(self.traffic))

    def call(self, method: str, request: Message, answer: type[_Answer]) -> _Answer:
        """Ask the server.

        Raises:
            UpstreamError: it does not answer, or not as it should.
        """
        timestamp = now().isoformat()
        headers: dict[bytes | str, bytes | str] = {
            "content-type": MEDIA_TYPE,
            "accept": MEDIA_TYPE,
            **dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()),
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public_key).decode(),
            TIMESTAMP_HEADER: timestamp,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(self._key, timestamp.encode())).decode(),
        }
        url, content = f"{self._origin}{PREFIX}{method}", request.SerializeToString(deterministic=True)
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), _SECONDS)
        try:
            with self._pool.stream("POST", url, headers=headers, content=content, extensions={"timeout": timeout}) as response:
                body = b""
                for part in response.iter_stream():
                    body += part
                    if len(body) > LARGEST_ANSWER:
                        raise UpstreamError(502)
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
            raise UpstreamError(503) from error
        if response.status != 200:
            raise UpstreamError(response.status, body)
        try:
            return answer.FromString(body)
        except DecodeError as error:
            raise UpstreamError(502) from error

    def close(self) -> None:
        """Close what is open."""
        self._pool.close()


class _Backend(httpcore.NetworkBackend):
    """Connections whose bytes are counted."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        inner = httpcore.SyncBackend().connect_tcp(host, port, timeout, local_address, socket_options)
        return _Counted(inner, self._traffic)


class _Counted(httpcore.NetworkStream):
    """A TCP stream that counts."""

    def __init__(self, inner: httpcore.NetworkStream, traffic: Traffic) -> None:
        self._inner, self._traffic = inner, traffic

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        content = self._inner.read(max_bytes, timeout)
        self._traffic.received += len(content)
        return content

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._traffic.sent += len(buffer)
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Encrypted(self, ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Encrypted(httpcore.NetworkStream):
    """TLS over a stream: Python's own way would read and write the socket past the one that counts."""

    def __init__(self, inner: _Counted, context: ssl.SSLContext, hostname: str | None, timeout: float | None) -> None:
        self._inner, self._incoming, self._outgoing = inner, ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=hostname)
        try:
            self._pumped(self._object.do_handshake, timeout)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return self._pumped(lambda: self._object.read(max_bytes), timeout)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            rest = memoryview(buffer)
            while rest:
                rest = rest[self._pumped(partial(self._object.write, rest), timeout) :]
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def _pumped(self, step: Callable[[], Any], timeout: float | None) -> Any:
        """The result of a step of TLS, for which bytes are moved until it has one."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                self._flush(timeout)
                if content := self._inner.read(_RECORD, timeout):
                    self._incoming.write(content)
                else:
                    self._incoming.write_eof()
            else:
                self._flush(timeout)
                return result

    def _flush(self, timeout: float | None) -> None:
        if content := self._outgoing.read():
            self._inner.write(content, timeout)

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._object if info == "ssl_object" else self._inner.get_extra_info(info)


def _read_key(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise InputFileError(f"{file} is no node's private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputFileError(f"{file} is no node's private key: it is not of an elliptic curve")
    return key
