"""How a prompt and a picture meet in a generative model: scores of class names, with a bounded amount of work at once.

Every prompt meets every picture inside the language model, so every example of every client is a row of its own, and
an example's gradient by its client's prompt comes from its own pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.cache import Kind
from sordino.encoders.prompt_model import NUMBERS_AT_ONCE, Prompt, PromptModel

if TYPE_CHECKING:  # it brings transformers
    from sordino.encoders.generative.answers import Answers
    from sordino.encoders.generative.encoder import GenerativeEncoder


def context_model(encoder: DualEncoder, classes: ClassTokens) -> PromptModel:
    """Return the model by which a context and images meet in an encoder: by features, or by likelihoods."""
    kind = GenerativeModel if Capability.LIKELIHOODS in encoder.capabilities else PromptModel
    return kind(encoder, classes)


@dataclass(frozen=True)
class GenerativeModel(PromptModel):
    """The model of every method whose prompt is a context, in an encoder of likelihoods.

    Logits are mean log-likelihoods of class names, in nats a token.
    """

    linear: ClassVar[bool] = False
    prompts_images: ClassVar[bool] = True

    @property
    def reads(self) -> Kind:
        return self._generative.kind

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return the contexts [P, M, E]: nothing can be computed before a prompt meets a picture."""
        assert isinstance(prompt, Tensor)
        return prompt

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        """Return logits [P, B, C] of images [P, B, S, W]; one of P prompts, or the images of one, may serve all.

        Rows of prompt and image that are too many for one pass are computed in pieces, which backward recomputes.
        """
        assert isinstance(prompt, Tensor)
        prompts, count = max(len(prompt), len(images)), images.shape[1]
        prompt, images = prompt.expand(prompts, -1, -1), images.expand(prompts, -1, -1, -1)
        rows = torch.arange(prompts * count, device=prompt.device)
        if not len(rows):
            return images.new_zeros(prompts, 0, len(self.classes)) + 0 * prompt.sum()
        pieces = rows.split(self._rows_at_once(prompt))
        scored = []
        for piece in pieces:
            context = prompt[piece // count]
            state = images[(piece // count).to(images.device), (piece % count).to(images.device)]
            if len(pieces) > 1 and torch.is_grad_enabled() and context.requires_grad:
                scored.append(checkpoint(self._likelihoods, context, state, use_reentrant=False))
            else:
                scored.append(self._likelihoods(context, state))
        return torch.cat(scored).view(prompts, count, -1)

    def flops(self, prompt: Prompt, images: int) -> float:
        return images * super().flops(prompt, images)

    def images_at_once(self, prompts: int) -> int:
        # A plain guess of the prompt's length is enough: `scores` bounds the work itself.
        row = self.encoder.text_flops(1, 16, self.classes)
        return max(1, math.floor(self._budget / (prompts * row)))

    def _rows_at_once(self, prompt: Tensor) -> int:
        generative, answers = self._generative, cast("Answers", self.classes)
        by_work = self._budget / generative.text_flops(1, prompt.shape[-2], self.classes)
        by_logits = NUMBERS_AT_ONCE / ((1 + len(answers.tokens)) * generative.vocabulary)
        return max(1, math.floor(min(by_work, by_logits)))

    def _likelihoods(self, context: Tensor, state: Tensor) -> Tensor:
        return self._generative.likelihoods(context, state, cast("Answers", self.classes))

    @property
    def _generative(self) -> GenerativeEncoder:
        return cast("GenerativeEncoder", self.encoder)
