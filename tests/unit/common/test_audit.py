"""Ledgers of a whole run: they verify and agree, and whatever is done to them shows."""

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from metamoe.common.audit.entries import Intent, Open, Seal, array_entries, canonical, head_statement
from metamoe.common.audit.keys import audit_key, public_hex, read_public, signed_by
from metamoe.common.audit.ledger import HEAD, LEDGER, Ledger
from metamoe.common.audit.merkle import merkle_root
from metamoe.common.audit.reconcile import reconcile
from metamoe.common.audit.verify import Checked, Verdict, check_ledger, worst
from metamoe.common.errors import InputFileError, LedgerError
from metamoe.common.files import write_secret
from metamoe.simulations.local import run_local
from tests.conftest import small_run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    for part in ("clients/audit", "server/audit"):
        shutil.copytree(finished / part, tmp_path / part)
    return tmp_path


def client_of(run: Path, number: int = 0) -> Path:
    return run / "clients" / "audit" / f"client-{number}"


def verdict(folder: Path) -> Verdict:
    return worst(check_ledger(folder).findings)


def agreement(run: Path, number: int = 0) -> Verdict:
    return worst(reconcile(check_ledger(client_of(run, number)), check_ledger(run / "server" / "audit")))


def edit(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    file = folder / LEDGER
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"".join(line + b"\n" for line in change(lines)))


