"""The edge of a client: what tries to leave beside what is allowed, and what is left behind when nothing may."""

import io
import resource
import secrets
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metamoe.client import egress
from metamoe.client.answer import answer
from metamoe.client.app import respond
from metamoe.client.egress import audited, guard
from metamoe.client.site import Site
from metamoe.common.audit.entries import Intent, Refusal
from metamoe.common.audit.ledger import LEDGER, Ledger
from metamoe.common.audit.policy import (
    DEFAULT,
    SIMULATION,
    Budget,
    Policy,
    Rule,
    check_request,
    load_policy,
    policy_hash,
    policy_text,
)
from metamoe.common.audit.verify import Verdict, check_ledger, worst
from metamoe.common.audit.words import EXPLAINED, policy_lines
from metamoe.common.config import Settings
from metamoe.common.data.datasets import public_fingerprint
from metamoe.common.errors import BudgetError, InputFileError, LedgerError, MetaMoEError, PolicyError, ProtocolError
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed, load_settings, preset_names
from metamoe.common.wire import (
    ARRAYS,
    AUDIT,
    CLIENT_ERROR_CODE,
    MESSAGE_TYPE,
    Envelope,
    Kind,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    reply_artifacts,
)

pytestmark = pytest.mark.usefixtures("identity")


def request(settings: Settings, kind: Kind = "profile", run: str = "", first_proxy: int = 0) -> RecordDict:
    seed = load_seed(settings.seed_model)
    arrays = {"proxies": first_proxy + np.arange(settings.proxies.count)} if kind == "expert" else {}
    envelope = Envelope(run=run or secrets.token_hex(16), message=secrets.token_hex(16))
    return encode_request(Request(settings, seed.fingerprint, public_fingerprint(settings.data), arrays, envelope))


def honest(settings: Settings, kind: Kind = "profile") -> dict[str, np.ndarray]:
    """Arrays of the declared form."""
    rng = np.random.default_rng(0)
    artifacts = reply_artifacts(kind, settings, load_seed(settings.seed_model))
    return {a.name: rng.normal(size=a.shape).astype(a.dtype) * (a.name != "client") for a in artifacts}


def leave(settings: Settings, reply: RecordDict, tmp_path: Path, policy: Policy = SIMULATION) -> RecordDict:
    """What leaves when an app wants to send this profile."""
    site = Site(0, tmp_path / "state", policy=written(policy, tmp_path))
    return audited("profile", request(settings), site, lambda _: reply)


def written(policy: Policy, folder: Path) -> Path:
    file = folder / "policy.toml"
    file.write_text(policy_text(policy))
    return file


def limited(policy: Policy, **limits: object) -> Policy:
    return policy.model_copy(update={"limits": policy.limits.model_copy(update=limits)})


SECRET = b"patient 4711, male, 1961-05-04, diagnosis C50.9"


def hidden_in_low_bits(array: np.ndarray) -> np.ndarray:
    """A secret in the bits of a float32 that say nothing."""
    bits = encode_reply({"a": array})[ARRAYS]["a"].numpy().view(np.uint32).copy()
    secret = np.resize(np.frombuffer(SECRET, np.uint8), bits.shape).astype(np.uint32)
    return (bits | secret).view(np.float32)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def packed(array: np.ndarray, **changes: object) -> Array:
    values = {"dtype": str(array.dtype), "shape": array.shape, "stype": "numpy.ndarray", "data": npy(array)} | changes
    return Array(**values)


VECTOR = "seed-routing-vector"
Smuggler = Callable[[dict[str, np.ndarray]], RecordDict]


def arrays_with(**changes: Callable[[np.ndarray], np.ndarray | Array]) -> Smuggler:
    """The honest reply with some arrays made into others."""

    def smuggle(arrays: dict[str, np.ndarray]) -> RecordDict:
        made = dict(encode_reply(arrays)[ARRAYS])
        for name, change in changes.items():
            key = name.replace("_", "-")
            made[key] = as_array(change(arrays[key]))
        return RecordDict({ARRAYS: ArrayRecord(made)})

    return smuggle


