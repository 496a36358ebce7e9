"""The `[runtime]` table of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RuntimeSettings(BaseModel):
    """How rounds are run, whatever the method."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    participation: float = Field(default=1.0, gt=0, le=1, description="fraction of the clients that train in a round")
    weighting: Literal["examples", "uniform"] = Field(
        default="examples",
        description="'examples': clients tell the server how many examples they hold, and averages are weighted by it; "
        "'uniform': they do not, and each counts the same",
    )
    evaluate_every: int = Field(default=1, ge=1, description="rounds between evaluations; the last is always evaluated")
    checkpoint_every: int = Field(default=5, ge=1, description="rounds between checkpoints")
