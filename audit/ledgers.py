"""Where ledgers are: in a run's folder, in a folder of their own, or in a bundle that was handed over."""

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from metamoe.common.audit.keys import public_file
from metamoe.common.audit.ledger import HEAD, LEDGER
from metamoe.common.errors import InputFileError

_LARGEST = 64_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Ledgers:
    """Folders with ledgers: the clients', and the server's if it is there."""

    clients: list[Path]
    server: Path | None

    @property
    def all(self) -> list[Path]:
        return [*self.clients, *([self.server] if self.server else [])]


@contextmanager
def ledgers_at(place: Path) -> Iterator[Ledgers]:
    """The ledgers in a run's folder, in a client's state folder, in one ledger's own folder, or in a bundle.

    Raises:
        InputFileError: there is none.
    """
    with ExitStack() as stack:
        folder = place
        if place.is_file():
            folder = Path(stack.enter_context(TemporaryDirectory())) / place.stem
            _unpack(place, folder)
        found = _find(folder)
        if not found.all:
            raise InputFileError(f"{place} holds no ledger ({LEDGER}); give a run's folder, a ledger's folder, or a bundle")
        yield found


def write_bundle(folder: Path, bundle: Path) -> None:
    """Put the public part of a ledger into a zip file: lines, head, policies and public key, and not the key that signs.

    Raises:
        InputFileError: there is no ledger, or the bundle exists or cannot be written.
    """
    files = [folder / LEDGER, folder / HEAD, public_file(folder), *sorted(folder.glob("policy-*.toml"))]
    try:
        with zipfile.ZipFile(bundle, "x", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                # Without times: the same ledger gives the same bundle, and nothing tells when a file was written.
                archive.writestr(zipfile.ZipInfo(file.name, _EPOCH), file.read_bytes(), zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise InputFileError(f"the bundle {bundle} cannot be written: {error}") from error


def _find(folder: Path) -> Ledgers:
    if (folder / LEDGER).is_file():
        return Ledgers([], folder) if _is_server(folder) else Ledgers([folder], None)
    # A run's folder has the clients' state in clients/; a deployed client's state folder is one client's.
    for state in (folder / "clients", folder):
        # A head without lines counts too: that they are gone is to be said.
        clients = sorted({file.parent for name in (LEDGER, HEAD) for file in (state / "audit").glob(f"client-*/{name}")})
        if clients:
            break
    server = folder / "server" / "audit"
    return Ledgers(clients, server if (server / LEDGER).is_file() else None)


def _is_server(folder: Path) -> bool:
    """Whether the first line says that a server keeps this ledger."""
    with (folder / LEDGER).open("rb") as file:
        return b'"role":"server"' in file.readline()


def _unpack(bundle: Path, folder: Path) -> None:
    """The files of a bundle, each checked by name and size before it is read."""
    try:
        with zipfile.ZipFile(bundle) as archive:
            entries = archive.infolist()
            wanted = {LEDGER, HEAD, public_file(folder).name}
            for entry in entries:
                known = entry.filename in wanted or (entry.filename.startswith("policy-") and "/" not in entry.filename)
                if not known or entry.file_size > _LARGEST:
                    raise InputFileError(f"{bundle} is not a ledger's bundle: it holds {entry.filename!r}")
            folder.mkdir()
            for entry in entries:
                (folder / entry.filename).write_bytes(archive.read(entry))
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise InputFileError(f"{bundle} is not a ledger's bundle: {error}") from error
