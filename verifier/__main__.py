"""Checks an exported ledger of MetaMoE-FL, offline, and says in words what left.

    python verifier.pyz BUNDLE [--key audit.pub] [--server-key audit.pub]

Written from docs/audit.md, with nothing of the product's own code in it: Python 3.11 and the package cryptography are all it
needs. ``main`` reads a bundle and ``check`` checks it; form.py says what a ledger's line is, and rules.py what a policy allows.

Exit codes: 0 fine, 1 violation of the policy, 2 wrong usage, 3 tampered with, 5 incomplete, 6 budget exceeded, 14 no bundle.
"""

import argparse
import re
import sys
import tomllib
import zipfile
import zlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import rules
from form import ENTRIES, HEAD, LINE, canonical, digest_of, merkle_root, parsed, sha, signed

NO_BUNDLE = 14
LARGEST = 64_000_000


def read_lines(content, found):
    """The lines as far as they are lines, into ``found`` as (line, its bytes); each follows from the one before."""
    previous, (*lines, rest) = "0" * 64, content.split(b"\n")
    if rest:
        yield rules.INCOMPLETE, f"line {len(lines) + 1} was not written to its end"
    for count, raw in enumerate(lines):
        where = f"line {count + 1}"
        try:
            line = parsed(raw)
        except ValueError:
            line = None
        if not LINE(line):
            yield rules.TAMPERED, f"{where} is no line of a ledger"
            return
        if canonical(line) != raw:
            yield rules.TAMPERED, f"{where} is not in the canonical form"
        if line["seq"] != count or line["prev"] != previous:
            yield rules.TAMPERED, f"{where} does not follow from the line before"
        found.append((line, raw))
        previous = sha(raw)


def check_head(content, lines, key):
    """The signed end of the ledger."""
    try:
        head = parsed(content)
    except ValueError:
        head = None
    if not HEAD(head):
        yield rules.TAMPERED, "head.json cannot be read"
    elif not signed(key, head["signature"], {"count": head["count"], "last": head["last"], "what": "head"}):
        yield rules.TAMPERED, "head.json is not signed by the keeper of this ledger"
    elif head["count"] > len(lines):
        yield rules.TAMPERED, f"head.json counts {head['count']} lines, but there are {len(lines)}: the end was cut off"
    elif head["count"] and sha(lines[head["count"] - 1][1]) != head["last"]:
        yield rules.TAMPERED, "head.json does not belong to these lines"
    elif head["count"] < len(lines):
        yield rules.INCOMPLETE, f"head.json counts {head['count']} lines of {len(lines)}: a write was interrupted"


def read_policies(files, opened, found):
    """The policies that runs name by their hash, into ``found``."""
    for digest in {entry["policy"] for entry in opened if entry["policy"]}:
        content = files.get(f"policy-{digest}.toml")
        if content is None:
            yield rules.INCOMPLETE, f"the policy {digest[:16]} is not here"
        elif sha(content) != digest:
            yield rules.TAMPERED, f"the policy {digest[:16]} was changed"
        else:
            try:
                found[digest] = tomllib.loads(content.decode())
            except ValueError:
                yield rules.INCOMPLETE, f"the policy {digest[:16]} cannot be read"


def check_run(run, lines, key, server, policies):
    """One run: how it begins, its seals, the server's receipts, and what was sent in it against its policy."""
    entries = [(line["entry"], raw) for line, raw in lines if line["entry"]["run"] == run]
    by_type = {name: [entry for entry, _ in entries if entry["type"] == name] for name in ENTRIES}
    first = entries[0][0]
    if first["type"] != "open" or len(by_type["open"]) != 1:
        yield rules.TAMPERED, "does not begin with the one line that opens it"
        return
    if first["key"] != key:
        yield rules.TAMPERED, "was opened under another key than the ledger's"
    if server and first["server"] != server:
        yield rules.TAMPERED, "was opened for another server"
    policy = policies.get(first["policy"])
    if policy and policy.get("server") not in (None, first["server"]):
        yield rules.VIOLATION, "was opened for a server that the policy does not allow"
    yield from check_seals(run, entries, key)
    yield from check_receipts(run, by_type, key, server or first["server"])
    if {erasure["root"] for erasure in by_type["erasure"]} - {records["root"] for records in by_type["records"]}:
        yield rules.TAMPERED, "erases a record from a list that the run has not"
    if policy:
        yield from rules.check_policy(policy, by_type["intent"])


def check_seals(run, entries, key):
    for position, (entry, _) in enumerate(entries):
        if entry["type"] == "seal":
            root = merkle_root([raw for _, raw in entries[:position]]).hex()
            if (entry["count"], entry["root"]) != (position, root):
                yield rules.TAMPERED, "has a seal that does not fit the lines before it"
            statement = {"count": entry["count"], "root": entry["root"], "run": run, "what": "seal"}
            if not signed(key, entry["signature"], statement):
                yield rules.TAMPERED, "has a seal that the keeper of this ledger did not sign"
    if not any(entry["type"] == "seal" for entry, _ in entries):
        yield rules.INCOMPLETE, "is not sealed: it is still going on, or did not come to its end"


