"""Whatever is said to a gateway, it neither falls nor lets anything pass."""

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.app.message import make_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from google.protobuf.message import Message as Proto
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from metamoe.audit.gateway.fleet import METHODS, RefusedError
from metamoe.audit.gateway.gateway import Gateway
from metamoe.audit.gateway.upstream import Traffic, UpstreamError, _read_key
from metamoe.common.audit.policy import policy_text
from metamoe.common.config import Settings
from metamoe.common.model.seed import load_seed
from metamoe.common.wire import MESSAGE_TYPE, Envelope, encode_request
from metamoe.common.wire import Request as Question
from tests.conftest import small_run
from tests.unit.audit.conftest import NODE, OPEN, RUN, Server, _ids, honest

_SOON = 240


@dataclass
class Line:
    """In place of the way to the server: what would have been sent."""

    public_key: bytes
    server: Server = field(default_factory=Server)
    sent: list[tuple[str, Proto]] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)

    def call(self, method: str, request: Proto, answer: type[Proto]) -> Proto:
        self.sent.append((method, request))
        return answer.FromString(self.server.answer(method, request.SerializeToString()).SerializeToString())


class Situation:
    """A gateway that waits for a client's reply, and what an honest client would say to it."""

    def __init__(self, folder: Path, keys: Path, settings: Settings) -> None:
        self._key = _read_key(keys / "clients" / "client-0" / "node.key")
        self.line, self._signed = Line(public_key_to_bytes(self._key.public_key())), ("", "", None)
        (folder / "policy.toml").write_text(policy_text(OPEN))
        self.gateway = Gateway(folder / "gateway", folder / "policy.toml", self.line, "b" * 64)
        self.node = Node(node_id=NODE)
        self.say(
            "activate-node", ActivateNodeRequest(public_key=self.line.public_key, heartbeat_interval=30).SerializeToString()
        )
        self._settings, self.random = settings, 0
        self.ask()

    def ask(self) -> None:
        """A request that has no reply yet, and the honest reply's parts."""
        seed = load_seed(self._settings.seed_model).fingerprint
        self.line.server.ask(encode_request(Question(self._settings, seed, "a" * 64, {}, Envelope())), MESSAGE_TYPE["profile"])
        pulled = PullMessagesResponse.FromString(
            self.say("pull-messages", PullMessagesRequest(node=self.node).SerializeToString())
        )
        for object_id in _ids(pulled.message_object_trees[0]):
            request = PullObjectRequest(node=self.node, run_id=RUN, object_id=object_id)
            self.say("pull-object", request.SerializeToString())
        reply = Message(honest(self._settings), reply_to=message_from_proto(pulled.messages_list[0]))
        self.objects = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.reply = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(make_message(reply.metadata, type(reply.content)()))],
            message_object_trees=[get_object_tree(reply)],
        )
        self.session = reply.metadata.reply_to_message_id

    def say(self, method: str, body: bytes) -> bytes:
        timestamp = now()
        if self._signed[2] is None or (timestamp - self._signed[2]).total_seconds() > _SOON:
            text = timestamp.isoformat()
            self._signed = text, b64encode(sign_message(self._key, text.encode())).decode(), timestamp
        headers = {
            TIMESTAMP_HEADER: self._signed[0],
            FLEET_HTTP_SIGNATURE_HEADER: self._signed[1],
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.line.public_key).decode(),
        }
        return self.gateway.handle(method, headers, body)


@pytest.fixture(scope="module")
def situation(keys: Path, tmp_path_factory: pytest.TempPathFactory, seed_folder: Path) -> Iterator[Situation]:
    with pytest.MonkeyPatch.context() as patched:
        # Nobody pulls the plug here, and there are many files.
        patched.setattr("os.fsync", lambda _: None)
        yield Situation(tmp_path_factory.mktemp("random"), keys, small_run(seed_folder))


def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few bytes changed, taken out, or put in."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(found) - 1, 0)))
        match draw(st.sampled_from(("change", "cut", "insert", "end"))):
            case "change" if found:
                found[place] = draw(st.integers(0, 255))
            case "cut":
                del found[place : place + draw(st.integers(1, 40))]
            case "insert":
                found[place:place] = draw(st.binary(min_size=1, max_size=40))
            case _:
                del found[place:]
    return bytes(found)


