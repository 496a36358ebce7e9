"""The files for containers fit FLARE's kits and project. No container is started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from engines.test_containers import last, service_of
from flare.test_provision import PROJECT
from sordino.flare.project import ServerEntry, load_project
from sordino.flare.provision import SITE, provision


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Where a service's folders are: path inside to the variable that names it, and its mode."""
    found = {}
    for volume in service["volumes"]:
        variable, inside, mode = re.fullmatch(r"\$\{(\w+):\?[^}]*\}:([^:]+)(?::(ro))?", volume).groups()  # type: ignore[union-attr]
        found[inside] = (variable, mode or "rw")
    return found


def test_state_is_kept_outside_and_data_is_only_read() -> None:
    store = ServerEntry.model_fields["store"].default
    assert mounts(service_of("flare", "server")) == {"/kit": ("KIT", "rw"), store: ("STORE", "rw")}
    kept = {"/kit": ("KIT", "rw"), "/state": ("STATE", "rw"), "/data": ("DATA", "ro")}
    assert mounts(service_of("flare", "site")) == kept
    assert 'source = "imagefolder:/data/' in SITE, "the example of a site's file looks there, too"


def test_the_server_has_the_projects_port() -> None:
    port = ServerEntry.model_fields["port"].default
    assert service_of("flare", "server")["ports"] == [f"${{PORT:-{port}}}:${{PORT:-{port}}}"]


def test_the_image_starts_what_a_kit_has(tmp_path: Path) -> None:
    program, script, option = last("flare", "CMD").strip("[]").replace('"', "").split(", ")
    (tmp_path / "project.toml").write_text(PROJECT)
    kits = provision(load_project(tmp_path / "project.toml"), tmp_path / "kits")
    for kit in kits[:2]:
        text = (kit / script).read_text()
        assert option in text, "the server's and a site's"
        assert "exec python3 " in text, "which has a stop's signal itself, not a shell that waits for it"
    assert program == "bash"
    assert all("command" not in service_of("flare", party) for party in ("server", "site"))
