"""The app bundle that Flower carries from server to clients: it names the installed packages, and holds no code."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import tomli_w

from metamoe.common.files import write_atomically

CLIENT_APP = "metamoe.client.app:app"


def write_app(folder: Path, client_app: str = CLIENT_APP) -> Path:
    """A Flower app that holds no code: the installed packages are the app, so nothing else can be picked up in their place.

    Args:
        folder: where it is written.
        client_app: where the clients' app is, as module:attribute.
    """
    pyproject = {
        "project": {"name": "metamoe", "version": version("metamoe-fl"), "license": "Apache-2.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "metamoe",
                    "components": {"serverapp": "metamoe.server.app:app", "clientapp": client_app},
                    "config": {"preset": "glyphs", "set": "", "out": "runs/flower", "audit-keys": "", "resume": False},
                }
            }
        },
    }
    write_atomically(folder / "pyproject.toml", tomli_w.dumps(pyproject))
    return folder


def bundle_hash() -> str:
    """SHA-256 of the one bundle that this version of the product makes: Flower packs the same files to the same bytes."""
    # Flower's packing loads much that only this needs.
    from flwr.cli.build import build_fab_from_disk

    with TemporaryDirectory() as folder:
        return hashlib.sha256(build_fab_from_disk(write_app(Path(folder)))).hexdigest()
