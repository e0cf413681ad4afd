"""Checking a ledger, offline and from public keys: is it unbroken, and does it keep to its policy."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from rfc8785 import CanonicalizationError

from metamoe.common.audit.entries import (
    FIRST,
    Arrival,
    Entry,
    Erasure,
    Head,
    Intent,
    Line,
    Open,
    Receipt,
    Records,
    Resent,
    Seal,
    canonical,
    digest_of,
    head_statement,
    receipt_statement,
    seal_statement,
)
from metamoe.common.audit.keys import public_file, read_public, signed_by
from metamoe.common.audit.ledger import HEAD, LEDGER
from metamoe.common.audit.merkle import merkle_root
from metamoe.common.audit.policy import ArtifactKind, Policy, epsilon_of, kind_of_array, load_policy
from metamoe.common.audit.terms import first_terms, problems, settings_file, statistics, tells_of_samples, terms_of
from metamoe.common.errors import InputFileError, PolicyError, first_problem

_Kind = TypeVar("_Kind", bound=Entry)


class Verdict(IntEnum):
    """What a check comes to; the exit codes of ``metamoe audit``. Two is for wrong usage."""

    FINE = 0
    VIOLATION = 1
    TAMPERED = 3
    DISAGREE = 4
    INCOMPLETE = 5
    OVER_BUDGET = 6


_WORST_FIRST = (Verdict.TAMPERED, Verdict.DISAGREE, Verdict.VIOLATION, Verdict.OVER_BUDGET, Verdict.INCOMPLETE)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: how bad, where, what, and in which run if it is of one alone."""

    verdict: Verdict
    where: str
    what: str
    run: str = ""


@dataclass(frozen=True)
class Checked:
    """A ledger that was read: its lines as far as they are lines, what is wrong with them, and where the keys come from; of a
    gateway's also the key of the client's own ledger, under which the server knows the client.
    """

    name: str
    key: str
    lines: list[tuple[Line, bytes]] = field(default_factory=list)
    policies: dict[str, Policy] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    sender: str = ""

    @property
    def entries(self) -> list[Entry]:
        return [line.entry for line, _ in self.lines]

    @property
    def runs(self) -> list[str]:
        """The runs it has lines of, in their order."""
        return list(dict.fromkeys(entry.run for entry in self.entries))

    def in_runs(self, runs: Sequence[str]) -> "Checked":
        """Only what is of these runs, and what is of none alone."""
        lines = [(line, raw) for line, raw in self.lines if line.entry.run in runs]
        findings = [finding for finding in self.findings if finding.run in ("", *runs)]
        return replace(self, lines=lines, findings=findings)

    def of(self, kind: type[_Kind], run: str | None = None) -> list[_Kind]:
        """The entries of one type, of one run or of all."""
        return [entry for entry in self.entries if isinstance(entry, kind) and run in (None, entry.run)]


def worst(findings: Iterable[Finding]) -> Verdict:
    """The gravest verdict: tampering before disagreement, violation, budget, and what is only not finished."""
    found = {finding.verdict for finding in findings}
    return next((verdict for verdict in _WORST_FIRST if verdict in found), Verdict.FINE)


def check_ledger(folder: Path, key: str | None = None, server: str | None = None, name: str = "") -> Checked:
    """Read a ledger and check every hash, signature, Merkle root and receipt in it, and each message against its policy.

    Args:
        folder: with ``ledger.jsonl``, ``head.json`` and the policies that it names.
        key: public key of its keeper, hexadecimal, as you had it from them; None for ``audit.pub`` in the folder.
        server: public key of the server's ledger; None for the one that a run's policy or, without one, the ledger names.
        name: by which findings speak of it; empty for the folder's.

    Raises:
        InputFileError: there is no ledger, or no key.
    """
    name = name or (folder.name if folder.name != "audit" else folder.parent.name)
    checked = Checked(name, key or read_public(public_file(folder)))
    try:
        content = (folder / LEDGER).read_bytes()
    except OSError as error:
        # Of lines that are all gone the head still tells.
        if not isinstance(error, FileNotFoundError) or not (folder / HEAD).is_file():
            raise InputFileError(f"{folder / LEDGER} cannot be read: {error}") from error
        content = b""
    checked.findings.extend(_read_lines(checked, content))
    checked.findings.extend(_check_head(checked, folder / HEAD))
    checked.findings.extend(_read_policies(checked, folder))
    for run in checked.runs:
        checked.findings.extend(replace(finding, run=run) for finding in _check_run(checked, run, server))
    checked.findings.extend(_check_terms(checked, folder))
    checked.findings.extend(_check_statistics(checked))
    checked.findings.extend(_check_budget(checked))
    return checked


