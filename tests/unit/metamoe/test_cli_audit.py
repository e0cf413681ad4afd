"""``metamoe audit`` as one uses it: places, words, pages, bundles and exit codes."""

import hashlib
import json
import re
import secrets
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from metamoe.audit.canary import Canary, needles, search
from metamoe.audit.ledgers import ledgers_at
from metamoe.client.app import respond
from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.audit.entries import Intent
from metamoe.common.audit.ledger import HEAD, LEDGER
from metamoe.common.audit.policy import load_policy
from metamoe.common.audit.terms import Terms, check_terms
from metamoe.common.audit.touching import touching
from metamoe.common.audit.verify import check_ledger
from metamoe.common.audit.words import privacy_of
from metamoe.common.config import Settings
from metamoe.common.data.datasets import public_fingerprint
from metamoe.common.errors import InputFileError, PolicyError
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.presets import changed, to_toml
from metamoe.common.wire import Envelope, Request, encode_request


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
    shutil.rmtree(run / "server" / "audit")
    assert run_metamoe("audit", "reconcile", str(run)) == InputFileError.exit_code
    assert run_metamoe("audit", "verify", "nowhere") == InputFileError.exit_code
    assert run_metamoe("audit", "verify") == 2


@pytest.fixture
def federation(finished: Path, tmp_path: Path) -> Path:
    """The same ledgers as they lie after a deployed run, whose server has its key beside all runs."""
    folder = tmp_path / "federation"
    for client in ("client-0", "client-1", "client-2"):
        shutil.copytree(finished / "clients/audit" / client, folder / "clients" / client / "state/audit" / client)
    shutil.copytree(finished / "server/audit", folder / "runs/first/server/audit")
    (folder / "server").mkdir()
    for name in ("audit.key", "audit.pub"):
        shutil.move(folder / "runs/first/server/audit" / name, folder / "server" / name)
    (folder / "federation.toml").write_text('host = "localhost"\nport = 8000\nclients = 3\n')
    return folder


@pytest.mark.parametrize("place", ["", "runs/first", "clients/client-1", "clients/client-1/state", "bundle.zip"])
def test_every_place_of_a_federation_is_one_for_every_command(
    federation: Path, run_metamoe, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_metamoe("audit", "export", str(federation / "clients/client-1"), str(federation / "bundle.zip")) == 0
    whole, known = place in ("", "runs/first"), str(federation / "server" / "audit.pub")
    capsys.readouterr()
    assert run_metamoe("audit", "verify", str(federation / place), "--json") == 0
    said = json.loads(capsys.readouterr().out)["ledgers"]
    alone = "bundle" if place == "bundle.zip" else "client-1"
    names = ["client-0", "client-1", "client-2", "server of first"] if whole else [alone]
    assert [ledger["name"] for ledger in said] == names
    if place == "bundle.zip":
        assert said[0]["keys"][0] == f"its key: audit.pub in {federation / place}"
    else:
        assert all(known in ledger["keys"][-1] for ledger in said)
    other = [] if whole else ["--server", str(federation / "runs/first")]
    assert run_metamoe("audit", "reconcile", str(federation / place), *other) == 0
    assert run_metamoe("audit", "explain", str(federation / place)) == 0
    assert run_metamoe("audit", "budget", str(federation / place)) == 0
    assert run_metamoe("audit", "report", str(federation / place), "--out", str(federation / "pages")) == 0
    assert len(list((federation / "pages").iterdir())) == (4 if whole else 2)


def test_a_deployed_runs_own_place_is_about_that_run(federation: Path, small: Settings, run_metamoe) -> None:
    """Another run of the same client, left open, concerns the federation and the client, and not the first run."""
    seed, envelope = load_seed(small.seed_model), Envelope(run="ab" * 16, message="cd" * 16)
    request = encode_request(Request(small, seed.fingerprint, public_fingerprint(small.data), {}, envelope))
    site = Site(0, federation / "clients/client-0/state")
    audited("profile", request, site, partial(respond, "profile", site=site))
    assert run_metamoe("audit", "verify", str(federation / "runs/first")) == 0
    assert run_metamoe("audit", "report", str(federation / "runs/first")) == 0
    assert run_metamoe("audit", "verify", str(federation / "clients/client-0")) == 3


def test_a_federations_key_is_the_one_that_counts(federation: Path, run_metamoe) -> None:
    """Another one beside the ledger does not save a ledger that was signed with it."""
    key = federation / "clients/client-0/state/audit/client-0/audit.pub"
    shutil.copy(key, federation / "server" / "audit.pub")
    shutil.copy(key, federation / "runs/first/server/audit/audit.pub")
    assert run_metamoe("audit", "verify", str(federation / "runs/first")) == 3


HARM: dict[str, tuple[Callable[[list[bytes]], list[bytes]], int]] = {
    "a changed byte": (lambda lines: [*lines[:2], lines[2].replace(b'"time":"2', b'"time":"3', 1), *lines[3:]], 3),
    "a removed line": (lambda lines: lines[:3] + lines[4:], 3),
    "a removed last line": (lambda lines: lines[:-1], 3),
    "two swapped lines": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 3),
    "forged signatures": (lambda lines: [re.sub(rb'"signature":"....', b'"signature":"0000', line) for line in lines], 3),
    "no lines": (lambda _: [], 3),
    "half a last line": (lambda lines: [*lines, lines[-1][:40]], 5),
}


