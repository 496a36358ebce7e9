"""A project's file: where the server listens, and which public key is which site's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from sordino.errors import ConfigError
from sordino.experiments.toml_tables import read_model
from sordino.files import user_path
from sordino.flower.keys import load_public_key

NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class ServerEntry(BaseModel):
    """The `[server]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = Field(pattern="^[A-Za-z0-9][A-Za-z0-9.-]*$", description="name or address at which sites reach it")
    port: int = Field(default=8443, ge=1, le=65535, description="the one port that is open, for sites")
    address: str = Field(
        default="0.0.0.0", pattern="^[0-9a-fA-F.:]+$", description="address of this machine that the port is open at"
    )
    loopback: int = Field(default=9091, ge=1, le=65535, description="port of the SuperLink, on this machine alone")
    state: str = Field(default="state", description="folder with database, keys and certificates")
    days: int = Field(default=365, ge=1, le=3650, description="for which a certificate is valid, from the last start")
    certificate: str | None = Field(default=None, description="chain (PEM) to show to sites; absent: the project's own")
    key: str | None = Field(default=None, description="private key (PEM) of that certificate")
    most_bytes: int = Field(
        default=8 * 2**20, ge=5 * 2**20, description="the longest request; what is longer is sent in parts of 4 MiB"
    )
    nginx: str = Field(default="nginx", description="the proxy's program")


class SiteEntry(BaseModel):
    """An entry of `[[sites]]`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=NAME, description="the site's name, as in its own file")
    key: str = Field(description="file with its public key")


class Project(BaseModel):
    """A project's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=NAME, description="of the project, in its certificates")
    server: ServerEntry
    sites: list[SiteEntry] = Field(min_length=1)


class ServerProject:
    """A project at its server's machine.

    Args:
        file: the project's file. Relative paths in it are from its own folder.

    Raises:
        ConfigError: it is missing or malformed, or a key or value is not allowed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.resolve()
        self.settings = read_model(self.file, Project, "PROJECT.toml")
        names = [site.name for site in self.settings.sites]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError("sites", twice[0], "is there twice; give each site a name of its own")
        server = self.settings.server
        if (server.certificate is None) != (server.key is None):
            raise ConfigError("server.certificate", server.certificate, "needs server.key, and that needs it")
        if server.port == server.loopback:
            raise ConfigError("server.loopback", server.loopback, "is the port for sites; choose another")

    @cached_property
    def sites(self) -> Mapping[bytes, str]:
        """Return public key to site.

        Raises:
            ConfigError: a key is missing or malformed, or there twice.
        """
        keys: dict[bytes, str] = {}
        for site in self.settings.sites:
            key = load_public_key(self._path(site.key, "sites.key"), "sites.key")
            if key in keys:
                raise ConfigError("sites.key", site.key, f"is {keys[key]}'s key, too; each site makes its own")
            keys[key] = site.name
        return keys

    @property
    def state(self) -> Path:
        """Return the folder with database, keys and certificates."""
        return self._path(self.settings.server.state, "server.state")

    @property
    def ca(self) -> Path:
        """Return the project's own certificate, which sites check the server's with."""
        return self.state / "ca.crt"

    @property
    def superlink(self) -> str:
        """Return the SuperLink's address, on this machine alone."""
        return f"127.0.0.1:{self.settings.server.loopback}"

    @property
    def own_certificate(self) -> tuple[Path, Path] | None:
        """Return chain and key of the server's own certificate, if it has one."""
        server = self.settings.server
        if server.certificate is None or server.key is None:
            return None
        chain, key = self._path(server.certificate, "server.certificate"), self._path(server.key, "server.key")
        for name, path in (("server.certificate", chain), ("server.key", key)):
            if not path.is_file():
                raise ConfigError(name, str(path), "there is no such file")
        return chain, key

    def _path(self, text: str, key: str) -> Path:
        return self.file.parent / user_path(text, key)
