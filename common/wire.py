"""Everything that may cross between server and clients: typed requests and replies, to Flower records and back.

The server asks three kinds of question. A reply holds exactly the arrays declared here for its kind, by record, name,
dtype and shape, and nothing else: no text, no metric, no example count.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Annotated, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metamoe.common.audit.entries import FIRST, Digest, Identifier, Receipt
from metamoe.common.config import Settings
from metamoe.common.errors import ProtocolError, VersionMismatchError, first_problem
from metamoe.common.gaussian import shape_rank, shape_size
from metamoe.common.model.lora import expert_shapes
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.model.vectors import all_evidence_paths, evidence_paths, evidence_width
from metamoe.common.presets import validated

PROTOCOL = 10

Kind = Literal["profile", "expert", "deliver"]
MESSAGE_TYPE: dict[Kind, str] = {"profile": "query.profile", "expert": "train.expert", "deliver": "evaluate.deliver"}
ARRAYS = "arrays"
AUDIT = "audit"
REQUEST = "request"
CLIENT_ERROR_CODE = 1_000
"""Added to an error's exit code when a client reports it: Flower's own codes are below it."""
MANTISSA_BITS = 10
"""Of every float32 that a client sends. The others, of its 23, are zero: a statistic of samples has nothing to say there, and
what has nothing to say could say something else.
"""
_LOW_BITS = np.uint32((1 << (23 - MANTISSA_BITS)) - 1)


@dataclass(frozen=True)
class Artifact:
    """One array that may cross; one that is optional a client's policy can withhold, and the run goes on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    optional: bool = False

    @property
    def bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


AUDIT_ARTIFACTS: dict[Kind, list[Artifact]] = {
    "profile": [Artifact("audit-key", "uint8", (32,))],
    "expert": [],
    "deliver": [Artifact("ledger-root", "uint8", (32,)), Artifact("ledger-signature", "uint8", (64,))],
}
"""What a client that keeps a ledger adds to its replies, in a record of its own: its public key, and the signed Merkle root."""


class Envelope(BaseModel):
    """What a request says for the ledgers: which message of which run it is, who asks, and what has arrived so far."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: Identifier = "0" * 32
    message: Identifier = "0" * 32
    key: Digest = FIRST
    receipts: Annotated[list[Receipt], Field(max_length=len(MESSAGE_TYPE))] = []


@dataclass(frozen=True)
class Request:
    """What the server sends: the settings, the hashes of what both sides must hold alike, arrays, the numbers of the clients
    that are left in the run (None: all of them), the names of the experts that are delivered, and the numbers of the clients
    that only say who they are, as the server has from an earlier run what it would ask them.
    """

    settings: Settings
    seed: str
    public: str
    arrays: Mapping[str, np.ndarray]
    envelope: Envelope = field(default_factory=Envelope)
    members: Sequence[int] | None = None
    experts: Sequence[str] = ()
    known: Sequence[int] = ()

    def only_introduces(self, client: int) -> bool:
        """Whether this client is asked for no more in stage 1 than who it is."""
        return client in self.known


def kind_of(message_type: str) -> Kind:
    """Which of our questions a Flower message type is.

    Raises:
        ProtocolError: none.
    """
    kinds: list[Kind] = [kind for kind, name in MESSAGE_TYPE.items() if name == message_type]
    if not kinds:
        raise ProtocolError(f"message type {message_type!r} is none of {', '.join(MESSAGE_TYPE.values())}")
    return kinds[0]


def reply_artifacts(kind: Kind, settings: Settings, seed: Seed, introduced: bool = False) -> list[Artifact]:
    """What a client's reply consists of; ``introduced`` in stage 1 where it only says who it is."""
    match kind:
        case "profile":
            artifacts = [Artifact("client", "int64", ())]
            if introduced:
                return artifacts
            proxies, routed = settings.proxies, settings.router.vectors == "seed" and settings.router.rows != "fresh"
            on_embedding = settings.router.decide == "embedding"
            if (proxies.selection != "random" and proxies.relevance == "fisher") or (routed and on_embedding):
                artifacts.append(Artifact("seed-routing-vector", "float32", (seed.width,)))
            if proxies.selection != "random" and proxies.relevance == "classifier":
                artifacts.append(Artifact("relevance-classifier", "float32", (seed.width + 1,)))
            if routed and not on_embedding:
                artifacts.append(Artifact("seed-ffn-inputs", "float32", _vectors_shape(settings, seed)))
            if settings.by_shape:
                size = shape_size(settings.router.shape_rank, evidence_width(seed, settings.lora, settings.router))
                artifacts.append(Artifact("seed-shape", "float16", (size,), optional=True))
            return artifacts
        case "expert":
            matrices = [Artifact(name, "float16", shape) for name, shape in expert_shapes(seed, settings.lora).items()]
            vectors = Artifact("routing-vectors", "float32", _vectors_shape(settings, seed))
            wanted = settings.router.vectors == "private" and settings.router.rows != "fresh"
            return [*matrices, vectors] if wanted else matrices
        case "deliver":
            return [Artifact("accuracy", "float32", ())] if settings.report_accuracy else []


