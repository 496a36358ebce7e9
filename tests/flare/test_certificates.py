"""Kits whose keys were made where they stay: what leaves, what is signed, and what is refused."""

from __future__ import annotations

import json
import shutil
import ssl
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from nvflare.lighter.utils import generate_cert
from typer.testing import CliRunner

from flare.test_provision import PROJECT, WEST
from sordino.cli.app import app
from sordino.errors import ConfigError, RunError
from sordino.flare import certificates
from sordino.flare.certificates import approve, fingerprint_of_authority, make_kit, request
from sordino.flare.names import KIT_FILE
from sordino.flare.project import Project, load_project
from sordino.flare.provision import provision


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project.toml").write_text(PROJECT + WEST)
    return load_project(tmp_path / "project.toml")


def numbers_of(key: Path) -> list[bytes]:
    """The secret numbers of a private key, as text and as bytes, to look for."""
    private = load_pem_private_key(key.read_bytes(), None).private_numbers()  # type: ignore[union-attr]
    secrets = [private.d, private.p, private.q]
    lines = [line for line in key.read_bytes().splitlines() if b"--" not in line]
    return [secret.to_bytes((secret.bit_length() + 7) // 8) for secret in secrets] + lines


def test_a_private_key_never_leaves_its_site(project: Project, tmp_path: Path) -> None:
    """Nothing that the owner was sent, has or sends holds any of it; the site alone makes the kit."""
    site, owner = tmp_path / "site", tmp_path / "owner"
    file, key = request("west", "west_bank", "client", site)
    owner.mkdir()
    shutil.copy(file, owner / file.name)
    approval, same = approve(project, owner / file.name, owner / "ca", owner / "out")
    assert same == key
    (private,) = site.glob("*.key")
    assert private.stat().st_mode & 0o077 == 0
    secrets = numbers_of(private)
    assert all(any(secret in file.read_bytes() for file in site.iterdir()) for secret in secrets[3:])
    held = [file for file in owner.rglob("*") if file.is_file()]
    assert {file.name for file in held} == {"west.csr", "cert.json", "west.approved.json"}
    for each in held:
        assert not any(secret in each.read_bytes() for secret in secrets), each
    assert "PRIVATE" not in approval.read_text()
    kit = make_kit(approval, site, fingerprint_of_authority(project, owner / "ca"), tmp_path / "kit")
    assert (kit / "startup" / "client.key").read_bytes() == private.read_bytes()
    assert (kit / "startup" / "client.key").stat().st_mode & 0o077 == 0


def test_it_has_the_files_of_a_kit_made_in_one_place(project: Project, tmp_path: Path) -> None:
    """But for key and certificate: the same permissions, class, and addresses, also at server and administrators."""
    central = {kit.name: kit for kit in provision(project, tmp_path / "central")}
    ca = tmp_path / "central" / project.name / "state"
    parties = [("server", "coordinator", "server"), ("west", "west_bank", "client")]
    parties.append(("lead@example.org", "coordinator", "lead"))
    for name, organization, kind in parties:
        file, _ = request(name, organization, kind, tmp_path / "requests" / name)  # type: ignore[arg-type]
        approval, _ = approve(project, file, ca, tmp_path / "approved")
        told = fingerprint_of_authority(project, ca)
        kit = make_kit(approval, file.parent, told, tmp_path / "kits" / name)
        own = {str(path.relative_to(kit)) for path in kit.rglob("*") if path.is_file()}
        theirs = {str(path.relative_to(central[name])) for path in central[name].rglob("*") if path.is_file()}
        assert own == theirs - {"startup/signature.json", "local/signature.json", "signature.json"}
        secret = {"client.crt", "client.key", "server.crt", "server.key", "signature.json"}
        for each in own:
            if Path(each).name not in secret:
                assert (kit / each).read_bytes() == (central[name] / each).read_bytes(), each
        side = "server" if kind == "server" else "client"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(kit / "startup" / f"{side}.crt", kit / "startup" / f"{side}.key")
        certificate = x509.load_pem_x509_certificate((kit / "startup" / f"{side}.crt").read_bytes())
        role = certificate.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)
        assert [entry.value for entry in role] == [kind]
    assert json.loads((tmp_path / "kits/lead@example.org/local" / KIT_FILE).read_text()) == {"sites": ["east", "west"]}


def test_who_the_project_does_not_name_is_not_signed(project: Project, tmp_path: Path) -> None:
    file, _ = request("mallory", "west_bank", "client", tmp_path / "mallory")
    with pytest.raises(ConfigError, match="is of 'mallory', whom the project does not name"):
        approve(project, file, tmp_path / "ca", tmp_path / "out")
    file, _ = request("west", "mafia", "client", tmp_path / "west")
    with pytest.raises(ConfigError, match="belongs to 'mafia', and the project says 'west_bank'"):
        approve(project, file, tmp_path / "ca", tmp_path / "out")
    (tmp_path / "text.csr").write_text("please")
    with pytest.raises(ConfigError, match="is no request of 'sordino flare request'"):
        approve(project, tmp_path / "text.csr", tmp_path / "ca", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nobody_becomes_more_than_the_project_says(project: Project, tmp_path: Path) -> None:
    """A site's request that asks to be a server, or a lead, is signed as the site that it is."""
    for kind in ("server", "lead"):
        file, _ = request("west", "west_bank", kind, tmp_path / kind)  # type: ignore[arg-type]
        approval, _ = approve(project, file, tmp_path / "ca", tmp_path / f"{kind}-out")
        document = json.loads(approval.read_text())
        assert document["party"]["kind"] == "client"
        certificate = x509.load_pem_x509_certificate(document["certificate"].encode())
        roles = [entry.value for entry in certificate.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)]
        assert roles == ["client"]
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [name.value for name in names] == ["west"], "and not the server's host"


def test_a_wrong_fingerprint_key_or_certificate_makes_no_kit(project: Project, tmp_path: Path) -> None:
    file, _ = request("west", "west_bank", "client", tmp_path / "west")
    approval, _ = approve(project, file, tmp_path / "ca", tmp_path / "out")
    told = fingerprint_of_authority(project, tmp_path / "ca")
    other, _ = request("west", "west_bank", "client", tmp_path / "other")
    with pytest.raises(ConfigError, match=f"--fingerprint = {'00' * 32!r}: the approval is of a project with {told}"):
        make_kit(approval, file.parent, "00" * 32, tmp_path / "kit")
    with pytest.raises(ConfigError, match="is for another key than"):
        make_kit(approval, other.parent, told, tmp_path / "kit")
    with pytest.raises(ConfigError, match="--request = .*has no key of west"):
        make_kit(approval, tmp_path / "nowhere", told, tmp_path / "kit")
    forged, _ = approve(project, other, tmp_path / "forger", tmp_path / "forged")
    document = json.loads(approval.read_text()) | {"certificate": json.loads(forged.read_text())["certificate"]}
    forged.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="its certificate is not signed by its project"):
        make_kit(forged, other.parent, told, tmp_path / "kit")
    forged.write_text(json.dumps(document | {"root": "no certificate"}))
    with pytest.raises(ConfigError, match="is no file of 'sordino flare approve'"):
        make_kit(forged, other.parent, told, tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_a_key_is_never_overwritten_and_a_role_that_flare_does_not_sign_is_told(
    project: Project, tmp_path: Path
) -> None:
    file, _ = request("west", "west_bank", "client", tmp_path / "west")
    before = file.with_suffix(".key").read_bytes()
    with pytest.raises(ConfigError, match="--out = .*holds something; choose another folder"):
        request("west", "west_bank", "client", tmp_path / "west")
    assert file.with_suffix(".key").read_bytes() == before
    with pytest.raises(ConfigError, match="--role = 'project_admin': FLARE signs no such request"):
        request("boss@example.org", "coordinator", "project_admin", tmp_path / "boss")
    with pytest.raises(ConfigError, match="holds something else than a project's key"):
        approve(project, file, tmp_path / "west", tmp_path / "out")


def test_an_expired_project_signs_nothing(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = request("west", "west_bank", "client", tmp_path / "west")
    old = datetime(2020, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(certificates, "generate_cert", partial(generate_cert, not_valid_before=old))
    fingerprint_of_authority(project, tmp_path / "ca")
    with pytest.raises(RunError, match="FLARE could not sign the request: .*expired"):
        approve(project, file, tmp_path / "ca", tmp_path / "out")


def test_the_three_commands(tmp_path: Path) -> None:
    (tmp_path / "project.toml").write_text(PROJECT)

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["flare", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    asked = said("request", "east", "--organization", "east_hospital", "--out", str(tmp_path / "east"))
    file = str(tmp_path / "east" / "east.csr")
    assert file in asked.replace("\n", "")
    options = ["--ca", str(tmp_path / "ca"), "--out", str(tmp_path / "out")]
    signed = said("approve", str(tmp_path / "project.toml"), file, *options)
    key = asked.split("Key: ")[1].split()[0]
    assert f"Key: {key}" in signed
    fingerprint = signed.split("Fingerprint of the project: ")[1].split()[0]
    approval = str(tmp_path / "out" / "east.approved.json")
    kit = ["--request", str(tmp_path / "east"), "--fingerprint", fingerprint, "--out", str(tmp_path / "kit")]
    said("kit", approval, *kit)
    assert (tmp_path / "kit" / "startup" / "sub_start.sh").exists()
