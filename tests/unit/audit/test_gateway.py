"""The owner's gateway: what is declared and allowed passes, and nothing else that a client says or a server sends."""

import errno
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import PrivateFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.log_pb2 import PushLogsRequest, PushLogsResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from metamoe.audit.gateway.upstream import Upstream, UpstreamError
from metamoe.common.audit.entries import Intent, Refusal, Resent
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.verify import Verdict, check_ledger, worst
from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, LedgerError, PolicyError, ProtocolError, VersionMismatchError
from metamoe.common.wire import ARRAYS, AUDIT, CLIENT_ERROR_CODE, encode_reply
from metamoe.deploy.keys import _private
from tests.conftest import small_run
from tests.unit.audit.conftest import BUNDLE, NODE, OPEN, RUN, Between, Server, arrays_of, between, client_of, honest, key_of

SECRET = b"patient 4711, diagnosis C50.9"
REFUSED = [CLIENT_ERROR_CODE + error.exit_code for error in (ProtocolError, PolicyError)]


@pytest.fixture(scope="module")
def settings(seed_folder: Path) -> Settings:
    return small_run(seed_folder)


@pytest.fixture
def wire(keys: Path, tmp_path: Path, settings: Settings) -> Iterator[Between]:
    with between(keys, tmp_path, settings) as found:
        yield found


@pytest.fixture(scope="module")
def running(keys: Path, tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Iterator[Between]:
    with between(keys, tmp_path_factory.mktemp("running"), settings) as found:
        yield found


@pytest.fixture
def shared(running: Between) -> Between:
    """One for tests that leave nothing behind but lines in its ledger."""
    running.server.arrived.clear()
    running.server.waiting.clear()
    return running


def entries(folder: Path) -> list[object]:
    return Ledger(folder / "gateway" / "audit").entries()


def test_what_is_declared_and_allowed_arrives_to_the_bit_and_is_in_the_ledger(wire: Between, tmp_path: Path) -> None:
    reply = Message(honest(wire.settings), reply_to=wire.asked())
    wire.push(reply)
    assert wire.server.codes() == [0]
    arrived = wire.server.content()
    sent = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
    # All but the message itself, which is made anew.
    assert set(sent) - set(arrived) == {reply.object_id}
    assert {name: arrived[name] for name in sent if name in arrived} == {n: c for n, c in sent.items() if n != reply.object_id}
    (intent,) = [entry for entry in entries(tmp_path) if isinstance(entry, Intent)]
    assert {a.name: a.sha256 for a in intent.arrays} == {
        name: hashlib.sha256(array.tobytes()).hexdigest()
        for name, array in (encode_arrays(arrays_of(wire.settings)) | key_of()).items()
    }


def encode_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in encode_reply(arrays)[ARRAYS].items()}


def with_record(wire: Between, name: str, record: object) -> None:
    content = honest(wire.settings)
    content[name] = record
    wire.push(Message(content, reply_to=wire.asked()))


def with_array(wire: Between, name: str, array: Array) -> None:
    content = honest(wire.settings)
    content[ARRAYS] = ArrayRecord({**content[ARRAYS], name: array})
    wire.push(Message(content, reply_to=wire.asked()))


def changed(wire: Between, change: Callable[[np.ndarray], np.ndarray], name: str = "seed-ffn-inputs") -> None:
    with_array(wire, name, Array(change(encode_arrays(arrays_of(wire.settings))[name])))


def secret_in_low_bits(array: np.ndarray) -> np.ndarray:
    hidden = np.resize(np.frombuffer(SECRET, np.uint8), array.shape).astype(np.uint32)
    return (array.view(np.uint32) | hidden).view(np.float32)


def behind_the_numbers(wire: Between) -> None:
    array = Array(encode_arrays(arrays_of(wire.settings))["seed-ffn-inputs"])
    with_array(wire, "seed-ffn-inputs", Array(array.dtype, array.shape, array.stype, array.data + SECRET))


