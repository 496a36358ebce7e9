"""Hyper-parameters of `sgpt`; `sordino.algorithms.sgpt` says what they do."""

from dataclasses import field

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        groups: number of group prompts to pick from.
        prompt_length: tokens of a prompt in each of its layers.
        shared_layers: number of layers, the first ones, that shared prompts join.
        group_layers: number of the next layers that group prompts join; the group is picked before the first of them.
            On a tower that has too few layers, at most half of them are grouped and the rest shared.
        hand_written: the prompt whose class features are the head.
        local_steps: gradient steps a client takes between averagings, of both parts together.
        shared_share: the share of them, rounded down, that trains the shared prompts; they come first.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps, afresh in each part.
        attraction: weight of the term that moves a key to the images that chose it.
        group_momentum, key_momentum: the share of the old group prompts and keys that the server keeps.
    """

    groups: PositiveInt = 20
    prompt_length: PositiveInt = 1
    shared_layers: PositiveInt = 5
    group_layers: PositiveInt = 2
    hand_written: str = "a photo of a"
    local_steps: PositiveInt = 4
    shared_share: float = Field(default=0.5, ge=0, le=1)
    batch_size: NonNegativeInt = 40
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.01, momentum=0.9, weight_decay=1e-5))
    attraction: NonNegativeFloat = 1.0
    group_momentum: float = Field(default=0.5, ge=0, lt=1)
    key_momentum: float = Field(default=0.5, ge=0, lt=1)

    def layers(self, depth: int) -> tuple[int, int]:
        """Return the numbers of shared and of grouped layers of a tower of `depth`."""
        if self.shared_layers + self.group_layers <= depth:
            return self.shared_layers, self.group_layers
        grouped = min(self.group_layers, depth // 2)
        return min(self.shared_layers, depth - grouped), grouped
