"""Where ledgers and the keys that belong to them are: in a run's folder, a federation's, a client's, a ledger's own, or in a
bundle that was handed over.
"""

import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from metamoe.common.audit.keys import public_file
from metamoe.common.audit.ledger import HEAD, LEDGER
from metamoe.common.errors import InputFileError

_BESIDE = r"policy-[0-9a-f]{64}\.toml|settings-[0-9a-f]{64}\.json"
_LARGEST = 64_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)
_FEDERATION = "federation.toml"


@dataclass(frozen=True)
class Found:
    """A ledger, and where the keys are that belong to it.

    Attributes:
        folder: of its lines.
        name: by which to speak of it.
        key: file with its keeper's public key.
        server: of a client's, file with the public key of the server's ledger; None for the one that its policy or, without
            one, the ledger itself names.
    """

    folder: Path
    name: str
    key: Path
    server: Path | None = None


@dataclass(frozen=True)
class Ledgers:
    """The clients' ledgers and the servers', as far as they are there.

    Attributes:
        clients: one each.
        servers: one for each run.
        gateways: those of the clients' gateways, which say the same of the same messages.
        of_run: whether the place is one run's, though the clients' ledgers have others too.
        bundle: what they were unpacked from.
    """

    clients: list[Found]
    servers: list[Found]
    gateways: tuple[Found, ...] = ()
    of_run: bool = False
    bundle: Path | None = None

    @property
    def all(self) -> list[Found]:
        return [*self.clients, *self.servers]

    def shown(self, key: Path) -> str:
        """The place of a key for those who read of it."""
        return f"{key.name} in {self.bundle}" if self.bundle and key in [one.key for one in self.all] else str(key)


@contextmanager
def ledgers_at(place: Path) -> Iterator[Ledgers]:
    """The ledgers of a federation's folder, a run's, a client's, a client's state folder, one ledger's own, or a bundle.

    Raises:
        InputFileError: there is none.
    """
    with ExitStack() as stack:
        folder = place.absolute()
        if place.is_file():
            folder = Path(stack.enter_context(TemporaryDirectory())) / place.stem
            _unpack(place, folder)
        found = replace(_find(folder), bundle=place if place.is_file() else None)
        if not found.all:
            raise InputFileError(
                f"{place} holds no ledger ({LEDGER}); give the folder of a federation, a run, a client or a ledger, or a bundle"
            )
        yield found


def write_bundle(found: Found, bundle: Path) -> None:
    """Put the public part of a ledger into a zip file: lines, head, policies, runs' settings and public key, and not the
    key that signs.

    Raises:
        InputFileError: there is no ledger, or the bundle exists or cannot be written.
    """
    folder = found.folder
    beside = sorted([*folder.glob("policy-*.toml"), *folder.glob("settings-*.json")])
    named = {file.name: file for file in (folder / LEDGER, folder / HEAD, *beside)}
    named[public_file(folder).name] = found.key
    try:
        with zipfile.ZipFile(bundle, "x", zipfile.ZIP_DEFLATED) as archive:
            for name, file in named.items():
                # Without times: the same ledger gives the same bundle, and nothing tells when a file was written.
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), file.read_bytes(), zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise InputFileError(f"the bundle {bundle} cannot be written: {error}") from error


def _find(folder: Path) -> Ledgers:
    if any((folder / name).is_file() for name in (LEDGER, HEAD)):
        return Ledgers([], [_server_found(folder)]) if _is_server(folder) else Ledgers([_client_found(folder)], [])
    if (folder / _FEDERATION).is_file():
        servers = [_server_found(own) for own in _lying_in(folder, "runs/*/server/audit")]
        return Ledgers(_federation_clients(folder), servers, _gateways(folder, "clients/client-*/"))
    servers = [_server_found(own) for own in _lying_in(folder, "server/audit")]
    # A simulation has its clients' state in its folder; a deployed run lies beside the clients' folders; a client's own folder
    # has its state in state/, and that in turn is a place of its own.
    for pattern in ("clients/audit/client-*", "state/audit/client-*", "audit/client-*"):
        if clients := [_client_found(own) for own in _lying_in(folder, pattern)]:
            return Ledgers(clients, servers, _gateways(folder))
    federation = folder.parent.parent
    if servers and (federation / _FEDERATION).is_file():
        return Ledgers(_federation_clients(federation), servers, _gateways(federation, "clients/client-*/"), of_run=True)
    return Ledgers([], servers)


def _federation_clients(federation: Path) -> list[Found]:
    return [_client_found(own) for own in _lying_in(federation, "clients/client-*/state/audit/client-*")]


def _gateways(folder: Path, clients: str = "") -> tuple[Found, ...]:
    """``[FEDERATION/clients/]CLIENT/gateway/audit``."""
    found = _lying_in(folder, f"{clients}gateway/audit")
    return tuple(replace(_client_found(own), name=f"gateway of {own.parents[1].name}") for own in found)


def _lying_in(folder: Path, pattern: str) -> list[Path]:
    """Folders with a ledger; a head without lines counts too: that they are gone is to be said."""
    return sorted({file.parent for name in (LEDGER, HEAD) for file in folder.glob(f"{pattern}/{name}")})


def _client_found(folder: Path) -> Found:
    """``[FEDERATION/clients/CLIENT/state/]audit/client-N``, or its gateway's ``[FEDERATION/clients/CLIENT/]gateway/audit``."""
    server, federation = None, folder.parents[3 if folder.parent.name == "gateway" else 4 : 5]
    if federation and (federation[0] / _FEDERATION).is_file():
        server = public_file(federation[0] / "server")
    return Found(folder, folder.name, public_file(folder), server if server and server.is_file() else None)


def _server_found(folder: Path) -> Found:
    """``[FEDERATION/runs/]RUN/server/audit``: the key of a federation's server is kept beside its runs."""
    own = public_file(folder)
    if folder.name != "audit" or len(folder.parents) < 4:
        return Found(folder, folder.name, own)
    federation = folder.parents[3]
    if not (federation / _FEDERATION).is_file():
        return Found(folder, folder.parent.name, own)
    kept = public_file(federation / "server")
    return Found(folder, f"server of {folder.parents[1].name}", kept if kept.is_file() else own)


def _is_server(folder: Path) -> bool:
    """Whether the first line says that a server keeps this ledger."""
    # A head without lines is a client's until they are found.
    file = folder / LEDGER
    return file.is_file() and b'"role":"server"' in file.read_bytes().partition(b"\n")[0]


def _unpack(bundle: Path, folder: Path) -> None:
    """The files of a bundle, each checked by name and size before it is read."""
    try:
        with zipfile.ZipFile(bundle) as archive:
            entries = archive.infolist()
            wanted = {LEDGER, HEAD, public_file(folder).name}
            for entry in entries:
                if not (entry.filename in wanted or re.fullmatch(_BESIDE, entry.filename)) or entry.file_size > _LARGEST:
                    raise InputFileError(f"{bundle} is not a ledger's bundle: it holds {entry.filename!r}")
            folder.mkdir()
            for entry in entries:
                (folder / entry.filename).write_bytes(archive.read(entry))
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise InputFileError(f"{bundle} is not a ledger's bundle: {error}") from error