def edited(change: Callable[[PushMessagesRequest], object]) -> Callable[[Between], None]:
    def cheat(wire: Between) -> None:
        wire.push(Message(honest(wire.settings), reply_to=wire.asked()), change)

    return cheat


def with_objects(wire: Between, change: Callable[[bytes], bytes], kind: bytes) -> None:
    """A reply with one object written otherwise, and all above it named anew."""
    request, objects = wire.deflated(Message(honest(wire.settings), reply_to=wire.asked()))
    first = next(name for name, content in objects.items() if content.startswith(kind + b" "))
    renamed: dict[str, str] = {}
    for name, content in list(objects.items()):
        new = change(content) if name == first else content
        for old, anew in renamed.items():
            new = new.replace(old.encode(), anew.encode())
        renamed[name] = hashlib.sha256(new).hexdigest()
        objects[renamed[name]] = new

    def rename(tree: ObjectTree) -> None:
        tree.object_id = renamed[tree.object_id]
        for child in tree.children:
            rename(child)

    rename(request.message_object_trees[0])
    request.messages_list[0].metadata.message_id = request.message_object_trees[0].object_id
    wire.push_raw(request, objects)


def with_body(content: bytes, body: bytes) -> bytes:
    kind, children, _ = content.partition(b"\0")[0].split(b" ")
    return kind + b" " + children + b" %d\0" % len(body) + body


def spaced(content: bytes) -> bytes:
    return with_body(content, content.partition(b"\0")[2].replace(b", ", b",  \t ").replace(b"{", b"{ \n"))


def many_times(content: bytes) -> bytes:
    about = json.loads(content.partition(b"\0")[2])
    about["arraychunk_ids"] *= 300_000
    return with_body(content, json.dumps(about).encode())


def twice(wire: Between) -> None:
    question = wire.asked()
    wire.push(Message(honest(wire.settings), reply_to=question))
    other = {name: array + (array.dtype.kind == "f") for name, array in arrays_of(wire.settings).items()}
    wire.push(Message(encode_reply(other, key_of()), reply_to=question))


def in_an_extra_object(wire: Between) -> None:
    request, objects = wire.deflated(Message(honest(wire.settings), reply_to=wire.asked()))
    extra = hashlib.sha256(SECRET).hexdigest()
    request.message_object_trees[0].children[0].children.add(object_id=extra)
    wire.push_raw(request, objects | {extra: SECRET})


def beside_the_records(wire: Between) -> None:
    request, objects = wire.deflated(Message(honest(wire.settings), reply_to=wire.asked()))
    extra = hashlib.sha256(SECRET).hexdigest()
    request.message_object_trees[0].children.add(object_id=extra)
    wire.push_raw(request, objects | {extra: SECRET})


def to_nothing(wire: Between) -> None:
    question = wire.asked()
    question.metadata.__dict__["_message_id"] = hashlib.sha256(SECRET).hexdigest()
    wire.push(Message(honest(wire.settings), reply_to=question))


def under_another_name(wire: Between) -> None:
    request, objects = wire.deflated(Message(honest(wire.settings), reply_to=wire.asked()))
    wire.push_raw(request, dict.fromkeys(objects, SECRET))


def unasked_object(wire: Between) -> None:
    wire.client.PushObject(
        PushObjectRequest(
            node=wire.node, run_id=RUN, object_id=hashlib.sha256(SECRET).hexdigest(), object_content=SECRET, session_id="x"
        )
    )


def with_headers(wire: Between, path: str, request: object, **more: str) -> None:
    """Flower's own headers, and more."""
    built = []
    client = wire.client._client
    client.event_hooks["request"] = [lambda sent: (sent.headers.update(more), built.append(sent))]
    try:
        wire.client._unary_unary(path=path, rpc_method="", request=request, response_type=PushMessagesResponse)
    finally:
        client.event_hooks["request"] = []


def compressed(wire: Between) -> None:
    body = gzip.compress(PullMessagesRequest(node=wire.node).SerializeToString() + SECRET)
    raw(wire, "/v1/fleet/pull-messages", body)


