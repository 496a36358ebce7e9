"""Who a party is: certificates for mutual TLS, one a role, from one authority.

An identity is a role and not a host: whoever dials a party demands the certificate of its role, and a party reads from
a caller's certificate what the caller may ask for. The authority's own key is forgotten once all are signed, so that
nobody can make another party later.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sordino.errors import ConfigError, RunError
from sordino.files import write_atomically

SERVERS = ("server-0", "server-1")
DEALER, MODEL_OWNER, DATA_OWNER = "dealer", "model-owner", "data-owner"
ROLES = (*SERVERS, DEALER, MODEL_OWNER, DATA_OWNER)
KEY, CERTIFICATE, AUTHORITY = "key.pem", "certificate.pem", "authority.pem"  # files of a party's folder


@dataclass(frozen=True)
class Identity:
    """What a party shows of itself, and whom it believes.

    Attributes:
        role: of `ROLES`.
        key, certificate, authority: PEM; the key is the party's secret.
    """

    role: str
    key: bytes
    certificate: bytes
    authority: bytes

    @classmethod
    def load(cls, folder: Path, *roles: str, key: str = "session.certificates") -> Identity:
        """Read a party's folder.

        Args:
            folder: with `key.pem`, `certificate.pem` and `authority.pem`.
            roles: that will do.
            key: of the configuration, or the option, that names the folder, for messages.

        Raises:
            ConfigError: a file is missing or damaged, or the role is another.
        """
        try:
            secret, certificate, authority = ((folder / name).read_bytes() for name in (KEY, CERTIFICATE, AUTHORITY))
            subject = x509.load_pem_x509_certificate(certificate).subject
            role = str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(
                key, str(folder), f"no party's folder ({error}); 'sordino mpc certificates' makes them"
            ) from None
        if role not in roles:
            raise ConfigError(key, str(folder), f"is that of {role}; {' or '.join(roles)} is needed")
        return cls(role, secret, certificate, authority)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a party that listens; callers must show a certificate of the same authority."""
        pairs = [(self.key, self.certificate)]
        return grpc.ssl_server_credentials(pairs, root_certificates=self.authority, require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a party that dials."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def make_certificates(folder: Path, days: int = 365) -> list[Path]:
    """An authority, and a folder with key and certificate for each role, to be handed to the parties.

    Args:
        folder: where to; must not hold any yet.
        days: until they expire.

    Returns:
        The folders.

    Raises:
        ConfigError: there are some already.
        RunError: the folder cannot be written.
    """
    folders = [folder / role for role in ROLES]
    for each in folders:
        if each.exists():
            raise ConfigError("--out", str(folder), f"{each.name} is there already; choose another folder")
    authority = generate_private_key(SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sordino mpc")])
    own = _certificate(issuer, issuer, authority, authority, days).public_bytes(Encoding.PEM)
    for role, each in zip(ROLES, folders, strict=True):
        try:
            each.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise RunError(f"cannot make {each}: {error.strerror or error}; choose another --out") from None
        key = generate_private_key(SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomically(each / KEY, secret)
        (each / KEY).chmod(0o600)
        write_atomically(
            each / CERTIFICATE, _certificate(subject, issuer, key, authority, days).public_bytes(Encoding.PEM)
        )
        write_atomically(each / AUTHORITY, own)
    return folders


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, signer: EllipticCurvePrivateKey, days: int
) -> x509.Certificate:
    """Of an authority for itself, or of a role for both ends of TLS."""
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
