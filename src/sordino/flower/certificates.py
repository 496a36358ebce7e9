"""The project's own certificate authority, and the server's certificates; keys are made here and stay here."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sordino.errors import RunError
from sordino.files import FREE_SPACE, NewFile, create_files, write_atomically

YEARS = 10  # that the authority is valid: sites are given its certificate once
BEFORE = datetime.timedelta(hours=1)  # clocks differ


def write_certificates(state: Path, project: str, host: str, days: int) -> None:
    """Make the authority where it is missing, and new certificates of the server: for sites, and for the loopback.

    Writes `ca.crt`, `ca.key`, `server.crt`, `server.key`, `loopback.crt` and `loopback.key`.

    Args:
        state: the folder.
        project: its name.
        host: name or address at which sites reach the server.
        days: for which the server's certificates are valid.

    Raises:
        RunError: the authority's files are damaged, or it has expired.
    """
    if not (state / "ca.key").exists():
        _make_authority(state, project)
    try:
        authority = x509.load_pem_x509_certificate((state / "ca.crt").read_bytes())
        key = load_pem_private_key((state / "ca.key").read_bytes(), None)
    except (OSError, ValueError):
        raise RunError(
            f"{state} holds ca.key or ca.crt and not both; put the other back from a backup, or "
            "remove it where no site was given a certificate yet"
        ) from None
    if authority.not_valid_after_utc < _now():
        raise RunError(f"{state / 'ca.crt'} has expired; move it and ca.key away, and give sites the new ca.crt")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    for name, hosts in (("server", [host]), ("loopback", ["127.0.0.1", "localhost"])):
        own = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _certificate(hosts[-1], authority.subject, own, days)
            .add_extension(x509.SubjectAlternativeName([_name(each) for each in hosts]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(state, name, own, certificate)


def _make_authority(state: Path, project: str) -> None:
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Sordino project {project}"[:64])])
    usage = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
            *("encipher_only", "decipher_only"),
        ),
        False,
    )
    certificate = (
        _certificate("", subject, key, 365 * YEARS)
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = NewFile(state / "ca.key", _private_pem(key), private=True)
    try:
        create_files(secret, NewFile(state / "ca.crt", certificate.public_bytes(Encoding.PEM)))
    except FileExistsError as error:
        there, lost = Path(error.filename), secret.path
        raise RunError(
            f"{there} is there, and {lost.name} is not; put that back from a backup, or move {there.name} away and "
            "give sites the new one"
        ) from None
    except OSError as error:
        raise RunError(f"cannot write {secret.path}: {error.strerror or error}; {FREE_SPACE}") from None


def _certificate(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    builder = (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - BEFORE)
        .not_valid_after(_now() + datetime.timedelta(days=days))
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])]) if subject else None
    return builder if name is None else builder.subject_name(name)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(state: Path, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Write or replace a key that nobody else may read, and then its certificate."""
    write_atomically(state / f"{name}.key", _private_pem(key), FREE_SPACE, private=True)
    write_atomically(state / f"{name}.crt", certificate.public_bytes(Encoding.PEM), FREE_SPACE)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
