"""The verifier, which shares no code with the product, comes to the same verdict on every bundle."""

import hashlib
import re
import subprocess
import sys
import zipapp
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from metamoe.audit.ledgers import Found, write_bundle
from metamoe.audit.verification import verify
from metamoe.common.audit.entries import (
    ArrayEntry,
    Arrival,
    Entry,
    Erasure,
    Intent,
    Open,
    Receipt,
    Records,
    Refusal,
    Resent,
    Spent,
    canonical,
    digest_of,
    receipt_statement,
    settings_hash,
)
from metamoe.common.audit.keys import public_hex
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.policy import DEFAULT, Between, Budget, Policy, policy_hash, policy_text
from metamoe.common.audit.terms import keep_settings
from metamoe.common.audit.verify import Verdict
from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError

FOLDER = Path(__file__).parents[3] / "verifier"
SERVER = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\1")
LORA = "vision_model.encoder.layers.1.mlp.fc1.lora_A.weight"
SHAPES = {
    "client": [],
    "seed-routing-vector": [8],
    "seed-shape": [8],
    "seed-ffn-inputs": [2, 8],
    LORA: [2, 8],
    "accuracy": [],
    "audit-key": [32],
}
SETTINGS = [Settings(), Settings(seed=1), Settings(router={"context": 0.5}), Settings(clients=4)]
POLICIES = [
    DEFAULT,
    DEFAULT.model_copy(update={"settings": {"seed": Between(min=0, max=1)}, "seed_models": ["a" * 64]}),
    DEFAULT.model_copy(update={"settings": {"seed": [0]}, "server": public_hex(SERVER)}),
    DEFAULT.model_copy(update={"settings": "any", "seed_models": "any", "public_sets": "any"}),
    DEFAULT.model_copy(update={"limits": DEFAULT.limits.model_copy(update={"max_distinct_statistics": 1})}),
    DEFAULT.model_copy(update={"limits": DEFAULT.limits.model_copy(update={"max_bytes_per_run": 100})}),
    DEFAULT.model_copy(update={"budget": Budget(epsilon=3.0, delta=1e-5)}),
]


@pytest.fixture(scope="module")
def verifier() -> ModuleType:
    """The program's main module, imported as Python runs it: from its own folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        import importlib.util

        spec = importlib.util.spec_from_file_location("verifier_main", FOLDER / "__main__.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@dataclass
class Made:
    """A ledger to make a bundle of, and its server's key."""

    folder: Path
    ledger: Ledger


def array(name: str, content: int) -> ArrayEntry:
    digest = hashlib.sha256(bytes([content])).hexdigest()
    return ArrayEntry.model_validate({"name": name, "dtype": "float32", "shape": SHAPES[name], "bytes": 4, "sha256": digest})


@st.composite
def entries_of_run(draw: st.DrawFn, run: str, key: str, honest: bool) -> tuple[list[Entry], Policy, Settings, bool]:
    """A run as a client may have written it, honest or not."""
    policy = draw(st.sampled_from([DEFAULT, POLICIES[-1]] if honest else POLICIES))
    settings = SETTINGS[0] if honest else draw(st.sampled_from(SETTINGS))
    rarely = st.just(value=False) if honest else st.integers(0, 9).map(lambda n: n == 0)
    opened = Open(
        run=run,
        role="client",
        key="c" * 64 if draw(rarely) else key,
        server=public_hex(OTHER if draw(rarely) else SERVER),
        settings=settings_hash(settings),
        seed_model=("b" if draw(rarely) else "a") * 64,
        public_set=("b" if draw(rarely) else "a") * 64,
        code="d" * 64,
        policy=policy_hash(policy),
    )
    entries: list[Entry] = [opened]
    names = draw(st.lists(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=3), max_size=3))
    if honest:
        names = [{"client", "seed-routing-vector"}, {LORA}]
    for number, chosen in enumerate(names):
        message = hashlib.sha256(f"{run}{number}".encode()).hexdigest()[:32]
        arrays = [array(name, draw(st.just(0) if honest else st.integers(0, 2))) for name in sorted(chosen)]
        noise = draw(st.sampled_from([None, None, (2.0, 1.0, 1), (0.7, 1.0, 1)]))
        spent = []
        if noise:
            covers = sorted(chosen - {"client"})
            spent = [Spent(covers=covers, epsilon=1.0, delta=1e-5, noise_multiplier=noise[0], sampling_rate=1.0, steps=1)]
        stage = draw(st.sampled_from(["profile", "expert", "deliver"]))
        if draw(st.booleans()):
            entries.append(Records(run=run, stage=stage, root="7" * 64))
            if draw(st.booleans()):
                entries.append(Erasure(run=run, root=("8" if draw(rarely) else "7") * 64, leaf="9" * 64))
        entries.append(Intent(run=run, message=message, stage=stage, arrays=arrays, spent=spent))
        again = message
        if draw(rarely):
            again = hashlib.sha256(message.encode()).hexdigest()[:32]
            entries.append(Resent(run=run, message=again, stage=stage, first="0" * 32 if draw(rarely) else message))
        if not draw(rarely):
            digest = "e" * 64 if draw(rarely) else digest_of(arrays)
            signature = (OTHER if draw(rarely) else SERVER).sign(receipt_statement(run, again, digest)).hex()
            entries.append(Receipt(run=run, message=again, arrays=digest, signature=signature))
    if draw(rarely):
        entries.append(Refusal(run=run, message="f" * 32, stage="expert", code=60))
    return entries, policy, settings, not draw(rarely)


