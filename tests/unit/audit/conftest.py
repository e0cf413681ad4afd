"""A gateway between Flower's own client and a server, over real TLS and real sockets; the server notes down what arrives."""

import hashlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunResponse, Run
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from metamoe.audit.gateway.gateway import Gateway
from metamoe.audit.gateway.server import application
from metamoe.audit.gateway.upstream import Upstream, _read_key
from metamoe.common.audit.policy import DEFAULT, Policy, policy_text
from metamoe.common.config import Settings
from metamoe.common.model.seed import load_seed
from metamoe.common.wire import AUDIT_ARTIFACTS, MESSAGE_TYPE, Envelope, Kind, encode_reply, encode_request, reply_artifacts
from metamoe.common.wire import Request as Question
from metamoe.deploy.flower import free_port
from metamoe.deploy.keys import Federation, make_keys

RUN, NODE = 77, 4_242
BUNDLE = b"the agreed bundle"
OPEN = DEFAULT.model_copy(update={"limits": DEFAULT.limits.model_copy(update={"reply_time_step": 0})})


@dataclass
class Server:
    """The server's Fleet API, as far as a client can see it.

    Attributes:
        arrived: every request: its path, headers and body.
        objects: all that it has to give, by their ids.
        waiting: messages that it has for the client, and the trees of their objects.
        bundle: the app bundle of its runs.
        version: of its app.
        down: whether it answers to nothing that is pushed.
    """

    arrived: list[tuple[str, str, bytes]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    waiting: list[PullMessagesResponse] = field(default_factory=list)
    bundle: bytes = BUNDLE
    version: str = version("metamoe-fl")
    down: bool = False

    def ask(self, content: RecordDict, message_type: str = MESSAGE_TYPE["profile"]) -> Message:
        """Put a message into the queue."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1
        message = Message(content, dst_node_id=NODE, message_type=message_type)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.objects |= {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        bare = message_to_proto(make_message(message.metadata, RecordDict()))
        self.waiting.append(PullMessagesResponse(messages_list=[bare], message_object_trees=[get_object_tree(message)]))
        return message

    def answer(self, method: str, body: bytes) -> object:
        match method:
            case "activate-node":
                return ActivateNodeResponse(node_id=NODE)
            case "send-node-heartbeat":
                return SendNodeHeartbeatResponse(success=True)
            case "pull-messages":
                return self.waiting.pop(0) if self.waiting else PullMessagesResponse()
            case "get-run":
                return GetRunResponse(run=Run(run_id=RUN, fab_hash=_sha256(self.bundle), fab_version=self.version))
            case "get-fab":
                return GetFabResponse(fab=Fab(hash_str=_sha256(self.bundle), content=self.bundle))
            case "pull-object":
                content = self.objects.get(PullObjectRequest.FromString(body).object_id)
                return PullObjectResponse(object_found=bool(content), object_available=bool(content), object_content=content)
            case "push-messages":
                tree = PushMessagesRequest.FromString(body).message_object_trees[0]
                return PushMessagesResponse(objects_to_push=_ids(tree), session_id="session")
            case "push-object":
                return PushObjectResponse(stored=True)
            case _:
                return ConfirmMessageReceivedResponse()

    def pushed(self) -> list[PushMessagesRequest]:
        """The replies that arrived."""
        return [PushMessagesRequest.FromString(body) for path, _, body in self.arrived if path == "push-messages"]

    def content(self) -> dict[str, bytes]:
        """The objects that arrived."""
        requests = [PushObjectRequest.FromString(body) for path, _, body in self.arrived if path == "push-object"]
        return {request.object_id: request.object_content for request in requests}

    def codes(self) -> list[int]:
        """Of each reply its error's code; 0 for one that is none."""
        return [request.messages_list[0].error.code for request in self.pushed()]

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)

        @app.post("/v1/{api}/{method}")
        async def take(api: str, method: str, request: Request) -> Response:
            body = await request.body()
            self.arrived.append((method if api == "fleet" else f"{api}/{method}", repr(request.headers.raw), body))
            if self.down and method.startswith("push"):
                return Response(status_code=503)
            return Response(self.answer(method, body).SerializeToString(), media_type="application/protobuf")

        return app


class Relay:
    """A wire on which somebody counts."""

    def __init__(self, port: int) -> None:
        self.up = self.down = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._to = port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pump, args=(near, far, "up"), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, "down"), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, way: str) -> None:
        try:
            while content := source.recv(65_536):
                setattr(self, way, getattr(self, way) + len(content))
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        self._listener.close()


