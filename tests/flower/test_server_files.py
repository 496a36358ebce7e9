"""Keys, certificates and the proxy's configuration."""

from __future__ import annotations

import re
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest
import tomli_w
import typer
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from engines.test_containers import service_of
from flower.parties import needs_nginx
from full_disk import full_disk
from sordino.cli.app import app
from sordino.cli.flower import app as flower
from sordino.errors import ConfigError, RunError
from sordino.flower.app import __file__ as app_file
from sordino.flower.certificates import write_certificates
from sordino.flower.control import APP
from sordino.flower.keys import load_key, load_public_key, make_key, public_bytes
from sordino.flower.names import CONFIG, FINGERPRINT, FLEET, PATIENCE, PROPOSAL
from sordino.flower.project import Project, ServerEntry, ServerProject, SiteEntry
from sordino.flower.proxy import configuration
from sordino.flower.superlink import up

ROOT = Path(__file__).parents[2]


def test_a_key_is_its_owners_alone_and_is_not_replaced(tmp_path: Path) -> None:
    line = make_key(tmp_path / "node")
    assert stat.S_IMODE((tmp_path / "node").stat().st_mode) == 0o600
    assert line.startswith("ecdsa-sha2-nistp384 ")
    assert (tmp_path / "node.pub").read_text() == f"{line}\n"
    key = load_key(tmp_path / "node")
    assert public_bytes(key.public_key()) == load_public_key(tmp_path / "node.pub", "sites.key")
    before = (tmp_path / "node").read_bytes()
    with pytest.raises(RunError, match="exists; a node keeps its key"):
        make_key(tmp_path / "node")
    assert (tmp_path / "node").read_bytes() == before


def test_a_full_disk_leaves_no_half_of_a_pair(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(RunError, match="node cannot be written: .*free space, or choose another file"):
        make_key(tmp_path / "node")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "node.pub").write_text("of a key that is elsewhere")
    with pytest.raises(RunError, match=r"node\.pub exists; a node keeps its key"):
        make_key(tmp_path / "node")
    assert not (tmp_path / "node").exists()
    assert (tmp_path / "node.pub").read_text() == "of a key that is elsewhere"


