"""Whether a federation's certificates can be used: their dates, keys, issuers and hosts."""

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from metamoe.deploy.keys import Federation


def certificate_problems(folder: Path, federation: Federation, now: datetime) -> dict[Path, str]:
    """Every certificate of a federation, and what is wrong with it at a time; an empty text is nothing."""
    server, clients = folder / "server", [folder / "clients" / name for name in federation.names]
    authority = server / "ca.crt"
    problems = {server / "server.crt": certificate_problem(server / "server.crt", authority, federation.host, now)}
    for client in clients:
        # One that is elsewhere has its own.
        if not (client / "node.key").exists():
            continue
        for own in (client / "runtime.crt", client / "gateway.crt"):
            # A folder from before there were gateways gets its keys when it is started.
            if own.name == "runtime.crt" or own.exists():
                problems[own] = certificate_problem(own, own, "localhost", now)
        copy = client / "ca.crt"
        try:
            same = _load(copy) == _load(authority)
            problems[copy] = "" if same else f"is not the authority of the server: copy {authority} there"
        except (OSError, ValueError) as error:
            problems[copy] = f"cannot be read: {error}"
    return problems


def certificate_problem(file: Path, issuer: Path, host: str, now: datetime) -> str:
    """What is wrong with a certificate, the key beside it, its issuer, and the host it must be for."""
    try:
        certificate = _load(file)
        key = serialization.load_pem_private_key(file.with_suffix(".key").read_bytes(), None)
        certificate.verify_directly_issued_by(_load(issuer))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except InvalidSignature:
        return f"is not signed by {issuer}: make new keys"
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        return f"cannot be used with its key and {issuer}: {error}"
    known = {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        return f"is not valid before {begin:%Y-%m-%d %H:%M} UTC: some machine's clock is wrong"
    if now > end:
        return f"expired on {end:%Y-%m-%d}: make new keys"
    if key.public_key() != certificate.public_key():
        return f"does not belong to {file.with_suffix('.key')}: make new keys"
    return "" if host in known else f"is not for the host {host!r}: make new keys with --host {host}"


def _load(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())