@pytest.mark.parametrize("command", ["verify", "reconcile", "report"])
@pytest.mark.parametrize("place", ["clients/audit/client-0", "server/audit"])
@pytest.mark.parametrize(("change", "code"), HARM.values(), ids=HARM)
def test_harm_to_either_side_is_found_by_every_command(
    run: Path, run_metamoe, change: Callable[[list[bytes]], list[bytes]], code: int, place: str, command: str
) -> None:
    file = run / place / LEDGER
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
    assert run_metamoe("audit", command, str(run)) == code


@pytest.mark.parametrize("harm", ["its ledger", "its lines", "its lines and its head"])
def test_a_client_whose_ledger_is_gone_is_missed(run: Path, run_metamoe, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The server has signed for what arrived from it."""
    client = run / "clients" / "audit" / "client-2"
    if harm == "its ledger":
        shutil.rmtree(client)
    else:
        (client / LEDGER).unlink()
        if harm == "its lines and its head":
            (client / HEAD).unlink()
    lines_alone = harm == "its lines"
    assert run_metamoe("audit", "verify", str(run)) == (3 if lines_alone else 0)
    assert run_metamoe("audit", "reconcile", str(run)) == (3 if lines_alone else 4)
    assert run_metamoe("audit", "report", str(run)) == (3 if lines_alone else 4)
    assert lines_alone or "3 messages of client 2 arrived, whose ledger is not here" in capsys.readouterr().out
    # One client by itself answers for nobody else.
    alone = run / "clients" / "audit" / "client-0"
    assert run_metamoe("audit", "reconcile", str(alone), "--server", str(run / "server" / "audit")) == 0


def test_what_an_epsilon_covers_is_said_of_each_artifact(
    small: Settings, tmp_path: Path, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    """One exact run, one with private means: the means are half covered, the experts not at all."""
    site = Site(0, tmp_path)
    noisy = changed(small, ["privacy.vectors=gaussian", "privacy.epsilon=4", "privacy.min-samples=40"])
    for settings in (small, noisy):
        seed, envelope = load_seed(settings.seed_model), Envelope(run=secrets.token_hex(16), message=secrets.token_hex(16))
        request = encode_request(Request(settings, seed.fingerprint, public_fingerprint(settings.data), {}, envelope))
        audited("profile", request, site, partial(respond, "profile", site=site))
    coverage = privacy_of(check_ledger(site.audit).of(Intent))
    assert {kind: (c.releases, c.exact) for kind, c in coverage.items()} == {
        "seed-routing-vector": (2, 1),
        "seed-ffn-inputs": (2, 1),
        # There is none with noise.
        "seed-shape": (1, 1),
    }
    for command in ("explain", "budget"):
        run_metamoe("audit", command, str(tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("privacy: exact, covered by no epsilon") == 3
    assert said.count("privacy: covered by epsilon 4, delta 1e-05") == 2
    assert "none for 1 of them: exact" in said


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
    assert pages["index.html"].count('class="picture"') == 3
    for words in ("to some degree single samples", "nothing of the data", "✓ holds", "expert: 1 of"):
        assert (words in pages["client-0.html"]) is (words != "expert: 1 of")
    entries = [json.loads(line)["entry"] for line in (run / "clients/audit/client-0" / LEDGER).read_bytes().splitlines()]
    hashes = [array["sha256"] for entry in entries if entry["type"] == "intent" for array in entry["arrays"]]
    assert len(hashes) > 5
    assert all(digest in pages["client-0.html"] for digest in hashes)
    assert "<script" not in "".join(pages.values())
    # What is signed on paper is the ledger up to its last line.
    lines = (run / "clients/audit/client-0" / LEDGER).read_bytes().splitlines()
    last = hashlib.sha256(lines[-1]).hexdigest()
    assert f"up to line {len(lines)} of its ledger, {last[:16]}" in pages["client-0.html"]
    assert last in pages["client-0.html"]
    client = run / "clients" / "audit" / "client-0"
    (client / LEDGER).write_bytes((client / LEDGER).read_bytes()[:-200])
    assert run_metamoe("audit", "report", str(run), "--out", str(tmp_path / "pages")) == 3
    assert "tampered with" in (tmp_path / "pages" / "client-0.html").read_text()


@pytest.mark.slow
def test_a_page_is_printed_whole(run: Path, run_metamoe, tmp_path: Path) -> None:
    """As a PDF that somebody signs: what is folded on the screen is printed, so there are more pages than without."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium; on Debian: apt-get install chromium")
    assert run_metamoe("audit", "report", str(run), "--out", str(tmp_path)) == 0
    whole = (tmp_path / "client-0.html").read_text()
    (tmp_path / "folded.html").write_text(re.sub(r"<details>.*?</details>", "", whole, flags=re.DOTALL))

    def printed(name: str) -> int:
        pdf = tmp_path / "page.pdf"
        always = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [browser, *always, f"--print-to-pdf={pdf}", (tmp_path / name).as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return len(re.findall(rb"/Type /Page\b(?!s)", pdf.read_bytes()))

    assert printed("client-0.html") > printed("folded.html") >= 1


def test_the_policy_is_printed_and_written_once(run_metamoe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "policy.toml"
    assert run_metamoe("audit", "policy", "--write", str(file), "--set", "router.vectors=private") == 0
    said = capsys.readouterr().out
    assert "refused" in said
    assert "Nothing else leaves" in said
    assert run_metamoe("audit", "policy", str(file)) == 0
    assert run_metamoe("audit", "policy", str(file), "--write", str(file)) == InputFileError.exit_code


def test_a_policy_can_be_pinned_before_the_first_run(small: Settings, run_metamoe, tmp_path: Path) -> None:
    """A seed model made to single samples out has no first run in which to do so."""
    preset, file = tmp_path / "agreed.toml", tmp_path / "policy.toml"
    preset.write_text(to_toml(small))
    assert run_metamoe("audit", "policy", "--preset", str(preset), "--pin", "--write", str(file)) == 0
    policy = load_policy(file)
    assert policy.seed_models == [load_seed(small.seed_model).fingerprint]
    asked = Terms(touching(small), policy.seed_models[0], policy.public_sets[0])
    check_terms(policy, asked, None)
    for change, rule in (("seed=1", "rule settings"), ("data.prompt=a {}", "rule settings")):
        with pytest.raises(PolicyError, match=rule):
            check_terms(policy, replace(asked, settings=touching(changed(small, [change]))), None)
    with pytest.raises(PolicyError, match="seed-models"):
        check_terms(policy, replace(asked, seed_model="0" * 64), None)


def test_the_schemas_describe_every_line_head_and_policy(
    finished: Path, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    from jsonschema import Draft202012Validator

    found: dict[str, list[object]] = {
        "ledger-line": [json.loads(line) for file in finished.rglob(LEDGER) for line in file.read_text().splitlines()],
        "ledger-head": [json.loads(file.read_text()) for file in finished.rglob(HEAD)],
        "policy": [tomllib.loads(file.read_text()) for file in finished.rglob("policy-*.toml")],
    }
    assert len(found["ledger-line"]) > 20
    for name, values in found.items():
        assert run_metamoe("audit", "schema", name) == 0
        schema = json.loads(capsys.readouterr().out)
        published = Path(__file__).parents[3] / "docs" / "schemas" / f"{name}.json"
        assert json.loads(published.read_text()) == schema
        validator = Draft202012Validator(schema)
        assert values
        for value in values:
            validator.validate(value)
            assert not validator.is_valid(value | {"note": "text"})


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