def as_array(value: np.ndarray | Array) -> Array:
    return value if isinstance(value, Array) else Array(value)


def beside(**records: object) -> Smuggler:
    """The honest reply with other records beside it."""
    return lambda arrays: RecordDict({**encode_reply(arrays), **records})


def replaced(name: str, array: np.ndarray) -> Smuggler:
    """The honest reply with an array more."""
    return lambda arrays: encode_reply({**arrays, name: array})


def bare(header: bytes) -> Array:
    """A client's number whose npy header is any text."""
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    return Array(dtype="int64", shape=(), stype="numpy.ndarray", data=data)


CATALOGUE: dict[str, Smuggler] = {
    "an extra array": replaced("extra", np.frombuffer(SECRET, np.uint8)),
    "an extra empty array whose name is the secret": replaced(SECRET.hex(), np.zeros(0, np.float32)),
    "the example count as an array": replaced("num-examples", np.array(797)),
    "another artifact of the product": replaced("accuracy", np.float32(0.5).reshape(())),
    "another case of a name": lambda arrays: encode_reply({("Client" if n == "client" else n): a for n, a in arrays.items()}),
    "another dtype": arrays_with(seed_routing_vector=lambda a: a.astype(np.float64)),
    "another byte order": arrays_with(seed_routing_vector=lambda a: a.astype(">f4")),
    "a longer shape": arrays_with(seed_routing_vector=lambda a: np.append(a, a[:1])),
    "a further axis": arrays_with(seed_routing_vector=lambda a: a[None]),
    "a shape that can be broadcast": arrays_with(seed_routing_vector=lambda a: a[:1]),
    "bits below the declared precision": arrays_with(seed_routing_vector=hidden_in_low_bits),
    "one bit below the declared precision": arrays_with(
        seed_routing_vector=lambda a: np.nextafter(encode_reply({"a": a})[ARRAYS]["a"].numpy(), np.float32(np.inf))
    ),
    "payload of not-a-number": arrays_with(
        seed_routing_vector=lambda a: (
            np.resize(np.uint32(0x7FC00000) | np.frombuffer(SECRET, np.uint8), a.shape).astype(np.uint32).view(np.float32)
        )
    ),
    "infinity for one and zero for nought": arrays_with(
        seed_routing_vector=lambda a: np.where(a > 0, np.float32(np.inf), np.float32(0))
    ),
    "text after the array": arrays_with(seed_routing_vector=lambda a: packed(a, data=npy(a) + SECRET)),
    "text in the header": arrays_with(
        client=lambda _: bare(b"{'descr': '<i8', 'shape': (), 'fortran_order': False, '" + SECRET + b"': 1}\n")
    ),
    "an archive in place of the array": arrays_with(seed_routing_vector=lambda a: packed(a, data=zlib.compress(npy(a)))),
    "the secret as the array's type": arrays_with(seed_routing_vector=lambda a: packed(a, stype=SECRET.decode())),
    "the secret as the array's dtype": arrays_with(seed_routing_vector=lambda a: packed(a, dtype=SECRET.decode())),
    "a lying shape": arrays_with(seed_routing_vector=lambda a: packed(a, shape=(4711,))),
    "a client's number that is a message": arrays_with(client=lambda _: np.array(int.from_bytes(SECRET[:7], "big"))),
    "a huge norm": arrays_with(seed_routing_vector=lambda a: np.full_like(a, 2.0**100)),
    "a metric": beside(metrics=MetricRecord({"loss": 0.25})),
    "a metric whose name is the secret": beside(metrics=MetricRecord({SECRET.decode(): 0.0})),
    "a config string": beside(config=ConfigRecord({"note": SECRET.decode()})),
    "config bytes": beside(config=ConfigRecord({"blob": SECRET})),
    "a second record of arrays": beside(more=ArrayRecord({"a": Array(np.frombuffer(SECRET, np.uint8))})),
    "a record's name": lambda arrays: RecordDict({**encode_reply(arrays), SECRET.decode(): ArrayRecord()}),
    "the expert in the profile's reply": replaced(
        "vision_model.encoder.layers.1.mlp.fc1.lora_A.weight", np.zeros((2, 16), np.float16)
    ),
    "a missing array": lambda arrays: encode_reply({"client": arrays["client"]}),
    "nothing at all": lambda _: RecordDict(),
}


