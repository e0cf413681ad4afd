import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metamoe.common.config import Settings
from metamoe.common.errors import MetaMoEError, ProtocolError
from metamoe.common.model.seed import Seed
from metamoe.common.presets import validated
from metamoe.common.wire import (
    ARRAYS,
    REQUEST,
    Artifact,
    Request,
    decode_arrays,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    reply_artifacts,
    request_artifacts,
)

DECLARED = [Artifact("vector", "float32", (3,)), Artifact("client", "int64", ())]


def reply(**changes: object) -> RecordDict:
    arrays = {"vector": np.arange(3, dtype=np.float32), "client": np.array(1)} | changes
    return RecordDict(
        {ARRAYS: ArrayRecord({n: a if isinstance(a, Array) else Array(np.asarray(a)) for n, a in arrays.items()})}
    )


def test_a_declared_reply_goes_through() -> None:
    decoded = decode_reply(reply(), DECLARED)
    assert decoded["vector"].tolist() == [0, 1, 2]
    assert decoded["client"] == 1
    assert decoded["client"].shape == ()


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, vector=np.zeros(10**6, dtype=np.float32))
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def lying(data: bytes) -> Array:
    return Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data)


def forged(header: bytes) -> Array:
    """An npy file with any header text."""
    return lying(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))


GOOD = npy(np.zeros(3, dtype=np.float32))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (reply(extra=np.zeros(2)), "undeclared array 'extra'"),
        (reply(vector=np.zeros(3)), "float64"),
        (reply(vector=np.zeros((3, 1), dtype=np.float32)), r"\[3, 1\]"),
        (reply(vector=np.zeros(4, dtype=np.float32)), r"\[4\]"),
        (reply(vector=np.float32(1)), r"\[\]"),
        (reply(vector=np.array([0, np.nan, 0], dtype=np.float32)), "not finite"),
        (reply(vector=np.array([0, np.inf, 0], dtype=np.float32)), "not finite"),
        (reply(vector=lying(archive())), "npy header"),
        (reply(vector=lying(npy(np.zeros(10**6, dtype=np.float32)))), "npy header"),
        (reply(vector=forged(b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }")), "npy header"),
        (reply(vector=forged(b"{")), "npy header"),
        (reply(vector=forged(b"{[]: 1}")), "npy header"),
        (reply(vector=forged(b"{'descr': ('<f4',), 'fortran_order': False, 'shape': (3,), }")), "npy header"),
        (reply(vector=forged(b"-" * 9_000)), "npy header"),
        (reply(vector=lying(GOOD + b"smuggled")), "20 bytes"),
        (reply(vector=lying(GOOD[:-1])), "11 bytes"),
        (reply(vector=lying(b"")), "npy header"),
        (reply(vector=Array(dtype="float32", shape=(3,), stype="torch", data=GOOD)), "vector"),
        (RecordDict({ARRAYS: ArrayRecord({"client": Array(np.array(1))})}), "'vector' is missing"),
        (RecordDict({**reply(), "metrics": MetricRecord({"loss": 1.0})}), "undeclared record 'metrics'"),
        (RecordDict({**reply(), "config": ConfigRecord({"note": "text"})}), "undeclared record 'config'"),
        (RecordDict({**reply(), "more": ArrayRecord()}), "undeclared record 'more'"),
        (RecordDict({ARRAYS: MetricRecord({"num-examples": 1})}), "missing"),
        (RecordDict(), "missing"),
    ],
)
def test_anything_else_is_refused(content: RecordDict, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decode_reply(content, DECLARED)


def test_an_empty_reply_is_empty() -> None:
    assert decode_reply(encode_reply({}), []) == {}
    with pytest.raises(ProtocolError, match="undeclared record 'arrays'"):
        decode_reply(reply(), [])


@given(st.binary(max_size=300))
@hypothesis_settings(max_examples=300, deadline=None)
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    for payload in (data, GOOD[:10] + data, GOOD[:-12] + data):
        try:
            decoded = decode_arrays(reply(vector=lying(payload)), DECLARED)
        except ProtocolError:
            continue
        assert decoded["vector"].dtype == np.float32
        assert decoded["vector"].shape == (3,)


@given(hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)))
@hypothesis_settings(max_examples=200, deadline=None)
def test_only_the_declared_form_passes(array: np.ndarray) -> None:
    try:
        decoded = decode_arrays(reply(vector=array), DECLARED)
    except ProtocolError:
        return
    assert array.dtype == np.float32
    assert array.shape == (3,)
    np.testing.assert_array_equal(decoded["vector"], array)


