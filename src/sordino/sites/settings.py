"""A site's own file, `site.toml`: its data, where it keeps state, and what it allows. No message can change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sordino.errors import ConfigError
from sordino.experiments.config import EncoderSettings
from sordino.experiments.toml_tables import read_model
from sordino.files import user_path
from sordino.privacy.ledger import Unit
from sordino.privacy.settings import Mechanism, NoiseBy
from sordino.tasks.settings import DataSettings, PartitionSettings

Fact = Literal["sizes", "accuracy", "class_names"]
FINGERPRINT = 64  # hexadecimal digits of an experiment's fingerprint


def is_fingerprint(text: str) -> bool:
    """Tell whether a text may be the fingerprint of an experiment."""
    return len(text) == FINGERPRINT and set(text) <= set("0123456789abcdef")


class PolicySettings(BaseModel):
    """The `[policy]` table: which experiments a site takes part in, and what may leave it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    experiments: list[str] = Field(
        default_factory=list,
        description="fingerprints of allowed experiments (`sordino site check` prints them), or 'any'",
    )
    signers: list[str] = Field(
        default_factory=list,
        description="files with the public Ed25519 keys (PEM) of those whose signed experiments are allowed",
    )
    mechanisms: list[Mechanism] = Field(
        default=["statistics", "dp-sgd", "cotangent", "dp-fedavg"],
        description="allowed privacy mechanisms; 'none' allows experiments that add no noise, also of a mechanism "
        "whose noise is 0",
    )
    noise_by: list[NoiseBy] = Field(
        default=["client", "shares"],
        description="who may add the noise; 'server' trusts the server with exact uploads",
    )
    epsilon: float = Field(
        gt=0, description="the most that all experiments together may spend, against the server, at delta; inf: any"
    )
    delta: float = Field(default=1e-5, gt=0, lt=1, description="at which epsilon is counted")
    unit: Unit = Field(default="example", description="what epsilon protects: 'example', 'person' or 'client'")
    tells: list[Fact] = Field(
        default=["sizes", "class_names"],
        description="facts that may leave besides a method's upload: 'sizes' (how many examples, or persons, it "
        "holds), 'class_names' (in words; their digest always does), 'accuracy' (without noise)",
    )
    fields: list[str] = Field(
        default=["*"],
        description="names of tensors that may leave, of uploads and of a release of statistics; '*': all that the "
        "method declares",
    )
    most_bytes: int = Field(default=2**28, ge=1, description="the longest request that is read")

    @field_validator("experiments", mode="before")
    @classmethod
    def _any_alone(cls, value: Any) -> Any:
        return ["any"] if value == "any" else value

    @field_validator("experiments")
    @classmethod
    def _fingerprints(cls, names: list[str]) -> list[str]:
        for name in names:
            if name != "any" and not is_fingerprint(name):
                raise ValueError(f"{name!r} is neither 'any' nor {FINGERPRINT} hexadecimal digits")
        return names


class SiteSettings(BaseModel):
    """A site's file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(
        pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="the site's name, as its certificate or key says it"
    )
    state: str = Field(default="state", description="the folder that keeps state, answers and the ledger")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where tensors live")
    data: DataSettings = Field(description="as in a configuration; a path is from the site's file")
    partition: PartitionSettings | None = Field(
        default=None,
        description="divides the data over clients, some of which this site holds; absent: all of it is one client's",
    )
    clients: list[int] | None = Field(
        default=None, min_length=1, description="with a partition: the numbers of its clients that this site holds"
    )
    encoder: EncoderSettings | None = Field(
        default=None, description="where this site has the encoder; its fingerprint must be that of the experiment's"
    )
    policy: PolicySettings

    @model_validator(mode="after")
    def _clients_need_a_partition(self) -> SiteSettings:
        if (self.clients is None) != (self.partition is None):
            raise ValueError("clients and [partition] come together: one says which clients the other has")
        if self.clients is not None and self.partition is not None:
            if len(set(self.clients)) < len(self.clients) or min(self.clients) < 0:
                raise ValueError("clients must be different numbers from 0")
            if max(self.clients) >= self.partition.clients:
                raise ValueError(f"client {max(self.clients)} is not one of the partition's {self.partition.clients}")
        return self


def load_site(path: Path) -> SiteSettings:
    """Read a site's file. Relative paths in it are from the folder where it really is, if `path` is a link to it.

    Every program that opens the file, whether it answers a server or tells its owner what was spent, finds one state.

    Raises:
        ConfigError: it is missing or malformed, or a key or value is not allowed.
    """
    site = read_model(path, SiteSettings, "SITE.toml")
    folder = path.resolve().parent

    def absolute(text: str, key: str) -> str:
        return str(folder / user_path(text, key))

    kind, colon, rest = site.data.source.partition(":")
    data = site.data
    if kind in ("imagefolder", "table") or rest.startswith((".", "/", "~")):
        data = data.model_copy(update={"source": kind + colon + absolute(rest, "data.source")})
    for key in ("public", "persons"):
        if (value := getattr(data, key)) is not None:
            data = data.model_copy(update={key: absolute(value, f"data.{key}")})
    policy = site.policy.model_copy(
        update={"signers": [absolute(file, "policy.signers") for file in site.policy.signers]}
    )
    state = absolute(site.state, "state")
    if any(not Path(file).is_file() for file in policy.signers):
        missing = next(file for file in policy.signers if not Path(file).is_file())
        raise ConfigError("policy.signers", missing, "there is no such file; put the signer's public key there")
    return site.model_copy(update={"data": data, "policy": policy, "state": state})