def test_what_is_honest_leaves(small: Settings, tmp_path: Path) -> None:
    reply = leave(small, encode_reply(honest(small)), tmp_path)
    assert set(reply) == {ARRAYS, AUDIT}


@pytest.mark.parametrize("smuggle", CATALOGUE.values(), ids=CATALOGUE)
def test_smuggling_is_refused_and_on_record(small: Settings, tmp_path: Path, smuggle: Smuggler) -> None:
    assert len(CATALOGUE) >= 20
    with pytest.raises((ProtocolError, PolicyError)) as refused:
        leave(small, smuggle(honest(small)), tmp_path)
    ledger = check_ledger(tmp_path / "state" / "audit" / "client-0")
    assert [entry.code for entry in ledger.of(Refusal)] == [refused.value.exit_code]
    assert ledger.of(Intent) == []


def test_a_forged_audit_record_is_replaced(small: Settings, tmp_path: Path) -> None:
    forged = np.frombuffer(SECRET[:32], np.uint8)
    reply = leave(small, encode_reply(honest(small), {"audit-key": forged}), tmp_path)
    assert bytes(reply[AUDIT]["audit-key"].numpy()).hex() == Ledger(tmp_path / "state" / "audit" / "client-0").public


def through_guard(settings: Settings, state: Path, app: Callable[[Message, Context], Message]) -> Message:
    message = Message(request(settings), dst_node_id=2, message_type=MESSAGE_TYPE["profile"])
    return guard(message, Context(1, 2, {"partition-id": 0}, RecordDict(), {"out": str(state)}), app)


def test_nothing_of_the_apps_own_message_survives(small: Settings, tmp_path: Path) -> None:
    """Time to live, creation time and message type can carry numbers and text too."""

    def smuggle(message: Message, _: Context) -> Message:
        reply = Message(encode_reply(honest(small)), reply_to=message)
        reply.metadata.ttl = 4711.0
        reply.metadata.created_at = 4711.0
        reply.metadata.message_type = "evaluate.patient4711"
        return reply

    reply = through_guard(small, tmp_path, smuggle)
    assert reply.has_content()
    assert 4711 not in (reply.metadata.ttl, reply.metadata.created_at)
    assert reply.metadata.message_type == MESSAGE_TYPE["profile"]


@pytest.mark.parametrize(
    "app",
    [
        lambda message, _: Message(Error(4711, "patient 4711"), reply_to=message),
        lambda *_: (_ for _ in ()).throw(ValueError("patient 4711")),
        lambda *_: "patient 4711",
    ],
    ids=["an error's code and text", "an exception's text", "no message"],
)
def test_errors_carry_nothing(small: Settings, tmp_path: Path, app: Callable[[Message, Context], Message]) -> None:
    reply = through_guard(small, tmp_path, app)
    assert (reply.error.code, reply.error.reason) == (CLIENT_ERROR_CODE + MetaMoEError.exit_code, "")


def test_an_artifact_leaves_once_in_a_run(small: Settings, tmp_path: Path) -> None:
    site, run = Site(0, tmp_path), secrets.token_hex(16)
    audited("expert", request(small, "expert", run), site, lambda _: encode_reply(honest(small, "expert")))
    other = request(small, "expert", run, first_proxy=1)
    with pytest.raises(PolicyError, match="released 1 times"):
        audited("expert", other, site, lambda _: pytest.fail("computed"))
    audited("expert", request(small, "expert"), site, lambda _: encode_reply(honest(small, "expert")))


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ("router.vectors=private", "expert", "'routing-vectors'"),
        ("proxies.relevance=classifier", "profile", "'relevance-classifier'"),
        ("lora.rank=65", "expert", "lora.rank = 65"),
        ("data.private-samples=1", "profile", "data.private-samples = 1 "),
    ],
)
def test_settings_never_widen_a_policy(small: Settings, tmp_path: Path, change: str, kind: Kind, reason: str) -> None:
    """The product's own policy, where no owner has given another; nothing is computed."""
    settings = changed(small, [change])
    with pytest.raises(PolicyError, match=reason):
        audited(kind, request(settings, kind), Site(0, tmp_path, simulation=False), lambda _: pytest.fail("computed"))


