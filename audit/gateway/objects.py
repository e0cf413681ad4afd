"""What a SuperNode pushes, read back to arrays: Flower's objects, each named by the hash of its content and holding the names
of its children.

    Message -> RecordDict -> ArrayRecord -> Array -> ArrayChunk

An object is ``TYPE CHILD,CHILD,... LENGTH``, a zero byte, and a body of that length. This is a reading of its own, that knows
no other type and allocates nothing that was not declared.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

from metamoe.common.errors import ProtocolError
from metamoe.common.wire import ARRAYS, AUDIT, Artifact, framed_bytes

_LARGEST_HEAD = 2_000_000
_LARGEST_JSON = 4_000_000


def read_reply(
    root: str, content_of: Callable[[str], bytes], artifacts: Sequence[Artifact], audit: Sequence[Artifact]
) -> RecordDict:
    """The records of a reply.

    Args:
        root: id of the RecordDict.
        content_of: gives the content of an object that was pushed, whose hash is its id.
        artifacts: what may be in the reply.
        audit: what may be in its record for the audit.

    Raises:
        ProtocolError: an object is not what it should be here, or an array that was not declared is in it.
    """
    declared = {ARRAYS: artifacts, AUDIT: audit}
    records = {}
    for name, record in _references(content_of(root), "RecordDict").items():
        if name not in declared:
            raise ProtocolError(f"undeclared record {name[:100]!r}")
        forms = {artifact.name: artifact for artifact in declared[name]}
        arrays = {}
        for key, array in _references(content_of(record), "ArrayRecord").items():
            if key not in forms:
                raise ProtocolError(f"undeclared array {key[:100]!r}")
            arrays[key] = _array(content_of(array), content_of, forms[key])
        records[name] = ArrayRecord(arrays)
    return RecordDict(dict(records))


def _array(content: bytes, content_of: Callable[[str], bytes], artifact: Artifact) -> Array:
    children, body = _opened(content, "Array")
    about = _json(body)
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "stype", "arraychunk_ids"}:
        raise ProtocolError(f"array {artifact.name!r} is not described as Flower does")
    order, shape = about["arraychunk_ids"], about["shape"]
    texts = all(isinstance(about[key], str) for key in ("dtype", "stype"))
    if not (texts and _are_counts(order) and _are_counts(shape)) or any(index >= len(children) for index in order):
        raise ProtocolError(f"array {artifact.name!r} is not described as Flower does")
    chunks = [_opened(content_of(child), "ArrayChunk")[1] for child in children]
    # Before they are joined: the same chunk can be named a million times.
    size = sum(len(chunks[index]) for index in order)
    if size != framed_bytes(artifact):
        raise ProtocolError(f"array {artifact.name!r} has {size} bytes with its header; declared are {framed_bytes(artifact)}")
    return Array(about["dtype"], tuple(shape), about["stype"], b"".join(chunks[index] for index in order))


def _references(content: bytes, kind: str) -> dict[str, str]:
    """Names, and the ids of what they name."""
    children, body = _opened(content, kind)
    named = _json(body)
    if not isinstance(named, dict) or not set(map(str, named.values())) == set(children):
        raise ProtocolError(f"a {kind} does not name its children")
    return {str(name): str(child) for name, child in named.items()}


def _opened(content: bytes, kind: str) -> tuple[list[str], bytes]:
    """The ids of an object's children, and its body."""
    divider = content.find(b"\0", 0, _LARGEST_HEAD)
    try:
        found, children, length = content[: max(divider, 0)].decode("ascii").split(" ")
        fits = int(length) == len(content) - divider - 1
    except ValueError as error:
        raise ProtocolError(f"an object has no head; a {kind} is expected") from error
    if found != kind or not fits:
        raise ProtocolError(f"an object is a {found[:50]!r} of another length or type; a {kind} is expected")
    return (children.split(",") if children else []), content[divider + 1 :]


def _json(body: bytes) -> Any:
    if len(body) > _LARGEST_JSON:
        raise ProtocolError(f"an object's description has {len(body)} bytes; at most {_LARGEST_JSON} are read")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("an object's description is not JSON") from error


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
