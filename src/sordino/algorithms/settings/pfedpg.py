"""Hyper-parameters of `pfedpg`; `sordino.algorithms.pfedpg` says what they do."""

from dataclasses import field

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT
from sordino.errors import ConfigError


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        prompt_length: number of tokens of a prompt.
        descriptor_length: number of vectors that describe a client: 1, or the number of the prompt's tokens.
        attention_width: l, of the generator's queries, keys and values.
        hand_written: the prompt whose class features are the head.
        local_steps: gradient steps a client takes between two generations.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps.
        server_optimizer: of the generator, the base prompts and the descriptors.
    """

    prompt_length: PositiveInt = 10
    descriptor_length: PositiveInt = 1
    attention_width: PositiveInt = 64
    hand_written: str = "a photo of a"
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 64
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.25, weight_decay=0.001))
    server_optimizer: Optimizer = field(default_factory=lambda: Optimizer(name="adam", learning_rate=0.001))

    def __post_init__(self) -> None:
        if self.descriptor_length not in (1, self.prompt_length):
            raise ConfigError(
                "descriptor_length", self.descriptor_length, f"must be 1 or prompt_length = {self.prompt_length}"
            )
