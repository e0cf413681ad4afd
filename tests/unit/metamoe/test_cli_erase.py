"""``metamoe audit erase``: what a record took part in, what is left of it, and the line that says that nothing is."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from metamoe.audit.erasure import look_up, steps, write_down
from metamoe.audit.ledgers import ledgers_at
from metamoe.audit.verification import verify
from metamoe.client.records import leaf, leaves_of, record_hashes, records_key
from metamoe.common.audit.entries import Erasure, Records
from metamoe.common.audit.ledger import Ledger
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private
from metamoe.common.errors import InvalidSettingError, StateFileError


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def record(small: Settings) -> str:
    """One that client 0 has, and no other."""
    mine, others = (set(record_hashes(load_private(small, client, "train"))) for client in (0, 1))
    return min(mine - others)


def test_it_says_what_a_record_took_part_in_and_what_is_left(
    run: Path, record: str, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_metamoe("audit", "erase", str(run), "--client", "client-0", "--record", record, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(part["stage"], part["sent"]) for part in answer["parts"]][:2] == [
        ("profile", ["seed-routing-vector", "seed-ffn-inputs", "seed-shape"]),
        ("expert", ["expert"]),
    ]
    assert answer["parts"][0]["members"] == ["digits", "greek", "arrows"]
    assert len(answer["steps"]) == 5
    assert f"record {record[:16]} is in the data (train)" in answer["left"]
    assert any("experts" in left for left in answer["left"])
    assert run_metamoe("audit", "erase", str(run), "--client", "client-1", "--record", record) == 0
    assert "took part in nothing" in capsys.readouterr().out
    # While it is there nothing is written down.
    done = run_metamoe("audit", "erase", str(run), "--client", "client-0", "--record", record, "--done")
    assert done == StateFileError.exit_code
    assert not [e for e in Ledger(run / "clients" / "audit" / "client-0").entries() if isinstance(e, Erasure)]


def test_a_picture_s_hash_is_that_of_its_file_and_a_client_must_be_named(
    run: Path, tmp_path: Path, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "picture").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    given = ("--record", str(tmp_path / "picture"), "--json")
    assert run_metamoe("audit", "erase", str(run), "--client", "client-0", *given) == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == [empty]
    assert run_metamoe("audit", "erase", str(run), *given) == InvalidSettingError.exit_code


def test_once_nothing_is_left_the_ledger_says_so_and_holds(run: Path, record: str) -> None:
    with ledgers_at(run) as ledgers:
        found = ledgers.clients[0]
        answer = look_up(found, [record])
        with pytest.raises(StateFileError, match="not erased yet"):
            write_down(found, answer)
        # Profile and expert are of the same list, so that one line says it for both.
        assert write_down(found, replace(answer, left=[])) == 1
        assert [part.erased for part in look_up(found, [record]).parts][:2] == [True, True]
        assert write_down(found, replace(look_up(found, [record]), left=[])) == 0
    assert verify(run).fine


def test_the_list_is_held_to_what_the_ledger_commits_to(run: Path, record: str) -> None:
    with ledgers_at(run) as ledgers:
        found = ledgers.clients[0]
        committed = next(entry for entry in Ledger(found.folder).entries() if isinstance(entry, Records))
        file, own = found.folder / f"records-{committed.root}.json", leaf(records_key(found.folder), committed.run, record)
        one_less = [other for other in leaves_of(found.folder, committed.root) if other != own]
        file.write_text(json.dumps(one_less))
        answer = look_up(found, [record])
        assert (answer.parts[:1], answer.unknown) == ([], [record])
        assert [*answer.unclear.values()] == [f"{file} is not the list of records that the ledger names"]
        assert list(steps(answer.parts)) == []


def test_neither_key_nor_list_is_in_what_an_auditor_gets(run: Path, tmp_path: Path, run_metamoe) -> None:
    folder = run / "clients" / "audit" / "client-0"
    assert run_metamoe("audit", "export", str(folder), str(tmp_path / "bundle.zip")) == 0
    assert not [name for name in zipfile.ZipFile(tmp_path / "bundle.zip").namelist() if "records" in name]
    assert (folder / "records.key").stat().st_mode & 0o777 == 0o600
