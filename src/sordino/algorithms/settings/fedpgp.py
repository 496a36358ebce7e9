"""Hyper-parameters of `fedpgp`; `sordino.algorithms.fedpgp` says what they do."""

from dataclasses import field

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sordino.algorithms.optimizer import Optimizer
from sordino.algorithms.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Settings:
    """Hyper-parameters.

    Attributes:
        context_length: M, the number of learned vectors.
        initial_context: words that the shared context starts from, at its end; empty for random vectors alone.
        rank: b, of the personal part; 0 for none.
        local_steps: gradient steps a client takes between averagings.
        batch_size: examples a step and client; 0 takes all of them.
        optimizer: of a client's local steps, for all parts.
        contrast: mu, the weight of the contrastive loss; 0 leaves it out.
        temperature: t, of the contrastive loss.
        hand_written: the prompt whose class features stand for general knowledge.
    """

    context_length: PositiveInt = 16
    initial_context: str = ""
    rank: NonNegativeInt = 4
    local_steps: PositiveInt = 4
    batch_size: NonNegativeInt = 32
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=0.001))
    contrast: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 0.5
    hand_written: str = "a photo of a"