@dataclass
class Between:
    """A client, its gateway and the server."""

    folder: Path
    server: Server
    relay: Relay
    client: FleetHttpClient
    gateway: Gateway
    settings: Settings
    node: Node = field(default_factory=lambda: Node(node_id=NODE))

    def activate(self) -> None:
        own = public_key_to_bytes(_read_key(self.folder / "node.key").public_key())
        self.client.ActivateNode(ActivateNodeRequest(public_key=own, heartbeat_interval=30))

    def asked(self, kind: Kind = "profile", run: str = "", **settings: object) -> Message:
        """The server asks, and the SuperNode pulls all of it."""
        chosen = self.settings.model_copy(update=settings) if settings else self.settings
        arrays = {"proxies": np.arange(chosen.proxies.count)} if kind == "expert" else {}
        envelope = Envelope(run=run or secrets.token_hex(16), message=secrets.token_hex(16))
        seed = load_seed(chosen.seed_model).fingerprint
        self.server.ask(encode_request(Question(chosen, seed, "a" * 64, arrays, envelope)), MESSAGE_TYPE[kind])
        return self.pulled()

    def pulled(self) -> Message:
        answer = self.client.PullMessages(PullMessagesRequest(node=self.node))
        for object_id in _ids(answer.message_object_trees[0]):
            self.client.PullObject(PullObjectRequest(node=self.node, run_id=RUN, object_id=object_id))
        return message_from_proto(answer.messages_list[0])

    def push(self, reply: Message, change: Callable[[PushMessagesRequest], object] = lambda _: None) -> None:
        """Push a reply as a SuperNode does, once it is changed."""
        request, objects = self.deflated(reply)
        change(request)
        self.push_raw(request, objects)

    def deflated(self, reply: Message) -> tuple[PushMessagesRequest, dict[str, bytes]]:
        """What a SuperNode pushes of a reply: what is said of it, and its objects."""
        objects = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
        reply.metadata.__dict__["_message_id"] = reply.object_id
        bare = reply if reply.has_error() else make_message(reply.metadata, RecordDict())
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(bare)],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[1.5],
        )
        return request, objects

    def push_raw(self, request: PushMessagesRequest, objects: dict[str, bytes]) -> None:
        answer = self.client.PushMessages(request)
        for object_id in answer.objects_to_push:
            stored = self.client.PushObject(
                PushObjectRequest(
                    node=self.node,
                    run_id=RUN,
                    object_id=object_id,
                    object_content=objects[object_id],
                    session_id=answer.session_id,
                )
            )
            assert stored.stored

    def fab(self, run: int = RUN) -> bytes:
        return self.client.GetFab(GetFabRequest(node=self.node, hash_str=_sha256(BUNDLE), run_id=run)).fab.content


def arrays_of(settings: Settings, kind: Kind = "profile") -> dict[str, np.ndarray]:
    """Arrays as they are declared."""
    rng = np.random.default_rng(0)
    artifacts = reply_artifacts(kind, settings, load_seed(settings.seed_model))
    return {a.name: rng.normal(size=a.shape).astype(a.dtype) * (a.name != "client") for a in artifacts}


def key_of(kind: Kind = "profile", number: int = 7) -> dict[str, np.ndarray]:
    """What a client adds for the audit to its first reply."""
    return {a.name: np.full(a.shape, number, a.dtype) for a in AUDIT_ARTIFACTS[kind]}


def honest(settings: Settings, kind: Kind = "profile") -> RecordDict:
    return encode_reply(arrays_of(settings, kind), key_of(kind) if kind == "profile" else None)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gateway-keys") / "federation"
    make_keys(folder, Federation(host="localhost", port=1, clients=1), 2, datetime.now(UTC))
    return folder


@contextmanager
def serving(app: FastAPI, port: int, certificate: Path) -> Iterator[None]:
    config = uvicorn.Config(
        app,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=str(certificate.with_suffix(".key")),
        log_level="error",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def between(
    keys: Path, folder: Path, settings: Settings, policy: Policy = OPEN, server: Server | None = None
) -> Iterator[Between]:
    """All three, running; a folder that was used before is a gateway that is started again."""
    own, server = keys / "clients" / "client-0", server or Server()
    (folder / "policy.toml").write_text(policy_text(policy))
    port, gate = free_port(), free_port()
    with serving(server.app(), port, keys / "server" / "server.crt"):
        relay = Relay(port)
        upstream = Upstream(f"localhost:{relay.port}", own / "ca.crt", own / "node.key")
        gateway = Gateway(folder / "gateway", folder / "policy.toml", upstream, _sha256(BUNDLE))
        with (
            serving(application(gateway, upstream), gate, own / "gateway.crt"),
            client_of(gate, own / "gateway.crt", own / "node.key") as client,
        ):
            found = Between(own, server, relay, client, gateway, settings)
            found.activate()
            yield found
        relay.close()


def client_of(port: int, authority: Path, key: Path) -> FleetHttpClient:
    """Flower's own client, as its SuperNode makes it."""
    private = _read_key(key)
    interceptors = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(private, private.public_key())]
    return FleetHttpClient.from_server_address(f"localhost:{port}", False, str(authority), interceptors)


def _ids(tree: object) -> list[str]:
    return list(dict.fromkeys([*(i for child in tree.children for i in _ids(child)), tree.object_id]))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
