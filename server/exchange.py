"""Asking the clients: requests out, replies checked, named and counted as they come in."""

import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.audit.code import code_hash
from common.audit.entries import (
    Arrival,
    Failure,
    Open,
    Receipt,
    array_entries,
    digest_of,
    receipt_statement,
    settings_hash,
)
from common.audit.ledger import Ledger
from common.config import Settings
from common.errors import MetaMoEError, ProtocolError, RunFailedError
from common.events import EventLog
from common.model.seed import Seed
from common.wire import (
    Envelope,
    Kind,
    RecordDict,
    Request,
    addressed,
    decode_audit,
    decode_reply,
    encode_request,
    reply_artifacts,
)

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

    def __init__(
        self,
        settings: Settings,
        seed: Seed,
        public: str,
        nodes: Sequence[int],
        ask: Ask,
        events: EventLog,
        ledger: Ledger,
    ) -> None:
        self.transfers = [Transfer(name) for name in settings.client_names]
        self._settings, self._seed, self._public, self._ask, self._events = settings, seed, public, ask, events
        self._nodes = list(nodes)
        self._ledger, self._run = ledger, secrets.token_hex(16)
        self._receipts: dict[int, list[Receipt]] = {node: [] for node in nodes}
        self._keys: dict[int, str] = {}
        ledger.open(
            Open(
                run=self._run,
                role="server",
                key=ledger.public,
                server=ledger.public,
                settings=settings_hash(settings),
                seed_model=seed.fingerprint,
                public_set=public,
                code=code_hash(),
                policy=None,
            )
        )

    def close(self) -> None:
        """The run is over: the server's ledger is sealed."""
        self._ledger.seal(self._run)

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
        messages = {node: secrets.token_hex(16) for node in requests}
        waiting = set(requests)
        for node, content in self._ask(kind, {node: self._addressed(c, node, messages[node]) for node, c in requests.items()}):
            waiting.remove(node)
            try:
                if isinstance(content, MetaMoEError):
                    raise type(content)(f"{self._name(kind, node)} could not answer {kind!r}: {content}")
                try:
                    arrays, extra = decode_reply(content, declared), decode_audit(kind, content)
                except ProtocolError as error:
                    raise ProtocolError(f"{self._name(kind, node)}, reply to {kind!r}: {error}") from error
            except MetaMoEError as error:
                self._ledger.append(Failure(run=self._run, message=messages[node], stage=kind, code=error.exit_code))
                raise
            self._arrived(kind, node, messages[node], arrays, extra)
            yield node, arrays
        if waiting:
            missing = ", ".join(sorted(self._name(kind, node) for node in waiting))
            raise RunFailedError(
                f"no answer to {kind!r} within compute.timeout = {self._settings.compute.timeout:.0f} s from {missing}"
            )

    def _addressed(self, content: RecordDict, node: int, message: str) -> RecordDict:
        envelope = Envelope(run=self._run, message=message, key=self._ledger.public, receipts=self._receipts[node])
        return addressed(content, envelope)

    def _arrived(
        self, kind: Kind, node: int, message: str, arrays: Mapping[str, np.ndarray], extra: Mapping[str, np.ndarray]
    ) -> None:
        """Write down what arrived, and sign for it."""
        if "audit-key" in extra:
            self._keys[node] = extra["audit-key"].tobytes().hex()
        client = int(arrays["client"]) if kind == "profile" else self._nodes.index(node)
        entries = array_entries({**arrays, **extra})
        digest = digest_of(entries)
        signature = self._ledger.sign(receipt_statement(self._run, message, digest))
        self._receipts[node].append(Receipt(run=self._run, message=message, arrays=digest, signature=signature))
        self._ledger.append(
            Arrival(
                run=self._run,
                message=message,
                stage=kind,
                client=max(client, 0),
                key=self._keys.get(node),
                arrays=entries,
                signature=signature,
            )
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