def test_a_mean_over_too_few_does_not_leave(small: Settings, tmp_path: Path) -> None:
    file = written(limited(DEFAULT, min_private_samples=41), tmp_path)
    content = request(changed(small, ["data.private-samples=0"]))
    assert answer("profile", decode_request("profile", content), Site(0, tmp_path, policy=file))
    short = request(small)
    with pytest.raises(PolicyError, match="40 private samples"):
        answer("profile", decode_request("profile", short), Site(0, tmp_path, policy=file))


def test_a_runs_bytes_are_limited(small: Settings, tmp_path: Path) -> None:
    policy = limited(SIMULATION, max_bytes_per_run=100)
    with pytest.raises(PolicyError, match="bytes in this run"):
        leave(small, encode_reply(honest(small)), tmp_path, policy)


@pytest.mark.parametrize("app_fails", [False, True])
def test_replies_wait_for_the_next_step(
    small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app_fails: bool
) -> None:
    """On a clock of its own: 13 seconds of work, then 7 of waiting, whether there is a reply or an error. Only then is the
    message made, which says when that was.
    """
    clock, slept, awake = iter([100.0, 113.0]), [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        awake.append(time.time())

    monkeypatch.setattr(egress, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep))
    file = written(limited(SIMULATION, reply_time_step=10.0), tmp_path)
    node = {"partition-id": 0, "state-dir": str(tmp_path / "state"), "policy": str(file)}
    message = Message(request(small), dst_node_id=2, message_type=MESSAGE_TYPE["profile"])
    reply = RecordDict() if app_fails else encode_reply(honest(small))
    sent = guard(message, Context(1, 2, node, RecordDict(), {}), lambda m, _: Message(reply, reply_to=m))
    assert sent.has_error() is app_fails
    assert slept == [7.0]
    assert sent.metadata.created_at >= awake[0]


def test_a_full_disk_at_the_ledger_means_nothing_is_sent(small: Settings, tmp_path: Path) -> None:
    """The operating system refuses to let any file grow: not even the reply's hash can be written down."""
    site = Site(0, tmp_path)
    audited("profile", request(small), site, lambda _: encode_reply(honest(small)))
    size = (site.audit / LEDGER).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1_000, hard))
    try:
        with pytest.raises(LedgerError, match="nothing is sent"):
            audited("profile", request(small), site, lambda _: encode_reply(honest(small)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(check_ledger(site.audit).of(Intent)) == 1


def test_the_amount_of_data_shows_nowhere(small: Settings, tmp_path: Path) -> None:
    """Names, types, shapes and lengths of all that leaves, and the ledger, are the same for 50 samples and all there are."""
    seen = []
    for samples in (50, 0):
        settings = changed(small, [f"data.private-samples={samples}"])
        site, run, forms = Site(0, tmp_path / str(samples)), secrets.token_hex(16), []
        for kind in ("profile", "expert"):
            content = audited(kind, request(settings, kind, run), site, lambda c, k=kind, s=site: respond(k, c, s))
            forms += [
                (record, name, array.dtype, array.shape, array.stype, len(array.data))
                for record, arrays in content.array_records.items()
                for name, array in arrays.items()
            ]
            assert set(content) == set(content.array_records)
        seen.append((forms, (site.audit / LEDGER).stat().st_size))
    assert seen[0] == seen[1]


ARRAY = hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, max_side=20))
NAMES = st.sampled_from(["client", VECTOR, "seed-ffn-inputs", "accuracy", "routing-vectors"]) | st.text(max_size=20)
ENVELOPES = st.builds(
    lambda dtype, shape, stype, data: Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data),
    st.sampled_from(["float32", "float16", "int64", "object", "<f4"]) | st.text(max_size=5),
    st.lists(st.integers(-2, 200), max_size=3),
    st.just("numpy.ndarray") | st.text(max_size=5),
    st.binary(max_size=200),
)
RECORDS = st.one_of(
    st.dictionaries(NAMES, ARRAY.map(Array) | ENVELOPES, max_size=4).map(ArrayRecord),
    st.dictionaries(NAMES, st.integers(-9, 9) | st.floats(allow_nan=False), max_size=2).map(MetricRecord),
    st.dictionaries(NAMES, st.text(max_size=9) | st.binary(max_size=9) | st.booleans(), max_size=2).map(ConfigRecord),
)
REPLIES = st.dictionaries(st.sampled_from([ARRAYS, AUDIT]) | st.text(max_size=9), RECORDS, max_size=3).map(RecordDict)


