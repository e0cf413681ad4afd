"""A federation's folder: its keys and certificates, and what was agreed when they were made.

    federation.toml           where the server is, and how many clients there are
    ca/                       ca.key, ca.crt            the operator's; ca.key goes nowhere
    server/                   server.key, server.crt    with a copy of ca.crt
                              audit.key, audit.pub      signs the server's ledger
    clients/client-N/         node.key, node.pub        who the client is to the server
                              policy.toml               what may leave the client; its owner's to change
                              runtime.key, runtime.crt  for its own processes among themselves; with a copy of ca.crt
                              gateway.key, gateway.crt  by which its SuperNode knows its gateway

and, empty at first, what is written later: ``runs/``, ``server/flower/``, ``server/cache/``, and each client's ``data/``,
``state/`` and ``gateway/``. They are made here because a container engine would make them for root.

Server and each client have a file ``superexec.secret`` besides: what starts an app process proves with it that it may. All
keys are ECDSA on the curve P-384 but the ledger's, which is Ed25519, and files that must stay secret have the mode 0600.
"""

import ipaddress
import os
import re
import secrets
import tomllib
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metamoe.common.audit.keys import audit_key, public_hex, read_public
from metamoe.common.audit.policy import DEFAULT, policy_text
from metamoe.common.errors import InputFileError, InvalidSettingError, first_problem
from metamoe.common.files import write_atomically

# Clocks of different machines differ a little: a certificate is valid from just before it is made.
_BACKDATED = timedelta(minutes=5)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SERVICES = ("superlink", "supernode")
"""The names of the services in docker/compose*.yaml; in compose.yaml each client's has its number behind it."""
_GATEWAY = "gateway"


class Federation(BaseModel):
    """What ``federation.toml`` says: the server's ``host`` and ``port`` as clients reach it, and the number of ``clients``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str
    port: int = Field(ge=1, le=65_535)
    clients: int = Field(ge=1, le=1_000)

    @property
    def names(self) -> list[str]:
        """The clients' folders: client-0, client-1, ..."""
        return [f"client-{number}" for number in range(self.clients)]


