"""A project's file: the server, the sites and the administrators that startup kits are made for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from sordino.errors import ConfigError
from sordino.experiments.toml_tables import read_model

SERVER = "server"  # its name in certificates; where it is, is in the kits
# FLARE takes no others. A dot in a site's name would make it a part of another site.
NAME = "^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"
ORGANIZATION = "^[A-Za-z0-9][A-Za-z0-9_]{0,62}$"
ADMINISTRATOR = r"^[A-Za-z0-9._+-]+@([A-Za-z0-9-]+\.)+[A-Za-z]{2,}$"
HOST = r"^([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$"
LONGEST = 64  # characters of a name in a certificate

Role = Literal["lead", "project_admin", "org_admin", "member"]
ROLES: tuple[Role, ...] = get_args(Role)
REQUESTED: tuple[Role, ...] = ("lead", "org_admin", "member")  # those whose requests FLARE signs
Kind = Role | Literal["server", "client"]  # FLARE's words


class ServerEntry(BaseModel):
    """The `[server]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = Field(pattern=HOST, max_length=253, description="name or address at which sites reach it")
    port: int = Field(default=8002, ge=1, le=65535, description="the one port that it listens at")
    organization: str = Field(default="coordinator", pattern=ORGANIZATION, description="who operates it")
    store: str = Field(
        default="/var/lib/sordino-flare", pattern='^/[^"\\\\]*$', description="folder on the server that keeps jobs"
    )


class SiteEntry(BaseModel):
    """An entry of `[[sites]]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=NAME, description="the site's name, as in its own file")
    organization: str = Field(pattern=ORGANIZATION, description="who owns it")


class AdminEntry(BaseModel):
    """An entry of `[[admins]]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=ADMINISTRATOR, max_length=LONGEST, description="an e-mail address")
    organization: str = Field(pattern=ORGANIZATION, description="where this person works")
    role: Role = Field(default="lead", description="lead: submits experiments, and ends their own; member: looks on")


class Project(BaseModel):
    """A project's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=ORGANIZATION, description="of the project, in its certificates")
    days: int = Field(default=360, ge=1, le=3650, description="for which the project's own certificate is valid")
    server: ServerEntry
    sites: list[SiteEntry] = Field(min_length=1)
    admins: list[AdminEntry] = Field(min_length=1)


class Party(BaseModel):
    """A party of a project, with all that its kit says besides key and certificates.

    Attributes:
        name: as in its certificate.
        organization: who owns it, or where the person works.
        kind: what it is; of a person, the role.
        server: where the server is, for all; and where it keeps jobs.
        sites: the names of all sites, which administrators alone are told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(max_length=255)
    organization: str = Field(pattern=ORGANIZATION)
    kind: Kind
    server: ServerEntry
    sites: list[str] = Field(default_factory=list)


def kind_of(name: str, role: str | None = None) -> Kind:
    """Return what a party that requests a certificate is by its name, and by its role if it is an administrator.

    Raises:
        ConfigError: it is an administrator of a role that nobody can request; or it is none, and a role is given.
    """
    if "@" not in name:
        if role is not None:
            raise ConfigError(
                "--role", role, f"is for administrators, whose names are e-mail addresses; {name!r} is none"
            )
        return "server" if name == SERVER else "client"
    roles: dict[str, Kind] = {each: each for each in REQUESTED}
    if role is not None and role not in roles:
        made = "; the project's owner makes that kit with 'provision'" if role in ROLES else ""
        raise ConfigError("--role", role, f"choose from {', '.join(REQUESTED)}{made}")
    return roles[role or "lead"]


def check_name(name: str, organization: str, kind: Kind) -> None:
    """Check a name and an organization as a project's file does.

    Raises:
        ConfigError: no project could name such a party.
    """
    if kind in ("server", "client") and not re.fullmatch(NAME, name):
        raise ConfigError("NAME", name, "is no name of a site: use letters, digits, - and _, at most 63")
    if kind not in ("server", "client") and not (re.fullmatch(ADMINISTRATOR, name) and len(name) <= LONGEST):
        raise ConfigError("NAME", name, f"is no e-mail address of an administrator, of at most {LONGEST} characters")
    if not re.fullmatch(ORGANIZATION, organization):
        raise ConfigError("--organization", organization, "use letters, digits and _")


def parties_of(project: Project) -> list[Party]:
    """Return all parties of a project, the server first."""
    server = project.server
    names = [site.name for site in project.sites]
    parties = [Party(name=SERVER, organization=server.organization, kind="server", server=server)]
    for name, organization in ((site.name, site.organization) for site in project.sites):
        parties += [Party(name=name, organization=organization, kind="client", server=server)]
    for admin in project.admins:
        entry = {"name": admin.name, "organization": admin.organization, "kind": admin.role}
        parties.append(Party.model_validate(entry | {"server": server, "sites": names}))
    return parties


def load_project(file: Path) -> Project:
    """Read a project's file.

    Raises:
        ConfigError: it is missing or malformed, or a key or value is not allowed.
    """
    project = read_model(file, Project, "PROJECT.toml")
    names = [SERVER, *(site.name for site in project.sites), *(admin.name for admin in project.admins)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        key = "admins" if "@" in twice[0] else "sites"
        reason = "is the server's name" if twice[0] == SERVER else "is there twice"
        raise ConfigError(key, twice[0], f"{reason}; give each party a name of its own")
    return project
