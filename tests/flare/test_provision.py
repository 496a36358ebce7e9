"""What startup kits let jobs and people do, as FLARE itself reads their files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tomli_w
from cryptography import x509
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.security.security import FLAuthorizer
from typer.testing import CliRunner

from sordino.cli.app import app
from sordino.errors import ConfigError
from sordino.flare.names import CONTROLLER, EXECUTOR, KIT_FILE, SITE_FILE
from sordino.flare.project import AdminEntry, Party, Project, ServerEntry, load_project
from sordino.flare.provision import build, provision
from sordino.sites.server_settings import COORDINATOR_FILE, CoordinatorSettings, load_coordinator

PROJECT = """
name = "trial"

[server]
host = "127.0.0.1"
port = 28461
store = "/somewhere/store"

[[sites]]
name = "east"
organization = "east_hospital"

[[admins]]
name = "lead@example.org"
organization = "coordinator"

[[admins]]
name = "boss@example.org"
organization = "coordinator"
role = "project_admin"
"""
WEST = '\n[[sites]]\nname = "west"\norganization = "west_bank"\n'


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("project")
    (folder / "project.toml").write_text(PROJECT)
    return {kit.name: kit for kit in provision(load_project(folder / "project.toml"), folder / "out")}


def may(kit: Path, role: str, right: str) -> bool:
    """Whether FLARE, with a kit's file, lets a user of a role do something to a job of another user."""
    policy = json.loads((kit / "local" / "authorization.json").read_text())
    authorizer = FLAuthorizer("east_hospital", policy)
    user = Person("lead@example.org", "coordinator", role)
    other = Person("other@example.org", "elsewhere", "lead")
    allowed, error = authorizer.authorize(AuthzContext(right, user, submitter=other))
    assert not error or "not authorized" in error, error
    return bool(allowed)


@pytest.mark.parametrize("party", ["server", "east"])
@pytest.mark.parametrize("role", ["project_admin", "org_admin", "lead", "member"])
def test_nobody_brings_code_or_a_shell(party: str, role: str, kits: dict[str, Path]) -> None:
    assert not may(kits[party], role, "byoc")
    assert not may(kits[party], role, "cat")
    assert may(kits[party], role, "show_errors") == (party == "server")
    runs_jobs = role in ("project_admin", "lead")
    assert may(kits[party], role, "submit_job") == runs_jobs
    assert may(kits[party], role, "check_status") == (party == "server" or runs_jobs), "which jobs run there"
    assert may(kits[party], role, "abort_job") == (role == "project_admin"), "of another's job"


@pytest.mark.parametrize(("party", "allowed"), [("server", CONTROLLER), ("east", EXECUTOR)])
def test_a_job_may_name_one_class(party: str, allowed: str, kits: dict[str, Path]) -> None:
    resources = json.loads((kits[party] / "local" / "resources.json").read_text())
    assert resources["class_list_enforcement_mode"] == "enforce"
    listed, mode, default = ComponentPathAuthorizer()._get_policy_from_resources(resources)
    assert (listed, mode.value, default) == ([allowed], "enforce", False)


def test_files_are_where_they_survive_and_logs_stay_at_the_site(kits: dict[str, Path]) -> None:
    server = (kits["server"] / "local" / "resources.json").read_text()
    assert "/somewhere/store/jobs-storage" in server
    assert "/tmp/" not in server
    assert json.loads((kits["east"] / "local" / "resources.json").read_text())["allow_log_streaming"] is False
    for party, file in (("server", "fed_server.json"), ("east", "fed_client.json")):
        assert json.loads((kits[party] / "startup" / file).read_text())["require_signed_jobs"] is True
    assert json.loads((kits["lead@example.org"] / "local" / KIT_FILE).read_text()) == {"sites": ["east"]}
    assert (kits["east"] / "local" / f"{SITE_FILE}.example").exists()
    coordinator = load_coordinator(kits["server"] / "local" / COORDINATOR_FILE)
    assert Path(coordinator.runs).resolve() == (kits["server"] / "runs").resolve()


