"""Gradients of a method's loss. A method gets them here only, so that a privacy mechanism can stand in between.

A method gives the function from its parameters to a prompt. It does not know whether the gradient that it gets is exact
or noised. This module has the exact one, which is not private and enters nothing in the ledger. The noised ones are in
`dp_sgd` and `cotangent`.

Under a mechanism, an example that is not finite counts as nothing. Its contribution must be bounded; it must not depend
on the other examples, nor theirs on it. Masking its loss is not enough: a backward pass multiplies a masked term by
zero, and zero times infinity is not a number. So its features are replaced by zeros before the loss is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sordino.encoders.frozen.replay import repeated
from sordino.encoders.prompt_model import Prompt, PromptModel, cross_entropies
from sordino.privacy.sampling import Sampling

Parameters = Mapping[str, Tensor]  # each [K, ...]
PromptOf = Callable[[Parameters], Prompt]  # parameters to K prompts, each client's from its own slice


@dataclass(frozen=True)
class Batch:
    """One minibatch of every client in the stack.

    Attributes:
        features: [K, B, ...] the images as the method's model reads them: features [D], patches [P, D], pixels, ...
        labels: [K, B] class indices, int64.
        mask: [K, B], true where there is an example; clients with fewer examples are padded.
        sampling: rates and expected sizes under Poisson sampling, which a noised batch must have; None otherwise.
        rows: [K, B] their row numbers in the table of images, for an audit; None if unknown.
        persons: [K, B] whose image each is, int64 from 0, if persons were sampled; None if examples were. Numbers tell
            persons of one client apart and mean nothing else. Where there is no example they do not matter.
    """

    features: Tensor
    labels: Tensor
    mask: Tensor
    sampling: Sampling | None = None
    rows: Tensor | None = None
    persons: Tensor | None = None


@dataclass(frozen=True)
class Gradient:
    """The gradient of every client's mean loss, and of its penalty if the method's model has one.

    Attributes:
        values: parameter name to gradient, shaped as the parameter, [K, ...].
        loss: [K], mean loss of the examples in nats (`PromptModel.losses`), without the penalty. It is for the
            simulation's log only: no method sends it.
    """

    values: dict[str, Tensor]
    loss: Tensor


class Gradients(Protocol):
    """The function that a method differentiates its loss with.

    Args:
        prompt_of: makes prompts of `parameters` and `fixed` together.
        parameters: the tensors [K, ...] to differentiate by.
        fixed: further tensors [K, ...] that the prompt is made of.
        batch: the examples.
    """

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient: ...


def example_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return the cross-entropy [K, B] of every example from logits [K, B, C]."""
    return cross_entropies(logits, batch.labels)


def client_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return every client's mean cross-entropy [K] over its real examples, from logits [K, B, C]; 0 without any."""
    return mean_losses(example_losses(logits, batch), batch.mask)


def mean_losses(losses: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [K] of every client's losses [K, B] over the examples in the mask [K, B]; 0 without any."""
    return torch.where(mask, losses, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def finite_examples(batch: Batch) -> Batch:
    """Return the batch without the examples that have a feature that is not finite."""
    finite = batch.features.isfinite()
    return excluding(batch, ~(finite.flatten(2).all(-1) if finite.ndim > 2 else finite))


def excluding(batch: Batch, excluded: Tensor) -> Batch:
    """Return the batch without some examples, [K, B]: they leave the mask, and zeros replace their features."""
    # Done even if there are none: to ask would make the host wait for an accelerator.
    over_features = excluded.view(*excluded.shape, *[1] * (batch.features.ndim - 2))
    features = torch.where(over_features, 0.0, batch.features)
    return replace(batch, features=features, mask=batch.mask & ~excluded)


@dataclass(frozen=True)
class ExactGradients:
    """Plain gradients without privacy, computed in pieces that bound memory whatever K and C are.

    Attributes:
        model: the frozen model.
        finite_only: true if a mechanism uses the gradients. Then an example whose features or loss are not finite
            counts as nothing. So does a client's whole batch if its gradient is still not finite. If false, such
            numbers go through, and the run ends with an error that shows them.
        penalized: false leaves out the penalty, where that is added once and not by example.
    """

    model: PromptModel
    finite_only: bool = False
    penalized: bool = True

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        batch = finite_examples(batch) if self.finite_only else batch
        with torch.no_grad():
            prompt = prompt_of({**parameters, **fixed})
        pieces = []
        clients, at_once = len(batch.labels), self.model.prompts_at_once(prompt, batch.labels.shape[1])
        for chunk in torch.arange(clients, device=batch.labels.device).split(at_once):
            trained = {name: value[chunk] for name, value in parameters.items()}
            rest = {name: value[chunk] for name, value in fixed.items()}
            examples = Batch(batch.features[chunk], batch.labels[chunk], batch.mask[chunk])
            pieces.append(self._piece(prompt_of, trained, rest, examples))
        values = {name: torch.cat([piece.values[name] for piece in pieces]) for name in parameters}
        return Gradient(values, torch.cat([piece.loss for piece in pieces]))

    def _piece(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.enable_grad():
            prompt = prompt_of({**leaves, **fixed})
            with repeated(not self.model.conditions_on_images):
                features = self.model.class_features(prompt)
            losses = self.model.losses(features, prompt, batch.features, batch.labels)
            if self.finite_only and not bool((losses.isfinite() | ~batch.mask).all()):
                return self._piece(prompt_of, parameters, fixed, excluding(batch, ~losses.isfinite()))
            means = mean_losses(losses, batch.mask)
            penalty = self.model.penalty(features) if self.penalized else None
            objective = means if penalty is None else means + penalty
            # Client k's loss depends on slice k alone, so the gradient of the sum is the stack of the gradients.
            gradients = torch.autograd.grad(objective.sum(), list(leaves.values()))
        values = dict(zip(leaves, gradients, strict=True))
        return Gradient(finite_clients(values) if self.finite_only else values, means.detach())


def finite_clients(values: Parameters) -> dict[str, Tensor]:
    """Replace all tensors [K, ...] of a client by zeros if one of its numbers is not finite."""
    finite = torch.stack([value.isfinite().flatten(1).all(1) for value in values.values()]).all(0)  # [K]
    return {name: torch.where(finite.view(-1, *[1] * (value.ndim - 1)), value, 0.0) for name, value in values.items()}
