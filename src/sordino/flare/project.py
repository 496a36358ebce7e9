"""A project's file: the server, the sites and the administrators that startup kits are made for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sordino.errors import ConfigError
from sordino.experiments.toml_tables import read_model

SERVER = "server"  # its name in certificates; where it is, is in the kits
NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
ORGANIZATION = "^[A-Za-z0-9][A-Za-z0-9_]{0,62}$"
ADMINISTRATOR = r"^[A-Za-z0-9._+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+$"


class ServerEntry(BaseModel):
    """The `[server]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9.:-]*$", description="name or address at which sites reach it")
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

    name: str = Field(pattern=ADMINISTRATOR, description="an e-mail address")
    organization: str = Field(pattern=ORGANIZATION, description="where this person works")
    role: Literal["lead", "project_admin", "org_admin", "member"] = Field(
        default="lead", description="lead: submits experiments, and ends their own; member: looks on"
    )


class Project(BaseModel):
    """A project's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=ORGANIZATION, description="of the project, in its certificates")
    days: int = Field(default=360, ge=1, le=3650, description="for which the project's own certificate is valid")
    server: ServerEntry
    sites: list[SiteEntry] = Field(min_length=1)
    admins: list[AdminEntry] = Field(min_length=1)


def load_project(file: Path) -> Project:
    """Read a project's file.

    Raises:
        ConfigError: it is missing or malformed, or a key or value is not allowed.
    """
    project = read_model(file, Project)
    names = [SERVER, *(site.name for site in project.sites), *(admin.name for admin in project.admins)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        key = "admins" if "@" in twice[0] else "sites"
        reason = "is the server's name" if twice[0] == SERVER else "is there twice"
        raise ConfigError(key, twice[0], f"{reason}; give each party a name of its own")
    return project
