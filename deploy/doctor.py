"""What is wrong with a federation's folder: certificates, keys, file modes, processes; each finding with what to do."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from common.errors import MetaMoEError
from deploy.certificates import certificate_problems
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
    now_wrong = certificate_problems(folder, federation, now)
    soon_wrong = certificate_problems(folder, federation, now + _SOON)
    for file, problem in now_wrong.items():
        soon = f"will soon be of no use, it {soon_wrong[file]}" if soon_wrong[file] else ""
        yield Finding(str(file), problem or soon)


def _modes(folder: Path) -> Iterator[Finding]:
    for file in sorted(file for name in _SECRETS for file in folder.rglob(name)):
        mode = file.stat().st_mode & 0o777
        yield Finding(str(file), f"has mode {mode:o}, so that others can read it: chmod 600 {file}" if mode & 0o077 else "")


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    return Finding(f"port {port}", "is taken by another program: stop it, or change port in federation.toml" if taken else "")