@st.composite
def trees(draw: st.DrawFn, names: list[str]) -> ObjectTree:
    ids = st.sampled_from(names) | st.text(max_size=5) | st.binary(max_size=8).map(lambda b: hashlib.sha256(b).hexdigest())
    return draw(
        st.recursive(
            st.builds(lambda name: ObjectTree(object_id=name), ids),
            lambda inner: st.builds(lambda n, c: ObjectTree(object_id=n, children=c), ids, st.lists(inner, max_size=3)),
            max_leaves=8,
        )
    )


@st.composite
def messages(draw: st.DrawFn, situation: Situation) -> list[tuple[str, bytes]]:
    """What a client might say: bytes, requests of Flower's with anything in them, and replies that are almost honest."""
    objects, honest_reply = situation.objects, situation.reply
    match draw(st.sampled_from(("bytes", "spoilt", "tree", "object"))):
        case "bytes":
            return [(draw(st.sampled_from([*METHODS, "register-node", "../x"])), draw(st.binary(max_size=300)))]
        case "spoilt":
            return [("push-messages", spoilt(draw, honest_reply.SerializeToString(deterministic=True)))]
        case "tree":
            request = PushMessagesRequest()
            request.CopyFrom(honest_reply)
            tree = draw(trees(list(objects)))
            request.message_object_trees[0].CopyFrom(tree)
            request.messages_list[0].metadata.message_id = tree.object_id
            pushed = [("push-messages", request.SerializeToString(deterministic=True))]
            bodies = objects | {hashlib.sha256(c).hexdigest(): c for c in draw(st.lists(st.binary(max_size=8), max_size=2))}
        case _:
            # One object is another, and those above it name it.
            first = draw(st.sampled_from([n for n, c in objects.items() if not c.startswith(b"Message ")]))
            renamed: dict[str, str] = {}
            bodies = {}
            for name, content in objects.items():
                new = content
                if name == first:
                    # Other numbers of the declared form may leave; more of them may not.
                    is_numbers = content.startswith(b"ArrayChunk ")
                    new = content + draw(st.binary(min_size=1, max_size=9)) if is_numbers else spoilt(draw, content)
                for old, anew in renamed.items():
                    new = new.replace(old.encode(), anew.encode())
                renamed[name] = hashlib.sha256(new).hexdigest()
                bodies[renamed[name]] = new
            text = honest_reply.SerializeToString(deterministic=True)
            for old, anew in renamed.items():
                text = text.replace(old.encode(), anew.encode())
            pushed = [("push-messages", text)]
    for name, content in bodies.items():
        request = PushObjectRequest(
            node=situation.node, run_id=RUN, object_id=name, object_content=content, session_id=situation.session
        )
        pushed.append(("push-object", request.SerializeToString(deterministic=True)))
    return pushed


def nothing_passes(data: st.DataObject, situation: Situation) -> None:
    for method, body in data.draw(messages(situation)):
        situation.random += 1
        try:
            situation.say(method, body)
        except (RefusedError, UpstreamError):
            continue
    answered = False
    for method, request in situation.line.sent:
        if method == "push-messages":
            answered = True
            assert request.messages_list[0].HasField("error")
            assert not request.messages_list[0].error.reason
        if method == "push-object":
            assert request.object_content.startswith(b"Message  ")
    situation.line.sent.clear()
    if answered or situation.gateway._requests.get(situation.session).reply():
        situation.ask()
        situation.line.sent.clear()


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@given(data=st.data())
@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
def test_random_messages_do_not_pass(situation: Situation, data: st.DataObject) -> None:
    nothing_passes(data, situation)


@pytest.mark.slow
def test_ten_thousand_random_messages_do_not_pass(situation: Situation) -> None:
    situation.random = 0

    @given(data=st.data())
    @hypothesis_settings(max_examples=2_000, deadline=None, suppress_health_check=QUIET)
    def said(data: st.DataObject) -> None:
        nothing_passes(data, situation)

    said()
    assert situation.random >= 10_000
