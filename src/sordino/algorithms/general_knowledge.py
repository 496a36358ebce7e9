"""The class features of a hand-written prompt, which several methods keep near to or learn beside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import PromptModel


@dataclass(frozen=True)
class GeneralKnowledgeModel(PromptModel):
    """CoOp's model, which also knows the class features of a hand-written prompt.

    Attributes:
        hand_written: the words before the class name.
    """

    hand_written: str = "a photo of a"

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.hand_written)

    @cached_property
    def _general(self) -> Tensor:
        """Return the class features [C, D] of the hand-written prompt, computed once."""
        with torch.no_grad():
            return self.text_features(self.encoder.embed(self.hand_written)[None])[0]
