"""The pages of an audit: one for the federation, one for each client; each a file that needs nothing else."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from metamoe.audit.ledgers import Ledgers
from metamoe.audit.page import Html, array_table, document, join, signature, table, tag
from metamoe.audit.picture import checks, flow, spent, time_line
from metamoe.audit.verification import checked_at
from metamoe.common.audit.entries import Arrival, Erasure, Intent, Open, Receipt, Refusal, Resent, Seal
from metamoe.common.audit.reconcile import reconcile_all, unclaimed
from metamoe.common.audit.verify import Checked, Finding, Verdict, worst
from metamoe.common.audit.words import EXPLAINED, coverage_words, policy_lines, privacy_of, released
from metamoe.common.errors import InputFileError
from metamoe.common.files import write_atomically

MEANING = {
    Verdict.FINE: "fine",
    Verdict.VIOLATION: "violation of the policy",
    Verdict.TAMPERED: "tampered with",
    Verdict.DISAGREE: "the ledgers disagree",
    Verdict.INCOMPLETE: "incomplete",
    Verdict.OVER_BUDGET: "budget exceeded",
}


def write_pages(found: Ledgers, folder: Path, refresh: int = 0) -> Verdict:
    """Write ``index.html`` and ``client-N.html`` into a folder.

    Args:
        found: the ledgers.
        folder: for the pages.
        refresh: seconds after which a browser reads a page anew; 0 for never.

    Returns:
        What all checks together come to.

    Raises:
        InputFileError: there is no client's ledger.
    """
    if not found.clients:
        raise InputFileError("there is no client's ledger to report on")
    clients, servers = checked_at(found)
    findings = {client.name: client.findings + reconcile_all([client], servers) for client in clients}
    of_server = [finding for server in servers for finding in (*server.findings, *unclaimed(clients, server))]
    for client in clients:
        write_atomically(folder / f"{client.name}.html", client_page(client, findings[client.name], bool(servers), refresh))
    everything = [f for of in findings.values() for f in of] + of_server
    write_atomically(folder / "index.html", federation_page(clients, servers, findings, everything, refresh))
    return worst(everything)


def federation_page(
    clients: Sequence[Checked],
    servers: Sequence[Checked],
    findings: dict[str, list[Finding]],
    everything: Sequence[Finding],
    refresh: int = 0,
) -> str:
    """All clients at a glance, and the server's ledgers, of which each run can have one."""
    rows = []
    for client in clients:
        sent = [array for intent in client.of(Intent) for array in intent.arrays]
        verdict = MEANING[worst(findings[client.name])]
        cells = (
            str(len(client.runs)),
            str(len(client.of(Intent))),
            f"{sum(a.bytes for a in sent):,}",
            _key(client.key),
            verdict,
        )
        name = tag("a", client.name, href=f"{client.name}.html")
        rows.append(tag("tr", tag("th", name, scope="row"), *(tag("td", cell) for cell in cells)))
    header = ["client", "runs", "messages sent", "bytes sent", "public key", "ledger"]
    parts = [
        *[flow(client.name, client.of(Intent)) for client in clients],
        checks(everything, bool(servers)),
        _verdict(everything, "Every ledger holds, and all agree with the server's."),
        tag("h2", "Clients"),
        table(header, rows),
        tag("h2", "The server's ledger"),
        *[tag("p", f"{of.name}: {len(of.of(Arrival))} arrivals, {len(of.runs)} runs; {'; '.join(of.keys)}.") for of in servers],
        *([] if servers else [tag("p", "Not here.")]),
        tag("h2", "What all clients together sent, and what it means"),
        _explained([intent for client in clients for intent in client.of(Intent)]),
    ]
    return document("What the clients of this federation sent", *parts, refresh=refresh)


def client_page(client: Checked, findings: Sequence[Finding], compared: bool, refresh: int = 0) -> str:
    """One client: its policy, and each message of each run."""
    agreed = " and agrees with the server's" if compared else "; the server's ledger is not here to compare it with"
    parts = [
        flow(client.name, client.of(Intent)),
        checks(findings, compared),
        spent(client),
        time_line(client),
        _verdict(findings, f"The ledger holds{agreed}."),
    ]
    last = hashlib.sha256(client.lines[-1][1]).hexdigest() if client.lines else "–"
    facts = {"public key": client.key, "lines": str(len(client.lines)), "last line": last, "runs": str(len(client.runs))}
    facts["checked with"] = "; ".join(client.keys)
    parts.append(tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items())))
    for digest, policy in client.policies.items():
        parts += [tag("h2", "Policy"), tag("p", tag("code", digest), class_="note")]
        parts.append(tag("ul", *(tag("li", line) for line in policy_lines(policy))))
    for run in client.runs:
        parts += [tag("h2", f"Run {run[:8]}"), _run_facts(client, run)]
        for intent in client.of(Intent, run):
            again = [resent.message for resent in client.of(Resent, run) if resent.first == intent.message]
            receipt = any(receipt.message in (intent.message, *again) for receipt in client.of(Receipt, run))
            signed = "the server signed for it" if receipt else "the server's signature is in its own ledger"
            if again:
                signed += f"; sent again, to the byte, {len(again)} times, as the run was interrupted"
            parts += [
                tag("h3", intent.stage, tag("span", signed, class_="sum")),
                _explained([intent]),
                tag("details", tag("summary", f"{len(intent.arrays)} arrays"), array_table(intent.arrays)),
            ]
        refusals = [f"Refused in stage {r.stage}: error code {r.code} was sent, nothing else." for r in client.of(Refusal, run)]
        parts += [tag("p", refusal) for refusal in refusals]
        parts += [tag("p", f"Erased since: a record that took part, {e.leaf[:16]}.") for e in client.of(Erasure, run)]
    parts.append(signature(f"I have read what {client.name} sent, up to line {len(client.lines)} of its ledger, {last[:16]}."))
    return document(f"What {client.name} sent", *parts, refresh=refresh)


def _run_facts(client: Checked, run: str) -> Html:
    seals = client.of(Seal, run)
    facts = {
        **{
            f"{name}": getattr(opened, name) or "–"
            for opened in client.of(Open, run)
            for name in ("settings", "code", "policy")
        },
        "seed model": ", ".join(opened.seed_model for opened in client.of(Open, run)),
        "public set": ", ".join(opened.public_set for opened in client.of(Open, run)),
        "Merkle root": seals[-1].root if seals else "not sealed",
    }
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", tag("code", value))) for name, value in facts.items()))


def _verdict(findings: Sequence[Finding], fine: str) -> Html:
    if not findings:
        return tag("p", tag("strong", fine))
    listed = [tag("li", f"{MEANING[finding.verdict]}: {finding.where}: {finding.what}") for finding in findings]
    return join([tag("p", tag("strong", f"Found: {MEANING[worst(findings)]}.")), tag("ul", *listed)])


def _explained(intents: Sequence[Intent]) -> Html:
    """A list of what was sent, in words, and by which epsilon it is covered."""
    items, privacy = [], privacy_of(intents)
    for kind, arrays in released(intents).items():
        words, size = EXPLAINED[kind], f"{sum(array.bytes for array in arrays):,} bytes"
        text = f": {words.what}; computed: {words.how}; from: {words.samples}. Can reveal: {words.reveals}."
        covered = f" Privacy: {coverage_words(privacy[kind])}." if kind in privacy else ""
        items.append(tag("li", tag("strong", kind), f" ({size})", text + covered))
    return tag("ul", *items)


def _key(key: str) -> Html:
    return tag("code", key[:16] + "…", title=key)