def raw(wire: Between, path: str, body: bytes) -> None:
    written = SimpleNamespace(SerializeToString=lambda **_: body)
    wire.client._unary_unary(path=path, rpc_method="", request=written, response_type=PushMessagesResponse)


def unknown_field(wire: Between) -> None:
    raw(wire, "/v1/fleet/pull-messages", PullMessagesRequest(node=wire.node).SerializeToString() + b"\xfa\x01\x1d" + SECRET)


def told_by(path: str, request: object) -> Callable[[Between], None]:
    def cheat(wire: Between) -> None:
        wire.client._unary_unary(path=path, rpc_method="", request=request, response_type=PushLogsResponse)

    return cheat


def other_key(wire: Between) -> None:
    wire.push(Message(honest(wire.settings), reply_to=wire.asked()))
    secret = {"audit-key": np.resize(np.frombuffer(SECRET, np.uint8), 32)}
    wire.push(Message(encode_reply(arrays_of(wire.settings), secret), reply_to=wire.asked(run="2" * 32)))


def unsigned_seal(wire: Between) -> None:
    wire.push(Message(honest(wire.settings), reply_to=wire.asked()))
    sizes = {"ledger-root": 32, "ledger-signature": 64}
    sealed = {name: np.resize(np.frombuffer(SECRET, np.uint8), size) for name, size in sizes.items()}
    wire.push(Message(encode_reply({}, sealed), reply_to=wire.asked("deliver")))


def not_allowed(wire: Between) -> None:
    wire.push(Message(honest(wire.settings), reply_to=wire.asked()))
    reply = encode_reply({"accuracy": np.array(12.5, np.float32)})
    wire.push(Message(reply, reply_to=wire.asked("deliver", report_accuracy=True)))


