"""Keys and certificates: what is made, who may read it, and what the doctor finds wrong with it."""

import shutil
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.deploy.doctor import examine, examine_client
from metamoe.deploy.flower import free_port
from metamoe.deploy.keys import Federation, make_client_keys, make_keys, read_federation

NOW = datetime.now(UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "federation", Federation(host="server.example", port=free_port(), clients=2), 365, NOW)
    return tmp_path / "federation"


def problems(folder: Path, now: datetime = NOW) -> dict[str, str]:
    return {str(Path(finding.what).relative_to(folder)): finding.problem for finding in examine(folder, now) if finding.problem}


def test_keys_are_ecdsa_p384_of_their_own_and_secret_files_are_for_their_owner_alone(folder: Path) -> None:
    publics = set()
    for name in ("client-0", "client-1"):
        own = folder / "clients" / name
        key = serialization.load_ssh_private_key((own / "node.key").read_bytes(), None)
        public = serialization.load_ssh_public_key((own / "node.pub").read_bytes())
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP384R1)
        assert key.public_key() == public
        publics.add((own / "node.pub").read_bytes())
    assert len(publics) == 2
    secret = [file for file in folder.rglob("*") if file.suffix in (".key", ".secret")]
    assert len(secret) == 1 + 3 + 2 * 4
    assert {file.stat().st_mode & 0o777 for file in secret} == {0o600}
    # The authority's key is the operator's alone.
    assert list(folder.rglob("ca.key")) == [folder / "ca" / "ca.key"]


def test_a_client_trusts_the_server_by_name_and_no_other_authority(folder: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other", Federation(host="server.example", port=8000, clients=1), 365, NOW)

    def handshake(trusted: Path, host: str) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(folder / "server" / "server.crt", folder / "server" / "server.key")
        client = ssl.create_default_context(cafile=str(trusted))
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            client.wrap_bio(to_client, to_server, server_hostname=host),
            server.wrap_bio(to_server, to_client, server_side=True),
        ]
        while ends:
            for end in list(ends):
                try:
                    end.do_handshake()
                    ends.remove(end)
                except ssl.SSLWantReadError:
                    continue

    own = folder / "clients" / "client-0" / "ca.crt"
    for host in ("server.example", "localhost", "127.0.0.1"):
        handshake(own, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(own, "elsewhere.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "other" / "clients" / "client-0" / "ca.crt", "server.example")


def test_keys_are_never_overwritten(folder: Path) -> None:
    with pytest.raises(InputFileError, match="never overwritten"):
        make_keys(folder, read_federation(folder), 365, NOW)


@pytest.mark.parametrize("host", ["https://server", "a b", "", "server:8000", "-x"])
def test_a_host_that_is_none_is_refused_before_anything_is_written(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="neither a name nor an address"):
        make_keys(tmp_path / "new", Federation(host=host, port=8000, clients=1), 1, NOW)
    assert not (tmp_path / "new").exists()


@settings(deadline=None)
@given(st.text(max_size=80))
def test_a_federation_file_is_one_or_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "federation.toml").write_text(text)
    with pytest.raises(InputFileError, match=r"federation\.toml"):
        read_federation(folder)


def test_a_folder_without_a_federation_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="metamoe deploy keys"):
        read_federation(tmp_path)


def test_the_doctor_finds_nothing_wrong_with_new_keys(folder: Path) -> None:
    assert problems(folder) == {}


def test_the_doctor_finds_certificates_that_expire_or_are_from_the_future(folder: Path) -> None:
    assert "soon be of no use, it expired on" in problems(folder, NOW + timedelta(days=340))["server/server.crt"]
    late = problems(folder, NOW + timedelta(days=400))
    assert "expired on" in late["server/server.crt"]
    assert "expired on" in late["clients/client-1/runtime.crt"]
    assert "clock is wrong" in problems(folder, NOW - timedelta(days=1))["server/server.crt"]


def test_the_doctor_finds_what_does_not_go_together(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_keys(other, Federation(host="elsewhere.example", port=8000, clients=1), 365, NOW)
    shutil.copy(other / "server" / "server.key", folder / "server")
    shutil.copy(other / "server" / "ca.crt", folder / "clients" / "client-1")
    (folder / "clients" / "client-0" / "runtime.crt").write_text("none")
    (folder / "clients" / "client-0" / "node.key").chmod(0o644)
    found = problems(folder)
    assert "does not belong to" in found.pop("server/server.crt")
    assert "not the authority of the server" in found.pop("clients/client-1/ca.crt")
    assert "cannot be used" in found.pop("clients/client-0/runtime.crt")
    assert "mode 644" in found.pop("clients/client-0/node.key")
    assert found == {}


def test_the_doctor_finds_another_authority_and_another_host(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_keys(other, Federation(host="elsewhere.example", port=8000, clients=1), 365, NOW)
    for file in ("server.key", "server.crt"):
        shutil.copy(other / "server" / file, folder / "server")
    assert "not signed by" in problems(folder)["server/server.crt"]
    shutil.copy(other / "server" / "ca.crt", folder / "server")
    assert "not for the host 'server.example'" in problems(folder)["server/server.crt"]


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    """A server with the federation's certificate that says what time it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server" / "server.crt", folder / "server" / "server.key")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_client_with_keys_of_its_own_sees_whose_server_answers_and_whether_clocks_agree(
    folder: Path, port: int, tmp_path: Path
) -> None:
    client = tmp_path / "client"
    make_client_keys(client, folder / "server" / "ca.crt", folder / "server" / "audit.pub", 30, NOW)
    assert {file.name for file in client.iterdir()} == {path.name for path in (folder / "clients" / "client-0").iterdir()}
    assert (folder / "server" / "audit.pub").read_text().strip() in (client / "policy.toml").read_text()

    def wrong(now: datetime, host: str = "localhost", at: int = port) -> list[str]:
        return [finding.problem for finding in examine_client(client, host, at, now) if finding.problem]

    now = datetime.now(UTC)
    assert wrong(now) == []
    assert "120 s ahead of the server's" in wrong(now + timedelta(seconds=120))[0].replace("119", "120").replace("121", "120")
    assert "behind the server's" in wrong(now - timedelta(seconds=90))[0]
    assert "does not answer" in wrong(now, at=free_port())[0]

    make_keys(tmp_path / "other", Federation(host="localhost", port=8000, clients=1), 30, NOW)
    shutil.copy(tmp_path / "other" / "server" / "ca.crt", client)
    assert "is not the one that" in wrong(now)[0]
    with pytest.raises(InputFileError, match="is no certificate"):
        make_client_keys(tmp_path / "new", folder / "server" / "server.key", folder / "server" / "audit.pub", 30, NOW)
    with pytest.raises(InputFileError, match="not a public audit key"):
        make_client_keys(tmp_path / "new", folder / "server" / "ca.crt", folder / "server" / "ca.crt", 30, NOW)
    assert not (tmp_path / "new").exists()
