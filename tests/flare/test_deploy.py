"""The files for containers fit the kits, the project and the repository. No container is started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flare.test_provision import PROJECT
from sordino.flare.project import ServerEntry, load_project
from sordino.flare.provision import SITE, provision

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "flare"


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"])


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Where a service's folders are: path inside to the variable that names it, and its mode."""
    found = {}
    for volume in service["volumes"]:
        variable, inside, mode = re.fullmatch(r"\$\{(\w+):\?[^}]*\}:([^:]+)(?::(ro))?", volume).groups()  # type: ignore[union-attr]
        found[inside] = (variable, mode or "rw")
    return found


def test_there_is_a_server_and_a_site_and_nothing_else(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {"server", "site"}
    for service in services.values():
        assert service["restart"] == "unless-stopped"
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "network_mode", "command", "entrypoint", "user"} & set(service)


def test_state_is_kept_outside_and_data_is_only_read(services: dict[str, dict[str, Any]]) -> None:
    store = ServerEntry.model_fields["store"].default
    assert mounts(services["server"]) == {"/kit": ("KIT", "rw"), store: ("STORE", "rw")}
    assert mounts(services["site"]) == {"/kit": ("KIT", "rw"), "/state": ("STATE", "rw"), "/data": ("DATA", "ro")}
    assert 'source = "imagefolder:/data/' in SITE, "the example of a site's file looks there, too"


def test_the_server_has_one_port_and_a_site_none(services: dict[str, dict[str, Any]]) -> None:
    port = ServerEntry.model_fields["port"].default
    assert services["server"]["ports"] == [f"${{PORT:-{port}}}:${{PORT:-{port}}}"]
    assert "ports" not in services["site"]


def test_the_image_starts_what_a_kit_has_and_copies_what_is_there(
    services: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for service in services.values():
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    (program, script, option) = re.findall(r"^CMD \[(.*)\]$", text, re.MULTILINE)[0].replace('"', "").split(", ")
    (tmp_path / "project.toml").write_text(PROJECT)
    kits = provision(load_project(tmp_path / "project.toml"), tmp_path / "kits")
    for kit in kits[:2]:
        assert option in (kit / script).read_text(), "the server's and a site's"
    assert program == "bash"
    assert re.search(r"^USER (?!root)\w+$", text, re.MULTILINE)
    assert "--require-hashes" in text
