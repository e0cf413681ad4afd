"""The commands ``metamoe audit``: for those who answer for the data."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from metamoe.audit.ledgers import ledgers_at, write_bundle
from metamoe.audit.report import MEANING, write_pages
from metamoe.audit.verification import checked_at, checked_gateways
from metamoe.audit.verification import verify as verified
from metamoe.cli_attacks import attack, canary
from metamoe.cli_erase import erase
from metamoe.cli_follow import watch
from metamoe.common.audit.entries import Arrival, Head, Intent, Line, json_schema
from metamoe.common.audit.policy import DEFAULT, Policy, epsilon_of, kind_of_array, load_policy, policy_text
from metamoe.common.audit.reconcile import reconcile_all, unclaimed
from metamoe.common.audit.terms import Terms, pinned
from metamoe.common.audit.touching import touching
from metamoe.common.audit.verify import Checked, Finding, Verdict, worst
from metamoe.common.audit.words import EXPLAINED, coverage_words, policy_lines, privacy_of, released
from metamoe.common.errors import InputFileError
from metamoe.common.files import write_atomically
from metamoe.common.presets import load_settings
from metamoe.options import Set, console, json_option, log, put_json
from metamoe.show import show_table

audit = typer.Typer(
    no_args_is_help=True,
    help="For those who answer for the data: what may leave a client, what left, and whether it can be shown.",
    epilog="Exit codes of verify, reconcile and report: 0 fine, 1 violation of the policy, 2 wrong usage, 3 tampered with, "
    "4 ledgers disagree, 5 incomplete, 6 budget exceeded.",
)

_PLACE = "Folder of a run, a federation, a client or a ledger, or a bundle from 'metamoe audit export'."
_CHECKED = "verdict, ledgers (name, lines, runs, bytes_sent, bytes_received, key, keys), findings (verdict, where, what)"
Place = Annotated[Path, typer.Argument(help=_PLACE)]


@audit.command()
def policy(
    file: Annotated[
        Path | None, typer.Argument(help="Policy, a TOML file. (default: the one that comes with the product)")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset or TOML file of a run, to list the arrays it would send.")] = "glyphs",
    set_: Set = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the policy to a new file, to be edited and kept.")
    ] = None,
    pin: Annotated[
        bool,
        typer.Option(
            "--pin", help="Let a server use the seed, public set and settings of --preset alone, from the first run on."
        ),
    ] = False,
    as_json: Annotated[
        bool,
        json_option("policy, rules (in words), sends (when, artifact, arrays, bytes, allowed)"),
    ] = False,
) -> None:
    """Say in plain language what may leave a client, and what of it a run would send."""
    if write and write.exists():
        raise InputFileError(f"{write} exists; a policy is never overwritten, so give another file")
    chosen = load_policy(file) if file else DEFAULT
    settings = load_settings(preset, set_ or [])
    from metamoe.common.model.seed import load_seed
    from metamoe.common.wire import AUDIT_ARTIFACTS, MESSAGE_TYPE, Artifact, reply_artifacts

    seed = load_seed(settings.seed_model)
    if pin:
        from metamoe.common.data.datasets import public_fingerprint

        chosen = pinned(chosen, Terms(touching(settings), seed.fingerprint, public_fingerprint(settings.data)))
    sends: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    styles: dict[int, str] = {}
    for stage in MESSAGE_TYPE:
        by_kind: dict[str, list[Artifact]] = {}
        for artifact in (*reply_artifacts(stage, settings, seed), *AUDIT_ARTIFACTS[stage]):
            by_kind.setdefault(kind_of_array(artifact.name), []).append(artifact)
        for kind, artifacts in by_kind.items():
            forms = f"{len(artifacts)} x" if len(artifacts) > 1 else str(list(artifacts[0].shape))
            size, allowed = sum(artifact.bytes for artifact in artifacts), kind in chosen.allow
            if not allowed:
                styles[len(rows)] = "red"
            rows.append([stage, kind, f"{forms} {artifacts[0].dtype}", f"{size:,}", "" if allowed else "refused"])
            sends.append({"when": stage, "artifact": kind, "arrays": len(artifacts), "bytes": size, "allowed": allowed})
    if as_json:
        rules = list(policy_lines(chosen))
        put_json({"policy": chosen.model_dump(mode="json", by_alias=True), "rules": rules, "sends": sends})
    else:
        _show_policy(chosen, preset, rows, styles)
    if write:
        write_atomically(write, policy_text(chosen))
        log.info("policy: %s; name it in the node's configuration as policy", write)


def _show_policy(chosen: Policy, preset: str, rows: Sequence[Sequence[str]], styles: Mapping[int, str]) -> None:
    for line in policy_lines(chosen):
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
    header = ["when", "artifact", "arrays", "bytes", ""]
    show_table(console, header, rows, title=f"a run of {preset} would send", grouped=True, styles=styles)


@audit.command()
def verify(
    places: Annotated[list[Path], typer.Argument(help=f"{_PLACE} Several are possible.")],
    key: Annotated[
        Path | None, typer.Option(help="Public key file (audit.pub) of the ledger's keeper, as you had it from them.")
    ] = None,
    server_key: Annotated[Path | None, typer.Option(help="Public key file (audit.pub) of the server's ledger.")] = None,
    as_json: Annotated[bool, json_option(_CHECKED)] = False,
) -> None:
    """Check ledgers by themselves, offline: every line, hash and signature, the Merkle root of each run, the server's receipts,
    and that nothing was sent that the policy does not allow.
    """
    found = [verified(place, key, server_key) for place in places]
    if key is None:
        log.info("to verify is to have the key from its owner: give --key FILE for one ledger")
    _show(
        [ledger for each in found for ledger in each.ledgers], [finding for each in found for finding in each.findings], as_json
    )


@audit.command("reconcile")
def reconcile_(
    place: Annotated[
        Path, typer.Argument(help="Folder of a run or a federation with both sides' ledgers; or one client's, with --server.")
    ],
    server: Annotated[Path | None, typer.Option(help="The server's ledger: its folder, a bundle, or the run's folder.")] = None,
    as_json: Annotated[bool, json_option(_CHECKED)] = False,
) -> None:
    """Compare what clients say they sent with what the server says arrived, message by message, array by array. In a run's
    folder with both sides' ledgers every client's has to be there.
    """
    with ledgers_at(place) as found, ledgers_at(server or place) as other:
        if not other.servers:
            raise InputFileError(f"{server or place} holds no server's ledger; give one with --server")
        if not found.clients:
            raise InputFileError(f"{place} holds no client's ledger; give the folder of one, and this one with --server")
        clients, servers = checked_at(found)
        clients += checked_gateways(found, servers)
        arrived = checked_at(other)[1]
    findings = [finding for ledger in (*clients, *arrived) for finding in ledger.findings]
    findings += reconcile_all(clients, arrived)
    if server is None:
        findings += [finding for of in arrived for finding in unclaimed(clients, of)]
    _show([*clients, *arrived], findings, as_json)


@audit.command()
def explain(place: Place) -> None:
    """Say of everything that left what it is, how it was computed, which samples touched it, and what it can reveal."""
    clients = _clients_at(place)
    # In a file, or for another program, a sentence is a line.
    shown: dict[str, Any] = {"highlight": False, "soft_wrap": not console.is_terminal}
    for client in clients:
        for run in client.runs:
            console.rule(f"{client.name}, run {run[:8]}", align="left")
            intents = client.of(Intent, run)
            privacy = privacy_of(intents)
            for kind, arrays in released(intents).items():
                words = EXPLAINED[kind]
                total = sum(array.bytes for array in arrays)
                count = f"{len(arrays)} arrays, {total:,} bytes" if len(arrays) > 1 else f"{total:,} bytes"
                console.print(f"[bold]{kind}[/bold] ({count}): {words.what}.", **shown)
                console.print(f"  computed: {words.how}\n  from: {words.samples}\n  can reveal: {words.reveals}", **shown)
                if kind in privacy:
                    console.print(f"  privacy: {coverage_words(privacy[kind])}", **shown)


@audit.command()
def budget(
    place: Place,
    delta: Annotated[float, typer.Option(min=1e-12, max=0.5, help="Delta at which epsilon is said.")] = 1e-5,
    as_json: Annotated[
        bool,
        json_option(f"{_CHECKED}, delta, budget (client, artifacts, epsilon, limits)"),
    ] = False,
) -> None:
    """Add up the differential privacy that each client has spent, over all its runs: by artifact and in all, and what is
    covered by no epsilon.
    """
    # What was spent is spent over all runs, also where one is looked at.
    clients = _clients_at(place, whole=True)
    rows, spent_by = [], []
    for client in clients:
        intents = client.of(Intent)
        artifacts: list[dict[str, Any]] = []
        for kind, coverage in privacy_of(intents).items():
            epsilon = epsilon_of(coverage.spent, delta) if coverage.spent else None
            parts = [f"{epsilon:.3f}"] if epsilon is not None else []
            parts += [f"none for {coverage.exact} of them: exact"] if coverage.exact else []
            rows.append([client.name, kind, str(coverage.releases), ", ".join(parts)])
            artifacts.append({"artifact": kind, "releases": coverage.releases, "exact": coverage.exact, "epsilon": epsilon})
        total = epsilon_of([spent for intent in intents for spent in intent.spent], delta)
        limits = sorted({(p.budget.epsilon, p.budget.delta) for p in client.policies.values() if p.budget})
        of = ", ".join(f"{epsilon:g} at {at:g}" for epsilon, at in limits)
        rows.append([client.name, "all that is covered", "", f"{total:.3f}, of {of or 'no limit'}"])
        named = [{"epsilon": epsilon, "delta": at} for epsilon, at in limits]
        spent_by.append({"client": client.name, "artifacts": artifacts, "epsilon": total, "limits": named})
    findings = [finding for client in clients for finding in client.findings]
    if not as_json:
        show_table(console, ["client", "artifact", "releases", f"epsilon at delta {delta:g}"], rows, grouped=True)
    _show(clients, findings, as_json, {"delta": delta, "budget": spent_by})


@audit.command()
def export(
    place: Place,
    bundle: Annotated[Path, typer.Argument(help="New zip file.")],
) -> None:
    """Pack one ledger for a third party: its lines, policies and public key, and not the key that signs."""
    with ledgers_at(place) as found:
        if len(found.all) != 1:
            names = ", ".join(str(one.folder) for one in found.all)
            raise InputFileError(f"{place} holds {len(found.all)} ledgers; give the folder of one: {names}")
        write_bundle(found.all[0], bundle)
    console.print(f"bundle: {bundle}", soft_wrap=True)


@audit.command()
def report(
    place: Place,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pages. (default: audit/ in the folder, or BUNDLE-audit beside a bundle)")
    ] = None,
) -> None:
    """Write an HTML page for each client and one for the federation: what left, what it means, and whether the ledgers hold."""
    folder = out or (place.with_name(f"{place.stem}-audit") if place.is_file() else place / "audit")
    with ledgers_at(place) as found:
        verdict = write_pages(found, folder)
    console.print(f"report: {folder / 'index.html'}", soft_wrap=True)
    raise typer.Exit(int(verdict))


audit.command()(canary)
audit.command()(attack)
audit.command()(erase)
audit.command()(watch)


class Described(StrEnum):
    """A form of file that has a published schema."""

    LINE = "ledger-line"
    HEAD = "ledger-head"
    POLICY = "policy"


@audit.command()
def schema(
    of: Annotated[Described, typer.Argument(help="A line of ledger.jsonl, head.json, or a policy.")] = Described.LINE,
) -> None:
    """Print a JSON Schema."""
    models: dict[Described, type[BaseModel]] = {Described.LINE: Line, Described.HEAD: Head, Described.POLICY: Policy}
    console.print_json(data=json_schema(models[of]))


def _clients_at(place: Path, *, whole: bool = False) -> list[Checked]:
    with ledgers_at(place) as found:
        clients, _ = checked_at(found, whole=whole)
    if not clients:
        raise InputFileError(f"{place} holds no client's ledger")
    return clients


def _show(
    checked: Sequence[Checked], findings: Sequence[Finding], as_json: bool, more: Mapping[str, object] | None = None
) -> None:
    """The ledgers, what is wrong with them, and the exit code; as JSON with ``more``."""
    moved = [
        [sum(array.bytes for entry in of for array in entry.arrays) for of in (ledger.of(Intent), ledger.of(Arrival))]
        for ledger in checked
    ]
    verdict = worst(findings)
    if as_json:
        names = ("name", "lines", "runs", "bytes_sent", "bytes_received", "key", "keys")
        values = [
            (of.name, len(of.lines), len(of.runs), *counts, of.key, of.keys) for of, counts in zip(checked, moved, strict=True)
        ]
        ledgers = [dict(zip(names, ledger, strict=True)) for ledger in values]
        wrong = [{"verdict": MEANING[f.verdict], "where": f.where, "what": f.what} for f in findings]
        put_json({"verdict": MEANING[verdict], "ledgers": ledgers, "findings": wrong, **(more or {})})
        raise typer.Exit(int(verdict))
    rows = []
    for ledger, counts in zip(checked, moved, strict=True):
        bytes_ = (f"{count:,}" if count else "" for count in counts)
        rows.append([ledger.name, str(len(ledger.lines)), str(len(ledger.runs)), *bytes_, ledger.key[:16]])
    show_table(console, ["ledger", "lines", "runs", "bytes sent", "bytes received", "public key"], rows)
    for ledger in checked:
        console.print(f"{ledger.name}: {'; '.join(ledger.keys)}", markup=False, highlight=False, soft_wrap=True)
    for finding in findings:
        line = f"{MEANING[finding.verdict]}: {finding.where}: {finding.what}"
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(MEANING[verdict], style="bold" if verdict is Verdict.FINE else "bold red")
    raise typer.Exit(int(verdict))
