"""Every ledger of a run, each checked by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Protocol

from metamoe.audit.ledgers import Found, Ledgers, ledgers_at
from metamoe.common.audit.entries import Receipt
from metamoe.common.audit.keys import CLIENT_KEY, read_public
from metamoe.common.audit.verify import Checked, Finding, Verdict, check_ledger, worst


class HasFolder(Protocol):
    """Whatever has a run's folder."""

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True)
class Verification:
    """What a check of ledgers found.

    Attributes:
        verdict: what all findings come to, which is the exit code of ``metamoe audit verify``.
        findings: all that is wrong: each with its verdict, where it is, and what it is.
        ledgers: as they were read, clients' first; each says where the keys come from that it was checked with.
    """

    verdict: Verdict
    findings: list[Finding]
    ledgers: list[Checked] = field(repr=False)

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong."""
        return self.verdict is Verdict.FINE


def verify(
    run: HasFolder | str | PathLike[str],
    key: str | PathLike[str] | None = None,
    server_key: str | PathLike[str] | None = None,
) -> Verification:
    """Check ledgers by themselves, offline: every line, hash and signature, the Merkle root of each run, the server's receipts,
    and that nothing was sent that the policy does not allow.

    Args:
        run: a run, its folder, a federation's, a client's, a ledger's own, or a bundle.
        key: public key file (audit.pub) of the ledger's keeper, as you had it from them; None for the one beside each ledger.
        server_key: that of the server's ledger; None for the federation's, or without one that which each ledger names.

    Raises:
        InputFileError: there is no ledger, or a key cannot be read.
    """
    own, server = (Path(file) if file is not None else None for file in (key, server_key))
    with ledgers_at(Path(run) if isinstance(run, str | PathLike) else run.folder) as found:
        clients, servers = checked_at(found, own, server)
        ledgers = [*clients, *checked_gateways(found, servers, server), *servers]
    findings = [finding for ledger in ledgers for finding in ledger.findings]
    return Verification(worst(findings), findings, ledgers)


def checked_at(
    found: Ledgers, key: Path | None = None, server_key: Path | None = None, *, whole: bool = False
) -> tuple[list[Checked], list[Checked]]:
    """The clients' ledgers and the servers', each checked with the keys that belong to it.

    Args:
        found: where they are.
        key: public key file of the keeper, where it is one ledger; None for that which was found.
        server_key: that of the servers' ledgers.
        whole: clients' ledgers with their other runs too where the place is one run's.

    Raises:
        InputFileError: one cannot be read, or its key.
    """
    alone = key if not found.clients else None
    servers = [_checked(found, one, server_key or alone or one.key, None) for one in found.servers]
    clients = [_checked(found, one, key or one.key, server_key or one.server) for one in found.clients]
    if found.of_run and not whole:
        clients = _in_their_runs(clients, servers)
    return clients, servers


def checked_gateways(found: Ledgers, servers: Sequence[Checked], server_key: Path | None = None) -> list[Checked]:
    """The ledgers of the clients' gateways, each with the key of the client's own ledger, under which its messages arrive.

    Args:
        found: where they are.
        servers: the servers' ledgers of the same place.
        server_key: public key file of the servers' ledgers; None for that which was found.

    Raises:
        InputFileError: one cannot be read, or a key.
    """
    gateways = []
    for one in found.gateways:
        checked, sender = _checked(found, one, one.key, server_key or one.server), one.folder / CLIENT_KEY
        gateways.append(replace(checked, sender=read_public(sender) if sender.is_file() else ""))
    return _in_their_runs(gateways, servers) if found.of_run else gateways


def _in_their_runs(clients: list[Checked], servers: Sequence[Checked]) -> list[Checked]:
    runs = [run for server in servers for run in server.runs]
    return [client.in_runs(runs) for client in clients if set(runs).intersection(client.runs)]


def _checked(found: Ledgers, one: Found, key: Path, server: Path | None) -> Checked:
    ledger = check_ledger(one.folder, read_public(key), read_public(server) if server else None, one.name)
    ledger.keys.append(f"its key: {found.shown(key)}")
    if server:
        ledger.keys.append(f"the server's: {found.shown(server)}")
    elif ledger.of(Receipt):
        ledger.keys.append("the server's: as its policy or the ledger itself names it")
    return ledger