def _read_lines(checked: Checked, content: bytes) -> Iterator[Finding]:
    previous = FIRST
    *lines, rest = content.split(b"\n")
    if rest:
        yield Finding(Verdict.INCOMPLETE, f"{checked.name}, line {len(lines) + 1}", "was not written to its end")
    for number, raw in enumerate(lines):
        where = f"{checked.name}, line {number + 1}"
        try:
            line = Line.model_validate_json(raw)
            form = canonical(line)
        except ValidationError as error:
            yield Finding(Verdict.TAMPERED, where, f"is no line of a ledger: {first_problem(error)}")
            return
        except CanonicalizationError as error:
            yield Finding(Verdict.TAMPERED, where, f"is no line of a ledger: {error}")
            return
        if form != raw:
            yield Finding(Verdict.TAMPERED, where, "is not in the canonical form of RFC 8785")
        if line.seq != number:
            yield Finding(Verdict.TAMPERED, where, f"has the number {line.seq}; lines are missing or out of order")
        elif line.prev != previous:
            yield Finding(Verdict.TAMPERED, where, "does not follow from the line before, which was changed or replaced")
        checked.lines.append((line, raw))
        previous = hashlib.sha256(raw).hexdigest()


def _check_head(checked: Checked, file: Path) -> Iterator[Finding]:
    where = f"{checked.name}, {HEAD}"
    try:
        head = Head.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        yield Finding(Verdict.TAMPERED, where, f"cannot be read: {type(error).__name__}")
        return
    if not signed_by(checked.key, head.signature, head_statement(head.count, head.last)):
        yield Finding(Verdict.TAMPERED, where, "is not signed by the keeper of this ledger")
    elif head.count > len(checked.lines):
        yield Finding(
            Verdict.TAMPERED, where, f"counts {head.count} lines, but there are {len(checked.lines)}: the end was cut off"
        )
    elif head.count and hashlib.sha256(checked.lines[head.count - 1][1]).hexdigest() != head.last:
        yield Finding(Verdict.TAMPERED, where, "does not belong to these lines")
    elif head.count < len(checked.lines):
        yield Finding(Verdict.INCOMPLETE, where, f"counts {head.count} lines of {len(checked.lines)}: a write was interrupted")


def _read_policies(checked: Checked, folder: Path) -> Iterator[Finding]:
    for digest in {entry.policy for entry in checked.of(Open) if entry.policy}:
        file = folder / f"policy-{digest}.toml"
        # Of the file as it is: what a policy says without saying it changes with the product.
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            yield Finding(Verdict.TAMPERED, checked.name, f"{file.name} is not the policy that the ledger names")
            continue
        try:
            checked.policies[digest] = load_policy(file)
        except InputFileError as error:
            yield Finding(Verdict.INCOMPLETE, checked.name, f"the policy it names cannot be read: {error}")


