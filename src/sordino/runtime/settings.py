"""The `[runtime]` table of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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


def participant_count(clients: int, participation: float) -> int:
    """Return the number of clients that take part in a round."""
    return max(1, round(participation * clients))
