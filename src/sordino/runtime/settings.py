"""The `[runtime]` table of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sordino.errors import ConfigError

READ_BY = {"trim": "trimmed-mean", "norm_bound": "norm-bound"}  # the aggregation that reads a key


class RuntimeSettings(BaseModel):
    """The settings of a round that do not depend on the method."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    participation: float = Field(default=1.0, gt=0, le=1, description="fraction of the clients that train in a round")
    weighting: Literal["examples", "uniform"] = Field(
        default="examples",
        description="'examples': clients tell the server how many examples they hold, and averages are weighted by it; "
        "'uniform': they do not, and each counts the same",
    )
    aggregation: Literal["mean", "trimmed-mean", "median", "norm-bound"] = Field(
        default="mean",
        description="what the server makes of uploads: their weighted 'mean'; the 'trimmed-mean' or the 'median' of "
        "each coordinate, in which every client counts the same; 'norm-bound': the weighted mean of uploads that were "
        "shortened to norm_bound",
    )
    trim: float = Field(
        default=0.1, ge=0, lt=0.5, description="trimmed-mean: fraction of the clients that is cut at each end"
    )
    norm_bound: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="norm-bound: the largest norm of an upload"
    )
    evaluate_every: int = Field(default=1, ge=1, description="rounds between evaluations; the last is always evaluated")
    checkpoint_every: int = Field(default=5, ge=1, description="rounds between checkpoints")

    @model_validator(mode="after")
    def _check_meant(self) -> RuntimeSettings:
        """Refuse a bound on attackers where no aggregation is named: the plain mean keeps none."""
        if "aggregation" not in self.model_fields_set:
            for key, kind in READ_BY.items():
                if (value := getattr(self, key)) != type(self).model_fields[key].default:
                    remedy = f"needs runtime.aggregation = {kind!r}; the plain mean of uploads ignores it"
                    raise ConfigError(f"runtime.{key}", value, remedy)
        return self


def participant_count(clients: int, participation: float) -> int:
    """Return the number of clients that take part in a round."""
    return max(1, round(participation * clients))
