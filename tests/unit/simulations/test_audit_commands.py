"""``metamoe audit`` as one uses it: places, words, pages, bundles and exit codes."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common.audit.ledger import LEDGER
from common.errors import InputFileError
from common.model.seed import Seed
from simulations.canary import Canary, needles, search
from simulations.ledgers import ledgers_at


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run's ledgers, to do harm to."""
    for part in ("clients/audit", "server/audit"):
        shutil.copytree(finished / part, tmp_path / "run" / part)
    return tmp_path / "run"


def test_a_run_verifies_and_reconciles(run: Path, run_metamoe, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_metamoe("audit", "verify", str(run)) == 0
    assert run_metamoe("audit", "reconcile", str(run)) == 0
    client = run / "clients" / "audit" / "client-1"
    keys = ["--key", str(client / "audit.pub"), "--server-key", str(run / "server" / "audit" / "audit.pub")]
    assert run_metamoe("audit", "verify", str(client), *keys) == 0
    assert "fine" in capsys.readouterr().out


def test_each_kind_of_harm_has_its_exit_code(run: Path, run_metamoe) -> None:
    client = run / "clients" / "audit" / "client-0"
    lines = (client / LEDGER).read_bytes().splitlines(keepends=True)
    (client / LEDGER).write_bytes(b"".join(lines[:-1]))
    assert run_metamoe("audit", "verify", str(client)) == 3
    assert run_metamoe("audit", "reconcile", str(run)) == 3
    (client / LEDGER).write_bytes(b"".join(lines))
    other = run / "clients" / "audit" / "client-1"
    keys = ["--key", str(other / "audit.pub")]
    assert run_metamoe("audit", "verify", str(client), *keys) == 3
    # The server knows this client, but another's ledger is handed over as its own.
    shutil.rmtree(run / "server" / "audit")
    assert run_metamoe("audit", "reconcile", str(run)) == InputFileError.exit_code
    assert run_metamoe("audit", "verify", "nowhere") == InputFileError.exit_code
    assert run_metamoe("audit", "verify") == 2


def test_a_bundle_is_enough_for_a_third_party(run: Path, run_metamoe, tmp_path: Path) -> None:
    client, bundle = run / "clients" / "audit" / "client-0", tmp_path / "bundle.zip"
    assert run_metamoe("audit", "export", str(client), str(bundle)) == 0
    assert not any("key" in name for name in zipfile.ZipFile(bundle).namelist())
    secret = (client / "audit.key").read_text().strip()
    assert secret.encode() not in bundle.read_bytes()
    shutil.move(run / "server", tmp_path / "server")
    shutil.rmtree(run)
    assert run_metamoe("audit", "verify", str(bundle)) == 0
    assert run_metamoe("audit", "reconcile", str(bundle), "--server", str(tmp_path / "server" / "audit")) == 0
    assert run_metamoe("audit", "export", str(tmp_path / "server" / "audit"), str(bundle)) == InputFileError.exit_code


def test_a_run_of_several_ledgers_is_not_one_bundle(run: Path, run_metamoe, tmp_path: Path) -> None:
    assert run_metamoe("audit", "export", str(run), str(tmp_path / "b.zip")) == InputFileError.exit_code


@pytest.mark.parametrize("name", ["../evil", "audit.key", "policy-/../../x", "ledger.jsonl/"])
def test_a_bundle_with_other_files_is_refused(tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle.zip"
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(InputFileError, match="not a ledger's bundle"), ledgers_at(bundle):
        pass


@given(st.binary(max_size=300))
@hypothesis_settings(max_examples=100, deadline=None)
def test_no_file_crashes_the_reader_of_bundles(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    bundle = tmp_path_factory.mktemp("bundle") / "bundle.zip"
    bundle.write_bytes(content)
    with pytest.raises(InputFileError), ledgers_at(bundle):
        pass


def test_what_left_is_explained(run: Path, run_metamoe, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_metamoe("audit", "explain", str(run)) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("the mean of the frozen seed model's embedding", "membership inference", "client-2"):
        assert words in said


def test_the_pages_say_what_left_and_whether_it_holds(run: Path, run_metamoe, tmp_path: Path) -> None:
    assert run_metamoe("audit", "report", str(run), "--out", str(tmp_path / "pages")) == 0
    pages = {file.name: file.read_text() for file in (tmp_path / "pages").iterdir()}
    assert set(pages) == {"index.html", "client-0.html", "client-1.html", "client-2.html"}
    assert "Every ledger holds" in pages["index.html"]
    entries = [json.loads(line)["entry"] for line in (run / "clients/audit/client-0" / LEDGER).read_bytes().splitlines()]
    hashes = [array["sha256"] for entry in entries if entry["type"] == "intent" for array in entry["arrays"]]
    assert len(hashes) > 5
    assert all(digest in pages["client-0.html"] for digest in hashes)
    assert "<script" not in "".join(pages.values())
    client = run / "clients" / "audit" / "client-0"
    (client / LEDGER).write_bytes((client / LEDGER).read_bytes()[:-200])
    assert run_metamoe("audit", "report", str(run), "--out", str(tmp_path / "pages")) == 3
    assert "tampered with" in (tmp_path / "pages" / "client-0.html").read_text()


def test_the_policy_is_printed_and_written_once(run_metamoe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "policy.toml"
    assert run_metamoe("audit", "policy", "--write", str(file), "--set", "router.vectors=private") == 0
    said = capsys.readouterr().out
    assert "refused" in said
    assert "Nothing else leaves" in said
    assert run_metamoe("audit", "policy", str(file)) == 0
    assert run_metamoe("audit", "policy", str(file), "--write", str(file)) == InputFileError.exit_code


def test_the_schema_describes_every_line(finished: Path, run_metamoe, capsys: pytest.CaptureFixture[str]) -> None:
    from jsonschema import Draft202012Validator

    assert run_metamoe("audit", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    published = Path(__file__).parents[3] / "docs" / "schemas" / "ledger-line.json"
    assert json.loads(published.read_text()) == schema
    validator = Draft202012Validator(schema)
    lines = [line for file in finished.rglob(LEDGER) for line in file.read_text().splitlines()]
    assert len(lines) > 20
    for line in lines:
        validator.validate(json.loads(line))
        assert not validator.is_valid(json.loads(line) | {"note": "text"})


def test_the_search_finds_a_record_in_every_disguise(seed: Seed) -> None:
    """The controls of the search itself, and that it finds nothing in noise."""
    rng = np.random.default_rng(0)
    canary = Canary("CANARY" + "0123456789abcdef" * 2, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    wanted = needles([canary], seed)
    quiet = search({"noise": rng.bytes(20_000), "text": b"nothing of interest " * 50}, wanted)
    assert quiet.found == []
    assert quiet.blind == []
    assert quiet.controls > 100
    row = canary.pixels[16, :, 0].astype(np.float32) / 255
    loud = search({"reply": rng.bytes(99) + row.tobytes() + rng.bytes(99), "name": canary.token.encode()}, wanted)
    assert any("pixels/255 as <f4" in hit for hit in loud.found)
    assert any("text" in hit for hit in loud.found)


@pytest.mark.slow
def test_no_canary_leaves(run_metamoe, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_metamoe("audit", "canary") == 0
    assert "no canary left" in capsys.readouterr().out
