"""What holds for every reply before it leaves, wherever that is enforced: in the client's own app, and in its owner's gateway.

The run is in the ledger, the policy allows what is asked, and the arrays are what was declared for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from metamoe.common.audit.code import code_hash
from metamoe.common.audit.entries import (
    ArrayEntry,
    Entry,
    Intent,
    Open,
    Receipt,
    Resent,
    Spent,
    digest_of,
    receipt_statement,
    settings_hash,
)
from metamoe.common.audit.keys import signed_by
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.policy import (
    Policy,
    check_arrays,
    check_budget,
    check_request,
    kind_of_array,
    policy_hash,
    policy_text,
)
from metamoe.common.audit.terms import Terms, check_statistics, check_terms, first_terms
from metamoe.common.audit.touching import touching
from metamoe.common.config import Settings
from metamoe.common.errors import PolicyError, ProtocolError
from metamoe.common.files import write_atomically
from metamoe.common.model.seed import load_seed
from metamoe.common.privacy import expert_mechanism, vectors_mechanism
from metamoe.common.wire import AUDIT_ARTIFACTS, Artifact, Kind, Request, reply_artifacts


def open_run(ledger: Ledger, folder: Path, policy: Policy, terms: Request) -> None:
    """Begin the run in the ledger, keep the policy it runs under, and write down what the server has signed for.

    Args:
        ledger: of whoever looks at what leaves.
        folder: where it lies.
        policy: the owner's.
        terms: what the server asks.

    Raises:
        PolicyError: the policy is for another server.
        ProtocolError: the run began with something else, or a receipt is not its server's.
        LedgerError: it could not be written down.
    """
    envelope, digest = terms.envelope, policy_hash(policy)
    if policy.server not in (None, envelope.key):
        raise PolicyError(
            f"the server's ledger has the key {envelope.key[:16]}, but this client's policy allows {policy.server[:16]} alone"
        )
    stored = folder / f"policy-{digest}.toml"
    if not stored.exists():
        write_atomically(stored, policy_text(policy))
    opened = Open(
        run=envelope.run,
        role="client",
        key=ledger.public,
        server=envelope.key,
        settings=settings_hash(terms.settings),
        seed_model=terms.seed,
        public_set=terms.public,
        code=code_hash(),
        policy=digest,
    )
    ledger.open(opened)
    known = ledger.run(envelope.run)
    begun = next(entry for entry in known if isinstance(entry, Open))
    for what in ("server", "settings", "seed_model", "public_set"):
        if getattr(begun, what) != getattr(opened, what):
            raise ProtocolError(f"run {envelope.run[:8]} began with another {what}; a run keeps what it began with")
    if new := [receipt for receipt in envelope.receipts if receipt not in known]:
        _check_receipts(envelope.run, known, new)
        ledger.append(*new)


def _check_receipts(run: str, known: list[Entry], receipts: list[Receipt]) -> None:
    server = next(entry.server for entry in known if isinstance(entry, Open))
    for receipt in receipts:
        statement = receipt_statement(receipt.run, receipt.message, receipt.arrays)
        if receipt.run != run or not signed_by(server, receipt.signature, statement):
            raise ProtocolError(f"the receipt for message {receipt.message} is not signed by the server of this run")


def check_asked(policy: Policy, folder: Path, ledger: Ledger, kind: Kind, terms: Request, introduces: bool) -> None:
    """Whether a server may ask this after all it has asked before; before a seed model is loaded that the server names.

    Args:
        policy: the owner's.
        folder: of the ledger.
        ledger: with all that left before.
        kind: what is asked.
        terms: of the request.
        introduces: whether the client only says who it is.

    Raises:
        PolicyError: names the setting, its value, and the rule.
    """
    asking = Terms(touching(terms.settings), terms.seed, terms.public)
    idle = introduces or (kind == "deliver" and not terms.settings.report_accuracy)
    check_terms(policy, asking, first_terms(folder, ledger.entries()), idle=idle)


def allowed_artifacts(kind: Kind, settings: Settings, policy: Policy, introduced: bool = False) -> list[Artifact]:
    """What a reply consists of under a policy; ``introduced`` in stage 1 where it only says who it is."""
    return permitted(policy, reply_artifacts(kind, settings, load_seed(settings.seed_model), introduced))


def permitted(policy: Policy, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """What a reply consists of under a policy: without what is optional and not allowed. What is not optional stays, to be
    refused.
    """
    return [artifact for artifact in artifacts if not artifact.optional or kind_of_array(artifact.name) in policy.allow]


def planned_spending(kind: Kind, settings: Settings) -> list[Spent]:
    """The differential privacy that a reply spends, as its settings say before it is computed."""
    privacy = settings.privacy
    names = [artifact.name for artifact in reply_artifacts(kind, settings, load_seed(settings.seed_model))]
    if kind == "profile" and privacy.vectors == "gaussian":
        mechanism, spent = vectors_mechanism(settings), (privacy.epsilon, privacy.delta)
        covered = [name for name in names if name != "client"]
    elif kind == "expert" and privacy.expert == "dp-sgd":
        mechanism, spent = expert_mechanism(settings), (privacy.expert_epsilon, privacy.expert_delta)
        covered = names
    else:
        return []
    if not covered:
        return []
    return [Spent(covers=covered, epsilon=spent[0], delta=spent[1], **asdict(mechanism))]


def checked(
    kind: Kind,
    terms: Request,
    artifacts: Sequence[Artifact],
    policy: Policy,
    ledger: Ledger,
    spent: list[Spent],
    ready: list[ArrayEntry],
    compute: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The arrays of a reply, computed only if they may be asked for, and returned only if they may leave.

    Args:
        kind: what is asked.
        terms: of the request.
        artifacts: what the reply consists of.
        policy: the owner's.
        ledger: with all that left before.
        spent: the differential privacy that the reply spends.
        ready: the arrays, where they are kept from before.
        compute: gives the arrays, of exactly these artifacts, checked for their form.

    Raises:
        PolicyError, BudgetError: the policy does not allow it.
    """
    settings, run = terms.settings, terms.envelope.run
    names = [artifact.name for artifact in (*artifacts, *AUDIT_ARTIFACTS[kind])]
    entries = ledger.run(run)
    check_request(policy, settings, names, entries)
    ever = ledger.entries()
    check_budget(policy, spent, names, ever)
    check_statistics(policy, names, spent, ever, ready)
    arrays = compute()
    check_arrays(policy, arrays, [array for entry in entries if isinstance(entry, Intent) for array in entry.arrays])
    return arrays


def is_sent_again(kind: Kind, terms: Request, policy: Policy, ledger: Ledger, arrays: list[ArrayEntry]) -> bool:
    """Whether these arrays have left in this run and stage before; that they leave again is then in the ledger.

    Raises:
        PolicyError: the policy does not allow them any longer.
        LedgerError: it could not be written down.
    """
    run, digest = terms.envelope.run, digest_of(arrays)
    entries = ledger.run(run)
    released = [entry for entry in entries if isinstance(entry, Intent) and entry.stage == kind]
    first = next((entry for entry in released if digest_of(entry.arrays) == digest), None)
    if first is None:
        return False
    others = [entry for entry in entries if entry not in released]
    check_request(policy, terms.settings, [array.name for array in first.arrays], others)
    ledger.append(Resent(run=run, message=terms.envelope.message, stage=kind, first=first.message))
    return True
