"""The `[privacy]` table of a configuration."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sordino.errors import ConfigError
from sordino.privacy.ledger import Unit

Mechanism = Literal["none", "statistics", "dp-sgd", "cotangent", "dp-fedavg"]
NoiseBy = Literal["client", "server", "shares"]
BY_CLIENT: tuple[Mechanism, ...] = ("dp-fedavg",)  # mechanisms whose unit is the client, and no other
BY_PERSON: tuple[Mechanism, ...] = (
    "statistics",
    "dp-sgd",
    "cotangent",
)  # who can protect a person

# Epsilon can be computed for these budgets and this noise; beyond them, floats have no room for it.
LEAST_EPSILON, MOST_EPSILON = 1e-9, 1e6
EPSILONS = f"from {LEAST_EPSILON:g} to {MOST_EPSILON:g}, or inf for no noise"
LEAST_MULTIPLIER, MOST_MULTIPLIER = 1e-30, 1e9
# Clipped numbers far below the largest of float32 and far above the least: where floats lie as far apart as the clip is
# long, rounding makes a clipped vector up to twice as long, and noise on it is lost.
LEAST_CLIP, MOST_CLIP = 1e-20, 1e20
MOST_BESIDE = 0.8  # of the budget may go to what is released beside class statistics
# Keys that a run with an earlier release of statistics takes from it.
OF_A_RELEASE = (
    *("noise_multiplier", "epsilon", "delta", "noise_by", "shared_budget", "subspace", "directions"),
    *("count_share", "center_share", "scatter_share", "sampling_rate"),
    *("unit", "person_images", "clip", "colluders", "dropouts", "simulation", "nonce"),
)
MULTIPLIERS = f"from {LEAST_MULTIPLIER:g} to {MOST_MULTIPLIER:g}, or 0 for no noise"


class PrivacySettings(BaseModel):
    """The `[privacy]` table: mechanism, budget, clip, and who adds the noise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mechanism: Mechanism = Field(
        default="none",
        description="'statistics': class counts and class means of frozen features are released once, and everything "
        "after is free; 'dp-sgd': every example's gradient is clipped, the sum noised; 'cotangent': likewise the "
        "loss's derivative by the text features; 'dp-fedavg': every client's upload, and the client is the unit of "
        "privacy",
    )
    unit: Unit = Field(
        default_factory=lambda before: _default_unit(before),
        description="what neighboring data sets differ in: 'example', 'person' (all images of one person; statistics, "
        "dp-sgd and cotangent) or 'client' (dp-fedavg, and its default); absent: else 'example'",
    )
    person_images: int = Field(
        default=16, ge=1, description="unit = 'person': most images of a person in a batch, the first ones of them"
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
        ge=LEAST_CLIP,
        le=MOST_CLIP,
        allow_inf_nan=False,
        description="the largest norm of a contribution: an example's gradient (dp-sgd), its error p - y "
        "(cotangent), the sum of either over a person's images (unit = 'person'), a client's upload (dp-fedavg)",
    )
    personal_clip: float | None = Field(
        default=None,
        ge=LEAST_CLIP,
        le=MOST_CLIP,
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
    subspace: int | None = Field(
        default=None,
        ge=1,
        description="public directions that image features are projected on; by default 16 for cotangent, all for "
        "statistics",
    )
    count_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="statistics: the part of a contribution's squared norm that class counts get; by default from "
        "noise, classes and examples",
    )
    center_share: float | None = Field(
        default=None,
        ge=0,
        le=0.5,
        description="statistics: the part of the budget for the mean feature, from which all are then seen; by default "
        "from noise, width and examples",
    )
    scatter_share: float | None = Field(
        default=None,
        ge=0,
        le=0.5,
        description="statistics: the part of the budget for features' squares and products, which say how images of a "
        "class vary; by default from noise, width and examples",
    )
    sampling_rate: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="statistics: the probability with which an example is in the release (Poisson sampling)",
    )
    held_error: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="statistics: a client trains on a class unless the release says that it holds none with more than "
        "this probability",
    )
    release: str | None = Field(
        default=None,
        description="statistics: a run directory whose release is used again, at no cost; it must be of the same data",
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
    compress: bool = Field(
        default=False,
        description="dp-fedavg, noise_by = 'server': send uploads as small integers whose rounding is the noise "
        "(CEPAM); the server knows the dither and sees no noise",
    )
    colluders: int = Field(
        default=1,
        ge=1,  # each client knows its own share, and is an observer of the others
        description="noise_by = 'shares', or compress: clients that may pool what they know, those of one site at "
        "least; noise is enough without their shares",
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

    def samples_clients(self, participation: float) -> bool:
        """Tell whether a round's clients are a Poisson sample: where noise is for a sum of clients at the server."""
        return self.mechanism == "dp-fedavg" and self.noise_by == "server" and participation < 1

    @property
    def on(self) -> bool:
        """True if contributions are clipped and noised."""
        return self.mechanism != "none"

    @property
    def by_person(self) -> bool:
        """True if a mechanism clips and samples persons, each with all their images."""
        return self.on and self.unit == "person"

    @model_validator(mode="after")
    def _consistent(self) -> PrivacySettings:
        if self.nonce is not None and not self.simulation:
            raise ConfigError("privacy.nonce", self.nonce, "only a simulation has one; set privacy.simulation = true")
        budget = self.epsilon
        if budget is not None and math.isfinite(budget) and not LEAST_EPSILON <= budget <= MOST_EPSILON:
            raise ConfigError("privacy.epsilon", budget, f"must be {EPSILONS}")
        if self.noise_multiplier and not LEAST_MULTIPLIER <= self.noise_multiplier <= MOST_MULTIPLIER:
            raise ConfigError("privacy.noise_multiplier", self.noise_multiplier, f"must be {MULTIPLIERS}")
        if self.release is not None and self.mechanism != "statistics":
            raise ConfigError("privacy.release", self.release, "needs privacy.mechanism = 'statistics'")
        if not self.on:
            self._check_meant()
            return self
        self._check_unit()
        if self.sampling_rate != 1 and self.mechanism != "statistics":
            remedy = "only 'statistics' samples once; others sample every batch, see settings.batch_size"
            raise ConfigError("privacy.sampling_rate", self.sampling_rate, remedy)
        if (self.center_share or 0) + (self.scatter_share or 0) > MOST_BESIDE:
            remedy = f"with privacy.center_share it may be {MOST_BESIDE}; class statistics need the rest"
            raise ConfigError("privacy.scatter_share", self.scatter_share, remedy)
        if self.epsilon is None and self.noise_multiplier is None and self.release is None:
            raise ConfigError(
                "privacy.epsilon", None, f"mechanism {self.mechanism!r} needs epsilon or noise_multiplier"
            )
        if self.mechanism == "cotangent" and self.noise_by != "client":
            raise ConfigError(
                "privacy.noise_by", self.noise_by, "the mechanism 'cotangent' has each client add the noise"
            )
        most = math.sqrt(2) * (self.person_images if self.by_person else 1)
        if self.mechanism == "cotangent" and self.clip > most:
            images = f" for each of {self.person_images} images" if self.by_person else ""
            allowed = f"p - y has a norm of at most sqrt(2){images}; choose clip <= {math.floor(1000 * most) / 1000:g}"
            raise ConfigError("privacy.clip", self.clip, allowed)
        if self.directions != "names" and self.mechanism not in ("cotangent", "statistics"):
            raise ConfigError(
                "privacy.directions", self.directions, "only 'cotangent' and 'statistics' project; leave it out"
            )
        if self.directions != "names" and self.mechanism == "statistics" and self.subspace is None:
            raise ConfigError("privacy.subspace", None, "with directions = 'images', say how many of them, such as 16")
        if self.clip_quantile is not None and self.mechanism != "dp-fedavg":
            raise ConfigError("privacy.clip_quantile", self.clip_quantile, "only 'dp-fedavg' adapts clip; leave it out")
        self._check_compression()
        return self

    def _check_compression(self) -> None:
        """Refuse a compression whose error is not the noise that the mechanism needs.

        Raises:
            ConfigError: of the key that does not fit.
        """
        if not self.compress:
            return
        if (self.mechanism, self.noise_by) != ("dp-fedavg", "server"):
            needs = (
                "needs mechanism = 'dp-fedavg' and noise_by = 'server': a server that knows the dither sees no noise"
            )
            raise ConfigError("privacy.compress", True, needs)
        if self.clip_quantile is not None:
            raise ConfigError("privacy.clip_quantile", self.clip_quantile, "with privacy.compress the clip is fixed")
        if self.noise_multiplier == 0 or self.epsilon == math.inf:
            needs = "without noise there is no error to round by; give a finite epsilon, or leave it out"
            raise ConfigError("privacy.compress", True, needs)

    def _check_meant(self) -> None:
        """Refuse a value, such as a budget, of a mechanism that nobody named: such a run would not be private at all.

        Where mechanism = 'none' was chosen, it turns off what the rest of the table says.

        Raises:
            ConfigError: the table has one, and no mechanism.
        """
        if "mechanism" in self.model_fields_set:
            return
        for key, field in type(self).model_fields.items():
            default = field.get_default(call_default_factory=True, validated_data={"mechanism": self.mechanism})
            if (value := getattr(self, key)) != default:
                off = "'none' clips nothing, adds no noise and keeps no budget"
                raise ConfigError(f"privacy.{key}", value, f"needs privacy.mechanism, such as 'statistics'; {off}")

    def _check_unit(self) -> None:
        """Refuse a unit that the mechanism does not protect.

        Raises:
            ConfigError: it protects another one.
        """
        if self.unit == "person" and self.mechanism not in BY_PERSON:
            *others, last = map(repr, BY_PERSON)
            raise ConfigError(
                "privacy.unit",
                "person",
                f"the mechanism {self.mechanism!r} does not bound what a person's images contribute; use "
                f"{', '.join(others)} or {last}, or leave privacy.unit out",
            )
        if (self.unit == "client") != (self.mechanism in BY_CLIENT):
            units = "'client'" if self.mechanism in BY_CLIENT else "'example' or 'person'"
            allowed = f"the unit of mechanism {self.mechanism!r} is {units}; set that, or leave privacy.unit out"
            raise ConfigError("privacy.unit", self.unit, allowed)


def _default_unit(before: dict[str, Any]) -> Unit:
    """Return the unit where none is set, from the fields that were checked before it."""
    return "client" if before.get("mechanism") in BY_CLIENT else "example"