def read_federation(folder: Path) -> Federation:
    """The federation of a folder that :func:`make_keys` made.

    Raises:
        InputFileError: there is none, or its ``federation.toml`` is not one.
    """
    file = folder / "federation.toml"
    try:
        return Federation.model_validate(tomllib.loads(file.read_text()))
    except FileNotFoundError as error:
        raise InputFileError(f"{folder} is no federation's folder; make one with: metamoe deploy keys {folder}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputFileError(f"{file} cannot be read: {error}") from error
    except ValidationError as error:
        raise InputFileError(f"{file}: {first_problem(error)}") from error


def make_keys(folder: Path, federation: Federation, days: int, now: datetime) -> None:
    """Make a federation's folder; see the module for what is in it.

    Args:
        folder: new or empty.
        federation: its server's certificate is for its host, for the loopback, and for the name of its container.
        days: how long the certificates are valid.
        now: from when on, with a time zone.

    Raises:
        InvalidSettingError: the host is neither a name nor an address.
        InputFileError: the folder is not empty or cannot be written.
    """
    names = [_general_name(host) for host in dict.fromkeys([federation.host, *_LOOPBACK, _SERVICES[0]])]
    _check_empty(folder)
    try:
        authority, issuer = _certificate("MetaMoE-FL federation", [], days, now)
        root = _pem(issuer)
        _write(folder / "ca" / "ca.key", _private(authority))
        _write(folder / "ca" / "ca.crt", root, secret=False)
        key, certificate = _certificate("MetaMoE-FL server", names, days, now, authority, issuer)
        _write(folder / "server" / "server.key", _private(key))
        _write(folder / "server" / "server.crt", _pem(certificate), secret=False)
        _write(folder / "server" / "ca.crt", root, secret=False)
        _write_secret(folder / "server")
        server = public_hex(audit_key(folder / "server"))
        for number, name in enumerate(federation.names):
            _make_client(folder / "clients" / name, root, server, [*_SERVICES[1:], f"{_SERVICES[1]}-{number}"], days, now)
        for written in ("runs", "server/flower", "server/cache"):
            (folder / written).mkdir(mode=0o700)
        write_atomically(folder / "federation.toml", tomli_w.dumps(federation.model_dump()))
    except OSError as error:
        raise InputFileError(f"keys cannot be written to {folder}: {error}") from error


def make_client_keys(folder: Path, authority: Path, server: Path, days: int, now: datetime) -> None:
    """Make the folder of one client, as :func:`make_keys` does for all, where its owner trusts nobody else with its keys.

    Args:
        folder: new or empty.
        authority: the operator's ca.crt.
        server: the public key of the server's ledger, audit.pub, to which the client's policy is bound.
        days: how long its certificate is valid.
        now: from when on, with a time zone.

    Raises:
        InputFileError: the folder is not empty or cannot be written, or a file of the operator's is not what it should be.
    """
    _check_empty(folder)
    try:
        root = authority.read_bytes()
        x509.load_pem_x509_certificate(root)
    except (OSError, ValueError) as error:
        raise InputFileError(f"{authority} is no certificate: {error}") from error
    key = read_public(server)
    try:
        _make_client(folder, root, key, _SERVICES[1:], days, now)
    except OSError as error:
        raise InputFileError(f"keys cannot be written to {folder}: {error}") from error


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputFileError(f"{folder} is not an empty folder; keys are never overwritten, so give another one")


def _make_client(folder: Path, root: bytes, server: str, services: Sequence[str], days: int, now: datetime) -> None:
    node = ec.generate_private_key(ec.SECP384R1())
    _write(folder / "node.key", _private(node, serialization.PrivateFormat.OpenSSH))
    public = node.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / "node.pub", public + b"\n", secret=False)
    names = [_general_name(host) for host in (*_LOOPBACK, *services)]
    _write_pair(folder / "runtime", names, days, now)
    gateways = [service.replace(_SERVICES[1], _GATEWAY) for service in services]
    make_gateway_keys(folder, days, now, gateways)
    _write(folder / "ca.crt", root, secret=False)
    _write_secret(folder)
    _write(folder / "policy.toml", policy_text(DEFAULT.model_copy(update={"server": server})).encode(), secret=False)
    for written in ("data", "state"):
        (folder / written).mkdir(mode=0o700)


def make_gateway_keys(folder: Path, days: int, now: datetime, services: Sequence[str] = (_GATEWAY,)) -> None:
    """Make what a client's gateway needs, in a folder that was made before there were any.

    Args:
        folder: the client's.
        days: how long its certificate is valid.
        now: from when on, with a time zone.
        services: the names of its container.
    """
    _write_pair(folder / "gateway", [_general_name(host) for host in (*_LOOPBACK, *services)], days, now)
    (folder / _GATEWAY).mkdir(mode=0o700, exist_ok=True)


def _write_pair(name: Path, hosts: Sequence[x509.GeneralName], days: int, now: datetime) -> None:
    """A key of a client's own, and the certificate that vouches for itself."""
    key, certificate = _certificate("MetaMoE-FL client", hosts, days, now)
    _write(name.with_suffix(".key"), _private(key))
    _write(name.with_suffix(".crt"), _pem(certificate), secret=False)


def _certificate(
    subject: str,
    hosts: Sequence[x509.GeneralName],
    days: int,
    now: datetime,
    authority: ec.EllipticCurvePrivateKey | None = None,
    issuer: x509.Certificate | None = None,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new key and its certificate, signed by the authority, or by itself where there is none."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    signer = authority or key
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if hosts:
        server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False).add_extension(
            server, critical=False
        )
    return key, builder.sign(signer, hashes.SHA384())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9*]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host):
            raise InvalidSettingError(
                f"host {host!r} is neither a name nor an address; give it without scheme and port"
            ) from None
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_secret(folder: Path) -> None:
    _write(folder / "superexec.secret", secrets.token_hex(32).encode())


def _write(file: Path, content: bytes, *, secret: bool = True) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The mode is set when the file is made: nobody can have read it before.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(content)
