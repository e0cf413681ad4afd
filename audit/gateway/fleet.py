"""What of Flower's Fleet API a client may use, and the one way in which each request may be written."""

import binascii
from base64 import b64decode
from collections.abc import Mapping
from datetime import datetime
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.common.constant import TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from google.protobuf.message import DecodeError, Message

METHODS: dict[str, type[Message]] = {
    "activate-node": ActivateNodeRequest,
    "deactivate-node": DeactivateNodeRequest,
    "send-node-heartbeat": SendNodeHeartbeatRequest,
    "pull-messages": PullMessagesRequest,
    "get-run": GetRunRequest,
    "get-fab": GetFabRequest,
    "pull-object": PullObjectRequest,
    "confirm-message-received": ConfirmMessageReceivedRequest,
    "push-messages": PushMessagesRequest,
    "push-object": PushObjectRequest,
}
"""Of the others, a client with a key needs none: it does not register itself."""
LARGEST_REQUEST = 6_000_000
"""Bytes. Flower cuts arrays into chunks of 5 MiB."""
MOST_OBJECTS = 20_000
_DEPTH = 5
_Request = TypeVar("_Request", bound=Message)


class RefusedError(Exception):
    """A request that does not pass, and the HTTP status that says so."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status = status


def read(kind: type[_Request], body: bytes) -> _Request:
    """A request, if it is written as Flower writes it: known fields alone, in their order.

    Raises:
        RefusedError: it is not.
    """
    try:
        request = kind.FromString(body)
    except DecodeError as error:
        raise RefusedError(f"is no {kind.__name__}") from error
    request.DiscardUnknownFields()
    if request.SerializeToString(deterministic=True) != body:
        raise RefusedError(f"{kind.__name__} holds more than its fields")
    return request


def authenticate(headers: Mapping[str, str], public_key: bytes) -> None:
    """Whether a request comes from the SuperNode that has the node's key: not from whoever else reaches the port.

    Raises:
        RefusedError: it does not, with status 401, at which a SuperNode ends.
    """
    try:
        timestamp = headers[TIMESTAMP_HEADER]
        age = (now() - datetime.fromisoformat(timestamp)).total_seconds()
        own = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True) == public_key
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        signed = own and verify_signature(bytes_to_public_key(public_key), timestamp.encode("ascii"), signature)
    except (KeyError, ValueError, TypeError, UnicodeError, binascii.Error, UnsupportedAlgorithm) as error:
        raise RefusedError("is not signed by the node's key", 401) from error
    if not signed or abs(age) > TIMESTAMP_TOLERANCE:
        raise RefusedError("is not signed by the node's key, now", 401)


def objects_of(tree: ObjectTree) -> list[str]:
    """The ids of all objects in a tree, children before their parents, each once.

    Raises:
        RefusedError: there are too many, they are nested too deep, or one is no SHA-256.
    """
    found: dict[str, None] = {}

    def walk(node: ObjectTree, depth: int) -> None:
        if depth > _DEPTH:
            raise RefusedError(f"objects are nested deeper than {_DEPTH}")
        for child in node.children:
            walk(child, depth + 1)
        if len(node.object_id) != 64 or not set(node.object_id) <= set("0123456789abcdef"):
            raise RefusedError("an object's id is no SHA-256")
        found[node.object_id] = None
        if len(found) > MOST_OBJECTS:
            raise RefusedError(f"more than {MOST_OBJECTS} objects")

    walk(tree, 1)
    return list(found)