def _check_run(checked: Checked, run: str, server: str | None) -> Iterator[Finding]:
    where = f"{checked.name}, run {run[:8]}"
    of_run = [(line.entry, raw) for line, raw in checked.lines if line.entry.run == run]
    first = of_run[0][0]
    if not isinstance(first, Open) or len(checked.of(Open, run)) != 1:
        yield Finding(Verdict.TAMPERED, where, "does not begin with the one line that opens it")
        return
    if first.key != checked.key:
        yield Finding(Verdict.TAMPERED, where, "was opened under another key than the ledger's")
    if server and first.server != server:
        yield Finding(Verdict.TAMPERED, where, "was opened for another server")
    policy = checked.policies.get(first.policy or "")
    if policy and policy.server not in (None, first.server):
        yield Finding(Verdict.VIOLATION, where, "was opened for a server that the policy does not allow")
    yield from _check_seals(checked, run, where, of_run)
    yield from _check_receipts(checked, run, where, server or first.server)
    if {erasure.root for erasure in checked.of(Erasure, run)} - {records.root for records in checked.of(Records, run)}:
        yield Finding(Verdict.TAMPERED, where, "erases a record from a list that the run has not")
    if policy:
        yield from _check_policy(policy, where, checked.of(Intent, run))


def _check_seals(checked: Checked, run: str, where: str, of_run: Sequence[tuple[Entry, bytes]]) -> Iterator[Finding]:
    if not checked.of(Seal, run):
        yield Finding(Verdict.INCOMPLETE, where, "is not sealed: it is still going on, or did not come to its end")
    for position, (entry, _) in enumerate(of_run):
        if isinstance(entry, Seal):
            root = merkle_root([raw for _, raw in of_run[:position]]).hex()
            if (entry.count, entry.root) != (position, root):
                yield Finding(Verdict.TAMPERED, where, "has a seal that does not fit the lines before it")
            if not signed_by(checked.key, entry.signature, seal_statement(run, entry.count, entry.root)):
                yield Finding(Verdict.TAMPERED, where, "has a seal that the keeper of this ledger did not sign")


def _check_receipts(checked: Checked, run: str, where: str, server: str) -> Iterator[Finding]:
    intents = {intent.message: digest_of(intent.arrays) for intent in checked.of(Intent, run)}
    if len(intents) < len(checked.of(Intent, run)):
        yield Finding(Verdict.VIOLATION, where, "answers one message twice")
    again = checked.of(Resent, run)
    for resent in again:
        if resent.first not in intents:
            yield Finding(Verdict.TAMPERED, where, f"sent again what no earlier line sent: {resent.first[:8]}")
    intents |= {resent.message: intents[resent.first] for resent in again if resent.first in intents}
    for receipt in checked.of(Receipt, run):
        statement = receipt_statement(run, receipt.message, receipt.arrays)
        if not signed_by(server, receipt.signature, statement):
            yield Finding(Verdict.TAMPERED, where, f"has a receipt for {receipt.message[:8]} that the server did not sign")
        if intents.get(receipt.message) != receipt.arrays:
            yield Finding(
                Verdict.TAMPERED, where, f"has a receipt for {receipt.message[:8]}, but not what the server says it received"
            )
    for arrival in checked.of(Arrival, run):
        statement = receipt_statement(run, arrival.message, digest_of(arrival.arrays))
        if not signed_by(checked.key, arrival.signature, statement):
            yield Finding(Verdict.TAMPERED, where, f"has an arrival of {arrival.message[:8]} that does not fit its signature")
    receipts = {receipt.message for receipt in checked.of(Receipt, run)}
    for intent in checked.of(Intent, run):
        sent = {intent.message} | {resent.message for resent in again if resent.first == intent.message}
        # The last reply of a run is signed for in the server's ledger alone: no request follows it.
        if not sent & receipts and intent.stage != "deliver":
            yield Finding(
                Verdict.INCOMPLETE,
                where,
                f"has no receipt for {intent.stage} message {intent.message[:8]}: it may not have arrived",
            )