@pytest.mark.slow
@given(reply=REPLIES, keep=st.sets(st.sampled_from(["client", VECTOR, "seed-ffn-inputs", "seed-shape"])))
@hypothesis_settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_reply_crashes_the_edge_or_passes_with_anything_unlisted(small: Settings, reply: RecordDict, keep: set[str]) -> None:
    """Ten thousand replies, from noise to the honest one with noise in it."""
    artifacts = reply_artifacts("profile", small, load_seed(small.seed_model))
    good = encode_reply(honest(small))[ARRAYS]
    kept = {name: good[name] for name in keep}
    mixed = ArrayRecord({**reply.array_records.get(ARRAYS, {}), **kept})
    content = RecordDict({**reply, ARRAYS: mixed}) if kept else reply
    try:
        arrays = decode_reply(content, artifacts)
    except ProtocolError:
        return
    assert set(content) <= {ARRAYS, AUDIT}
    declared = {(a.name, a.dtype, a.shape): a.optional for a in artifacts}
    found = {(n, str(a.dtype), a.shape) for n, a in arrays.items()}
    # All that is declared, and nothing else; a policy can keep what is optional.
    assert {form for form, optional in declared.items() if not optional} <= found <= declared.keys()
    # What leaves is made anew from these arrays: nothing of the reply itself is left.
    assert encode_reply(arrays)[ARRAYS].keys() == arrays.keys()