def resigned(folder: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    """Harm done by someone who holds the client's own key: every hash, seal and signature fits again."""
    key = audit_key(folder)
    values = change([json.loads(line) for line in (folder / LEDGER).read_bytes().splitlines()])
    lines: list[bytes] = []
    for number, value in enumerate(values):
        value |= {"seq": number, "prev": hashlib.sha256(lines[-1]).hexdigest() if lines else "0" * 64}
        lines.append(canonical(value))
    last = hashlib.sha256(lines[-1]).hexdigest()
    head = {"version": 1, "count": len(lines), "last": last, "signature": key.sign(head_statement(len(lines), last)).hex()}
    (folder / LEDGER).write_bytes(b"".join(line + b"\n" for line in lines))
    (folder / HEAD).write_bytes(canonical(head))


def test_a_key_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped as it writes its key leaves none, and the next makes it; audit.pub is made again too."""

    def killed(_descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            audit_key(tmp_path)
    assert list(tmp_path.iterdir()) == []
    key = audit_key(tmp_path)
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "audit.pub").unlink()
    assert public_hex(audit_key(tmp_path)) == public_hex(key) == read_public(tmp_path / "audit.pub")
    assert len(list(tmp_path.iterdir())) == 2


def test_of_two_that_make_a_secret_one_does(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert [write_secret(file, "one"), write_secret(file, "two")] == [True, False]
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_leaves_ledgers_that_verify_and_agree(finished: Path) -> None:
    server = check_ledger(finished / "server" / "audit")
    assert server.findings == []
    for number in range(3):
        client = check_ledger(client_of(finished, number))
        assert client.findings == []
        assert reconcile(client, server) == []
        stages = [intent.stage for intent in client.of(Intent)]
        assert stages == ["profile", "expert", "deliver"]
    # Three clients, three replies each; one line opens, one seals.
    assert len(server.lines) == 11


def test_ledgers_are_small(finished: Path) -> None:
    assert all(file.stat().st_size < 50_000 for file in finished.rglob(LEDGER))


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a changed byte": lambda lines: [*lines[:2], lines[2].replace(b'"time":"2', b'"time":"3', 1), *lines[3:]],
    "a removed line": lambda lines: lines[:3] + lines[4:],
    "a removed last line": lambda lines: lines[:-1],
    "two lines removed at the end": lambda lines: lines[:-2],
    "two swapped lines": lambda lines: [*lines[:1], lines[2], lines[1], *lines[3:]],
    "a doubled line": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "a space": lambda lines: [lines[0].replace(b":", b": ", 1), *lines[1:]],
    "no JSON": lambda lines: [b"nonsense", *lines[1:]],
    "no lines": lambda _: [],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("place", ["clients/audit/client-0", "server/audit"])
def test_a_ledger_that_was_changed_is_found_out(run: Path, change: Callable, place: str) -> None:
    edit(run / place, change)
    assert verdict(run / place) is Verdict.TAMPERED


@given(st.data())
@hypothesis_settings(max_examples=150, deadline=None)
def test_no_byte_can_change(finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("flip")
    for file in client_of(finished).iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    content = bytearray((folder / LEDGER).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    (folder / LEDGER).write_bytes(content)
    assert worst(check_ledger(folder).findings) is Verdict.TAMPERED


@pytest.mark.parametrize("part", ["seal", "head", "receipt"])
def test_a_forged_signature_is_found_out(run: Path, part: str) -> None:
    folder = client_of(run)
    other = Ed25519PrivateKey.generate().sign(b"").hex()
    if part == "head":
        head = json.loads((folder / HEAD).read_text())
        (folder / HEAD).write_bytes(canonical(head | {"signature": other}))
    else:
        resigned(
            folder,
            lambda lines: [
                line | {"entry": line["entry"] | {"signature": other}} if line["entry"]["type"] == part else line
                for line in lines
            ],
        )
    assert verdict(folder) is Verdict.TAMPERED


def test_a_ledger_under_another_key_is_found_out(run: Path) -> None:
    other = public_hex(Ed25519PrivateKey.generate())
    assert worst(check_ledger(client_of(run), other).findings) is Verdict.TAMPERED
    assert worst(check_ledger(client_of(run), None, other).findings) is Verdict.TAMPERED


def test_even_with_the_key_a_client_cannot_take_back_what_arrived(run: Path) -> None:
    """The end goes, and all is signed anew: in itself the ledger is only unfinished, but the server has signed for more."""
    resigned(client_of(run), lambda lines: [line for line in lines if line["entry"].get("stage") != "deliver"])
    assert verdict(client_of(run)) is Verdict.FINE
    assert agreement(run) is Verdict.DISAGREE
    resigned(client_of(run), lambda lines: [line for line in lines if line["entry"]["type"] != "seal"])
    assert verdict(client_of(run)) is Verdict.INCOMPLETE
    assert agreement(run) is Verdict.DISAGREE


def test_what_only_the_client_has_is_found_out(run: Path) -> None:
    folder = run / "server" / "audit"
    resigned(
        folder,
        lambda lines: [line for line in lines if (line["entry"].get("stage"), line["entry"].get("client")) != ("expert", 0)],
    )
    assert agreement(run) is Verdict.DISAGREE
    assert agreement(run, 1) is Verdict.FINE


def test_another_array_is_found_out(run: Path) -> None:
    def harm(lines: list[dict]) -> list[dict]:
        for line in lines:
            if line["entry"].get("stage") == "expert" and "arrays" in line["entry"]:
                line["entry"]["arrays"][0]["sha256"] = "0" * 64
        return lines

    resigned(client_of(run), harm)
    assert verdict(client_of(run)) is Verdict.TAMPERED
    assert agreement(run) is Verdict.DISAGREE


def test_a_run_that_stopped_is_incomplete(tmp_path: Path, seed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metamoe.server import stages

    monkeypatch.setattr(stages, "unify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_local(small_run(seed_folder), tmp_path)
    assert verdict(client_of(tmp_path)) is Verdict.INCOMPLETE
    assert agreement(tmp_path) is Verdict.FINE


def test_ledgers_of_other_runs_do_not_agree(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("other"))
    ledger.open(opened(ledger, "b" * 32))
    other = check_ledger(ledger._file.parent)
    assert worst(reconcile(other, check_ledger(run / "server" / "audit"))) is Verdict.DISAGREE


def opened(ledger: Ledger, run: str = "a" * 32) -> Open:
    digest = "0" * 64
    return Open(
        run=run,
        role="client",
        key=ledger.public,
        server=digest,
        settings=digest,
        seed_model=digest,
        public_set=digest,
        code=digest,
        policy=None,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger", now=lambda: datetime(2026, 1, 2, 3, 4, 59, tzinfo=UTC))


def test_a_line_is_what_the_documentation_says(ledger: Ledger) -> None:
    """By hand: the canonical form of the first two lines, and their chain."""
    run = "a" * 32
    ledger.open(opened(ledger))
    ledger.open(opened(ledger))
    seal = ledger.seal(run)
    first, second = ledger._file.read_bytes().splitlines()
    zeros = "0" * 64
    assert first.decode() == (
        f'{{"entry":{{"code":"{zeros}","key":"{ledger.public}","policy":null,"public_set":"{zeros}","role":"client",'
        f'"run":"{run}","seed_model":"{zeros}","server":"{zeros}","settings":"{zeros}","type":"open"}},'
        f'"prev":"{zeros}","seq":0,"time":"2026-01-02T03:04Z","version":1}}'
    )
    assert json.loads(second)["prev"] == hashlib.sha256(first).hexdigest()
    assert seal.root == hashlib.sha256(b"\x00" + first).hexdigest()
    statement = f'{{"count":1,"root":"{seal.root}","run":"{run}","what":"seal"}}'
    assert signed_by(ledger.public, seal.signature, statement.encode())


def test_a_line_cut_short_by_a_crash_goes_and_the_chain_goes_on(ledger: Ledger) -> None:
    ledger.open(opened(ledger))
    with ledger._file.open("ab") as file:
        file.write(b'{"entry":{"arr')
    folder = ledger._file.parent
    assert verdict(folder) is Verdict.INCOMPLETE
    Ledger(folder).seal("a" * 32)
    assert verdict(folder) is Verdict.FINE


def test_a_ledger_that_lost_its_end_is_not_written_on(ledger: Ledger) -> None:
    ledger.open(opened(ledger))
    ledger.seal("a" * 32)
    folder = ledger._file.parent
    edit(folder, lambda lines: lines[:-1])
    with pytest.raises(LedgerError, match="lines were removed"):
        Ledger(folder).open(opened(ledger, "b" * 32))


def test_a_full_disk_is_an_error(ledger: Ledger) -> None:
    """The operating system refuses to let the file grow, in the middle of a line."""
    ledger.open(opened(ledger))
    before = ledger._file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(LedgerError, match="nothing is sent"):
            ledger.open(opened(ledger, "b" * 32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ledger._file.read_bytes()[: len(before)] == before
    ledger.open(opened(ledger, "b" * 32))
    assert check_ledger(ledger._file.parent).runs == ["a" * 32, "b" * 32]


def test_merkle_roots_of_rfc_6962() -> None:
    """The roots of the test vectors of Certificate Transparency for the first 0, 1, 2, 3, 7 and 8 leaves."""
    leaves = [bytes.fromhex(leaf) for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
    leaves.append(bytes.fromhex("606162636465666768696a6b6c6d6e6f"))
    roots = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    assert {count: merkle_root(leaves[:count]).hex() for count in roots} == roots


def test_keys_are_kept_and_checked(tmp_path: Path) -> None:
    key = audit_key(tmp_path)
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600
    assert read_public(tmp_path / "audit.pub") == public_hex(key) == public_hex(audit_key(tmp_path))
    (tmp_path / "audit.key").write_text("short")
    (tmp_path / "audit.pub").write_text("short")
    with pytest.raises(InputFileError, match="64 hexadecimal"):
        audit_key(tmp_path)
    with pytest.raises(InputFileError, match="64 hexadecimal"):
        read_public(tmp_path / "audit.pub")


def test_a_folder_without_a_ledger_is_no_ledger(tmp_path: Path) -> None:
    audit_key(tmp_path)
    with pytest.raises(InputFileError, match="cannot be read"):
        check_ledger(tmp_path)


def test_the_hash_of_an_array_is_that_of_its_bytes() -> None:
    import numpy as np

    (entry,) = array_entries({"client": np.array(1)})
    assert (entry.dtype, entry.shape, entry.bytes) == ("int64", [], 8)
    assert entry.sha256 == hashlib.sha256((1).to_bytes(8, "little")).hexdigest()


def test_findings_are_ranked() -> None:
    assert worst([]) is Verdict.FINE
    checked = Checked("x", "0" * 64)
    assert checked.of(Seal) == []
