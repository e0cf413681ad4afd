"""What is wrong with a federation, or with one client of it: certificates, keys, file modes, the server, clocks, nodes; each
finding with what to do.
"""

import http.client
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

from metamoe.common.errors import MetaMoEError
from metamoe.deploy.certificates import certificate_problem, certificate_problems
from metamoe.deploy.keys import Federation, read_federation
from metamoe.deploy.processes import online_nodes, registered, status

_SOON = timedelta(days=30)
_ANSWER_SECONDS = 10
# A certificate is valid from five minutes before it was made, and a date in HTTP is in whole seconds.
_SKEW_SECONDS = 30
_SECRETS = ("ca.key", "server.key", "audit.key", "node.key", "runtime.key", "gateway.key", "superexec.secret")


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
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", federation.port)) != 0:
            alone = any(party.running for party in status(folder))
            stopped = f"is not listened on, but clients run: metamoe deploy up {folder}" if alone else ""
            return [*findings, Finding(f"port {federation.port}", stopped)]
    reached = list(_server("localhost", federation.port, folder / "server" / "ca.crt", now))
    if any(finding.problem for finding in reached):
        return [*findings, *reached]
    try:
        online, nodes = online_nodes(folder), registered(folder)
    except MetaMoEError as error:
        return [*findings, *reached, Finding("server", str(error))]
    for name in federation.names:
        problem = f"is not registered: metamoe deploy register {folder}" if name not in nodes else ""
        if name in nodes and nodes[name] not in online:
            problem = f"is not connected: start it again (metamoe deploy up {folder}); its own log says why"
        reached.append(Finding(name, problem))
    return [*findings, *reached]


def examine_client(folder: Path, host: str, port: int, now: datetime) -> list[Finding]:
    """Look at everything of one client, and at its way to a server that is elsewhere.

    Args:
        folder: the client's, from :func:`metamoe.deploy.keys.make_client_keys`.
        host: of the server.
        port: of the server.
        now: the time on this machine, with a time zone.
    """
    owns = (folder / "runtime.crt", folder / "gateway.crt")
    findings = [*(Finding(str(own), certificate_problem(own, own, "localhost", now)) for own in owns), *_modes(folder)]
    return [*findings, *_server(host, port, folder / "ca.crt", now)]


def _server(host: str, port: int, authority: Path, now: datetime) -> Iterator[Finding]:
    """Whether a server answers that the authority vouches for, and whether its clock and ours agree."""
    what = f"server {host}:{port}"
    try:
        context = ssl.create_default_context(cafile=str(authority))
        connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_SECONDS, context=context)
        connection.request("HEAD", "/")
        date = connection.getresponse().getheader("Date")
        connection.close()
    except ssl.SSLCertVerificationError as error:
        yield Finding(what, f"is not the one that {authority} vouches for: {error.verify_message}")
        return
    except (ssl.SSLError, http.client.HTTPException) as error:
        yield Finding(what, f"is another program, or a server without TLS: {error}")
        return
    except OSError as error:
        yield Finding(what, f"does not answer: {error}")
        return
    yield Finding(what)
    if date:
        ahead = (now - parsedate_to_datetime(date)).total_seconds()
        wrong = f"is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's: set both by NTP"
        yield Finding("clock of this machine", wrong if abs(ahead) > _SKEW_SECONDS else "")


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