BYTES = Array(np.frombuffer(SECRET, np.uint8))
CHEATS: dict[str, Callable[[Between], object]] = {
    "an array of another name": lambda wire: with_array(wire, "extra", BYTES),
    "a record of another name": lambda wire: with_record(wire, "more", ArrayRecord({"a": BYTES})),
    "a config record": lambda wire: with_record(wire, "config", ConfigRecord({"text": SECRET})),
    "a metric record": lambda wire: with_record(wire, "metrics", MetricRecord({"loss": 4711.0})),
    "a config record in place of the arrays": lambda wire: with_record(wire, ARRAYS, ConfigRecord({"text": SECRET})),
    "metrics in place of the audit's arrays": lambda wire: with_record(wire, AUDIT, MetricRecord({"n": [1, 2]})),
    "doubles": lambda wire: changed(wire, lambda a: a.astype(np.float64)),
    "another shape": lambda wire: changed(wire, lambda a: np.concatenate([a, a])),
    "bytes behind the numbers": behind_the_numbers,
    "bits below those declared": lambda wire: changed(wire, secret_in_low_bits),
    "not a number": lambda wire: changed(wire, lambda a: np.full_like(a, np.nan)),
    "a norm beyond the policy's": lambda wire: changed(wire, lambda a: np.full_like(a, 2.0**60)),
    "another client's number": lambda wire: changed(wire, lambda _: np.array(4_711), "client"),
    "a pickle": lambda wire: with_array(wire, "seed-ffn-inputs", Array("float32", (1,), "torch.Tensor", b"\x80\x04" + SECRET)),
    "the run's number": edited(lambda r: setattr(r.messages_list[0].metadata, "run_id", 4_711)),
    "the message's type": edited(lambda r: setattr(r.messages_list[0].metadata, "message_type", SECRET.decode())),
    "the group": edited(lambda r: setattr(r.messages_list[0].metadata, "group_id", SECRET.decode())),
    "the recipient": edited(lambda r: setattr(r.messages_list[0].metadata, "dst_node_id", 4_711)),
    "the node": edited(lambda r: r.node.CopyFrom(Node(node_id=4_711))),
    "the message's id": edited(lambda r: setattr(r.messages_list[0].metadata, "message_id", SECRET.decode())),
    "records beside the objects": edited(
        lambda r: r.messages_list[0].content.items.add(key=SECRET.decode()).array_record.items.add(key="x")
    ),
    "two messages": edited(lambda r: r.messages_list.add().CopyFrom(r.messages_list[0])),
    "many run times": edited(lambda r: r.clientapp_runtime_list.extend([4.0, 7.0, 1.0, 1.0])),
    "an object that nothing names": in_an_extra_object,
    "an object beside the records": beside_the_records,
    "a deep tree": edited(
        lambda r: r.message_object_trees[0].children[0].children[0].children[0].children[0].children.add(object_id="a" * 64)
    ),
    "spaces": lambda wire: with_objects(wire, spaced, b"ArrayRecord"),
    "the order of a description": lambda wire: with_objects(
        wire, lambda c: with_body(c, json.dumps(dict(reversed(json.loads(c.partition(b"\0")[2]).items()))).encode()), b"Array"
    ),
    "a chunk named 300,000 times": lambda wire: with_objects(wire, many_times, b"Array"),
    "an object of another type": lambda wire: with_objects(
        wire, lambda c: c.replace(b"ArrayChunk", b"ArrayChunx", 1), b"ArrayChunk"
    ),
    "another reply to the same message": twice,
    "a reply to no message": to_nothing,
    "content under another's name": under_another_name,
    "an object of no message": unasked_object,
    "an unknown field": unknown_field,
    "compression": compressed,
    "ids of messages to pull": lambda wire: wire.client.PullMessages(
        PullMessagesRequest(node=wire.node, message_ids=[SECRET.decode()])
    ),
    "the time between heartbeats": lambda wire: wire.client.SendNodeHeartbeat(
        SendNodeHeartbeatRequest(node=wire.node, heartbeat_interval=47.11)
    ),
    "the key of a node": lambda wire: wire.client.ActivateNode(ActivateNodeRequest(public_key=SECRET, heartbeat_interval=30)),
    "a node that registers itself": lambda wire: wire.client.RegisterNode(RegisterNodeFleetRequest(public_key=SECRET)),
    "an object that nobody has": lambda wire: wire.client.PullObject(
        PullObjectRequest(node=wire.node, run_id=RUN, object_id=SECRET.decode())
    ),
    "a message that nobody sent": lambda wire: wire.client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=wire.node, run_id=RUN, message_object_id=SECRET.decode())
    ),
    "a run that nobody has": lambda wire: wire.client.GetRun(GetRunRequest(node=wire.node, run_id=4_711)),
    "an app bundle's hash": lambda wire: (
        wire.asked(),
        wire.client.GetFab(GetFabRequest(node=wire.node, run_id=RUN, hash_str=SECRET.decode())),
    ),
    "a log": told_by("/v1/runtime/push-logs", PushLogsRequest(logs=[SECRET.decode()])),
    "a run of its own": told_by("/v1/control/start-run", StartRunRequest()),
    "another method": told_by("/v1/fleet/push-metrics", PushLogsRequest(logs=[SECRET.decode()])),
    "a path with a query": told_by(f"/v1/fleet/pull?{SECRET.hex()}", PullMessagesRequest()),
    "another key for its ledger": other_key,
    "a seal that nobody signed": unsigned_seal,
    "what the policy does not allow": not_allowed,
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
def test_a_client_that_cheats_says_nothing(cheat: Callable[[Between], object], shared: Between) -> None:
    with pytest.raises(httpx.HTTPStatusError, match=r"Client error '4"):
        cheat(shared)
    # What was honest before the cheat has arrived; of the cheat at most the code of an error.
    later = shared.server.codes()[1:] if shared.server.codes()[:1] == [0] else shared.server.codes()
    assert set(later) <= {*REFUSED, CLIENT_ERROR_CODE + 1}
    everything = b"".join(path.encode() + headers.encode() + body for path, headers, body in shared.server.arrived)
    for said in (SECRET, SECRET.hex().encode(), hashlib.sha256(SECRET).hexdigest().encode()):
        assert said not in everything


