"""Everything that may cross between server and clients: typed requests and replies, to Flower records and back.

The server asks three kinds of question. A reply holds exactly the arrays declared here for its kind, by record, name,
dtype and shape, and nothing else: no text, no metric, no example count.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.config import Settings, validated
from common.errors import ProtocolError
from common.model.lora import expert_shapes
from common.model.routing import all_evidence_paths, evidence_paths
from common.model.seed import Seed, load_seed

PROTOCOL = 3

Kind = Literal["profile", "expert", "deliver"]
MESSAGE_TYPE: dict[Kind, str] = {"profile": "query.profile", "expert": "train.expert", "deliver": "evaluate.deliver"}
ARRAYS = "arrays"
REQUEST = "request"
CLIENT_ERROR_CODE = 1_000
"""Added to an error's exit code when a client reports it: Flower's own codes are below it."""


@dataclass(frozen=True)
class Artifact:
    """One array that may cross."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Request:
    """What the server sends: the settings, the hashes of what both sides must hold alike, and arrays."""

    settings: Settings
    seed: str
    public: str
    arrays: Mapping[str, np.ndarray]


def reply_artifacts(kind: Kind, settings: Settings, seed: Seed) -> list[Artifact]:
    """What a client's reply consists of."""
    match kind:
        case "profile":
            artifacts = [Artifact("client", "int64", ())]
            if settings.proxies.selection != "random":
                if settings.proxies.relevance == "fisher":
                    artifacts.append(Artifact("seed-routing-vector", "float32", (seed.width,)))
                else:
                    artifacts.append(Artifact("relevance-classifier", "float32", (seed.width + 1,)))
            if settings.router.vectors == "seed" and settings.router.rows != "fresh":
                artifacts.append(Artifact("seed-ffn-inputs", "float32", _vectors_shape(settings, seed)))
            return artifacts
        case "expert":
            matrices = [Artifact(name, "float16", shape) for name, shape in expert_shapes(seed, settings.lora).items()]
            vectors = Artifact("routing-vectors", "float32", _vectors_shape(settings, seed))
            wanted = settings.router.vectors == "private" and settings.router.rows != "fresh"
            return [*matrices, vectors] if wanted else matrices
        case "deliver":
            return [Artifact("accuracy", "float32", ())] if settings.report_accuracy else []


def request_artifacts(kind: Kind, settings: Settings, seed: Seed) -> list[Artifact]:
    """The arrays of a server's request."""
    match kind:
        case "profile":
            return []
        case "expert":
            return [Artifact("proxies", "int64", (settings.proxies.count,))]
        case "deliver":
            rows = settings.clients + settings.router.seed_expert
            routers = [
                part
                for i, paths in enumerate(evidence_paths(seed, settings.lora, settings.router))
                for part in (
                    Artifact(f"router.{i}.rows", "float32", (rows, len(paths) * seed.width)),
                    Artifact(f"router.{i}.biases", "float32", (rows,)),
                    Artifact(f"router.{i}.context", "float32", ()),
                )
            ]
            shapes = expert_shapes(seed, settings.lora)
            experts = [
                Artifact(f"expert.{k}.{name}", "float16", shape)
                for k in range(settings.clients)
                for name, shape in shapes.items()
            ]
            return routers + experts


def _vectors_shape(settings: Settings, seed: Seed) -> tuple[int, int]:
    """One vector for every FFN input that a router looks at."""
    return len(all_evidence_paths(seed, settings.lora, settings.router)), seed.width


def encode_request(request: Request) -> RecordDict:
    """A request as Flower records."""
    config = ConfigRecord(
        {
            "protocol": PROTOCOL,
            "settings": request.settings.model_dump_json(by_alias=True),
            "seed": request.seed,
            "public": request.public,
        }
    )
    return RecordDict({REQUEST: config, ARRAYS: _encode(request.arrays)})


def decode_request(kind: Kind, content: RecordDict) -> Request:
    """The request in Flower records.

    Raises:
        ProtocolError: it is not one of this kind, or one of another protocol version.
    """
    config = content.config_records.get(REQUEST)
    if config is None or set(config) != {"protocol", "settings", "seed", "public"}:
        raise ProtocolError(f"a request needs protocol, settings, seed and public; got {sorted(config or {})}")
    if config["protocol"] != PROTOCOL:
        raise ProtocolError(
            f"the server speaks protocol {config['protocol']!r}, this client {PROTOCOL}; install the same version"
        )
    try:
        values = json.loads(str(config["settings"]))
    except json.JSONDecodeError as error:
        raise ProtocolError(f"the request's settings are not JSON: {error}") from error
    settings = validated(values)
    arrays = decode_arrays(content, request_artifacts(kind, settings, load_seed(settings.seed_model)))
    return Request(settings, str(config["seed"]), str(config["public"]), arrays)


def encode_reply(arrays: Mapping[str, np.ndarray]) -> RecordDict:
    """A reply as Flower records."""
    return RecordDict({ARRAYS: _encode(arrays)} if arrays else {})


def decode_reply(content: RecordDict, artifacts: list[Artifact]) -> dict[str, np.ndarray]:
    """The arrays of a reply that holds exactly the given artifacts.

    Raises:
        ProtocolError: anything else is in it, or anything is missing or of another form.
    """
    allowed = {ARRAYS} if artifacts else set()
    if extra := set(content) - allowed:
        raise ProtocolError(f"undeclared record {sorted(extra)[0]!r}")
    return decode_arrays(content, artifacts)


def decode_arrays(content: RecordDict, artifacts: list[Artifact]) -> dict[str, np.ndarray]:
    """The declared arrays of a message, each checked by its header before anything is allocated.

    Raises:
        ProtocolError: names the array and what is wrong with it.
    """
    arrays = content.array_records.get(ARRAYS, ArrayRecord())
    if extra := set(arrays) - {artifact.name for artifact in artifacts}:
        raise ProtocolError(f"undeclared array {sorted(extra)[0]!r}")
    decoded = {}
    for artifact in artifacts:
        if artifact.name not in arrays:
            raise ProtocolError(f"array {artifact.name!r} is missing")
        decoded[artifact.name] = _decode(arrays[artifact.name], artifact)
    return decoded


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
