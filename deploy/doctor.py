"""What is wrong with a federation's folder: certificates, keys, file modes, processes; each finding with what to do."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from common.errors import MetaMoEError
from deploy.keys import Federation, read_federation
from deploy.processes import status

_SOON = timedelta(days=30)
_SECRETS = ("ca.key", "server.key", "node.key", "runtime.key", "superexec.secret")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``problem`` is empty if it is well."""

    what: str
    problem: str = ""


def examine(folder: Path, now: datetime) -> list[Finding]:
    """Look at everything of a federation that can be seen from its folder.

    Args:
        folder: the federation's.
        now: the time that certificates are held against, with a time zone.

    Raises:
        InputFileError: there is no federation in it.
    """
    federation = read_federation(folder)
    findings = [*_certificates(folder, federation, now), *_modes(folder)]
    try:
        parties = status(folder)
    except MetaMoEError as error:
        return [*findings, Finding("server", str(error))]
    if not parties[0].running:
        return [*findings, _port(federation.port)]
    for party in parties:
        problem = "" if party.online else f"is not {'connected' if party.running else 'running'}; metamoe deploy up {folder}"
        findings.append(Finding(party.name, problem))
    return findings


def _certificates(folder: Path, federation: Federation, now: datetime) -> Iterator[Finding]:
    server, clients = folder / "server", [folder / "clients" / name for name in federation.names]
    authority = server / "ca.crt"
    yield _held_against(server / "server.crt", authority, federation.host, now)
    for client in clients:
        yield _held_against(client / "runtime.crt", client / "runtime.crt", "localhost", now)
        file = client / "ca.crt"
        try:
            same = _load(file) == _load(authority)
            yield Finding(str(file), "" if same else f"is not the authority of the server: copy {authority} there")
        except (OSError, ValueError) as error:
            yield Finding(str(file), f"cannot be read: {error}")


def _held_against(file: Path, issuer: Path, host: str, now: datetime) -> Finding:
    """A certificate, its key beside it, its issuer, and the host it must be for."""
    try:
        certificate = _load(file)
        key = serialization.load_pem_private_key(file.with_suffix(".key").read_bytes(), None)
        certificate.verify_directly_issued_by(_load(issuer))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except InvalidSignature:
        return Finding(str(file), f"is not signed by {issuer}: make new keys")
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        return Finding(str(file), f"cannot be used with its key and {issuer}: {error}")
    known = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        return Finding(str(file), f"is not valid before {begin:%Y-%m-%d %H:%M} UTC: some machine's clock is wrong")
    if now > end:
        return Finding(str(file), f"expired on {end:%Y-%m-%d}: make new keys")
    if now > end - _SOON:
        return Finding(str(file), f"expires on {end:%Y-%m-%d}: make new keys before")
    if key.public_key() != certificate.public_key():
        return Finding(str(file), f"does not belong to {file.with_suffix('.key')}: make new keys")
    if host not in known:
        return Finding(str(file), f"is not for the host {host!r}: make new keys with --host {host}")
    return Finding(str(file))


def _modes(folder: Path) -> Iterator[Finding]:
    for file in sorted(file for name in _SECRETS for file in folder.rglob(name)):
        mode = file.stat().st_mode & 0o777
        yield Finding(str(file), f"has mode {mode:o}, so that others can read it: chmod 600 {file}" if mode & 0o077 else "")


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    return Finding(f"port {port}", "is taken by another program: stop it, or change port in federation.toml" if taken else "")


def _load(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())