def request_artifacts(kind: Kind, settings: Settings, seed: Seed, experts: int | None = None) -> list[Artifact]:
    """The arrays of a server's request; of a delivery, of a model with so many experts, one a client unless it says."""
    count = settings.clients if experts is None else experts
    match kind:
        case "profile":
            return []
        case "expert":
            return [Artifact("proxies", "int64", (settings.proxies.count,))]
        case "deliver":
            deciding = range(len(evidence_paths(seed, settings.lora, settings.router)))
            routers = [part for i in deciding for part in _router_artifacts(f"router.{i}", count, settings, seed)]
            shapes = expert_shapes(seed, settings.lora)
            matrices = [
                Artifact(f"expert.{k}.{name}", "float16", shape) for k in range(count) for name, shape in shapes.items()
            ]
            return routers + matrices


def _router_artifacts(name: str, experts: int, settings: Settings, seed: Seed) -> list[Artifact]:
    router = settings.router
    rows, width = experts + router.seed_expert, evidence_width(seed, settings.lora, router)
    shapes: dict[str, tuple[int, ...]] = {"rows": (rows, width), "biases": (rows,), "context": ()}
    if settings.by_shape:
        factors = (rows, shape_rank(router.shape_rank, width), width)
        shapes |= {"centre": (width,), "projection": (width, width), "scales": (rows, width), "factors": factors}
    return [Artifact(f"{name}.{part}", "float32", shape) for part, shape in shapes.items()]


def _vectors_shape(settings: Settings, seed: Seed) -> tuple[int, int]:
    """One vector for every FFN input that a router looks at."""
    return len(all_evidence_paths(seed, settings.lora, settings.router)), seed.width


def encode_request(request: Request) -> RecordDict:
    """A request as Flower records."""
    members = request.settings.members if request.members is None else request.members
    config = ConfigRecord(
        {
            "protocol": PROTOCOL,
            "version": version("metamoe-fl"),
            "settings": request.settings.model_dump_json(by_alias=True),
            "seed": request.seed,
            "public": request.public,
            "members": list(members),
            "experts": " ".join(request.experts),
            "known": list(request.known),
            "envelope": request.envelope.model_dump_json(),
        }
    )
    return RecordDict({REQUEST: config, ARRAYS: _encode(request.arrays)})


def addressed(content: RecordDict, envelope: Envelope) -> RecordDict:
    """The same request in another envelope; the arrays are shared, not copied."""
    config = ConfigRecord({**content.config_records[REQUEST], "envelope": envelope.model_dump_json()})
    return RecordDict({REQUEST: config, ARRAYS: content.array_records[ARRAYS]})


def question_hash(said: Sequence[object], content: RecordDict) -> str:
    """SHA-256 over what is asked for: what is said of it, as JSON, and a request's arrays. The same question has the same
    answer, whichever message it is.
    """
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, array in sorted(content.array_records.get(ARRAYS, ArrayRecord()).items()):
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode() + array.data)
    return digest.hexdigest()


