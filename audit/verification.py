"""Every ledger of a run, each checked by itself."""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Protocol

from metamoe.audit.ledgers import ledgers_at
from metamoe.common.audit.keys import read_public
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
        ledgers: as they were read, clients' first.
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
        run: a run, its folder, a client's state folder, a ledger's own folder, or a bundle.
        key: public key file (audit.pub) of the ledger's keeper, as you had it from them; None for the one beside each ledger.
        server_key: that of the server's ledger; None for the one that each ledger names.

    Raises:
        InputFileError: there is no ledger, or a key cannot be read.
    """
    own, server = (read_public(Path(file)) if file is not None else None for file in (key, server_key))
    place = Path(run) if isinstance(run, str | PathLike) else run.folder
    with ledgers_at(place) as found:
        ledgers = [check_ledger(folder, own, None if folder == found.server else server) for folder in found.all]
    findings = [finding for ledger in ledgers for finding in ledger.findings]
    return Verification(worst(findings), findings, ledgers)
