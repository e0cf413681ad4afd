"""The ClientApp with real messages: what leaves a client, and what does not."""

import json
import secrets
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from metamoe.client import answer as answers
from metamoe.client.app import app
from metamoe.client.egress import guard
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private, public_fingerprint
from metamoe.common.data.pixels import batches
from metamoe.common.errors import EmptyPartitionError, MetaMoEError, ProtocolError, PublicDataMismatchError, SeedMismatchError
from metamoe.common.model.inputs import embed
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import validated
from metamoe.common.wire import (
    ARRAYS,
    AUDIT,
    CLIENT_ERROR_CODE,
    MESSAGE_TYPE,
    Envelope,
    Kind,
    Request,
    decode_reply,
    encode_request,
    reply_artifacts,
    request_artifacts,
)

pytestmark = pytest.mark.usefixtures("identity")


def ask(kind: Kind, settings: Settings, out: Path, client: int = 0, **changes: object) -> Message:
    """The app's reply to one request."""
    seed = load_seed(settings.seed_model)
    arrays = {"proxies": np.arange(settings.proxies.count)} if kind == "expert" else {}
    values = {"seed": seed.fingerprint, "public": public_fingerprint(settings.data), "arrays": arrays} | changes
    # Every call is a run of its own: within one, an artifact is released once.
    values.setdefault("envelope", Envelope(run=secrets.token_hex(16), message=secrets.token_hex(16)))
    content = encode_request(Request(settings, **values))
    message = Message(content, dst_node_id=2, message_type=MESSAGE_TYPE[kind])
    node = {"partition-id": client, "num-partitions": settings.clients}
    context = Context(1, 2, node, RecordDict(), {"out": str(out)})
    return app(message, context)


def code_of(reply: Message) -> int:
    assert reply.has_error()
    assert not reply.error.reason
    return reply.error.code - CLIENT_ERROR_CODE


def test_a_profile_is_the_mean_embedding_and_the_clients_number(small: Settings, tmp_path: Path) -> None:
    reply = ask("profile", small, tmp_path, client=1)
    assert set(reply.content) == {ARRAYS, AUDIT}
    assert set(reply.content[AUDIT]) == {"audit-key"}
    assert set(reply.content[ARRAYS]) == {"client", "seed-routing-vector", "seed-ffn-inputs", "seed-shape"}
    arrays = decode_reply(reply.content, reply_artifacts("profile", small, load_seed(small.seed_model)))
    assert arrays["client"] == 1
    # The last of these batches is smaller than the others.
    seed, private = load_seed(small.seed_model), load_private(small, 1, "train")
    with torch.inference_mode():
        embedded = torch.cat([embed(seed.model, batch) for batch in batches(seed, private, 7)])
    # Sent with ten bits of mantissa.
    np.testing.assert_allclose(arrays["seed-routing-vector"], embedded.double().mean(0), rtol=2**-11, atol=1e-6)
    assert np.abs(arrays["seed-routing-vector"]).max() > 0.1


def test_an_expert_reply_holds_the_declared_arrays_and_nothing_else(small: Settings, tmp_path: Path) -> None:
    seed = load_seed(small.seed_model)
    reply = ask("expert", small, tmp_path)
    assert set(reply.content) == {ARRAYS}
    declared = reply_artifacts("expert", small, seed)
    assert set(reply.content[ARRAYS]) == {artifact.name for artifact in declared}
    arrays = decode_reply(reply.content, declared)
    # It trained: B starts at zero.
    assert all(np.abs(array).max() > 0 for name, array in arrays.items() if "lora_B" in name)
    assert len(list((tmp_path / "clients" / "digits" / "experts").glob("*/adapter_model.safetensors"))) == 1


