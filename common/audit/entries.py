"""The lines of a ledger: what each may say, and the one way to write it.

A client's ledger has ``open``, ``records``, ``intent``, ``resent``, ``refusal``, ``receipt``, ``seal`` and ``erasure``; a
server's ``open``, ``arrival``, ``failure`` and ``seal``. Nothing in them depends on a private sample but the hashes of what was
sent, and hashes of records under a key that the client keeps. Times are to the minute: finer ones would tell how long a client
computed, and so how much data it has.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import rfc8785
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256, or a public Ed25519 key")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$", description="Ed25519")]
Identifier = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
ArrayName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
Stage = Literal["profile", "expert", "deliver"]
FIRST = "0" * 64
"""What comes before the first line."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ArrayEntry(_Line):
    """One array that was sent: its form, its bytes without framing, and the SHA-256 of those bytes (C order, little endian)."""

    name: ArrayName
    dtype: Literal["float16", "float32", "int64", "uint8"]
    shape: list[Annotated[int, Field(ge=0)]]
    bytes: int = Field(ge=0)
    sha256: Digest


class Spent(_Line):
    """Differential privacy spent by a message: (epsilon, delta) of a Gaussian mechanism, and the arrays that it covers."""

    covers: list[ArrayName]
    epsilon: float = Field(ge=0, allow_inf_nan=False)
    delta: float = Field(ge=0, le=1)
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False, description="in units of the sensitivity")
    sampling_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)


class Open(_Line):
    """A run begins: the hashes of what it is about, and who keeps the other ledger."""

    type: Literal["open"] = "open"
    run: Identifier
    role: Literal["client", "server"]
    key: Digest = Field(description="public key of the keeper of this ledger")
    server: Digest = Field(description="public key of the server's ledger")
    settings: Digest
    seed_model: Digest
    public_set: Digest
    code: Digest = Field(description="of the installed product's own source files")
    policy: Digest | None = Field(description="of the client's policy file; none at the server")


class Records(_Line):
    """The records of which the next reply of this stage is computed: the Merkle root over their sorted leaves, each a hash
    under a key. Key and leaves never leave the client.
    """

    type: Literal["records"] = "records"
    run: Identifier
    stage: Stage
    root: Digest


class Erasure(_Line):
    """A record that took part in this run was erased where the client keeps anything of it."""

    type: Literal["erasure"] = "erasure"
    run: Identifier
    root: Digest = Field(description="of the list that the record is in")
    leaf: Digest = Field(description="of the record, under the client's key")


class Intent(_Line):
    """This is about to be sent; on disk before it is."""

    type: Literal["intent"] = "intent"
    run: Identifier
    message: Identifier
    stage: Stage
    arrays: list[ArrayEntry]
    spent: list[Spent] = []


class Resent(_Line):
    """What an earlier line was about to send is about to be sent again, to the byte: the server asked again."""

    type: Literal["resent"] = "resent"
    run: Identifier
    message: Identifier
    stage: Stage
    first: Identifier = Field(description="message of the line that has the arrays")


class Refusal(_Line):
    """Nothing was sent but this error code."""

    type: Literal["refusal"] = "refusal"
    run: Identifier
    message: Identifier
    stage: Stage
    code: int


class Receipt(_Line):
    """The server has signed that it received these arrays in answer to this message."""

    type: Literal["receipt"] = "receipt"
    run: Identifier
    message: Identifier
    arrays: Digest
    signature: Signature


class Arrival(_Line):
    """A reply arrived at the server, who signs for it."""

    type: Literal["arrival"] = "arrival"
    run: Identifier
    message: Identifier
    stage: Stage
    client: int = Field(ge=0)
    key: Digest | None = Field(description="public key of the client's ledger, as it said; none if it keeps no ledger")
    arrays: list[ArrayEntry]
    signature: Signature


class Failure(_Line):
    """A client answered with an error code, or with something that was not declared (``code`` 30)."""

    type: Literal["failure"] = "failure"
    run: Identifier
    message: Identifier
    stage: Stage
    code: int


class Seal(_Line):
    """The Merkle root over all earlier lines of this run, signed by the keeper of the ledger."""

    type: Literal["seal"] = "seal"
    run: Identifier
    count: int = Field(ge=1, description="lines under the root")
    root: Digest
    signature: Signature


Entry = Annotated[
    Open | Records | Erasure | Intent | Resent | Refusal | Receipt | Arrival | Failure | Seal,
    Field(discriminator="type"),
]


class Line(_Line):
    """One line of a ledger."""

    version: Literal[1] = 1
    seq: int = Field(ge=0)
    prev: Digest = Field(description="SHA-256 of the line before, without its end of line; zeros for the first")
    time: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\dZ$")]
    entry: Entry


class Head(_Line):
    """The end of a ledger, signed anew with every line: a line cut off shows."""

    version: Literal[1] = 1
    count: int = Field(ge=0)
    last: Digest
    signature: Signature


def canonical(value: BaseModel | dict[str, Any] | list[Any]) -> bytes:
    """The value in the one form that RFC 8785 allows."""
    return rfc8785.dumps(_plain(value))


def array_entries(arrays: Mapping[str, np.ndarray]) -> list[ArrayEntry]:
    """What a ledger says of these arrays."""
    return [
        ArrayEntry.model_validate(
            {
                "name": name,
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "bytes": array.nbytes,
                "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(),
            }
        )
        for name, array in arrays.items()
    ]


def digest_of(arrays: list[ArrayEntry]) -> str:
    """One hash for all arrays of a message, whatever their order."""
    return hashlib.sha256(canonical([_plain(a) for a in sorted(arrays, key=lambda a: a.name)])).hexdigest()


def settings_hash(settings: BaseModel) -> str:
    """SHA-256 of a run's settings in canonical form."""
    return hashlib.sha256(canonical(settings.model_dump(mode="json", by_alias=True))).hexdigest()


def receipt_statement(run: str, message: str, arrays: str) -> bytes:
    """What the server signs when a reply has arrived."""
    return canonical({"arrays": arrays, "message": message, "run": run, "what": "receipt"})


def seal_statement(run: str, count: int, root: str) -> bytes:
    """What the keeper of a ledger signs at the end of a run."""
    return canonical({"count": count, "root": root, "run": run, "what": "seal"})


def head_statement(count: int, last: str) -> bytes:
    """What the keeper of a ledger signs with every line."""
    return canonical({"count": count, "last": last, "what": "head"})


def json_schema(of: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema of what stands in a file: a ledger's :class:`Line`, its :class:`Head`, or a policy."""
    return TypeAdapter(of).json_schema()


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
