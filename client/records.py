"""Which private records took part in a run: a list that the client keeps, of hashes that say nothing without its key, and the
one hash over it that its ledger has.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

import fsspec
from datasets import Dataset, Image

from metamoe.client.private import private_samples
from metamoe.client.site import Site
from metamoe.common.audit.entries import Records
from metamoe.common.audit.merkle import merkle_root
from metamoe.common.config import Settings
from metamoe.common.errors import StateFileError
from metamoe.common.files import write_atomically, write_secret
from metamoe.common.wire import Kind

_KEY = "records.key"


def record_hashes(samples: Dataset) -> list[str]:
    """The hash of each record: SHA-256 of a picture's file, as ``sha256sum`` has it; of a text, of its columns as JSON."""
    if "image" not in samples.features:
        return [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest() for row in samples]
    hashes = []
    for picture in samples.cast_column("image", Image(decode=False))["image"]:
        if picture["bytes"] is not None:
            hashes.append(hashlib.sha256(picture["bytes"]).hexdigest())
            continue
        with fsspec.open(picture["path"]) as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashes


def took_part(kind: Kind, settings: Settings, site: Site, run: str) -> list[Records]:
    """The line for a ledger that commits to the records of which a reply is computed; the list is on disk beside it
    then. No line for a reply that is of no record.
    """
    if kind == "deliver" and not settings.report_accuracy:
        return []
    split = settings.data.evaluate_on if kind == "deliver" else "train"
    _make_key(site.audit)
    key = records_key(site.audit)
    leaves = sorted({leaf(key, run, record) for record in record_hashes(private_samples(settings, site, split))})
    root = root_of(leaves)
    write_atomically(_list_file(site.audit, root), json.dumps(leaves))
    return [Records(run=run, stage=kind, root=root)]


def leaf(key: bytes, run: str, record: str) -> str:
    """HMAC-SHA-256 of run and record under the client's own key: who has not the key cannot tell whether a record is meant."""
    return hmac.digest(key, f"{run} {record}".encode(), "sha256").hex()


def root_of(leaves: Sequence[str]) -> str:
    """The Merkle root (RFC 6962) over leaves in their order."""
    return merkle_root([bytes.fromhex(one) for one in leaves]).hex()


def leaves_of(folder: Path, root: str) -> list[str]:
    """The list that a ledger's line commits to.

    Raises:
        StateFileError: it is not there, or is another one.
    """
    file = _list_file(folder, root)
    try:
        leaves = [str(one) for one in json.loads(file.read_text())]
        found = root_of(leaves)
    except (OSError, ValueError, TypeError) as error:
        raise StateFileError(f"{file}, the list of records that took part, cannot be read: {error}") from error
    if found != root:
        raise StateFileError(f"{file} is not the list of records that the ledger names")
    return leaves


def _list_file(folder: Path, root: str) -> Path:
    return folder / f"records-{root}.json"


def _make_key(folder: Path) -> None:
    if not (folder / _KEY).exists():
        write_secret(folder / _KEY, secrets.token_hex(32) + "\n")


def records_key(folder: Path) -> bytes:
    """The key of the hashes of records, beside the ledger.

    Raises:
        StateFileError: it is not there.
    """
    try:
        return bytes.fromhex((folder / _KEY).read_text().strip())
    except (OSError, ValueError) as error:
        raise StateFileError(f"{folder / _KEY}, the key of the hashes of records, cannot be read: {error}") from error
