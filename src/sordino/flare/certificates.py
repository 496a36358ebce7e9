"""Kits whose private keys never leave their owners: a request goes to the project's owner, and a certificate back.

A party makes its key and a request for a certificate (a CSR, PEM). The project's owner signs requests of those whom the
project names, and returns what a kit needs besides the key. The party puts its kit together. Keys, requests and
signatures are FLARE's own; so is the form of the owner's key, which `provision` keeps as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID
from nvflare.lighter.utils import Identity, generate_cert, generate_keys, serialize_cert, serialize_pri_key
from nvflare.tool.cert.cert_commands import generate_csr_files, sign_csr_files
from nvflare.tool.cert.cert_constants import VALID_CERT_TYPES
from nvflare.tool.package.package_commands import PrebuiltCertBuilder
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sordino.errors import ConfigError, RunError
from sordino.experiments.run_lock import is_empty
from sordino.files import ANOTHER_OUT, FREE_SPACE, NewFile, create_files, write_atomically
from sordino.flare.project import ORGANIZATION, REQUESTED, Kind, Party, Project, parties_of
from sordino.flare.provision import build, close

STATE = "cert.json"  # where FLARE's provisioning keeps the owner's key and certificate, too
LONGEST = 2**20  # bytes of a request, or of an approval


class Approval(BaseModel):
    """The return of a project's owner for a request; nothing in it is secret.

    Attributes:
        project: its name.
        party: whom it is for.
        certificate: of the party, PEM.
        root: the project's own certificate, PEM.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    project: str = Field(pattern=ORGANIZATION)
    party: Party
    certificate: str
    root: str


def request(name: str, organization: str, kind: Kind, folder: Path) -> tuple[Path, str]:
    """Make a key, which stays in the folder, and a request to send; return the request, and its key's fingerprint.

    Raises:
        ConfigError: the folder holds something, or FLARE signs no such kind from a request.
        RunError: it could not be made.
    """
    if kind not in VALID_CERT_TYPES:
        raise ConfigError("--role", kind, f"FLARE signs no such request; choose from {', '.join(REQUESTED)}")
    if not is_empty(folder):
        raise ConfigError("--out", str(folder), "holds something; choose another folder, so that no key is lost")
    with _errors("make the request"):
        made = generate_csr_files(name, organization, kind, str(folder))
    file = Path(made["csr_path"])
    return file, fingerprint_of_key(x509.load_pem_x509_csr(file.read_bytes()))


def approve(project: Project, file: Path, authority: Path, out: Path) -> tuple[Path, str]:
    """Sign a request of a party that the project names; return the file to send back, and the key's fingerprint.

    Args:
        project: it says who may ask, and for what.
        file: the request.
        authority: the folder of the owner's key, which is made if the folder is empty.
        out: the folder to write to.

    Raises:
        ConfigError: it is no request, or of nobody whom the project names.
        RunError: it could not be signed.
    """
    asked = _read_request(file)
    name, organization = _entry(asked, NameOID.COMMON_NAME), _entry(asked, NameOID.ORGANIZATION_NAME)
    party = next((party for party in parties_of(project) if party.name == name), None)
    if party is None:
        raise ConfigError("REQUEST", str(file), f"is of {name!r}, whom the project does not name")
    if party.organization != organization:
        told = f"says that {name} belongs to {organization!r}, and the project says {party.organization!r}"
        raise ConfigError("REQUEST", str(file), told)
    if party.kind not in VALID_CERT_TYPES:
        raise ConfigError("admins.role", party.kind, "FLARE signs no such request; make this kit with 'provision'")
    key, root = _authority(project, authority)
    host = project.server.host
    with tempfile.TemporaryDirectory() as folder:
        _write_authority(Path(folder) / "ca", key, root)
        with _errors("sign the request"):
            signed = sign_csr_files(
                str(file),
                str(Path(folder) / "ca"),
                str(Path(folder) / "signed"),
                party.kind,  # as the project says, whatever the request asks for
                valid_days=project.days,
                csr=asked,
                server_default_host=host,
                server_additional_hosts=[host],
            )
        certificate = Path(signed["signed_cert"]).read_text(encoding="ascii")
    approval = Approval(project=project.name, party=party, certificate=certificate, root=root)
    made = out / f"{name}.approved.json"
    write_atomically(made, approval.model_dump_json(indent=1).encode(), ANOTHER_OUT)
    return made, fingerprint_of_key(asked)


def make_kit(file: Path, folder: Path, fingerprint: str, out: Path) -> Path:
    """Put a kit together from an approval and the key in a request's folder, and return the kit.

    Args:
        file: the approval.
        folder: of the request.
        fingerprint: of the project's certificate, as its owner told it in person or by telephone.
        out: the folder to make the kit in.

    Raises:
        ConfigError: the approval is malformed, for another key, or not of the project with this fingerprint.
        RunError: FLARE could not make the kit.
    """
    approval = _read_approval(file)
    party, key = approval.party, folder / f"{approval.party.name}.key"
    if (told := fingerprint_of_root(approval.root)) != fingerprint.replace(":", "").lower():
        raise ConfigError("--fingerprint", fingerprint, f"the approval is of a project with {told}; ask its owner")
    _check_certificate(file, approval, key)
    if not is_empty(out):
        raise ConfigError("--out", str(out), "holds something; choose another folder")
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        (place / "certificate.pem").write_text(approval.certificate, encoding="ascii")
        (place / "root.pem").write_text(approval.root, encoding="ascii")
        certificates = PrebuiltCertBuilder(
            str(place / "certificate.pem"), str(key), str(place / "root.pem"), party.name
        )
        parties = [party] if party.kind == "server" else [_server_of(party), party]
        kits = build(approval.project, parties, [certificates], place / "kits")
        close(kits / party.name, party)
        shutil.copytree(kits / party.name, out, dirs_exist_ok=True)
    return out


