"""The form of a ledger: what a line may hold, how it is written, hashed and signed."""

import hashlib
import json
import math
import re
from decimal import Decimal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def text(pattern):
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def whole(least=None):
    return lambda value: type(value) is int and (least is None or value >= least) and abs(value) < 2**53


def number(above=None, least=None, most=None):
    def check(value):
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        low = (above is None or value > above) and (least is None or value >= least)
        return low and (most is None or value <= most)

    return check


def either(*checks):
    return lambda value: any(check(value) for check in checks)


def each(check):
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def fields(**checks):
    """An object with exactly these fields."""
    return lambda value: (
        isinstance(value, dict) and value.keys() == checks.keys() and all(c(value[n]) for n, c in checks.items())
    )


DIGEST, SIGNATURE, IDENTIFIER = text("[0-9a-f]{64}"), text("[0-9a-f]{128}"), text("[0-9a-f]{32}")
NAME, STAGE, NONE = text("[A-Za-z0-9_.-]{1,200}"), text("profile|expert|deliver"), lambda value: value is None
ARRAY = fields(name=NAME, dtype=text("float16|float32|int64|uint8"), shape=each(whole(0)), bytes=whole(0), sha256=DIGEST)
SPENT = fields(
    covers=each(NAME),
    epsilon=number(least=0),
    delta=number(least=0, most=1),
    noise_multiplier=number(above=0),
    sampling_rate=number(above=0, most=1),
    steps=whole(1),
)
MESSAGE = {"run": IDENTIFIER, "message": IDENTIFIER}
ENTRIES = {
    "open": {
        **{"run": IDENTIFIER, "role": text("client|server"), "key": DIGEST, "server": DIGEST, "settings": DIGEST},
        **{"seed_model": DIGEST, "public_set": DIGEST, "code": DIGEST, "policy": either(DIGEST, NONE)},
    },
    "records": {"run": IDENTIFIER, "stage": STAGE, "root": DIGEST},
    "erasure": {"run": IDENTIFIER, "root": DIGEST, "leaf": DIGEST},
    "intent": {**MESSAGE, "stage": STAGE, "arrays": each(ARRAY), "spent": each(SPENT)},
    "resent": {**MESSAGE, "stage": STAGE, "first": IDENTIFIER},
    "refusal": {**MESSAGE, "stage": STAGE, "code": whole()},
    "receipt": {**MESSAGE, "arrays": DIGEST, "signature": SIGNATURE},
    "arrival": {
        **{**MESSAGE, "stage": STAGE, "client": whole(0), "key": either(DIGEST, NONE), "arrays": each(ARRAY)},
        "signature": SIGNATURE,
    },
    "failure": {**MESSAGE, "stage": STAGE, "code": whole()},
    "seal": {"run": IDENTIFIER, "count": whole(1), "root": DIGEST, "signature": SIGNATURE},
}


def is_entry(value):
    if not isinstance(value, dict) or not isinstance(value.get("type"), str) or value["type"] not in ENTRIES:
        return False
    return fields(type=text(value["type"]), **ENTRIES[value["type"]])(value)


VERSION = lambda value: type(value) is int and value == 1  # noqa: E731
LINE = fields(version=VERSION, seq=whole(0), prev=DIGEST, time=text(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ"), entry=is_entry)
HEAD = fields(version=VERSION, count=whole(0), last=DIGEST, signature=SIGNATURE)


def parsed(raw):
    """JSON in UTF-8, with every name once; ValueError for anything else."""

    def once(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    try:
        return json.loads(raw.decode(), object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def canonical(value):
    """The one form of RFC 8785, for what stands in a ledger."""
    if isinstance(value, dict):
        return b"{" + b",".join(canonical(name) + b":" + canonical(value[name]) for name in sorted(value)) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(canonical, value)) + b"]"
    if isinstance(value, float):
        return shortest(value).encode()
    return json.dumps(value, ensure_ascii=False).encode()


def shortest(value):
    """A float as ECMAScript writes it: the fewest digits that read back to it."""
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    digits = "".join(map(str, digits))
    point = len(digits) + exponent
    if len(digits) <= point <= 21:
        body = digits.ljust(point, "0")
    elif 0 < point <= 21:
        body = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        body = "0." + "0" * -point + digits
    else:
        body = digits[0] + ("." + digits[1:] if len(digits) > 1 else "") + f"e{point - 1:+d}"
    return ("-" if sign else "") + body


def sha(content):
    return hashlib.sha256(content).hexdigest()


def signed(key, signature, statement):
    """Whether the holder of a public key signed this statement."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), canonical(statement))
    except (InvalidSignature, ValueError):
        return False
    return True


def merkle_root(leaves):
    """RFC 6962, section 2.1."""
    if len(leaves) < 2:
        return hashlib.sha256(b"\x00" + leaves[0] if leaves else b"").digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + merkle_root(leaves[:half]) + merkle_root(leaves[half:])).digest()


def digest_of(arrays):
    """One hash for all arrays of a message."""
    return sha(canonical(sorted(arrays, key=lambda array: array["name"])))