def _check_policy(policy: Policy, where: str, intents: Sequence[Intent]) -> Iterator[Finding]:
    released: Counter[ArtifactKind] = Counter()
    total = 0
    for intent in intents:
        kinds = set()
        covered = {name for spent in intent.spent for name in spent.covers}
        for array in intent.arrays:
            total += array.bytes
            try:
                kind = kind_of_array(array.name)
            except PolicyError as error:
                yield Finding(Verdict.VIOLATION, where, f"sent {intent.stage}: {error}")
                continue
            kinds.add(kind)
            if kind in policy.allow and policy.allow[kind].private and array.name not in covered:
                yield Finding(Verdict.VIOLATION, where, f"sent {array.name!r} without the differential privacy it needs")
        released.update(kinds)
    for kind, count in released.items():
        rule = policy.allow.get(kind)
        if rule is None:
            yield Finding(Verdict.VIOLATION, where, f"sent {kind!r}, which the policy does not allow")
        elif count > rule.releases_per_run * (2 if kind == "ledger" else 1):
            yield Finding(Verdict.VIOLATION, where, f"sent {kind!r} {count} times; the policy allows {rule.releases_per_run}")
    if total > policy.limits.max_bytes_per_run:
        yield Finding(Verdict.VIOLATION, where, f"sent {total:,} bytes; the policy allows {policy.limits.max_bytes_per_run:,}")


def _check_terms(checked: Checked, folder: Path) -> Iterator[Finding]:
    """What each run asked, against what its policy lets a server choose; of policies that say so."""
    answered = {intent.run for intent in checked.of(Intent)}
    telling = {intent.run for intent in checked.of(Intent) if tells_of_samples(intent)}
    opened = [entry for entry in checked.of(Open) if entry.run in answered and entry.role == "client"]
    try:
        first = first_terms(folder, checked.entries)
    except PolicyError as error:
        yield Finding(Verdict.TAMPERED, checked.name, str(error))
        return
    for entry in opened:
        policy, where = checked.policies.get(entry.policy or ""), f"{checked.name}, run {entry.run[:8]}"
        try:
            terms = terms_of(folder, entry)
        except PolicyError as error:
            yield Finding(Verdict.TAMPERED, where, str(error), entry.run)
            continue
        if policy is None or "settings" not in policy.model_fields_set:
            continue
        if terms is None:
            what = f"was answered, but {settings_file(folder, entry.settings).name} is not here"
            yield Finding(Verdict.INCOMPLETE, where, what, entry.run)
            continue
        for problem in problems(policy, terms, first, idle=entry.run not in telling):
            yield Finding(Verdict.VIOLATION, where, f"was answered, but {problem}", entry.run)


def _check_statistics(checked: Checked) -> Iterator[Finding]:
    """How many different statistics had left after each message, against the policy it left under; of policies that say so."""
    policies = {entry.run: checked.policies.get(entry.policy or "") for entry in checked.of(Open)}
    seen: dict[bool, dict[ArtifactKind, set[object]]] = {True: {}, False: {}}
    for intent in checked.of(Intent):
        policy = policies.get(intent.run)
        for noise_counts, before in seen.items():
            for kind, identities in statistics([intent], noise_counts=noise_counts).items():
                known = before.setdefault(kind, set())
                if policy and noise_counts is (policy.budget is None) and _is_one_too_many(policy, known, identities):
                    what = f"sent another {kind!r} after {len(known)} different ones, all that the policy allows"
                    yield Finding(Verdict.VIOLATION, f"{checked.name}, run {intent.run[:8]}", what, intent.run)
                known |= identities


def _is_one_too_many(policy: Policy, known: set[object], identities: set[object]) -> bool:
    most = policy.limits.max_distinct_statistics
    stated = "max_distinct_statistics" in policy.limits.model_fields_set
    return stated and 0 < most <= len(known) and not identities & known


def _check_budget(checked: Checked) -> Iterator[Finding]:
    """All runs together, against the budget of the policy that the last one ran under."""
    policies = [checked.policies[entry.policy] for entry in checked.of(Open) if entry.policy in checked.policies]
    if not policies or not (budget := policies[-1].budget):
        return
    total = epsilon_of([spent for intent in checked.of(Intent) for spent in intent.spent], budget.delta)
    if total > budget.epsilon:
        what = f"spent epsilon {total:.2f} at delta {budget.delta:g}; the policy allows {budget.epsilon:g}"
        yield Finding(Verdict.OVER_BUDGET, checked.name, what)