def test_an_expert_is_trained_once_for_what_made_it(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask("expert", small, tmp_path).content[ARRAYS]
    routed = validated(small.model_dump() | {"router": small.router.model_dump() | {"context": 0.5}})
    trained = []
    train = answers.train_expert
    monkeypatch.setattr(answers, "train_expert", lambda *a, **k: trained.append(1) or train(*a, **k))
    again = ask("expert", routed, tmp_path).content[ARRAYS]
    assert not trained
    assert all(first[name].data == again[name].data for name in first)
    for change in (
        {"seed": 1},
        {"lora": small.lora.model_dump() | {"alpha": 5}},
        {"expert_training": small.expert_training.model_dump() | {"learning_rate": 1e-2}},
        {"data": small.data.model_dump() | {"private_samples": 41}},
    ):
        ask("expert", validated(small.model_dump() | change), tmp_path)
    ask("expert", small, tmp_path, arrays={"proxies": np.arange(small.proxies.count)[::-1].copy()})
    assert len(trained) == 5


def test_with_proxy_vectors_no_routing_vectors_leave(small: Settings, tmp_path: Path) -> None:
    values = small.model_dump()
    values["router"]["vectors"] = "proxy"
    arrays = ask("expert", validated(values), tmp_path).content[ARRAYS]
    assert arrays
    assert all(".lora_" in name for name in arrays)


@pytest.mark.parametrize("report", [False, True])
def test_after_delivery_nothing_leaves_but_the_accuracy_if_it_may(small: Settings, tmp_path: Path, report: bool) -> None:
    settings = small.model_copy(update={"report_accuracy": report})
    seed = load_seed(settings.seed_model)
    artifacts = request_artifacts("deliver", settings, seed)
    arrays = {a.name: np.full(a.shape, 0.01, a.dtype) for a in artifacts}
    reply = ask("deliver", settings, tmp_path, arrays=arrays, experts=settings.client_names)
    own = json.loads((tmp_path / "clients" / "digits" / "accuracy.json").read_text())["accuracy"]
    assert set(reply.content[AUDIT]) == {"ledger-root", "ledger-signature"}
    if report:
        assert set(reply.content) == {ARRAYS, AUDIT}
        assert set(reply.content[ARRAYS]) == {"accuracy"}
        assert reply.content[ARRAYS]["accuracy"].numpy() == pytest.approx(own, rel=2**-11)
    else:
        assert set(reply.content) == {AUDIT}


def test_sizes_do_not_tell_how_much_data_there_is(small: Settings, tmp_path: Path) -> None:
    more = validated(small.model_dump() | {"data": small.data.model_dump() | {"private_samples": 400}})
    shapes = [
        [
            (name, array.dtype, array.shape, len(array.data))
            for name, array in ask("expert", s, tmp_path).content[ARRAYS].items()
        ]
        for s in (small, more)
    ]
    assert shapes[0] == shapes[1]


def test_another_seed_or_public_set_is_refused_before_training(
    small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "train_expert", lambda *_, **__: pytest.fail("trained"))
    assert code_of(ask("expert", small, tmp_path, seed="0" * 64)) == SeedMismatchError.exit_code
    assert code_of(ask("expert", small, tmp_path, public="0" * 64)) == PublicDataMismatchError.exit_code


@pytest.mark.parametrize("ids", [[-1, 0], [0, 300]])
def test_proxies_outside_the_public_set_are_refused(small: Settings, tmp_path: Path, ids: list[int]) -> None:
    arrays = {"proxies": np.resize(np.array(ids), small.proxies.count)}
    assert code_of(ask("expert", small, tmp_path, arrays=arrays)) == ProtocolError.exit_code


def test_an_exceptions_text_stays_here(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("patient 4711")

    monkeypatch.setattr(answers, "train_expert", fail)
    reply = ask("expert", small, tmp_path)
    assert code_of(reply) == MetaMoEError.exit_code
    assert "4711" not in repr(reply)
    assert "patient 4711" in (tmp_path / "clients" / "client-0.log").read_text()


def test_an_empty_partition_has_its_code(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object) -> None:
        raise EmptyPartitionError("nothing here")

    monkeypatch.setattr(answers, "private_samples", empty)
    assert code_of(ask("profile", small, tmp_path)) == EmptyPartitionError.exit_code


def test_the_guard_holds_back_what_was_not_declared(small: Settings, tmp_path: Path) -> None:
    seed = load_seed(small.seed_model)
    content = encode_request(Request(small, seed.fingerprint, public_fingerprint(small.data), {}))
    message = Message(content, dst_node_id=2, message_type=MESSAGE_TYPE["profile"])

    def smuggle(request: Message, _context: Context) -> Message:
        arrays = {"client": np.array(0), "seed-routing-vector": np.zeros(seed.width, np.float32), "count": np.array(797)}
        return Message(RecordDict({ARRAYS: ArrayRecord({n: Array(a) for n, a in arrays.items()})}), reply_to=request)

    reply = guard(message, Context(1, 2, {"partition-id": 0}, RecordDict(), {"out": str(tmp_path)}), smuggle)
    assert code_of(reply) == ProtocolError.exit_code
    assert not reply.has_content()