def test_a_site_that_joins_later_leaves_the_others_their_certificates(tmp_path: Path) -> None:
    file = tmp_path / "project.toml"
    file.write_text(PROJECT)
    first = {kit.name: kit for kit in provision(load_project(file), tmp_path / "out")}
    file.write_text(PROJECT + WEST)
    second = {kit.name: kit for kit in provision(load_project(file), tmp_path / "out")}
    assert second.keys() - first.keys() == {"west"}
    for name in ("startup/client.crt", "startup/rootCA.pem"):
        assert (first["east"] / name).read_bytes() == (second["east"] / name).read_bytes()
    root = x509.load_pem_x509_certificate((second["west"] / "startup" / "rootCA.pem").read_bytes())
    west = x509.load_pem_x509_certificate((second["west"] / "startup" / "client.crt").read_bytes())
    west.verify_directly_issued_by(root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("port =", "prot =", r"server.prot = 28461: no such key; did you mean 'port'\?"),
        ('"east"', '"server"', "sites = 'server': is the server's name; give each party a name of its own"),
        ('"boss@', '"lead@', "admins = 'lead@example.org': is there twice"),
        ('"lead@example.org"', '"lead"', "admins.0.name = 'lead': string should match pattern"),
        ('store = "/some', 'store = "some', "server.store = 'somewhere/store': string should match pattern"),
        ('"project_admin"', '"king"', "admins.1.role = 'king': input should be"),
        ('"east"', '"north.hospital"', "sites.0.name = 'north.hospital': string should match pattern"),
        ('"lead@example.org"', '"lead@example.c1"', "admins.0.name = 'lead@example.c1': string should match pattern"),
        ('"lead@', f'"{"a" * 60}@', "admins.0.name = 'a{60}@example.org': string should have at most 64"),
        ('"127.0.0.1"', '"::1"', "server.host = '::1': string should match pattern"),
        ('"127.0.0.1"', '"host-"', "server.host = 'host-': string should match pattern"),
    ],
)
def test_bad_projects_are_refused_in_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "project.toml"
    file.write_text(PROJECT.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_project(file)


def test_every_name_that_a_project_may_have_gets_a_kit(tmp_path: Path) -> None:
    sites = ["7", "a-", "A_b-9", "Z" * 63]
    admins = ["a@b.cd", "A.b+c_d-e@x-y.example.org", f"{'a' * 52}@example.org"]
    tables = [{"name": name, "organization": "Z" * 63} for name in sites]
    people = [{"name": name, "organization": "9_"} for name in admins]
    project = {"name": "P" * 63, "server": {"host": "a-b.c9.example"}, "sites": tables, "admins": people}
    (tmp_path / "project.toml").write_text(tomli_w.dumps(project))
    kits = provision(load_project(tmp_path / "project.toml"), tmp_path / "out")
    assert {kit.name for kit in kits} == {"server", *sites, *admins}


def test_a_party_that_flare_takes_not_is_named(tmp_path: Path) -> None:
    server = ServerEntry(host="127.0.0.1")
    party = Party(name="north.hospital", organization="north", kind="client", server=server)
    with pytest.raises(ConfigError, match=r"sites = 'north.hospital': FLARE takes no such party: name=north.hospital"):
        build("trial", [party], [], tmp_path)


def test_the_page_on_deployment_names_every_key_and_its_project_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    for key in [*CoordinatorSettings.model_fields, *Project.model_fields]:
        assert f"`{key}" in page, key
    for key in ServerEntry.model_fields:
        assert f"`server.{key}`" in page, key
    for key in AdminEntry.model_fields:
        assert f"`{key}`" in page, key
    (project,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "project.toml").write_text(project)
    provision(load_project(tmp_path / "project.toml"), tmp_path / "kits")
    assert "`kits/eyes/state`" in page
    assert (tmp_path / "kits/eyes/state").is_dir()


def test_the_commands_of_the_page_on_deployment_make_a_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    (project,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("project.toml").write_text(project)
    commands = re.findall(r"^sordino (flare (?:request|approve|kit) .*)$", page, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["request", "approve", "kit"]
    printed = ""
    for command in commands:
        fingerprint = printed.rpartition("Fingerprint of the project: ")[2].strip()
        done = CliRunner().invoke(app, command.replace("FINGERPRINT", fingerprint).split(), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        printed += done.output
    assert Path("east/startup/client.key").exists()
    assert Path("ca").is_dir()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "project.toml").write_text(PROJECT)
    with pytest.raises(ConfigError, match="--out = .*holds other things than kits of project trial"):
        provision(load_project(tmp_path / "project.toml"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["project.toml"]