def harm(content: dict[str, bytes], place: str, at: int, kind: str) -> None:
    """Change one file of a bundle."""
    file = sorted(content)[at % len(content)] if place == "any" else place
    lines = content["ledger.jsonl"].splitlines(keepends=True)
    at %= max(len(lines), 1)
    match kind:
        case "a byte":
            changed = bytearray(content[file])
            changed[at * 37 % len(changed)] ^= 1
            content[file] = bytes(changed)
        case "the file":
            del content[file]
        case "a line":
            content["ledger.jsonl"] = b"".join(lines[:at] + lines[at + 1 :])
        case "the last line":
            content["ledger.jsonl"] = b"".join(lines[:-1])
        case "half a line more":
            content["ledger.jsonl"] += b'{"entry"'
        case "two lines swapped":
            lines[at : at + 2] = lines[at : at + 2][::-1]
            content["ledger.jsonl"] = b"".join(lines)
        case "spaces":
            content["ledger.jsonl"] = content["ledger.jsonl"].replace(b":", b": ", 1)
        case "a huge number":
            content["ledger.jsonl"] = content["ledger.jsonl"].replace(b'"seq":1', b'"seq":1' + b"0" * 30, 1)
        case "a name twice":
            content["ledger.jsonl"] = content["ledger.jsonl"].replace(b'"seq":0', b'"seq":0,"seq":0', 1)
        case "nesting":
            content["ledger.jsonl"] = b"[" * 100_000 + b"\n" + content["ledger.jsonl"]


KINDS = (
    *("nothing", "a byte", "the file", "a line", "the last line", "half a line more", "two lines swapped", "spaces"),
    *("a huge number", "a name twice", "nesting"),
)


def verdict_of(bundle: Path) -> int:
    try:
        return int(verify(bundle).verdict)
    except InputFileError as error:
        return error.exit_code


def verdict_of_other(verifier: ModuleType, bundle: Path) -> int:
    try:
        files = verifier.read_bundle(bundle)
        key = verifier.public_key(files.get("audit.pub", b""), "the bundle")
        return int(verifier.worst(verifier.check(files, key)[0]))
    except verifier.NoBundle:
        return int(verifier.NO_BUNDLE)