@pytest.mark.parametrize(("said", "arrives", "noted"), [(1_020, 1_020, 20), (2, 2, 1), (4_711, 1_001, 1)])
def test_of_an_error_a_known_code_alone_arrives(said: int, arrives: int, noted: int, wire: Between, tmp_path: Path) -> None:
    wire.push(Message(Error(said, SECRET.decode()), reply_to=wire.asked()))
    (request,) = wire.server.pushed()
    assert (request.messages_list[0].error.code, request.messages_list[0].error.reason) == (arrives, "")
    assert [entry.code for entry in entries(tmp_path) if isinstance(entry, Refusal)] == [noted]


def test_headers_times_and_run_times_of_a_client_go_no_further(shared: Between) -> None:
    reply = Message(honest(shared.settings), reply_to=shared.asked())
    reply.metadata.__dict__["_created_at"], reply.metadata.__dict__["_ttl"] = 1_800_000_000.4711, 4_711.0
    shared.push(reply)
    with_headers(shared, "/v1/fleet/pull-messages", PullMessagesRequest(node=shared.node), secret=SECRET.decode())
    (request,) = shared.server.pushed()
    metadata = request.messages_list[0].metadata
    assert metadata.created_at != 1_800_000_000.4711
    assert metadata.ttl != 4_711.0
    assert list(request.clientapp_runtime_list) == []
    assert not any(SECRET.decode() in headers for _, headers, _ in shared.server.arrived)


