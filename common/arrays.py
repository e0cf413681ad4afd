"""Arrays on disk that say whether they are whole: safetensors with the hash of all that is in them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from metamoe.common.errors import StateFileError
from metamoe.common.files import write_atomically

_HASH, _ABOUT = "sha256", "about"


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any] | None = None) -> None:
    """Write arrays and what is to be said about them (JSON); a reader sees the whole file or none of it.

    Raises:
        StateFileError: it cannot be written, as where the disk is full.
    """
    said = json.dumps(about or {}, sort_keys=True)
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        write_atomically(file, save(whole, {_ABOUT: said, _HASH: _hash(whole, said)}))
    except OSError as error:
        raise StateFileError(f"{file} cannot be written: {error}") from error


def read_arrays(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What :func:`write_arrays` wrote.

    Raises:
        StateFileError: it is not there, or not as it was written.
    """
    try:
        with safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StateFileError(f"{file} cannot be read: {error}") from error
    said = metadata.get(_ABOUT, "")
    if metadata.get(_HASH) != _hash(arrays, said):
        raise StateFileError(f"{file} is not as it was written: its hash is another one")
    return arrays, json.loads(said)


def arrays_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, forms and bytes of arrays, whatever their order."""
    return _hash(arrays, "")


def _hash(arrays: Mapping[str, np.ndarray], said: str) -> str:
    digest = hashlib.sha256(said.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode() + np.asarray(array, order="C").tobytes())
    return digest.hexdigest()