def test_a_full_disk_leaves_no_authority_that_blocks_the_next_start(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(RunError, match=r"cannot write .*ca\.key: .*free space"):
        write_certificates(tmp_path, "eyes", "fl.example.org", 30)
    assert list(tmp_path.iterdir()) == []
    write_certificates(tmp_path, "eyes", "fl.example.org", 30)
    (tmp_path / "ca.key").unlink()
    authority = (tmp_path / "ca.crt").read_bytes()
    with pytest.raises(RunError, match=r"ca\.crt is there, and ca\.key is not; put that back from a backup"):
        write_certificates(tmp_path, "eyes", "fl.example.org", 30)
    assert (tmp_path / "ca.crt").read_bytes() == authority, "sites have it"


def test_other_keys_are_refused(tmp_path: Path) -> None:
    """Flower itself takes any curve of NIST's, and tells of others late."""
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())):
        (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        with pytest.raises(ConfigError, match="is no private key of 'sordino flower key'"):
            load_key(tmp_path / "key")
    with pytest.raises(ConfigError, match="there is no such file; make a key with 'sordino flower key'"):
        load_key(tmp_path / "none")


def read(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def test_certificates_are_of_the_projects_authority_which_stays(tmp_path: Path) -> None:
    write_certificates(tmp_path, "eyes", "fl.example.org", 30)
    first = {name: (tmp_path / f"{name}.crt").read_bytes() for name in ("ca", "server", "loopback")}
    authority = read(tmp_path / "ca.crt")
    for name, host in (("server", "fl.example.org"), ("loopback", "localhost")):
        certificate = read(tmp_path / f"{name}.crt")
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert host in names.get_values_for_type(x509.DNSName)
        days = (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days
        assert days == 30
        assert stat.S_IMODE((tmp_path / f"{name}.key").stat().st_mode) == 0o600
    write_certificates(tmp_path, "eyes", "10.0.0.7", 30)
    assert (tmp_path / "ca.crt").read_bytes() == first["ca"], "sites have it"
    assert (tmp_path / "server.crt").read_bytes() != first["server"], "valid from the last start on"
    names = read(tmp_path / "server.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    (tmp_path / "ca.crt").unlink()
    with pytest.raises(RunError, match="holds ca.key or ca.crt and not both; put the other back from a backup"):
        write_certificates(tmp_path, "eyes", "10.0.0.7", 30)


@needs_nginx
@pytest.mark.parametrize("key", ["port", "loopback"])
def test_a_port_in_use_is_refused_before_sites_are_told_to_connect(key: str, tmp_path: Path) -> None:
    """nginx tries for seconds to have its port, and the server went on as if it had it."""
    make_key(tmp_path / "node")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as left:
        ports = {key: taken.getsockname()[1], ("loopback" if key == "port" else "port"): left.getsockname()[1]}
        left.close()
        server = {"host": "localhost", "address": "127.0.0.1", **ports}
        tables = {"name": "eyes", "server": server, "sites": [{"name": "east", "key": "node.pub"}]}
        (tmp_path / "project.toml").write_text(tomli_w.dumps(tables))
        told: list[str] = []
        with pytest.raises(ConfigError, match=rf"server\.{key} = {ports[key]}: cannot be listened on at 127\.0\.0\.1"):
            up(ServerProject(tmp_path / "project.toml"), told.append)
    assert told == []
    assert list((tmp_path / "state").iterdir()) == [], "nothing was started"


@needs_nginx
@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_nginx_takes_the_configuration_and_it_opens_one_port(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    write_certificates(folder, "eyes", "fl.example.org", 30)
    text = configuration(
        folder, address, 8443, 9091, folder / "server.crt", folder / "server.key", folder / "ca.crt", 2**23
    )
    (folder / "nginx.conf").write_text(text)
    nginx = shutil.which("nginx")
    assert nginx is not None, "apt-get install nginx"
    done = subprocess.run(
        [nginx, "-t", "-c", str(folder / "nginx.conf"), "-e", "stderr"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"listen (.*);", text) == [f"{address if '.' in address else '[::]'}:8443 ssl"]
    assert set(re.findall(r"location = (\S+)", text)) == {"/health", *FLEET}
    assert re.findall(r"location (/\S*) \{(.*)\}", text) == [("/", " return 403; ")]


def test_the_app_has_no_code_of_its_own_and_asks_for_nothing_but_flower() -> None:
    assert Path(app_file).parent == APP
    project = (APP / "pyproject.toml").read_text()
    assert 'dependencies = ["flwr>=1.42,<1.43"]' in project
    for key in (CONFIG, PROPOSAL, FINGERPRINT, PATIENCE):
        assert re.search(f"^{key} = ", project, re.MULTILINE), key


def test_the_compose_files_open_the_proxys_port_alone_and_their_commands_are_understood() -> None:
    port = ServerEntry.model_fields["port"].default
    assert service_of("flower", "server")["ports"] == [f"${{PORT:-{port}}}:${{PORT:-{port}}}"]
    command = typer.main.get_command(app)
    for party in ("server", "site"):
        words = [
            re.sub(r"\$\{SERVER:\?.*\}", "fl.example.org:8443", word) for word in service_of("flower", party)["command"]
        ]
        assert words.pop(0) == "sordino"
        with command.make_context("sordino", words) as context:
            name, _, rest = command.resolve_command(context, words)  # type: ignore[attr-defined]
            assert name == "flower"
            group = typer.main.get_command(flower)
            _, chosen, arguments = group.resolve_command(context, rest)  # type: ignore[attr-defined]
            chosen.make_context("sordino flower", arguments)


def test_the_projects_file_of_the_page_is_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "deploy-flower.md").read_text(encoding="utf-8")
    (project,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "project.toml").write_text(project)
    (tmp_path / "keys").mkdir()
    for name in ("east", "west"):
        make_key(tmp_path / "keys" / name)
    read = ServerProject(tmp_path / "project.toml")
    assert sorted(read.sites.values()) == ["east", "west"]
    assert read.settings.server.loopback == 9091
    assert 'address = "127.0.0.1:9091"' in page


def test_the_page_on_deployment_names_every_key() -> None:
    page = (ROOT / "docs" / "deploy-flower.md").read_text(encoding="utf-8")
    for key in (*Project.model_fields, *SiteEntry.model_fields):
        assert f"`{key}" in page, key
    for key in ServerEntry.model_fields:
        assert f"`server.{key}`" in page, key
