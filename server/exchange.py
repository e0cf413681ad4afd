"""Asking the clients: requests out, replies checked, named and counted as they come in."""

import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from metamoe.common.arrays import arrays_hash
from metamoe.common.audit.code import code_hash
from metamoe.common.audit.entries import (
    Arrival,
    Failure,
    Open,
    Receipt,
    array_entries,
    digest_of,
    receipt_statement,
    settings_hash,
)
from metamoe.common.audit.ledger import Ledger
from metamoe.common.config import Settings
from metamoe.common.errors import MetaMoEError, ProtocolError, RunFailedError
from metamoe.common.events import EventLog
from metamoe.common.model.seed import Seed
from metamoe.common.wire import (
    ARRAYS,
    Envelope,
    Kind,
    RecordDict,
    Request,
    addressed,
    decode_audit,
    decode_reply,
    encode_request,
    question_hash,
    reply_artifacts,
)
from metamoe.server.state import RunState


@dataclass(frozen=True)
class Waiting:
    """A node is not there, or its process ended: it is waited for."""

    reason: str


Ask = Callable[[Kind, Mapping[int, RecordDict]], Iterable[tuple[int, RecordDict | MetaMoEError | Waiting]]]
"""Sends each node its request and yields (node, reply) as replies come. A node that failed gives an error instead; one that is
waited for says so before.
"""


@dataclass
class Transfer:
    """What one client received and sent: bytes of array data, and each array it sent."""

    name: str
    bytes_down: int = 0
    bytes_up: int = 0
    artifacts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Missing:
    """A client that a run went on without: the stage in which it dropped out, and why."""

    name: str
    stage: Kind
    reason: str


