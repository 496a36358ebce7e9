"""The `[privacy]` table of a configuration."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sordino.errors import ConfigError
from sordino.privacy.ledger import Unit

Mechanism = Literal["none", "dp-sgd", "cotangent", "dp-fedavg"]
NoiseBy = Literal["client", "server", "shares"]

# Epsilon can be computed for these budgets and this noise; beyond them, floats have no room for it.
LEAST_EPSILON, MOST_EPSILON = 1e-9, 1e6
EPSILONS = f"from {LEAST_EPSILON:g} to {MOST_EPSILON:g}, or inf for no noise"
LEAST_MULTIPLIER, MOST_MULTIPLIER = 1e-30, 1e9
MULTIPLIERS = f"from {LEAST_MULTIPLIER:g} to {MOST_MULTIPLIER:g}, or 0 for no noise"


class PrivacySettings(BaseModel):
    """The `[privacy]` table: mechanism, budget, clip, and who adds the noise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mechanism: Mechanism = Field(
        default="none",
        description="'dp-sgd': every example's gradient is clipped, the sum noised; 'cotangent': likewise the loss's "
        "derivative by the text features; 'dp-fedavg': every client's upload, and the client is the unit of privacy",
    )
    epsilon: float | None = Field(
        default=None, gt=0, description="the budget; sets the noise unless noise_multiplier does"
    )
    delta: float | None = Field(default=None, description="below one over the number of units; by default well below")
    noise_multiplier: float | None = Field(
        default=None,
        ge=0,
        description="standard deviation of the noise over the sensitivity; by default as epsilon needs",
    )
    clip: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="the largest norm of a contribution: an example's gradient (dp-sgd), its error p - y "
        "(cotangent), a client's upload (dp-fedavg)",
    )
    personal_clip: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="dp-sgd: clip of personal parameters, if another",
    )
    shared_budget: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="dp-sgd, personal and shared parameters: the part of the budget that the shared ones get",
    )
    noise_by: NoiseBy = Field(
        default="client",
        description="who adds the noise: each client, enough for itself; the server, once, to the mean; or each client "
        "a share of what the mean needs",
    )
    subspace: int = Field(
        default=16, ge=1, description="cotangent: public directions that image features are projected on"
    )
    directions: Literal["names", "images"] = Field(
        default="names",
        description="cotangent: those directions are singular vectors of text features of public class names, or of "
        "features of the public images in data.public",
    )
    clip_quantile: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="dp-fedavg: adapt clip until this share of the uploads is below it (Andrew et al., 2021)",
    )
    clip_learning_rate: float = Field(default=0.2, gt=0, description="dp-fedavg: of the logarithm of an adaptive clip")
    colluders: int = Field(
        default=1,
        ge=0,
        description="noise_by = 'shares': clients that may pool what they know; noise is enough without their shares",
    )
    dropouts: int = Field(
        default=0, ge=0, description="noise_by = 'shares': clients that may drop out of a sum; likewise"
    )
    simulation: bool = Field(
        default=False,
        description="noise and samples that can be drawn again, from seed and nonce instead of the operating system; "
        "such a run is called simulated, never private",
    )
    nonce: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{32}$",
        description="simulation: 32 hexadecimal digits that tell this run's noise from all others'; drawn if absent",
    )

    @property
    def on(self) -> bool:
        """True if contributions are clipped and noised."""
        return self.mechanism != "none"

    @property
    def unit(self) -> Unit:
        """Return the unit of privacy: what neighboring data sets differ in."""
        return "client" if self.mechanism == "dp-fedavg" else "example"

    @model_validator(mode="after")
    def _consistent(self) -> PrivacySettings:
        if self.nonce is not None and not self.simulation:
            raise ConfigError("privacy.nonce", self.nonce, "only a simulation has one; set privacy.simulation = true")
        budget = self.epsilon
        if budget is not None and math.isfinite(budget) and not LEAST_EPSILON <= budget <= MOST_EPSILON:
            raise ConfigError("privacy.epsilon", budget, f"must be {EPSILONS}")
        if self.noise_multiplier and not LEAST_MULTIPLIER <= self.noise_multiplier <= MOST_MULTIPLIER:
            raise ConfigError("privacy.noise_multiplier", self.noise_multiplier, f"must be {MULTIPLIERS}")
        if not self.on:
            return self
        if self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError(
                "privacy.epsilon", None, f"mechanism {self.mechanism!r} needs epsilon or noise_multiplier"
            )
        if self.mechanism == "cotangent" and self.noise_by != "client":
            raise ConfigError(
                "privacy.noise_by", self.noise_by, "the mechanism 'cotangent' has each client add the noise"
            )
        if self.mechanism == "cotangent" and self.clip > math.sqrt(2):
            raise ConfigError("privacy.clip", self.clip, "p - y has a norm of at most sqrt(2); choose clip <= 1.414")
        if self.directions != "names" and self.mechanism != "cotangent":
            raise ConfigError(
                "privacy.directions", self.directions, "only 'cotangent' projects on directions; leave it out"
            )
        if self.clip_quantile is not None and self.mechanism != "dp-fedavg":
            raise ConfigError("privacy.clip_quantile", self.clip_quantile, "only 'dp-fedavg' adapts clip; leave it out")
        return self
