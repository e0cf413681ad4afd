"""Asking the clients: requests out, replies checked, named and counted as they come in."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.config import Settings
from common.errors import MetaMoEError, ProtocolError, RunFailedError
from common.events import EventLog
from common.model.seed import Seed
from common.wire import Kind, RecordDict, Request, decode_reply, encode_request, reply_artifacts

Ask = Callable[[Kind, Mapping[int, RecordDict]], Iterable[tuple[int, RecordDict | MetaMoEError]]]
"""Sends each node its request and yields (node, reply) as replies come; a node that failed gives an error instead."""


@dataclass
class Transfer:
    """What one client received and sent: bytes of array data, and each array it sent."""

    name: str
    bytes_down: int = 0
    bytes_up: int = 0
    artifacts: list[dict[str, Any]] = field(default_factory=list)


class Exchange:
    """The clients of one run, as the stages see them: numbered 0 to K - 1, whatever nodes they are and whoever answers
    first.
    """

    def __init__(self, settings: Settings, seed: Seed, public: str, nodes: Sequence[int], ask: Ask, events: EventLog) -> None:
        self.transfers = [Transfer(name) for name in settings.client_names]
        self._settings, self._seed, self._public, self._ask, self._events = settings, seed, public, ask, events
        self._nodes = list(nodes)

    def request(self, arrays: Mapping[str, np.ndarray]) -> RecordDict:
        """A request that carries these arrays."""
        return encode_request(Request(self._settings, self._seed.fingerprint, self._public, arrays))

    def profiles(self) -> list[dict[str, np.ndarray]]:
        """Ask every node who it is and what its data looks like to the seed. The replies, in the clients' order.

        Raises:
            RunFailedError: two nodes say that they are the same client.
        """
        found: dict[int, tuple[int, dict[str, np.ndarray]]] = {}
        for node, arrays in self._replies("profile", {node: self.request({}) for node in self._nodes}):
            client = int(arrays["client"])
            if not 0 <= client < self._settings.clients:
                raise ProtocolError(f"a node says it is client {client}, but the run has clients = {self._settings.clients}")
            if client in found:
                raise RunFailedError(
                    f"two nodes say that they are client {self.transfers[client].name}; give each its own partition-id"
                )
            found[client] = node, arrays
            self._count(client, 0, arrays)
            self._events("profile", len(found), self._settings.clients, self.transfers[client].name)
        self._nodes = [found[client][0] for client in sorted(found)]
        return [found[client][1] for client in sorted(found)]

    def ask(self, kind: Kind, requests: Sequence[RecordDict]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Send the k-th request to client k; yield (client, arrays) in the order in which replies come.

        Raises:
            ProtocolError: a reply that is not exactly what was declared.
            MetaMoEError: a client reports this error.
            RunFailedError: a client did not answer in time.
        """
        by_node = dict(zip(self._nodes, requests, strict=True))
        self._events(kind, 0, len(by_node))
        for done, (node, arrays) in enumerate(self._replies(kind, by_node), start=1):
            client = self._nodes.index(node)
            self._count(client, payload_bytes(by_node[node]), arrays)
            self._events(kind, done, len(by_node), self.transfers[client].name)
            yield client, arrays

    def _replies(self, kind: Kind, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        declared = reply_artifacts(kind, self._settings, self._seed)
        waiting = set(requests)
        for node, content in self._ask(kind, requests):
            waiting.remove(node)
            if isinstance(content, MetaMoEError):
                raise type(content)(f"{self._name(kind, node)} could not answer {kind!r}: {content}")
            try:
                yield node, decode_reply(content, declared)
            except ProtocolError as error:
                raise ProtocolError(f"{self._name(kind, node)}, reply to {kind!r}: {error}") from error
        if waiting:
            missing = ", ".join(sorted(self._name(kind, node) for node in waiting))
            raise RunFailedError(
                f"no answer to {kind!r} within compute.timeout = {self._settings.compute.timeout:.0f} s from {missing}"
            )

    def _name(self, kind: Kind, node: int) -> str:
        return f"node {node}" if kind == "profile" else f"client {self.transfers[self._nodes.index(node)].name}"

    def _count(self, client: int, down: int, arrays: Mapping[str, np.ndarray]) -> None:
        transfer = self.transfers[client]
        transfer.bytes_down += down
        for name, array in arrays.items():
            transfer.bytes_up += array.nbytes
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            shape = list(array.shape)
            transfer.artifacts.append(
                {"name": name, "dtype": str(array.dtype), "shape": shape, "bytes": array.nbytes, "sha256": digest}
            )


def payload_bytes(content: RecordDict) -> int:
    """Bytes of array data in a message."""
    return sum(array.numpy().nbytes for record in content.array_records.values() for array in record.values())