def fingerprint_of_root(root: str) -> str:
    """Return the SHA-256 of a project's certificate, in hex."""
    return x509.load_pem_x509_certificate(root.encode()).fingerprint(hashes.SHA256()).hex()


def fingerprint_of_authority(project: Project, folder: Path) -> str:
    """Return the fingerprint that parties must be told; see `make_kit`."""
    return fingerprint_of_root(_authority(project, folder)[1])


def fingerprint_of_key(of: x509.CertificateSigningRequest | x509.Certificate) -> str:
    """Return the SHA-256 of a public key, in hex."""
    return hashlib.sha256(of.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _server_of(party: Party) -> Party:
    """Return the server, for a kit that only has to know where it is."""
    server = party.server
    return Party(name="server", organization=server.organization, kind="server", server=server)


def _read_request(file: Path) -> x509.CertificateSigningRequest:
    try:
        if file.stat().st_size > LONGEST:
            raise ValueError("it is too long")
        asked = x509.load_pem_x509_csr(file.read_bytes())
        if not asked.is_signature_valid:
            raise ValueError("its signature is wrong")
    except (OSError, ValueError) as error:
        raise ConfigError("REQUEST", str(file), f"is no request of 'sordino flare request' ({error})") from None
    return asked


def _read_approval(file: Path) -> Approval:
    try:
        if file.stat().st_size > LONGEST:
            raise ValueError("it is too long")
        approval = Approval.model_validate_json(file.read_bytes())
        x509.load_pem_x509_certificate(approval.root.encode())
    except (OSError, ValueError, ValidationError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError("APPROVAL", str(file), f"is no file of 'sordino flare approve' ({why})") from None
    return approval


def _check_certificate(file: Path, approval: Approval, key: Path) -> None:
    """Check that a certificate is the party's, for its key, and signed by the project.

    Raises:
        ConfigError: it is not.
    """
    try:
        certificate = x509.load_pem_x509_certificate(approval.certificate.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(approval.root.encode()))
        own = load_pem_private_key(key.read_bytes(), None).public_key()
    except OSError as error:
        why = f"has no key of {approval.party.name} ({error.strerror}); name the folder of the request"
        raise ConfigError("--request", str(key.parent), why) from None
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError("APPROVAL", str(file), "its certificate is not signed by its project") from None
    if own != certificate.public_key():
        raise ConfigError("APPROVAL", str(file), f"is for another key than {key}")
    if _entry(certificate, NameOID.COMMON_NAME) != approval.party.name:
        raise ConfigError("APPROVAL", str(file), f"its certificate is not of {approval.party.name}")


def _entry(of: x509.CertificateSigningRequest | x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    found = of.subject.get_attributes_for_oid(oid)
    return str(found[0].value) if found else ""


def _authority(project: Project, folder: Path) -> tuple[str, str]:
    """Return the project's key and certificate, PEM; they are made where the folder is empty.

    Raises:
        ConfigError: the folder holds something else.
    """
    if not is_empty(folder) and not (folder / STATE).exists():
        raise ConfigError("--ca", str(folder), "holds something else than a project's key; choose another folder")
    if not (folder / STATE).exists():
        key, public = generate_keys()
        owner = Identity(project.name)
        root = generate_cert(owner, owner, key, public, valid_days=project.days, ca=True)
        state = {"root_cert": serialize_cert(root).decode(), "root_pri_key": serialize_pri_key(key).decode()}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with contextlib.suppress(FileExistsError):  # another process made it since
                create_files(NewFile(folder / STATE, json.dumps(state).encode(), private=True))
        except OSError as error:
            raise RunError(f"cannot write {folder / STATE}: {error.strerror or error}; {FREE_SPACE}") from None
    try:
        state = json.loads((folder / STATE).read_bytes())
        return str(state["root_pri_key"]), str(state["root_cert"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("--ca", str(folder), f"{STATE} is damaged; put a backup back") from None


def _write_authority(folder: Path, key: str, root: str) -> None:
    """Write the owner's key as FLARE's signing reads it, into a folder that nobody else can read."""
    folder.mkdir(mode=0o700)
    (folder / "rootCA.key").write_text(key, encoding="ascii")
    (folder / "rootCA.pem").write_text(root, encoding="ascii")
    (folder / "ca.json").write_text("{}", encoding="ascii")


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """Tell errors of FLARE's command line, which prints them and exits, as ours."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        raise RunError(f"FLARE could not {what}: {' '.join(said.getvalue().split())}") from None