def test_request_survives_the_wire(small: Settings) -> None:
    ids = np.arange(small.proxies.count)
    request = decode_request("expert", encode_request(Request(small, "a" * 64, "b" * 64, {"proxies": ids})))
    assert request.settings == small
    assert (request.seed, request.public) == ("a" * 64, "b" * 64)
    np.testing.assert_array_equal(request.arrays["proxies"], ids)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": 99}, "protocol 99"),
        ({"version": "9.9.9"}, r"server has MetaMoE-FL '9\.9\.9"),
        ({"members": [0, 1, 3]}, r"0 to 2; got \[0, 1, 3\]"),
        ({"members": [1, 0, 2]}, r"in order"),
        ({"experts": "a b a"}, "different names"),
        ({"experts": "a b c d"}, "at most one for each client"),
        ({"experts": "../a"}, r"different names.*'../a'"),
        ({"members": [0, 2]}, "run with 2 clients; it needs 3"),
        ({"known": [0, 3]}, r"known of a request are numbers of clients in order, 0 to 2; got \[0, 3\]"),
        ({"known": "0"}, "known of a request"),
        ({"settings": "not json"}, "not JSON"),
        ({"settings": '{"nonsense": 1}'}, "nonsense"),
        ({"settings": "[]"}, "settings = "),
        ({"extra": "x"}, "extra"),
    ],
)
def test_a_request_of_another_kind_is_refused(small: Settings, change: dict, reason: str) -> None:
    content = encode_request(Request(small, "a" * 64, "b" * 64, {}))
    content[REQUEST] = ConfigRecord({**content.config_records[REQUEST], **change})
    with pytest.raises(MetaMoEError, match=reason):
        decode_request("profile", content)


def test_an_expert_reply_is_lora_and_routing_vectors_and_nothing_else(seed: Seed, settings: Settings) -> None:
    settings = settings.model_copy(update={"router": settings.router.model_copy(update={"decide": "per-layer"})})
    artifacts = reply_artifacts("expert", settings, seed)
    matrices = [a for a in artifacts if ".lora_" in a.name]
    assert [a.name for a in artifacts if a not in matrices] == ["routing-vectors"]
    # Two layers, fc1 and fc2, A and B; rank 2, width 16, hidden 32: 2 * (2*(16+32) + 2*(32+16)) numbers of 2 bytes.
    assert len(matrices) == 8
    assert sum(a.bytes for a in matrices) == 2 * (2 * 48 + 2 * 48) * 2
    assert artifacts[-1].shape == (2, 16)
    assert {a.dtype for a in matrices} == {"float16"}


def test_accuracy_is_declared_only_if_the_settings_allow_it(seed: Seed) -> None:
    assert reply_artifacts("deliver", validated({}), seed) == []
    assert [a.name for a in reply_artifacts("deliver", validated({"report-accuracy": True}), seed)] == ["accuracy"]


def test_delivery_has_one_router_or_one_a_layer(seed: Seed) -> None:
    def routers(decide: str) -> int:
        router = {"decide": decide, "evidence": "layer", "vectors": "private"}
        artifacts = request_artifacts("deliver", validated({"router": router}), seed)
        shapes = [a.shape for a in artifacts if a.name.endswith(".rows")]
        # Three clients and the seed.
        assert set(shapes) == {(4, 16)}
        return len(shapes)

    assert (routers("once"), routers("per-layer")) == (1, 2)
    left = request_artifacts("deliver", validated({"quorum": 2}), seed, 2)
    # Two layers of two matrices each, A and B; two clients and the seed.
    assert len([a for a in left if a.name.startswith("expert.")]) == 2 * 8
    assert {a.shape[0] for a in left if a.name.endswith(".rows")} == {3}


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        # Of 32 and 16 dimensions, fewer than the rank, the whole triangle.
        ({}, {"seed-routing-vector": (16,), "seed-ffn-inputs": (2, 16), "seed-shape": (32 * 33 // 2,)}),
        (
            {"router": {"evidence": "layer"}},
            {"seed-routing-vector": (16,), "seed-ffn-inputs": (1, 16), "seed-shape": (16 * 17 // 2,)},
        ),
        ({"router": {"shape-rank": 3}}, {"seed-routing-vector": (16,), "seed-ffn-inputs": (2, 16), "seed-shape": (97,)}),
        ({"router": {"statistics": "mean"}}, {"seed-routing-vector": (16,), "seed-ffn-inputs": (2, 16)}),
        ({"privacy": {"vectors": "gaussian"}}, {"seed-routing-vector": (16,), "seed-ffn-inputs": (2, 16)}),
        ({"router": {"vectors": "proxy"}}, {"seed-routing-vector": (16,)}),
        ({"router": {"rows": "fresh"}}, {"seed-routing-vector": (16,)}),
        ({"router": {"vectors": "private"}}, {"seed-routing-vector": (16,)}),
        ({"router": {"vectors": "proxy"}, "proxies": {"relevance": "classifier"}}, {"relevance-classifier": (17,)}),
        ({"router": {"vectors": "proxy"}, "proxies": {"selection": "random"}}, {}),
    ],
)
def test_a_profile_is_what_the_settings_need_and_no_more(seed: Seed, changes: dict, sent: dict) -> None:
    settings = validated({"lora": {"first-layer": 1}} | changes)
    artifacts = reply_artifacts("profile", settings, seed)
    assert {a.name: a.shape for a in artifacts} == {"client": (), **sent}


def test_the_same_numbers_are_the_same_bytes_in_whatever_order_they_come() -> None:
    """A gateway makes a reply anew, and it must be the one that the client sent, from memory or from its store."""
    arrays = {"b": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)), "a": np.ones(2, np.float32)}
    again = {"a": np.ones(2, np.float32), "b": np.arange(6, dtype=np.float16).reshape(2, 3)}
    one, other = (encode_reply(some, {"y": np.zeros(1, np.uint8), "x": np.ones(1, np.uint8)}) for some in (arrays, again))
    assert get_all_nested_objects(one).keys() == get_all_nested_objects(other).keys()
