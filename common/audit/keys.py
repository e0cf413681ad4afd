"""Audit keys: Ed25519, one for each party, made where it is used."""

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from metamoe.common.errors import InputFileError
from metamoe.common.files import write_atomically, write_secret

_SECRET, _PUBLIC = "audit.key", "audit.pub"
CLIENT_KEY = "client.pub"
"""Beside a gateway's ledger: the public key of the ledger that the client's own app keeps, as its first reply named it."""


def audit_key(folder: Path) -> Ed25519PrivateKey:
    """The key in ``audit.key``; where there is none it is made, readable by its owner alone, with ``audit.pub`` beside it.

    Raises:
        InputFileError: the file holds something else.
    """
    file = folder / _SECRET
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not file.exists():
        new = Ed25519PrivateKey.generate().private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        write_secret(file, new.hex() + "\n")
    try:
        key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(file.read_text().strip()))
    except (OSError, ValueError) as error:
        raise InputFileError(f"{file} is not an audit key of 64 hexadecimal digits: {error}") from error
    if not (folder / _PUBLIC).exists():
        write_atomically(folder / _PUBLIC, public_hex(key) + "\n")
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half as 64 hexadecimal digits."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def read_public(file: Path) -> str:
    """The public key in a file, as 64 hexadecimal digits.

    Raises:
        InputFileError: it holds something else.
    """
    try:
        text = file.read_text().strip()
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except (OSError, ValueError) as error:
        raise InputFileError(f"{file} is not a public audit key of 64 hexadecimal digits: {error}") from error
    return text


def public_file(folder: Path) -> Path:
    """Where the public half lies."""
    return folder / _PUBLIC


def signed_by(public: str, signature: str, content: bytes) -> bool:
    """Whether ``signature`` (hexadecimal) over ``content`` was made by the holder of ``public`` (hexadecimal)."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), content)
    except (InvalidSignature, ValueError):
        return False
    return True
