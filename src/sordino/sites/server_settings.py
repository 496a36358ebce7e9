"""The server's own file, `coordinator.toml`: where it keeps runs, where it has encoders, and who is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sordino.errors import ConfigError
from sordino.experiments.config import Experiment
from sordino.experiments.toml_tables import read_model
from sordino.experiments.tracking import TrackingSettings
from sordino.files import user_path
from sordino.sites.fleet_config import NO_DATA
from sordino.sites.proposal import Proposal

COORDINATOR_FILE = "coordinator.toml"


class CoordinatorSettings(BaseModel):
    """The file of a server."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    runs: str = Field(default="runs", description="the folder of run directories; a path is from the file")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where tensors live")
    checkpoints: dict[str, str] = Field(
        default_factory=dict, description="encoder's name to its checkpoint here: clip = 'folder or hub name'"
    )

    tracking: TrackingSettings | None = Field(default=None, description="who is sent each round's metrics from here")

    def config(self, proposal: Proposal) -> Experiment:
        """Return the configuration of a proposed experiment, at this server.

        Raises:
            ConfigError: a key or value is not allowed, or the encoder's checkpoint is not named here.
        """
        name = proposal.tables.get("encoder", {}).get("name", "bundled")
        own: dict[str, Any] = {"device": self.device, **NO_DATA}
        if self.tracking is not None:
            own["tracking"] = self.tracking.model_dump()
        if name != "bundled":
            if name not in self.checkpoints:
                remedy = f"the experiment needs encoder {name!r}; say in the server's {COORDINATOR_FILE} where it is"
                raise ConfigError(f"checkpoints.{name}", None, remedy)
            own["encoder"] = {"checkpoint": self.checkpoints[name]}
        return proposal.config(own)

    def folder(self, proposal: Proposal) -> Path:
        """Return the run directory of an experiment: the same one for every job of it."""
        return Path(self.runs) / proposal.fingerprint


def load_coordinator(file: Path, runs: str = "../runs") -> CoordinatorSettings:
    """Read a server's file. Relative paths are from its own folder.

    Args:
        file: it may be missing.
        runs: where runs are kept then.

    Raises:
        ConfigError: it is malformed, or a key or value is not allowed.
    """
    file = file.resolve()
    settings = (
        read_model(file, CoordinatorSettings, COORDINATOR_FILE) if file.exists() else CoordinatorSettings(runs=runs)
    )
    kept = str(file.parent / user_path(settings.runs, "runs"))
    checkpoints = {
        name: str(path) if (path := file.parent / user_path(value, f"checkpoints.{name}")).exists() else value
        for name, value in settings.checkpoints.items()
    }
    tracking = settings.tracking
    if tracking is not None and "://" not in tracking.where:
        tracking = tracking.model_copy(update={"where": str(file.parent / user_path(tracking.where, "tracking.where"))})
    return settings.model_copy(update={"runs": kept, "checkpoints": checkpoints, "tracking": tracking})