def rewritten(bundle: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(bundle) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


SEEN: set[int] = set()


@pytest.mark.slow
@given(data=st.data(), kind=st.sampled_from(KINDS), at=st.integers(0, 10_000))
@hypothesis_settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
def test_both_come_to_the_same_verdict(
    tmp_path_factory: pytest.TempPathFactory, verifier: ModuleType, data: st.DataObject, kind: str, at: int
) -> None:
    folder = tmp_path_factory.mktemp("made")
    ledger = Ledger(folder / "client-0")
    honest = data.draw(st.booleans())
    for number in range(data.draw(st.integers(1, 4))):
        run = f"{number:032x}"
        entries, policy, settings, sealed = data.draw(entries_of_run(run, ledger.public, honest))
        ledger.append(*entries)
        (folder / "client-0" / f"policy-{policy_hash(policy)}.toml").write_text(policy_text(policy))
        if honest or data.draw(st.integers(0, 9)):
            keep_settings(folder / "client-0", settings)
        if sealed:
            ledger.seal(run)
    bundle = folder / "bundle.zip"
    write_bundle(Found(folder / "client-0", "client-0", folder / "client-0" / "audit.pub"), bundle)
    if kind != "nothing":
        rewritten(bundle, lambda content: harm(content, "any", at, kind))
    expected = verdict_of(bundle)
    SEEN.add(expected)
    assert verdict_of_other(verifier, bundle) == expected


@pytest.mark.slow
def test_every_verdict_was_among_them() -> None:
    """Runs after the test above: bundles of one verdict alone would show little."""
    assert {*map(int, (Verdict.FINE, Verdict.VIOLATION, Verdict.TAMPERED, Verdict.INCOMPLETE, Verdict.OVER_BUDGET)), 14} <= SEEN


def test_a_servers_ledger_too(tmp_path: Path, verifier: ModuleType) -> None:
    ledger = Ledger(tmp_path / "server", OTHER)
    key, run, message = public_hex(OTHER), "1" * 32, "2" * 32
    arrays = [array("seed-routing-vector", 0)]
    ledger.append(
        Open(
            run=run,
            role="server",
            key=key,
            server=key,
            settings="a" * 64,
            seed_model="a" * 64,
            public_set="a" * 64,
            code="a" * 64,
            policy=None,
        ),
        Arrival(
            run=run,
            message=message,
            stage="profile",
            client=0,
            key="3" * 64,
            arrays=arrays,
            signature=ledger.sign(receipt_statement(run, message, digest_of(arrays))),
        ),
    )
    ledger.seal(run)
    bundle = tmp_path / "bundle.zip"
    write_bundle(Found(tmp_path / "server", "server", tmp_path / "server" / "audit.pub"), bundle)
    assert verdict_of(bundle) == verdict_of_other(verifier, bundle) == 0
    rewritten(bundle, lambda files: files.update({"ledger.jsonl": files["ledger.jsonl"].replace(b'"client":0', b'"client":1')}))
    assert verdict_of(bundle) == verdict_of_other(verifier, bundle) == 3


def test_the_program_runs_alone_and_says_in_words_what_left(finished: Path, tmp_path: Path) -> None:
    """As a zipapp, in a Python that sees no package of the product's."""
    program, bundle = tmp_path / "verifier.pyz", tmp_path / "bundle.zip"
    zipapp.create_archive(FOLDER, program)
    client = finished / "clients" / "audit" / "client-0"
    write_bundle(Found(client, "client-0", client / "audit.pub"), bundle)
    command = [sys.executable, str(program), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "expert: expert, " in done.stdout
    assert "exact: matrices trained on the private samples" in done.stdout
    each, [total] = (re.findall(rf"{mark} ([\d,]+) bytes", done.stdout) for mark in (",", ":"))
    assert 0 < int(total.replace(",", "")) == sum(int(size.replace(",", "")) for size in each)
    assert done.stdout.endswith("fine\n")
    assert subprocess.run([*command, "--key", str(client / "head.json")], capture_output=True, check=False).returncode == 14
    assert subprocess.run(command[:2], capture_output=True, check=False).returncode == 2


def test_it_is_short_and_imports_nothing_of_ours() -> None:
    sources = [file.read_text() for file in FOLDER.glob("*.py")]
    assert sum(len(source.splitlines()) for source in sources) < 600
    assert not any("metamoe" in line for source in sources for line in source.splitlines() if "import" in line)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53) + 1, 2**53 - 1))
@hypothesis_settings(max_examples=2_000, deadline=None)
def test_numbers_have_the_form_of_rfc_8785(verifier: ModuleType, number: float) -> None:
    value = {"a": [number, "é\n"]}
    assert verifier.canonical(value) == rfc8785.dumps(value) == canonical(value)
