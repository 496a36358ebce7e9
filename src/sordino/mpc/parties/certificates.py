"""Identities of parties: certificates for mutual TLS, one for each role, from one authority.

An identity is a role and not a host. A caller demands the certificate of the role that it calls, and a party reads the
caller's rights from the caller's certificate. The authority's key is discarded after signing, so nobody can add a party
later. So certificates are renewed for all parties at once.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sordino.errors import ConfigError, RunError
from sordino.files import ANOTHER_OUT, NewFile, create_files
from sordino.progress import log

SERVERS = ("server-0", "server-1")
DEALER, MODEL_OWNER, DATA_OWNER = "dealer", "model-owner", "data-owner"
ROLES = (*SERVERS, DEALER, MODEL_OWNER, DATA_OWNER)
KEY, CERTIFICATE, AUTHORITY = "key.pem", "certificate.pem", "authority.pem"  # files of a party's folder
MOST_DAYS = 3650  # for which a certificate may be valid
WARNED_DAYS = 30  # before a certificate expires
RENEWAL = (
    "renew all certificates with 'sordino mpc certificates --out NEW_FOLDER', hand each party its folder, and restart "
    "the dealer and the servers with them"
)


@dataclass(frozen=True)
class Identity:
    """A party's credentials, and the authority that it trusts.

    Attributes:
        role: one of `ROLES`.
        key, certificate, authority: PEM. The key is the party's secret.
    """

    role: str
    key: bytes
    certificate: bytes
    authority: bytes

    @classmethod
    def load(cls, folder: Path, *roles: str, key: str = "session.certificates") -> Identity:
        """Load a party's folder.

        Args:
            folder: with `key.pem`, `certificate.pem` and `authority.pem`.
            roles: allowed roles.
            key: configuration key or option that names the folder, for messages.

        Raises:
            ConfigError: a file is missing or damaged, files do not belong together, the role is not allowed, or the
                certificate expired.
        """
        try:
            secret, certificate, authority = ((folder / name).read_bytes() for name in (KEY, CERTIFICATE, AUTHORITY))
            role = role_of(x509.load_pem_x509_certificate(certificate))
            identity = cls(role, secret, certificate, authority)
            own = load_pem_private_key(secret, None).public_key()
        except (OSError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                key, str(folder), f"no party's folder ({error}); 'sordino mpc certificates' makes them"
            ) from None
        if role not in roles:
            raise ConfigError(key, str(folder), f"is that of {role}; {' or '.join(roles)} is needed")
        if own != identity.chain[0].public_key() or not identity.issued(identity.chain[0]):
            mixed = f"{KEY}, {CERTIFICATE} and {AUTHORITY} are not of one 'sordino mpc certificates'"
            raise ConfigError(key, str(folder), f"{mixed}; take the whole folder of {role}")
        problem = dates_problem(identity.chain, f"the certificate of {role}")
        if problem:
            raise ConfigError(key, str(folder), problem)
        warn_of_expiry(identity.chain, f"the certificate of {role}")
        _warn_of_readers(folder / KEY)
        return identity

    @cached_property
    def chain(self) -> tuple[x509.Certificate, x509.Certificate]:
        """The party's certificate, and its authority's."""
        return x509.load_pem_x509_certificate(self.certificate), x509.load_pem_x509_certificate(self.authority)

    def issued(self, certificate: x509.Certificate) -> bool:
        """Return true if a certificate is one of this party's authority."""
        try:
            certificate.verify_directly_issued_by(self.chain[1])
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return credentials to listen with. Callers must show a certificate of the same authority."""
        pairs = [(self.key, self.certificate)]
        return grpc.ssl_server_credentials(pairs, root_certificates=self.authority, require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return credentials to connect with."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def role_of(certificate: x509.Certificate) -> str:
    """Return the role that a certificate stands for.

    Raises:
        IndexError: it names none.
    """
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def dates_problem(certificates: Sequence[x509.Certificate], whose: str) -> str | None:
    """Say that one of some certificates is not valid today, with the remedy; None if all are valid."""
    now = datetime.now(UTC)
    ends, begins = _end(certificates), max(each.not_valid_before_utc for each in certificates)
    if now >= ends:
        return f"{whose} expired on {ends:%Y-%m-%d}; {RENEWAL}"
    if now < begins:
        return (
            f"{whose} is valid from {begins:%Y-%m-%d %H:%M} UTC on, and here it is {now:%Y-%m-%d %H:%M}; set the clock"
        )
    return None


def warn_of_expiry(certificates: Sequence[x509.Certificate], whose: str) -> None:
    """Log a warning, once a day, if one of some certificates expires within `WARNED_DAYS`."""
    ends = _end(certificates)
    left = (ends - datetime.now(UTC)).days
    if left < WARNED_DAYS:
        _warn_once(f"{whose} expires in {left} day{'' if left == 1 else 's'}, on {ends:%Y-%m-%d}; {RENEWAL}")


def _warn_of_readers(key: Path) -> None:
    """Log a warning if others on this machine can read a key: they could act as its party.

    It is no error, as secrets that a container mounts may have such a mode.
    """
    mode = stat.S_IMODE(key.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        _warn_once(f"others on this machine may read {key} (mode {mode:o}) and act as its party; run 'chmod 600 {key}'")


@lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _end(certificates: Sequence[x509.Certificate]) -> datetime:
    return min(each.not_valid_after_utc for each in certificates)


def make_certificates(folder: Path, days: int = 365) -> list[Path]:
    """Make an authority, and a folder with key and certificate for each role, to hand to the parties.

    Args:
        folder: parent of the new folders; must not contain any of them.
        days: until the certificates expire, from 1 to MOST_DAYS.

    Returns:
        The folders.

    Raises:
        ConfigError: a role's folder exists already, or certificates would be valid for too long.
        RunError: a folder cannot be written.
    """
    if not 1 <= days <= MOST_DAYS:
        allowed = f"certificates are valid for 1 to {MOST_DAYS} days; make new ones before they expire"
        raise ConfigError("--days", days, allowed)
    folders = [folder / role for role in ROLES]
    for party_folder in folders:
        if party_folder.exists():
            raise ConfigError("--out", str(folder), f"{party_folder.name} is there already; choose another folder")
    authority = generate_private_key(SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sordino mpc")])
    authority_certificate = _certificate(issuer, issuer, authority, authority, days).public_bytes(Encoding.PEM)
    made: list[Path] = []
    try:
        for role, party_folder in zip(ROLES, folders, strict=True):
            party_folder.mkdir(mode=0o700, parents=True)
            made.append(party_folder)
            key = generate_private_key(SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
            certificate = _certificate(subject, issuer, key, authority, days).public_bytes(Encoding.PEM)
            create_files(
                NewFile(
                    party_folder / KEY,
                    key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
                    private=True,
                ),
                NewFile(party_folder / CERTIFICATE, certificate),
                NewFile(party_folder / AUTHORITY, authority_certificate),
            )
    except BaseException as error:
        for party_folder in made:  # or the next try would be refused for half of the parties
            shutil.rmtree(party_folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"cannot write to {folder}: {error.strerror or error}; {ANOTHER_OUT}") from None
        raise
    return folders


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, signer: EllipticCurvePrivateKey, days: int
) -> x509.Certificate:
    """Sign the certificate of an authority for itself, or of a role for both ends of TLS."""
    now, root = datetime.now(UTC), subject == issuer
    role = str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # for clocks that differ a little
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=root, path_length=0 if root else None), critical=True)
    )
    if not root:
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(role)]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    return builder.sign(signer, SHA256())
