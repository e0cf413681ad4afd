"""A gateway that belongs to the data's owner: between a client's SuperNode and the network, and the client's only way out.

The client's app arrives from the server, so what it promises of itself is a courtesy. Here every request is read, held against
what it may be, and made anew for the server: nothing that a client wrote goes further but the numbers of arrays that are
declared and that the policy allows, and codes of errors. A reply is kept until all of it is there; then it is in the ledger of
the gateway, and then it leaves.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from typing import NoReturn, TypeVar

from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from google.protobuf.message import Message as Proto

from metamoe.audit.gateway.fleet import LARGEST_REQUEST, METHODS, RefusedError, authenticate, objects_of, read
from metamoe.audit.gateway.passing import Passing
from metamoe.audit.gateway.requests import Asked, Requests, is_named_by
from metamoe.audit.gateway.upstream import Upstream, UpstreamError
from metamoe.common.errors import (
    LedgerError,
    MetaMoEError,
    PolicyError,
    ProtocolError,
    StateFileError,
    VersionMismatchError,
    all_errors,
)
from metamoe.common.files import write_atomically, write_json
from metamoe.common.wire import CLIENT_ERROR_CODE, Kind, kind_of

LONGEST_WAIT = 20.0
"""Seconds that a request is let wait for the policy's time step; a SuperNode asks again after 30."""
_log = getLogger("metamoe.gateway")
_Answer = TypeVar("_Answer", bound=Proto)


