"""Which code is running: the hash of the installed product's own files, for the ledgers."""

import hashlib
from functools import lru_cache
from importlib import resources
from pathlib import Path

_ROOMS = ("client", "common")


@lru_cache(maxsize=1)
def code_hash() -> str:
    """SHA-256 over path and content of every Python file that can see private data."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        root = Path(str(resources.files(f"metamoe.{room}")))
        for file in sorted(root.rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"{room}/{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