def test_policies_survive_a_file_and_are_strict(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    own = DEFAULT.model_copy(update={"budget": Budget(epsilon=4.0, delta=1e-5)})
    for policy in (DEFAULT, SIMULATION, own):
        file.write_text(policy_text(policy))
        assert load_policy(file) == policy
        assert policy_hash(load_policy(file)) == policy_hash(policy)
    for wrong in (
        "version = 2\n[allow]\n",
        "[allow.patients]\npurpose = 'x'\n",
        "[allow]\n[limits]\nmax-lora-rang = 3\n",
        "[allow.client]\n",
        "nonsense",
        "[allow.client]\npurpose = 'x'\nmax-norm = nan\n",
        "[allow]\n[budget]\nepsilon = -1.0\ndelta = 0.1\n",
    ):
        file.write_text(wrong)
        with pytest.raises(InputFileError, match="policy"):
            load_policy(file)


@given(st.text(max_size=200))
@hypothesis_settings(max_examples=200, deadline=None)
def test_no_text_crashes_the_reader_of_policies(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "policy.toml"
    file.write_text(text, errors="ignore")
    with suppress(InputFileError):
        load_policy(file)


def test_a_policy_is_said_in_words() -> None:
    lines = policy_lines(DEFAULT)
    assert any(line.startswith("routing-vectors never leaves") for line in lines)
    assert any("no privacy budget is set" in line for line in lines)
    allowed = Policy(allow={kind: Rule(purpose="test") for kind in EXPLAINED})
    assert not any("never leaves" in line for line in policy_lines(allowed))


def test_every_preset_can_run_under_the_products_policy() -> None:
    """What the defaults send, the default policy allows."""
    for preset in preset_names():
        settings = load_settings(preset)
        if settings.seed_model == "glyphs":
            seed = load_seed(settings.seed_model)
            for kind in MESSAGE_TYPE:
                check_request(DEFAULT, settings, [a.name for a in reply_artifacts(kind, settings, seed)], [])


def test_a_changed_policy_file_is_found_out(small: Settings, tmp_path: Path) -> None:
    leave(small, encode_reply(honest(small)), tmp_path, DEFAULT.model_copy(update={"limits": SIMULATION.limits}))
    folder = tmp_path / "state" / "audit" / "client-0"
    (stored,) = folder.glob("policy-*.toml")
    stored.write_text(stored.read_text().replace("version = 1", "version = 1\nbudget = {epsilon = 1.0, delta = 0.1}"))
    assert worst(check_ledger(folder).findings) is Verdict.TAMPERED


GAUSSIAN = ["privacy.vectors=gaussian", "privacy.epsilon=2", "privacy.min-samples=30"]


def budgeted(epsilon: float, tmp_path: Path) -> Path:
    allow = {kind: rule.model_copy(update={"private": kind.startswith("seed-")}) for kind, rule in SIMULATION.allow.items()}
    return written(SIMULATION.model_copy(update={"allow": allow, "budget": Budget(epsilon=epsilon, delta=1e-5)}), tmp_path)


def test_a_run_beyond_the_budget_is_refused_before_anything_is_computed(small: Settings, tmp_path: Path) -> None:
    """Two releases at epsilon 2 are one at 2.96: the third would be at 3.75."""
    site = Site(0, tmp_path / "state", policy=budgeted(3.0, tmp_path))
    settings = changed(small, GAUSSIAN)
    for _ in range(2):
        audited("profile", request(settings), site, lambda _: encode_reply(honest(settings)))
    with pytest.raises(BudgetError, match=r"epsilon = 3\.\d\d at delta = 1e-05; this client's policy allows 3"):
        audited("profile", request(settings), site, lambda _: pytest.fail("computed"))
    ledger = check_ledger(site.audit)
    spent = [spent for intent in ledger.of(Intent) for spent in intent.spent]
    assert [(s.epsilon, s.delta, s.covers) for s in spent] == [(2.0, 1e-5, [VECTOR, "seed-ffn-inputs"])] * 2
    assert ledger.of(Refusal)[0].code == BudgetError.exit_code
    assert Verdict.OVER_BUDGET not in {finding.verdict for finding in ledger.findings}


def test_what_needs_differential_privacy_does_not_leave_without(small: Settings, tmp_path: Path) -> None:
    site = Site(0, tmp_path / "state", policy=budgeted(3.0, tmp_path))
    with pytest.raises(BudgetError, match="with differential privacy only"):
        audited("profile", request(small), site, lambda _: pytest.fail("computed"))


def test_a_ledger_beyond_its_budget_is_found_out(small: Settings, tmp_path: Path, run_metamoe) -> None:
    """The owner lowered the budget below what is already spent."""
    settings, state = changed(small, GAUSSIAN), tmp_path / "state"
    audited(
        "profile", request(settings), Site(0, state, policy=budgeted(3.0, tmp_path)), lambda _: encode_reply(honest(settings))
    )
    audited("profile", request(small), Site(0, state), lambda _: encode_reply(honest(small)))
    with pytest.raises(BudgetError):
        audited("profile", request(settings), Site(0, state, policy=budgeted(1.0, tmp_path)), lambda _: pytest.fail("computed"))
    findings = check_ledger(Site(0, state).audit).findings
    assert Verdict.OVER_BUDGET in {finding.verdict for finding in findings}
    assert worst(f for f in findings if f.verdict is not Verdict.INCOMPLETE) is Verdict.OVER_BUDGET
    assert run_metamoe("audit", "budget", str(state)) == Verdict.OVER_BUDGET