def decode_terms(content: RecordDict) -> Request:
    """A request without its arrays, which are not looked at.

    Raises:
        ProtocolError: it is not one.
        VersionMismatchError: it is of another version.
        MetaMoEError: its settings are wrong.
    """
    config = content.config_records.get(REQUEST)
    if config is None or not {"protocol", "version"} <= set(config):
        raise ProtocolError(f"a request needs a protocol and a version; got {sorted(config or {})}")
    said, ours = (config["protocol"], config["version"]), (PROTOCOL, version("metamoe-fl"))
    if said != ours:
        raise VersionMismatchError(
            f"the server has MetaMoE-FL {said[1]!r} (protocol {said[0]!r}), this client {ours[1]!r} (protocol {ours[0]}); "
            "install the same version"
        )
    if set(config) != {"protocol", "version", "settings", "seed", "public", "members", "experts", "known", "envelope"}:
        raise ProtocolError(
            f"a request needs settings, seed, public, members, experts, known and envelope; got {sorted(config)}"
        )
    try:
        values = json.loads(str(config["settings"]))
        envelope = Envelope.model_validate_json(str(config["envelope"]))
    except json.JSONDecodeError as error:
        raise ProtocolError(f"the request's settings are not JSON: {error}") from error
    except ValidationError as error:
        raise ProtocolError(f"the request's envelope: {first_problem(error)}") from error
    hashes = str(config["seed"]), str(config["public"])
    if not all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes):
        raise ProtocolError(f"seed and public of a request are SHA-256 hashes; got {hashes}")
    settings = validated(values)
    members = _members(config["members"], settings)
    known = _numbers("known", config["known"], range(settings.clients))
    return Request(settings, *hashes, {}, envelope, members, _experts(config["experts"], len(members)), known)


def _members(value: object, settings: Settings) -> list[int]:
    members = _numbers("members", value, settings.members)
    if len(members) < settings.least_clients:
        raise ProtocolError(f"a request of a run with {len(members)} clients; it needs {settings.least_clients}")
    return members


def _numbers(what: str, value: object, allowed: Sequence[int]) -> list[int]:
    if not isinstance(value, list) or value != sorted(set(value).intersection(allowed)):
        raise ProtocolError(f"{what} of a request are numbers of clients in order, 0 to {allowed[-1]}; got {value!r}")
    return value


def _experts(value: object, members: int) -> list[str]:
    names = str(value).split()
    # They become names of folders.
    if len(set(names)) != len(names) or len(names) > members or not all(re.fullmatch("[a-z0-9][a-z0-9_-]*", n) for n in names):
        raise ProtocolError(f"experts of a request are different names, at most one for each client; got {value!r}")
    return names


def decode_request(kind: Kind, content: RecordDict) -> Request:
    """The request in Flower records.

    Raises:
        ProtocolError: it is not one of this kind.
        VersionMismatchError: it is of another version.
    """
    terms = decode_terms(content)
    seed = load_seed(terms.settings.seed_model)
    arrays = decode_arrays(content, request_artifacts(kind, terms.settings, seed, len(terms.experts)))
    return replace(terms, arrays=arrays)


def encode_reply(arrays: Mapping[str, np.ndarray], audit: Mapping[str, np.ndarray] | None = None) -> RecordDict:
    """A reply as Flower records, its float32 numbers rounded to :data:`MANTISSA_BITS`. Arrays are in the order of names and
    contiguous, so that the same numbers are the same bytes, whether they were just computed or read again.
    """
    coarse = {name: _rounded(np.asarray(array, order="C")) for name, array in sorted(arrays.items())}
    records = ({ARRAYS: _encode(coarse)} if arrays else {}) | ({AUDIT: _encode(dict(sorted(audit.items())))} if audit else {})
    return RecordDict(dict(records))


