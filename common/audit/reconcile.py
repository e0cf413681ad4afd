"""Comparing what clients' ledgers say they sent with what the server's ledger says arrived."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

from metamoe.common.audit.entries import (
    ArrayEntry,
    Arrival,
    Failure,
    Intent,
    Resent,
    Seal,
)
from metamoe.common.audit.verify import Checked, Finding, Verdict


def reconcile(client: Checked, server: Checked) -> list[Finding]:
    """Compare what a client's ledger says it sent with what the server's ledger says arrived from it, message by message and
    array by array, for the runs that both know.
    """
    findings = []
    runs = [run for run in client.runs if run in server.runs]
    if not runs:
        return [Finding(Verdict.DISAGREE, f"{client.name} and {server.name}", "have no run in common")]
    for run in runs:
        finished = bool(server.of(Seal, run))
        intents = {intent.message: intent for intent in client.of(Intent, run)}
        again = {resent.message: resent.first for resent in client.of(Resent, run) if resent.first in intents}
        sent = intents | {message: intents[first] for message, first in again.items()}
        arrived = {
            arrival.message: arrival for arrival in server.of(Arrival, run) if arrival.key == (client.sender or client.key)
        }
        failed = {failure.message for failure in server.of(Failure, run)}
        for message, arrival in arrived.items():
            where = f"{client.name}, run {run[:8]}, {arrival.stage} message {message[:8]}"
            if message not in sent:
                findings.append(Finding(Verdict.DISAGREE, where, "arrived at the server, but is not in the client's ledger"))
            else:
                findings += [
                    Finding(Verdict.DISAGREE, where, what) for what in _differences(sent[message].arrays, arrival.arrays)
                ]
        for message, intent in intents.items():
            # What was sent again has arrived if any of the messages has.
            if arrived.keys() & {message, *(other for other, first in again.items() if first == message)}:
                continue
            where = f"{client.name}, run {run[:8]}, {intent.stage} message {message[:8]}"
            if finished or message in failed:
                findings.append(
                    Finding(Verdict.DISAGREE, where, "is in the client's ledger, but did not arrive as it is there")
                )
            else:
                findings.append(Finding(Verdict.INCOMPLETE, where, "has not arrived; the server has not finished this run"))
        # A gateway's own seal goes nowhere.
        findings += _compare_seals(client, run, arrived) if not client.sender else []
    return findings


def reconcile_all(clients: Sequence[Checked], servers: Sequence[Checked]) -> list[Finding]:
    """Each client's ledger against those of the servers that have runs in common with it; one that has none disagrees."""
    findings = []
    for client in clients:
        known = [server for server in servers if set(client.runs).intersection(server.runs)]
        findings += [finding for server in known or servers[:1] for finding in reconcile(client, server)]
    return findings


def unclaimed(clients: Sequence[Checked], server: Checked) -> list[Finding]:
    """What arrived at the server in runs of these clients under a key that none of their ledgers has; all clients of the runs
    are to be among them.
    """
    keys, runs = {client.key for client in clients}, {run for client in clients for run in client.runs}
    counts = Counter((entry.run, entry.client) for entry in server.of(Arrival) if entry.run in runs and entry.key not in keys)
    return [
        Finding(
            Verdict.DISAGREE,
            f"{server.name}, run {run[:8]}",
            f"{count} messages of client {client} arrived, whose ledger is not here",
        )
        for (run, client), count in counts.items()
    ]


def _differences(sent: Sequence[ArrayEntry], arrived: Sequence[ArrayEntry]) -> Iterator[str]:
    here, there = ({array.name: array for array in arrays} for arrays in (sent, arrived))
    for name in sorted(here.keys() | there.keys()):
        if name not in here:
            yield f"array {name!r} arrived at the server, but is not in the client's ledger"
        elif name not in there:
            yield f"array {name!r} is in the client's ledger, but did not arrive"
        elif here[name] != there[name]:
            yield f"array {name!r} is another one at the server"


def _compare_seals(client: Checked, run: str, arrived: dict[str, Arrival]) -> Iterator[Finding]:
    """The root that the client signed and sent must be the one in its ledger."""
    roots = [hashlib.sha256(bytes.fromhex(seal.root)).hexdigest() for seal in client.of(Seal, run)]
    for arrival in arrived.values():
        for array in arrival.arrays:
            if array.name == "ledger-root" and array.sha256 not in roots:
                yield Finding(
                    Verdict.DISAGREE,
                    f"{client.name}, run {run[:8]}",
                    "the seal that the server received is not in the client's ledger",
                )