class Gateway:
    """What passes between one SuperNode and one server.

    Args:
        folder: of what it keeps: its ledger in ``audit/``, and what is on its way.
        policy: the owner's policy file; read anew for every reply.
        upstream: the server.
        bundle: SHA-256 of the one app bundle that the client may run.
        now: the clock.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        folder: Path,
        policy: Path,
        upstream: Upstream,
        bundle: str,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._upstream, self._bundle, self._now, self._sleep = upstream, bundle, now, sleep
        self._folder, self._requests = folder, Requests(folder / "requests")
        self._passing = Passing(folder / "audit", policy)
        self._node = self._read_node()
        # One reply at a time, and each once: a SuperNode pushes objects beside each other, and again after a while.
        self._leaving = threading.RLock()

    def handle(self, method: str, headers: Mapping[str, str], body: bytes) -> bytes:
        """The answer to one request of the SuperNode's.

        Raises:
            RefusedError: it does not pass.
            UpstreamError: the server is not there, or says no.
        """
        if method not in METHODS:
            raise RefusedError(f"{method[:100]!r} is nothing that a client may ask", 404)
        if len(body) > LARGEST_REQUEST:
            raise RefusedError(f"{len(body)} bytes; at most {LARGEST_REQUEST} are read", 413)
        authenticate(headers, self._upstream.public_key)
        request = read(METHODS[method], body)
        try:
            answer = self._answered(method, request)
        except RefusedError as error:
            _log.warning("refused %s: %s", method, error)
            raise
        except (OSError, LedgerError, StateFileError) as error:
            # A SuperNode tries again after this: when there is room on the disk, its reply leaves.
            _log.warning("%s: nothing passes: %s", method, error)
            raise RefusedError("cannot be written down", 503) from error
        return answer.SerializeToString()

    def save_traffic(self) -> None:
        """Write down how many bytes have crossed the network since this process began."""
        write_json(self._folder / "traffic.json", asdict(self._upstream.traffic))

    def _answered(self, method: str, request: Proto) -> Proto:
        match request:
            case ActivateNodeRequest():
                return self._activate(request)
            case PullMessagesRequest():
                return self._pull_messages(request)
            case GetRunRequest():
                return self._get_run(request)
            case GetFabRequest():
                return self._get_fab(request)
            case PullObjectRequest():
                return self._pull_object(request)
            case PushMessagesRequest():
                return self._push_messages(request)
            case PushObjectRequest():
                return self._push_object(request)
            case ConfirmMessageReceivedRequest():
                asked = self._asked(request.message_object_id, request.run_id)
                run = asked.message.metadata.run_id
                only = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=asked.id)
                return self._passed(method, request, only, ConfirmMessageReceivedResponse)
            case SendNodeHeartbeatRequest():
                beat = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
                return self._passed(method, request, beat, SendNodeHeartbeatResponse)
            case _:
                only = DeactivateNodeRequest(node_id=self._node.node_id)
                return self._passed(method, request, only, DeactivateNodeResponse)

    def _passed(self, method: str, request: Proto, only: Proto, answer: type[_Answer]) -> _Answer:
        """The server's answer to a request that is the one it can be."""
        if request != only:
            raise RefusedError("holds something else than this node may say")
        return self._upstream.call(method, only, answer)

    def _asked(self, message_id: str, run: int) -> Asked:
        asked = self._requests.get(message_id)
        if asked is None or asked.message.metadata.run_id != run:
            raise RefusedError("is of no message that the server has sent")
        return asked

    # What comes down.

    def _activate(self, request: ActivateNodeRequest) -> ActivateNodeResponse:
        only = ActivateNodeRequest(public_key=self._upstream.public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        answer = self._passed("activate-node", request, only, ActivateNodeResponse)
        self._node = Node(node_id=answer.node_id)
        write_atomically(self._folder / "node", str(answer.node_id))
        return answer

    def _read_node(self) -> Node:
        file = self._folder / "node"
        return Node(node_id=int(file.read_text())) if file.is_file() else Node()

    def _pull_messages(self, request: PullMessagesRequest) -> PullMessagesResponse:
        answer = self._passed("pull-messages", request, PullMessagesRequest(node=self._node), PullMessagesResponse)
        self.save_traffic()
        if not answer.messages_list:
            return PullMessagesResponse()
        pulled = PullMessagesResponse(
            messages_list=answer.messages_list[:1], message_object_trees=answer.message_object_trees[:1]
        )
        metadata = pulled.messages_list[0].metadata
        if not pulled.message_object_trees or metadata.message_id not in objects_of(pulled.message_object_trees[0]):
            raise RefusedError("the server sent a message without its objects", 502)
        asked = self._requests.add(pulled)
        try:
            kind_of(metadata.message_type)
        except ProtocolError as error:
            self._refuse(asked, error)
            return PullMessagesResponse()
        return pulled

    def _get_run(self, request: GetRunRequest) -> GetRunResponse:
        waiting = self._of_run(request.run_id)
        answer = self._passed("get-run", request, GetRunRequest(node=self._node, run_id=request.run_id), GetRunResponse)
        if answer.run.fab_version != version("metamoe-fl"):
            error = VersionMismatchError(
                f"the server's app is of MetaMoE-FL {answer.run.fab_version[:50]!r}, this gateway is "
                f"{version('metamoe-fl')!r}; install the same version"
            )
            self._refuse_all(waiting, error)
        self._check_bundle(waiting, answer.run.fab_hash)
        return answer

    def _get_fab(self, request: GetFabRequest) -> GetFabResponse:
        waiting = self._of_run(request.run_id)
        only = GetFabRequest(node=self._node, hash_str=self._bundle, run_id=request.run_id)
        answer = self._passed("get-fab", request, only, GetFabResponse)
        self._check_bundle(waiting, hashlib.sha256(answer.fab.content).hexdigest())
        return answer

    def _of_run(self, run: int) -> list[Asked]:
        if not (waiting := self._requests.of_run(run)):
            raise RefusedError("is of no run that asks this client")
        return waiting

    def _check_bundle(self, waiting: list[Asked], found: str) -> None:
        """The server's app bundle must be the agreed one; whoever asks for another hears that it was refused."""
        if found != self._bundle:
            self._refuse_all(waiting, PolicyError(f"the app bundle {found[:16]} is not the agreed one, {self._bundle[:16]}"))

    def _refuse_all(self, waiting: list[Asked], error: MetaMoEError) -> NoReturn:
        for asked in waiting:
            self._refuse(asked, error)
        raise RefusedError(str(error), 403)

    def _pull_object(self, request: PullObjectRequest) -> PullObjectResponse:
        holders = [asked for asked in self._of_run(request.run_id) if request.object_id in asked.objects]
        if not holders:
            raise RefusedError("is no object of a message that the server has sent")
        only = PullObjectRequest(node=self._node, run_id=request.run_id, object_id=request.object_id)
        answer = self._passed("pull-object", request, only, PullObjectResponse)
        if answer.object_available:
            if not is_named_by(request.object_id, answer.object_content):
                raise RefusedError("the server sent an object under another's name", 502)
            for asked in holders:
                asked.keep(request.object_id, answer.object_content)
        return answer

    # What goes up.

    def _push_messages(self, request: PushMessagesRequest) -> PushMessagesResponse:
        lengths = len(request.messages_list), len(request.message_object_trees)
        if request.node != self._node or lengths != (1, 1) or len(request.clientapp_runtime_list) > 1:
            raise RefusedError("is not one message of this node's")
        message, tree = request.messages_list[0], request.message_object_trees[0]
        said = message.metadata
        asked = self._asked(said.reply_to_message_id, said.run_id)
        own = asked.message.metadata
        told = (said.message_type, said.src_node_id, said.dst_node_id, said.group_id)
        if told != (own.message_type, self._node.node_id, own.src_node_id, own.group_id):
            raise RefusedError("is no reply to that message")
        *objects, root = objects_of(tree)
        kept = asked.reply()
        if root != said.message_id or (kept and kept.messages_list[0].metadata.message_id != root):
            raise RefusedError("is another reply to a message that has one")
        if message.HasField("error"):
            self._leave(asked, Error(_sent_code(message.error.code), ""))
            objects = []
        elif len(tree.children) != 1 or message.content.ByteSize():
            raise RefusedError("has no records, or more beside them")
        elif kept is None and not asked.is_done:
            self._keep_reply(asked, request)
        # The session is named by the message that is answered: so it outlives this process.
        return PushMessagesResponse(results={root: 0}, objects_to_push=[] if asked.is_done else objects, session_id=asked.id)

    def _keep_reply(self, asked: Asked, request: PushMessagesRequest) -> None:
        try:
            room = self._passing.room(kind_of(asked.message.metadata.message_type), asked.content())
        except LedgerError:
            raise
        except MetaMoEError as error:
            self._refuse(asked, error)
            raise RefusedError(str(error)) from error
        asked.keep_reply(request, room)

    def _push_object(self, request: PushObjectRequest) -> PushObjectResponse:
        asked = self._asked(request.session_id, request.run_id)
        reply = asked.reply()
        if request.node != self._node or reply is None:
            raise RefusedError("is of no message that was pushed")
        tree = reply.message_object_trees[0]
        *objects, _ = objects_of(tree)
        if request.object_id not in objects or not is_named_by(request.object_id, request.object_content):
            raise RefusedError("is no object of that message")
        with self._leaving:
            if asked.is_done:
                return PushObjectResponse(stored=True)
            have = asked.pushed_bytes()
            if request.object_id not in have:
                have[request.object_id] = len(request.object_content)
                if sum(have.values()) > asked.room:
                    error = ProtocolError(f"more than {asked.room} bytes in objects, which are all that is declared")
                    self._refuse(asked, error)
                    raise RefusedError(str(error))
                asked.push(request.object_id, request.object_content)
            if set(objects) <= set(have):
                self._leave(asked, tree.children[0].object_id)
        return PushObjectResponse(stored=True)

    def _refuse(self, asked: Asked, error: Exception) -> None:
        _log.warning("message %s: %s", asked.id[:8], error)
        code = error.exit_code if isinstance(error, MetaMoEError) else MetaMoEError.exit_code
        self._leave(asked, Error(CLIENT_ERROR_CODE + code, ""), at_once=True)

    def _leave(self, asked: Asked, reply: str | Error, *, at_once: bool = False) -> None:
        """Let a reply leave that is here as a whole, once: records by the id of their object, or an error. Of what was
        refused before it was computed the time tells nothing.

        Raises:
            RefusedError: it is not allowed, and an error's code left in its place; or it is not yet time.
            UpstreamError: the server is not there, or says no.
            LedgerError: it cannot be written down.
        """
        with self._leaving:
            if asked.is_done:
                return
            refused = None
            if not (asked.folder / "ready.pb").exists():
                content, refused = self._content(asked, reply)
                self._make_ready(asked, content)
            if not at_once:
                self._wait(asked)
            self._send(asked)
            asked.finish()
            self.save_traffic()
        if refused:
            raise RefusedError(refused)

    def _content(self, asked: Asked, reply: str | Error) -> tuple[RecordDict | Error, str]:
        """What leaves, and why it is not what was pushed."""
        try:
            kind = kind_of(asked.message.metadata.message_type)
        except ProtocolError as error:
            return Error(CLIENT_ERROR_CODE + error.exit_code, ""), ""
        if isinstance(reply, Error):
            self._write_down(kind, asked, reply.code)
            return reply, ""
        try:
            objects = asked.pushed_bytes().keys()
            return self._passing.released(kind, asked.content(), reply, objects, asked.pushed), ""
        except LedgerError:
            raise
        except Exception as error:
            _log.warning("message %s: %s", asked.id[:8], error)
            code = CLIENT_ERROR_CODE + (error.exit_code if isinstance(error, MetaMoEError) else MetaMoEError.exit_code)
            self._write_down(kind, asked, code)
            return Error(code, ""), str(error)

    def _write_down(self, kind: Kind, asked: Asked, code: int) -> None:
        try:
            self._passing.refused(kind, asked.content(), max(code - CLIENT_ERROR_CODE, MetaMoEError.exit_code))
        except LedgerError:
            raise
        except MetaMoEError as error:
            # What is no request of ours has no place in a ledger.
            _log.warning("message %s: %s", asked.id[:8], error)

    def _make_ready(self, asked: Asked, content: RecordDict | Error) -> None:
        """Make the message anew that leaves: when it was made, and how long it lives, is said by the gateway's clock."""
        message = Message(content, reply_to=asked.message)
        message.metadata.__dict__["_message_id"] = message.object_id
        tree = get_object_tree(message)
        root = message.deflate()
        empty = message if message.has_error() else make_message(message.metadata, RecordDict())
        push = PushMessagesRequest(node=self._node, messages_list=[message_to_proto(empty)], message_object_trees=[tree])
        write_atomically(asked.folder / "root.bin", root)
        write_atomically(asked.folder / "ready.pb", push.SerializeToString(deterministic=True))

    def _wait(self, asked: Asked) -> None:
        """Wait for a multiple of the policy's time step after the request came."""
        left = self._passing.due(asked.came, (asked.folder / "ready.pb").stat().st_mtime) - self._now()
        if left > 0:
            self._sleep(min(left, LONGEST_WAIT))
        if left > LONGEST_WAIT:
            raise RefusedError("is on its way", 503)

    def _send(self, asked: Asked) -> None:
        push = PushMessagesRequest.FromString((asked.folder / "ready.pb").read_bytes())
        session = asked.folder / "session.pb"
        if not session.exists():
            answer = self._upstream.call("push-messages", push, PushMessagesResponse)
            write_atomically(session, answer.SerializeToString())
        answer = PushMessagesResponse.FromString(session.read_bytes())
        metadata = push.messages_list[0].metadata
        for object_id in answer.objects_to_push:
            is_root = object_id == metadata.message_id
            request = PushObjectRequest(
                node=self._node,
                run_id=metadata.run_id,
                object_id=object_id,
                object_content=(asked.folder / "root.bin").read_bytes() if is_root else asked.pushed(object_id),
                session_id=answer.session_id,
            )
            if not self._upstream.call("push-object", request, PushObjectResponse).stored:
                # The server has forgotten the message: it is made anew when the SuperNode asks again.
                (asked.folder / "ready.pb").unlink()
                session.unlink()
                raise UpstreamError(503)


def _sent_code(code: int) -> int:
    """An error's code, if it is one of the product's or of Flower's; else that of an unknown error."""
    ours = {CLIENT_ERROR_CODE + error.exit_code for error in all_errors()}
    return code if code in ours or 0 < code <= ErrorCode.CLIENT_APP_CRASHED else CLIENT_ERROR_CODE + MetaMoEError.exit_code
