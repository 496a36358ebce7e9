"""The configuration of an experiment across machines: an experiment without data, and a `[fleet]` table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sordino.errors import config_error
from sordino.experiments.config import Experiment, check_overrides, parse_config
from sordino.experiments.toml_tables import read_tables
from sordino.runtime.fleet import Patience
from sordino.sites.proposal import Proposal

# The coordinator holds no pictures; these stand where a configuration needs some.
NO_DATA = {"data": {"source": "digits"}, "partition": {"scheme": "iid", "clients": 1}}


class FleetSettings(BaseModel):
    """The `[fleet]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    quorum: float = Field(default=1.0, gt=0, le=1, description="the fraction of the sites asked that is enough")
    deadline: float = Field(
        default=600.0, gt=0, description="seconds after which nobody is waited for, before and in a round"
    )
    grace: float = Field(default=30.0, ge=0, description="seconds that the others have once a quorum has answered")
    sites: list[str] = Field(
        default_factory=list,
        description="the sites that are waited for before the first round, until the deadline; absent: those there",
    )
    class_names: list[str] | None = Field(
        default=None, min_length=2, description="the classes, in order; absent: those of the sites, which must be equal"
    )


@dataclass(frozen=True)
class FleetConfig:
    """A configuration across machines.

    Attributes:
        experiment: what is run, with the coordinator's own encoder and device.
        fleet: how long it waits, and for how many.
    """

    experiment: Experiment
    fleet: FleetSettings

    @property
    def patience(self) -> Patience:
        """Return how long a server waits, and for how many."""
        return Patience(self.fleet.quorum, self.fleet.deadline, self.fleet.grace, tuple(self.fleet.sites))

    def proposal(self, key: Ed25519PrivateKey | None = None) -> Proposal:
        """Return what is proposed to sites, signed if there is a key."""
        names = self.fleet.class_names
        return Proposal.of(self.experiment, None if names is None else tuple(names), key)


def load_fleet_config(path: Path, overrides: Sequence[str] = ()) -> FleetConfig:
    """Read a configuration across machines. `[data]` and `[partition]` may be left out, and are not used.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value is not allowed.
    """
    tables = read_tables(path, overrides)
    check_overrides(tables, overrides)
    fleet = tables.pop("fleet", {})
    try:
        settings = FleetSettings.model_validate(fleet)
    except ValidationError as error:
        raise config_error(error, FleetSettings, "fleet") from None
    return FleetConfig(parse_config(NO_DATA | tables), settings)