def decode_reply(content: RecordDict, artifacts: Sequence[Artifact]) -> dict[str, np.ndarray]:
    """The arrays of a reply that holds exactly the given artifacts, and perhaps a record for the audit.

    Raises:
        ProtocolError: anything else is in it, or anything is missing, of another form, or finer than declared.
    """
    allowed = {ARRAYS, AUDIT} if artifacts else {AUDIT}
    if extra := set(content) - allowed:
        raise ProtocolError(f"undeclared record {sorted(extra)[0]!r}")
    arrays = decode_arrays(content, artifacts)
    for name, array in arrays.items():
        if array.dtype == np.float32 and np.any(array.view(np.uint32) & _LOW_BITS):
            raise ProtocolError(f"array {name!r} is finer than the declared {MANTISSA_BITS} bits of mantissa")
    return arrays


def decode_audit(kind: Kind, content: RecordDict) -> dict[str, np.ndarray]:
    """What a reply holds for the audit; nothing, if its client keeps no ledger.

    Raises:
        ProtocolError: it is not what is declared.
    """
    return decode_arrays(content, AUDIT_ARTIFACTS[kind], AUDIT) if AUDIT in content else {}


def decode_arrays(content: RecordDict, artifacts: Sequence[Artifact], record: str = ARRAYS) -> dict[str, np.ndarray]:
    """The declared arrays of a message, each checked by its header before anything is allocated.

    Raises:
        ProtocolError: names the array and what is wrong with it.
    """
    arrays = content.array_records.get(record, ArrayRecord())
    if extra := set(arrays) - {artifact.name for artifact in artifacts}:
        raise ProtocolError(f"undeclared array {sorted(extra)[0]!r}")
    decoded = {}
    for artifact in artifacts:
        if artifact.name not in arrays:
            if artifact.optional:
                continue
            raise ProtocolError(f"array {artifact.name!r} is missing")
        decoded[artifact.name] = _decode(arrays[artifact.name], artifact)
    return decoded


def framed_bytes(artifact: Artifact) -> int:
    """Bytes of an array on the wire: numpy's header, and the numbers."""
    return len(_npy_header(artifact)) + artifact.bytes


def _rounded(array: np.ndarray) -> np.ndarray:
    """float32 to the nearest number with few enough bits, ties to even; anything else as it is."""
    if array.dtype != np.float32:
        return array
    bits = np.ascontiguousarray(array).view(np.uint32)
    half = (_LOW_BITS >> 1) + ((bits >> (23 - MANTISSA_BITS)) & 1)
    return ((bits + half) & ~_LOW_BITS).view(np.float32).reshape(array.shape)


def _encode(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array, order="C")) for name, array in arrays.items()})


def _decode(array: Array, artifact: Artifact) -> np.ndarray:
    """The array, if its envelope, its npy header and its length all are what was declared, and every number is finite."""
    said, declared = (array.dtype, tuple(array.shape), array.stype), (artifact.dtype, artifact.shape, "numpy.ndarray")
    if said != declared:
        raise ProtocolError(
            f"array {artifact.name!r} is {array.dtype} {list(array.shape)} ({array.stype}); "
            f"declared is {artifact.dtype} {list(artifact.shape)} (numpy.ndarray)"
        )
    # The one header that numpy writes for this form. Compared, not parsed: a parser is something to attack.
    header = _npy_header(artifact)
    if not array.data.startswith(header):
        raise ProtocolError(
            f"array {artifact.name!r} does not begin with the npy header of {artifact.dtype} {list(artifact.shape)}"
        )
    if len(array.data) - len(header) != artifact.bytes:
        raise ProtocolError(f"array {artifact.name!r} has {len(array.data) - len(header)} bytes; declared are {artifact.bytes}")
    values = np.frombuffer(array.data, artifact.dtype, offset=len(header)).reshape(artifact.shape).copy()
    if not np.isfinite(values).all():
        raise ProtocolError(f"array {artifact.name!r} has values that are not finite")
    return values


def _npy_header(artifact: Artifact) -> bytes:
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(artifact.dtype))
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": artifact.shape})
    return stream.getvalue()