def test_whoever_has_not_the_node_s_key_is_refused(shared: Between, keys: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    other.write_bytes(_private(ec.generate_private_key(ec.SECP384R1()), PrivateFormat.OpenSSH))
    port = int(shared.client._base_url.rpartition(":")[2])
    before = len(shared.server.arrived)
    authority = keys / "clients" / "client-0" / "gateway.crt"
    with client_of(port, authority, other) as stranger, pytest.raises(httpx.HTTPStatusError, match="401"):
        stranger.PullMessages(PullMessagesRequest(node=shared.node))
    assert len(shared.server.arrived) == before


def test_another_app_bundle_does_not_come_down_and_the_server_hears_it(wire: Between) -> None:
    wire.server.bundle = b"an app that reads data"
    wire.asked()
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        wire.client.GetRun(GetRunRequest(node=wire.node, run_id=RUN))
    assert wire.server.codes() == [CLIENT_ERROR_CODE + PolicyError.exit_code]
    wire.asked()
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        wire.fab()
    wire.server.bundle = BUNDLE
    wire.asked()
    assert wire.fab() == BUNDLE
    wire.server.version = "9.9.9"
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        wire.client.GetRun(GetRunRequest(node=wire.node, run_id=RUN))
    assert wire.server.codes()[-1] == CLIENT_ERROR_CODE + VersionMismatchError.exit_code


def test_a_message_of_another_type_does_not_come_down(shared: Between) -> None:
    shared.server.ask(RecordDict({"config": ConfigRecord({"do": "send everything"})}), "query.everything")
    assert not shared.client.PullMessages(PullMessagesRequest(node=shared.node)).messages_list
    assert shared.server.codes() == [CLIENT_ERROR_CODE + ProtocolError.exit_code]


def test_a_server_may_not_choose_other_settings_in_a_later_run(wire: Between) -> None:
    wire.push(Message(honest(wire.settings), reply_to=wire.asked()))
    with pytest.raises(httpx.HTTPStatusError):
        wire.push(Message(honest(wire.settings), reply_to=wire.asked(run="2" * 32, seed=4)))
    assert wire.server.codes() == [0, CLIENT_ERROR_CODE + PolicyError.exit_code]


def test_what_the_server_asks_for_again_is_sent_again_and_counted_once(wire: Between, tmp_path: Path) -> None:
    for _ in range(2):
        wire.push(Message(honest(wire.settings), reply_to=wire.asked(run="1" * 32)))
    found = entries(tmp_path)
    assert wire.server.codes() == [0, 0]
    assert [type(entry) for entry in found if isinstance(entry, Intent | Resent)] == [Intent, Resent]


def test_its_bytes_are_those_on_the_wire(wire: Between) -> None:
    wire.push(Message(honest(wire.settings), reply_to=wire.asked()))
    wire.push(Message(encode_reply(arrays_of(wire.settings, "expert")), reply_to=wire.asked("expert")))
    traffic = wire.gateway._upstream.traffic
    wire.gateway._upstream.close()
    assert wire.relay.up > 5_000
    assert (traffic.sent, traffic.received) == (wire.relay.up, wire.relay.down)


def test_a_gateway_started_again_goes_on_with_a_reply_that_was_on_its_way(
    keys: Path, tmp_path: Path, settings: Settings
) -> None:
    server = Server()
    with between(keys, tmp_path, settings, server=server) as wire:
        reply = Message(honest(settings), reply_to=wire.asked())
        server.down = True
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            wire.push(reply)
        assert server.content() == {}
    server.down = False
    with between(keys, tmp_path, settings, server=server) as wire:
        wire.push(reply)
        # And once more, as its answer may have been lost.
        wire.push(reply)
    assert [code for code in server.codes() if code == 0][-1:] == [0]
    assert set(get_all_nested_objects(reply)) - set(server.content()) == {reply.object_id}
    checked = check_ledger(tmp_path / "gateway" / "audit")
    assert len(checked.of(Intent)) == 1
    assert worst(checked.findings) is Verdict.INCOMPLETE


def test_on_a_full_disk_nothing_passes(wire: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def unwritten(*_: object) -> None:
        raise LedgerError("the ledger cannot be written")

    for place, fails in (("metamoe.common.files.os.fsync", full), ("metamoe.audit.gateway.passing.Ledger.append", unwritten)):
        honestly, failing = wire.asked(), wire.asked()
        with monkeypatch.context() as patched:
            patched.setattr(place, fails)
            with pytest.raises(httpx.HTTPStatusError, match="503"):
                wire.push(Message(honest(wire.settings), reply_to=honestly))
            with pytest.raises(httpx.HTTPStatusError, match="503"):
                wire.push(Message(Error(CLIENT_ERROR_CODE + 1, ""), reply_to=failing))
        assert wire.server.pushed() == []


def test_a_reply_waits_for_the_time_step_of_the_policy(keys: Path, tmp_path: Path, settings: Settings) -> None:
    policy = OPEN.model_copy(update={"limits": OPEN.limits.model_copy(update={"reply_time_step": 50.0})})
    slept: list[float] = []
    with between(keys, tmp_path, settings, policy) as wire:
        wire.gateway._sleep = slept.append
        reply = Message(honest(settings), reply_to=wire.asked())
        came = wire.gateway._requests.get(reply.metadata.reply_to_message_id).came
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            wire.push(reply)
        assert (slept, wire.server.pushed()) == ([20.0], [])
        wire.gateway._now = lambda: came + 45.0
        wire.push(reply)
    assert slept[1] == pytest.approx(5.0, abs=0.01)
    assert wire.server.codes() == [0]


def test_what_is_no_key_or_certificate_is_named(keys: Path, tmp_path: Path) -> None:
    own, wrong = keys / "clients" / "client-0", tmp_path / "wrong"
    wrong.write_text("nothing")
    with pytest.raises(InputFileError, match="no node's private key"):
        Upstream("localhost:1", own / "ca.crt", wrong)
    with pytest.raises(InputFileError, match="no certificate"):
        Upstream("localhost:1", wrong, own / "node.key")


def test_a_server_that_its_authority_does_not_vouch_for_hears_nothing(keys: Path, tmp_path: Path, settings: Settings) -> None:
    own = keys / "clients" / "client-0"
    with between(keys, tmp_path, settings) as wire:
        upstream = Upstream(f"localhost:{wire.relay.port}", own / "runtime.crt", own / "node.key")
        before = len(wire.server.arrived)
        with pytest.raises(UpstreamError):
            upstream.call("pull-messages", PullMessagesRequest(node=Node(node_id=NODE)), PushMessagesResponse)
        assert len(wire.server.arrived) == before
