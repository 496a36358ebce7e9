"""Hyper-parameters of `secfpp`; `sordino.algorithms.secfpp` says what they do."""

from dataclasses import field
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sordino import secure
from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT
from sordino.errors import ConfigError
from sordino.secure.setup import Reveal


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors.
        initial_context: words that the domain-level part starts from, at its end; empty for random vectors alone.
        local_steps: gradient steps a client takes a round; while it is alone, of the domain-level part.
        balanced: true if those use batches in which each class of a client counts alike.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of both parts; its state stays at the client.
        cluster_every: rounds between two clusterings; clients learn alone before the first.
        clusters: their number; 0 lets it adapt.
        search: "pairs" opens the distances between all clients; "centers" those that k-means with splits and merges
            asks for, which are fewer, and finds less.
        significance: with "pairs", how often noise alone may look as split as a split that is kept.
        width: d, the largest number of values a prompt is reduced to.
        reveal: "distances", or "ratios" of a client's distances to each other, without their scale.
        colluders: T, the number of clients that may pool everything they hold and learn nothing of others' prompts,
            but the mean of the others in their cluster, who are two or more.
        smallest_cluster: fewest clients of a cluster whose mean is opened; 0 takes the fewest that are allowed, which
            is max(3, T + 2). More hide each other better.
        dropouts: the share of a round's clients that may vanish in the middle of it.
        largest: entries of the domain-level part's change since the start are cut down to this size.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    local_steps: PositiveInt = 4
    balanced: bool = True
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.002))
    cluster_every: PositiveInt = 10
    clusters: NonNegativeInt = 0
    search: Literal["pairs", "centers"] = "pairs"
    significance: float = Field(default=0.05, gt=0, lt=1)
    width: PositiveInt = 512
    reveal: Reveal = "distances"
    colluders: PositiveInt = 1
    smallest_cluster: NonNegativeInt = 0
    dropouts: float = Field(default=0.25, ge=0, lt=1)
    largest: PositiveFloat = 4.0

    def __post_init__(self) -> None:
        if self.smallest_cluster and self.smallest_cluster < secure.fewest_members(self.colluders):
            least = secure.fewest_members(self.colluders)
            why = f"must be 0, or {least} or more with colluders = {self.colluders}"
            raise ConfigError(
                "smallest_cluster",
                self.smallest_cluster,
                f"{why}: the mean goes to the members, who could compute the last one's prompt from it",
            )

    @property
    def minimum(self) -> int:
        """Return the fewest clients of a cluster whose mean is opened."""
        return self.smallest_cluster or secure.fewest_members(self.colluders)