class Exchange:
    """The clients of one run, as the stages see them: numbered 0 to K - 1, whatever nodes they are and whoever answers
    first.

    A client that fails is left out from then on, in ``missing`` and no longer in ``members``, while as many as the settings'
    quorum are left; with fewer the run ends with its error.
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
        state: RunState,
    ) -> None:
        names = settings.client_names
        self.transfers = [Transfer(name) for name in names]
        self._settings, self._seed, self._public, self._ask, self._events = settings, seed, public, ask, events
        self.missing = _left_out(state)
        gone = {missing.name for missing in self.missing}
        self.members = [client for client in settings.members if names[client] not in gone]
        self._known = [
            k for k in settings.members if state.taken_over("profile", names[k]) and state.reply("profile", names[k])
        ]
        self._nodes, self._clients = list(nodes), dict[int, int]()
        self._ledger, self._state, self._run = ledger, state, state.run
        self._keys: dict[int, str] = {}
        self._failures: list[str] = []
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
        # What was signed for before the run was interrupted may not have reached its client.
        self._receipts: dict[int, dict[Kind, Receipt]] = {client: {} for client in self.members}
        for arrival in ledger.run(self._run):
            if isinstance(arrival, Arrival) and arrival.client in self._receipts:
                digest = digest_of(arrival.arrays)
                self._receipts[arrival.client][arrival.stage] = Receipt(
                    run=self._run, message=arrival.message, arrays=digest, signature=arrival.signature
                )

    def close(self) -> None:
        """The run is over: the server's ledger is sealed."""
        self._ledger.seal(self._run)

    def request(self, arrays: Mapping[str, np.ndarray], experts: Sequence[str] = ()) -> RecordDict:
        """A request that carries these arrays; of a delivery, also the names of its experts."""
        hashes = self._seed.fingerprint, self._public
        return encode_request(
            Request(self._settings, *hashes, arrays, members=self.members, experts=experts, known=self._known)
        )

    def profiles(self) -> dict[int, dict[str, np.ndarray]]:
        """Ask every node who it is and what its data looks like to the seed. The replies by client, in the clients' order.

        Of a run that goes on, all are asked again, as nodes may be others than before; what they say must be the same. Those
        whose replies were taken over from an earlier run only say who they are.

        Raises:
            RunFailedError: two nodes say that they are the same client.
            ProtocolError: a client says something else than before.
            MetaMoEError: as :meth:`ask`.
        """
        found: dict[int, dict[str, np.ndarray]] = {}
        for node, arrays in self._replies("profile", {node: self.request({}) for node in self._nodes}):
            client = int(arrays["client"])
            if not 0 <= client < self._settings.clients:
                raise ProtocolError(f"a node says it is client {client}, but the run has clients = {self._settings.clients}")
            name = self.transfers[client].name
            if client in found:
                raise RunFailedError(f"two nodes say that they are client {name}; give each its own partition-id")
            if client not in self.members:
                # The run went on without it.
                self._nodes.remove(node)
                continue
            before = self._state.reply("profile", name)
            if before is None:
                self._state.keep("profile", name, arrays)
            elif client not in self._known and arrays_hash(before) != arrays_hash(arrays):
                raise ProtocolError(f"client {name} says something else than before the run was interrupted")
            found[client], self._clients[node] = before or arrays, client
            self._count(client, 0, arrays)
            self._events("profile", len(found), len(self._settings.members), name)
        # A node that failed before it said which client it is can be any of those that did not.
        reason = "; ".join(self._failures) or "it is not connected"
        for client in [client for client in self.members if client not in found]:
            name = self.transfers[client].name
            # Its expert is here: it can be part of the model, though nobody will deliver that.
            if (before := self._state.reply("profile", name)) and self._state.reply("expert", name):
                found[client] = before
                if client not in self._known:
                    self._count(client, 0, before)
            else:
                self._leave_out(client, "profile", reason)
        if len(self.members) < self._settings.least_clients:
            named = ", ".join(missing.name for missing in self.missing)
            raise RunFailedError(f"{len(self.members)} clients are left of the run; missing: {named}; {reason}")
        return {client: found[client] for client in self.members}

    def ask(self, kind: Kind, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Send each client its request, but to those who have answered it; yield (client, arrays) in the order in which replies
        come, those that are here first. Each is in the run's state before it is yielded.

        Raises:
            ProtocolError: a reply that is not exactly what was declared, and too few clients are left.
            MetaMoEError: a client reports this error, and too few are left.
            RunFailedError: clients did not answer in time, and too few are left.
        """
        self._events(kind, 0, len(requests))
        for done, (client, arrays) in enumerate(self._answers(kind, requests), start=1):
            if not self._state.taken_over(kind, self.transfers[client].name):
                self._count(client, payload_bytes(requests[client]), arrays)
            self._events(kind, done, len(requests), self.transfers[client].name)
            yield client, arrays

    def _answers(self, kind: Kind, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """What each client answered, now or before the run was interrupted."""
        left = set(requests)
        for client in requests:
            name = self.transfers[client].name
            if kind == "expert" and not self._state.answers(kind, name, question_hash([], requests[client])):
                continue
            if (before := self._state.reply(kind, name)) is not None:
                left.remove(client)
                yield client, before
        by_node = {node: requests[client] for node, client in self._clients.items() if client in left}
        for client in sorted(left - set(self._clients.values())):
            self._leave_out(client, kind, "it is not connected")
        for node, arrays in self._replies(kind, by_node):
            client = self._clients[node]
            self._state.keep(kind, self.transfers[client].name, arrays)
            yield client, arrays

    def _replies(self, kind: Kind, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        messages = {node: secrets.token_hex(16) for node in requests}
        waiting, absent = set(requests), set[int]()
        for node, content in self._ask(kind, {node: self._addressed(c, node, messages[node]) for node, c in requests.items()}):
            if isinstance(content, Waiting):
                self._events("waiting", 0, 1, self._name(kind, node))
                absent.add(node)
                continue
            waiting.remove(node)
            if node in absent:
                self._events("waiting", 1, 1, self._name(kind, node))
            try:
                if isinstance(content, MetaMoEError):
                    raise type(content)(f"{self._name(kind, node)} could not answer {kind!r}: {content}")
                try:
                    arrays, extra = self._decoded(kind, content), decode_audit(kind, content)
                except ProtocolError as error:
                    raise ProtocolError(f"{self._name(kind, node)}, reply to {kind!r}: {error}") from error
            except MetaMoEError as error:
                self._ledger.append(Failure(run=self._run, message=messages[node], stage=kind, code=error.exit_code))
                self._drop(kind, [node], error)
                continue
            self._arrived(kind, node, messages[node], arrays, extra)
            yield node, arrays
        if waiting:
            missing = ", ".join(sorted(self._name(kind, node) for node in waiting))
            seconds = self._settings.compute.timeout
            late = RunFailedError(f"no answer to {kind!r} within compute.timeout = {seconds:.0f} s from {missing}")
            self._drop(kind, sorted(waiting), late)

    def _decoded(self, kind: Kind, content: RecordDict) -> dict[str, np.ndarray]:
        """A reply that is what this client was asked for, and no more."""
        asked = reply_artifacts(kind, self._settings, self._seed)
        if kind != "profile":
            return decode_reply(content, asked)
        introduced = reply_artifacts(kind, self._settings, self._seed, introduced=True)
        only = set(content.array_records.get(ARRAYS, ())) == {artifact.name for artifact in introduced}
        arrays = decode_reply(content, introduced if only else asked)
        client = int(arrays["client"])
        if only != (client in self._known) and asked != introduced:
            raise ProtocolError(f"client {client} says {'no more than' if only else 'more than'} who it is")
        return arrays

    def _drop(self, kind: Kind, nodes: Sequence[int], error: MetaMoEError) -> None:
        """Go on without these nodes, or end the run with the error if too few are left."""
        self._nodes = [node for node in self._nodes if node not in nodes]
        if len(self._nodes) < self._settings.least_clients:
            before = ", ".join(missing.name for missing in self.missing)
            raise type(error)(f"{error}; missing before: {before}; quorum = {self._settings.quorum}") if before else error
        self._failures.append(str(error))
        for client in [self._clients.pop(node) for node in nodes if node in self._clients]:
            self._leave_out(client, kind, str(error))

    def _leave_out(self, client: int, kind: Kind, reason: str) -> None:
        missing = Missing(self.transfers[client].name, kind, reason)
        self.members = [member for member in self.members if member != client]
        self.missing.append(missing)
        self._state.note("missing", **asdict(missing))

    def _addressed(self, content: RecordDict, node: int, message: str) -> RecordDict:
        receipts = list(self._receipts[self._clients[node]].values()) if node in self._clients else []
        envelope = Envelope(run=self._run, message=message, key=self._ledger.public, receipts=receipts)
        return addressed(content, envelope)

    def _arrived(
        self, kind: Kind, node: int, message: str, arrays: Mapping[str, np.ndarray], extra: Mapping[str, np.ndarray]
    ) -> None:
        """Write down what arrived, and sign for it."""
        if "audit-key" in extra:
            self._keys[node] = extra["audit-key"].tobytes().hex()
        client = int(arrays["client"]) if kind == "profile" else self._clients[node]
        entries = array_entries({**arrays, **extra})
        digest = digest_of(entries)
        signature = self._ledger.sign(receipt_statement(self._run, message, digest))
        if client in self._receipts:
            receipt = Receipt(run=self._run, message=message, arrays=digest, signature=signature)
            self._receipts[client][kind] = receipt
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
        return f"node {node}" if kind == "profile" else f"client {self.transfers[self._clients[node]].name}"

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


def _left_out(state: RunState) -> list[Missing]:
    """Those whom a run that goes on has gone on without: proxies were chosen, or the model was made, without them. All others
    have another chance.
    """
    made_by: dict[str, str] = {"profile": "select", "expert": "unify"}
    found = {}
    for line in state.notes("missing"):
        stage, name = line["stage"], line["name"]
        if stage in made_by and state.notes(made_by[stage]) and state.reply(stage, name) is None:
            found[name] = Missing(name, stage, line["reason"])
    return list(found.values())


def payload_bytes(content: RecordDict) -> int:
    """Bytes of array data in a message."""
    return sum(array.numpy().nbytes for record in content.array_records.values() for array in record.values())