def check_receipts(run, by_type, key, server):
    def statement(message, arrays):
        return {"arrays": arrays, "message": message, "run": run, "what": "receipt"}

    sent = {intent["message"]: digest_of(intent["arrays"]) for intent in by_type["intent"]}
    if len(sent) < len(by_type["intent"]):
        yield rules.VIOLATION, "answers one message twice"
    again = by_type["resent"]
    for resent in again:
        if resent["first"] not in sent:
            yield rules.TAMPERED, f"sent again what no earlier line sent: {resent['first'][:8]}"
    known = sent | {resent["message"]: sent[resent["first"]] for resent in again if resent["first"] in sent}
    for receipt in by_type["receipt"]:
        if not signed(server, receipt["signature"], statement(receipt["message"], receipt["arrays"])):
            yield rules.TAMPERED, f"has a receipt for {receipt['message'][:8]} that the server did not sign"
        if known.get(receipt["message"]) != receipt["arrays"]:
            yield rules.TAMPERED, f"has a receipt for {receipt['message'][:8]}, but not for what was sent"
    for arrival in by_type["arrival"]:
        if not signed(key, arrival["signature"], statement(arrival["message"], digest_of(arrival["arrays"]))):
            yield rules.TAMPERED, f"has an arrival of {arrival['message'][:8]} that does not fit its signature"
    receipts = {receipt["message"] for receipt in by_type["receipt"]}
    for intent in by_type["intent"]:
        messages = {intent["message"]} | {resent["message"] for resent in again if resent["first"] == intent["message"]}
        # The last reply of a run is signed for in the server's ledger alone: no request follows it.
        if not messages & receipts and intent["stage"] != "deliver":
            yield rules.INCOMPLETE, f"has no receipt for {intent['stage']} message {intent['message'][:8]}"


class NoBundle(Exception):
    """What was given is no exported ledger."""


def read_bundle(file):
    """The files of a bundle, by name."""
    allowed = r"ledger\.jsonl|head\.json|audit\.pub|policy-[0-9a-f]{64}\.toml|settings-[0-9a-f]{64}\.json"
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not re.fullmatch(allowed, entry.filename) or entry.file_size > LARGEST:
                    raise NoBundle(f"it holds {entry.filename!r}")
            files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise NoBundle(str(error)) from error
    if not files.keys() & {"ledger.jsonl", "head.json"}:
        raise NoBundle("it holds no ledger")
    return files


def public_key(content, where):
    try:
        key = content.decode().strip()
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    except ValueError as error:
        raise NoBundle(f"{where} is no public key of 64 hexadecimal digits") from error
    return key


def check(files, key, server=None):
    """All findings, gravest or not, and the entries as far as they could be read."""
    lines, policies, findings = [], {}, []
    findings += read_lines(files.get("ledger.jsonl", b""), lines)
    findings += check_head(files.get("head.json", b""), lines, key)
    entries = [line["entry"] for line, _ in lines]
    findings += read_policies(files, [entry for entry in entries if entry["type"] == "open"], policies)
    for run in dict.fromkeys(entry["run"] for entry in entries):
        findings += [(verdict, f"run {run[:8]} {what}") for verdict, what in check_run(run, lines, key, server, policies)]
    findings += rules.check_terms(files, entries, policies)
    findings += rules.check_statistics(entries, policies)
    findings += rules.check_budget(entries, policies)
    return findings, entries


def worst(findings):
    return next((verdict for verdict in rules.WORST_FIRST if verdict in {found for found, _ in findings}), rules.FINE)


def told(entries):
    """What left, run by run, in sentences."""
    for run in dict.fromkeys(entry["run"] for entry in entries):
        of_run = [entry for entry in entries if entry["run"] == run]
        intents = [entry for entry in of_run if entry["type"] == "intent"]
        yield f"Run {run[:8]}: {sum(array['bytes'] for intent in intents for array in intent['arrays']):,} bytes of arrays"
        for intent in intents:
            covered, kinds = {name for spent in intent["spent"] for name in spent["covers"]}, {}
            for array in intent["arrays"]:
                kinds.setdefault(rules.kind_of(array["name"]), []).append(array)
            for kind, arrays in kinds.items():
                size, noise = sum(array["bytes"] for array in arrays), {array["name"] for array in arrays} <= covered
                how = "" if kind in rules.OF_NO_SAMPLE else ", with noise" if noise else ", exact"
                yield f"  {intent['stage']}: {kind or 'of no kind'}, {size:,} bytes{how}: {rules.WORDS.get(kind, 'unknown')}"
        for entry in of_run:
            if entry["type"] in ("refusal", "failure"):
                yield f"  {entry['stage']}: nothing but the error code {entry['code']}"
            elif entry["type"] == "erasure":
                yield f"  a record was erased, {entry['leaf'][:8]}, from the list {entry['root'][:8]}"
            elif entry["type"] == "resent":
                yield f"  {entry['stage']}: sent again, to the byte"
            elif entry["type"] == "arrival":
                yield f"  {entry['stage']}: {len(entry['arrays'])} arrays arrived from client {entry['client']}"


def main():
    parser = argparse.ArgumentParser(prog="verifier.pyz", description="Check an exported ledger of MetaMoE-FL, offline.")
    parser.add_argument("bundle", type=Path, help="zip file from 'metamoe audit export'")
    parser.add_argument("--key", type=Path, help="public key of the ledger's keeper, as you had it from them")
    parser.add_argument("--server-key", type=Path, help="public key of the server's ledger")
    options = parser.parse_args()
    try:
        files = read_bundle(options.bundle)
        own = options.key.read_bytes() if options.key else files.get("audit.pub", b"")
        key = public_key(own, options.key or "audit.pub in the bundle")
        server = public_key(options.server_key.read_bytes(), options.server_key) if options.server_key else None
    except (NoBundle, OSError) as error:
        print(f"{options.bundle} cannot be checked: {error}", file=sys.stderr)
        return NO_BUNDLE
    findings, entries = check(files, key, server)
    verdict = worst(findings)
    print(f"Key: {key} ({options.key or 'as the bundle has it: compare it with its owner'})")
    for sentence in told(entries):
        print(sentence)
    for found, what in findings:
        print(f"{rules.MEANING[found]}: {what}")
    print(rules.MEANING[verdict])
    return verdict


if __name__ == "__main__":
    sys.exit(main())
