"""The only way by which a method gets a gradient, so that privacy can stand in between.

A method says how its parameters make a prompt; it does not know whether the gradient that comes back is exact or
noised. Here is the exact one; it is not private, and enters nothing in the ledger. The noised ones are in `dp_sgd` and
`cotangent`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.encoders.prompt_model import Prompt, PromptModel

Parameters = Mapping[str, Tensor]  # each [K, ...]
PromptOf = Callable[[Parameters], Prompt]  # parameters to K prompts, each client's from its own slice


@dataclass(frozen=True)
class Sampling:
    """How a batch was sampled: every example by a coin of its own (Poisson sampling).

    Attributes:
        rate: [K] float64, the probability with which each of a client's examples was in the batch.
        expected: [K] float64, the expected number of examples, rate times the client's size.
    """

    rate: Tensor
    expected: Tensor


@dataclass(frozen=True)
class Batch:
    """One minibatch of every client in the stack.

    Attributes:
        features: [K, B, ...] what the method's model reads of the images: features [D], patches [P, D], pixels, ...
        labels: [K, B] class indices, int64.
        mask: [K, B], true where there is an example; clients with fewer examples are padded.
        sampling: how it was sampled, where that was by coins; what is noised must be.
        rows: [K, B] which rows of the table of images they are, for who watches; None where nobody said.
    """

    features: Tensor
    labels: Tensor
    mask: Tensor
    sampling: Sampling | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Gradient:
    """The gradient of every client's mean loss, and of its penalty where the method's model has one.

    Attributes:
        by: parameter name to gradient, shaped as the parameter, [K, ...].
        loss: [K], mean cross-entropy in nats, without a penalty. For the simulation's log only: no method sends it.
    """

    by: dict[str, Tensor]
    loss: Tensor


class Gradients(Protocol):
    """What a method is given to differentiate its loss.

    Args:
        prompt_of: makes prompts of `parameters` and `fixed` together.
        parameters: what to differentiate by.
        fixed: further tensors [K, ...] that the prompt is made of.
        batch: the examples.
    """

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient: ...


def example_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of every example, logits [K, B, C] to [K, B]."""
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view(batch.mask.shape)


def client_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of every client over its real examples: logits [K, B, C] to [K]; 0 where there is none."""
    return (example_losses(logits, batch) * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class ExactGradients:
    """Plain gradients, with no privacy, in pieces that bound memory whatever K and C are."""

    model: PromptModel

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        with torch.no_grad():
            prompt = prompt_of({**parameters, **fixed})
        pieces = []
        clients, at_once = len(batch.labels), self.model.prompts_at_once(prompt, batch.labels.shape[1])
        for chunk in torch.arange(clients, device=batch.labels.device).split(at_once):
            own = {name: value[chunk] for name, value in parameters.items()}
            rest = {name: value[chunk] for name, value in fixed.items()}
            examples = Batch(batch.features[chunk], batch.labels[chunk], batch.mask[chunk])
            pieces.append(self._piece(prompt_of, own, rest, examples))
        by = {name: torch.cat([piece.by[name] for piece in pieces]) for name in parameters}
        return Gradient(by, torch.cat([piece.loss for piece in pieces]))

    def _piece(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.enable_grad():
            prompt = prompt_of({**leaves, **fixed})
            features = self.model.class_features(prompt)
            losses = client_losses(self.model.scores(features, prompt, batch.features), batch)
            penalty = self.model.penalty(features)
            objective = losses if penalty is None else losses + penalty
            # Client k's loss depends on slice k alone, so the gradient of the sum is the stack of the gradients.
            gradients = torch.autograd.grad(objective.sum(), list(leaves.values()))
        return Gradient(dict(zip(leaves, gradients, strict=True)), losses.detach())
