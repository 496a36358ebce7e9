"""Startup kits by FLARE's own provisioning, closed further: no code from jobs, one class that they may name, a gate."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvflare.lighter.entity import Project as FlareProject
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.signature import SignatureBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Builder

from sordino.errors import ConfigError, RunError
from sordino.experiments.run_lock import is_empty
from sordino.files import ANOTHER_OUT, write_atomically
from sordino.flare.names import CONTROLLER, EXECUTOR, GATE, KIT_FILE, SITE_FILE
from sordino.flare.project import Party, Project, parties_of
from sordino.sites.server_settings import COORDINATOR_FILE

HEARTBEAT_SECONDS = 60  # after which a site that was silent is not connected any more

# What each role may do at the server. FLARE's own file lets a lead bring code.
NOTHING = {
    "submit_job": "none",
    "clone_job": "none",
    "manage_job": "none",
    "download_job": "none",
    "view": "any",
    "operate": "none",
    "shell_commands": "none",
    "byoc": "none",
    "server-predeployed-flwr": "none",
    "app_command": "none",  # asks a running job how far it is; FLARE counts it to none of the above
}
ALL_JOBS = {"submit_job": "any", "manage_job": "any", "download_job": "any", "app_command": "any"}
OWN_JOBS = {
    "submit_job": "any",
    "manage_job": "n:submitter",
    "download_job": "n:submitter",
    "app_command": "n:submitter",
}
PERMISSIONS = {
    "project_admin": NOTHING | ALL_JOBS,
    "org_admin": NOTHING | {"manage_job": "o:submitter", "operate": "o:site"},
    "lead": NOTHING | OWN_JOBS,
    "member": NOTHING,
}
# And at a site, where nobody but those who work there looks at errors and logs. Who runs jobs may ask which ones run.
AT_A_SITE = {role: rights | {"view": "none"} for role, rights in PERMISSIONS.items()}
AT_A_SITE["org_admin"]["view"] = "o:site"
for _role in ("project_admin", "lead"):
    AT_A_SITE[_role]["check_status"] = "any"


def provision(project: Project, out: Path) -> list[Path]:
    """Make a startup kit for every party of a project, and return their folders.

    `out` also holds, in `state`, the key that signs the project's certificates; with it, anybody makes new parties.
    Where `out` holds the project already, all kits are made again, with the same certificates for those who had one.

    Raises:
        ConfigError: `out` holds something else.
        RunError: FLARE could not make the kits.
    """
    if not is_empty(out) and not (out / project.name / "state" / "cert.json").exists():
        raise ConfigError("--out", str(out), f"holds other things than kits of project {project.name}; choose another")
    parties = parties_of(project)
    kits = build(project.name, parties, [CertBuilder(root_valid_days=project.days), SignatureBuilder()], out)
    for party in parties:
        close(kits / party.name, party)
    return [kits / party.name for party in parties]


def build(name: str, parties: Sequence[Party], certificates: Sequence[Builder], out: Path) -> Path:
    """Have FLARE make the kits of some parties, the server among them, and return the folder that they are in.

    Args:
        name: of the project.
        parties: those to make kits for.
        certificates: what puts keys and certificates into the kits, and what follows.
        out: the folder of FLARE's workspace.

    Raises:
        ConfigError: FLARE takes no such party.
        RunError: FLARE could not make the kits.
    """
    made = FlareProject(name, "prompts learned with Sordino")
    for party in parties:
        try:
            _add(made, party)
        except ValueError as error:
            key = {"server": "server", "client": "sites"}.get(party.kind, "admins")
            raise ConfigError(key, party.name, f"FLARE takes no such party: {error}") from None
    builders = [
        WorkspaceBuilder(template_file=["master_template.yml"]),
        StaticFileBuilder(config_folder="config", require_signed_jobs=True),
        *certificates,
    ]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        context = Provisioner(str(out), builders).provision(made)
    # It names a folder for results, from where the kits are moved on.
    told = [line for line in said.getvalue().splitlines() if line.strip() and "Generated results" not in line]
    for line in told:
        print(line, file=sys.stderr)
    if context.get_errors() or "current_prod_dir" not in context:
        raise RunError(f"FLARE could not make the kits: {'; '.join(context.get_errors()) or 'it does not say why'}")
    return Path(context["current_prod_dir"])


def _add(made: FlareProject, party: Party) -> None:
    if party.kind == "server":
        ports = {"fed_learn_port": party.server.port, "admin_port": party.server.port}
        hosts = {"host_names": [party.server.host], "default_host": party.server.host}
        made.set_server(party.name, party.organization, ports | hosts)
    elif party.kind == "client":
        made.add_client(party.name, party.organization, {"allow_log_streaming": False})
    else:
        made.add_admin(party.name, party.organization, {"role": party.kind})


def close(kit: Path, party: Party) -> None:
    """Write a kit's own files: what jobs and people may do there, which is less than FLARE lets them."""
    if party.kind == "server":
        _close_server(kit / "local", party.server.store)
    elif party.kind == "client":
        _close_site(kit / "local", party.name)
    else:
        _write(kit / "local" / KIT_FILE, {"sites": list(party.sites)})


def _close_server(local: Path, store: str) -> None:
    resources = _resources(local)
    resources["class_allow_list"] = [CONTROLLER]
    resources["servers"][0]["heart_beat_timeout"] = HEARTBEAT_SECONDS
    # FLARE's own places are below /tmp, which is emptied, and which others may read.
    text = json.dumps(resources, indent=1).replace("/tmp/nvflare/", f"{store.rstrip('/')}/")
    write_atomically(local / "resources.json", text.encode(), ANOTHER_OUT)
    _close(local, PERMISSIONS)
    write_atomically(local / COORDINATOR_FILE, COORDINATOR.encode(), ANOTHER_OUT)


def _close_site(local: Path, name: str) -> None:
    resources = _resources(local)
    resources["class_allow_list"] = [EXECUTOR]
    resources["allow_log_streaming"] = False
    _write(local / "resources.json", resources)
    _close(local, AT_A_SITE)
    write_atomically(local / f"{SITE_FILE}.example", SITE.format(name=name).encode(), ANOTHER_OUT)


def _close(local: Path, permissions: dict[str, dict[str, str]]) -> None:
    """Write who may do what, and take away a sample of privacy filters, which Sordino's uploads must not go through."""
    _write(local / "authorization.json", {"format_version": "1.0", "permissions": permissions})
    (local / "privacy.json.sample").unlink(missing_ok=True)


def _resources(local: Path) -> dict[str, Any]:
    """Return FLARE's own, with the gate before its other components."""
    document: dict[str, Any] = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    document["components"].insert(0, {"id": "sordino_gate", "path": GATE, "args": {}})
    return document


def _write(file: Path, document: dict[str, Any]) -> None:
    write_atomically(file, json.dumps(document, indent=1).encode(), ANOTHER_OUT)


COORDINATOR = """\
# The server's own file; no job can change it. Paths are from this folder.
runs = "../runs"          # run directories, one an experiment
# [checkpoints]
# clip = "folder"         # where this server has the encoder of experiments with encoder.name = "clip"
"""

SITE = """\
# Copy this file to site.toml and fill it in; no job can change it. Paths are from this folder.
name = "{name}"
state = "../state"        # rounds, answers and the ledger of this site: back it up

[data]
source = "imagefolder:/data/pictures"

[policy]
experiments = []          # fingerprints of allowed experiments, or "any"
epsilon = 8.0             # the most that all experiments together may spend
"""
