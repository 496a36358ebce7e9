"""Losses of candidate prompts. A forward-only method gets them here only, so that a mechanism can stand in between.

Such a method treats the model as a black box: it asks for the losses of a few candidates on a batch, and never for a
derivative. It gets `Losses` in the place where others get `Gradients`, called in the same way. So what is said of a
gradient (one for each batch, counted against the schedule, an example that is not finite counts as nothing) holds for
an answer too. Everything here runs without a graph; no derivative can be taken of an answer.

This module has exact answers, which are not private and enter nothing in the ledger. The noised ones are in `noised`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt
from sordino.privacy.gradients import Batch, Parameters, PromptOf, example_losses, finite_examples

# Numbers of a public function of K clients' features [K, B, ...], each image's from that image alone.
View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Question:
    """A question about candidates.

    Attributes:
        prompt_of: makes prompts of candidates and fixed tensors together, each candidate's from its own slice.
        measure: "loss" is the cross-entropy in nats; "error" is 1 where another class has the highest logit, else 0.
        relative: take each example's measures less their mean over the candidates. That is enough for ranks and for
            differences, and it leaves little to be clipped. If false, a loss is taken less ln C, that of a guess among
            C classes, where it is clipped, and ln C is added to the answer.
        view: a second look at the same images; the candidates are measured there too.
    """

    prompt_of: PromptOf
    measure: Literal["loss", "error"] = "loss"
    relative: bool = True
    view: View | None = None

    @property
    def views(self) -> int:
        """Return V, the number of looks at each image."""
        return 1 if self.view is None else 2


@dataclass(frozen=True)
class Answer:
    """The losses of every client's candidates on its batch.

    Attributes:
        values: "losses" to the mean measures [K, V, P].
        loss: [K], mean cross-entropy in nats over candidates, for the simulation's log only: no method sends it.
    """

    values: dict[str, Tensor]
    loss: Tensor

    @property
    def losses(self) -> Tensor:
        """Return the mean measures [K, V, P]."""
        return self.values["losses"]


class Losses(Protocol):
    """The function that a forward-only method measures candidates with.

    Args:
        question: what to measure.
        candidates: named tensors [K, P, ...], P candidates of each client.
        fixed: further tensors [K, ...] that prompts are made of, the same for a client's candidates.
        batch: the examples.
    """

    def __call__(self, question: Question, candidates: Parameters, fixed: Parameters, batch: Batch) -> Answer: ...


@dataclass(frozen=True)
class Measures:
    """Examples' measures of one or more clients.

    Attributes:
        each: [K, B, V, P], zero where there is no example or it is not finite.
        counted: [K, B], true for the examples that count.
        loss: [K, B], cross-entropy in nats, mean over candidates, zero where nothing counts.
    """

    each: Tensor
    counted: Tensor
    loss: Tensor


@dataclass(frozen=True)
class ExactLosses:
    """Plain means without privacy, computed in pieces that bound memory whatever K, P and C are.

    Attributes:
        model: the frozen model.
        finite_only: true if a mechanism uses the answers; see `sordino.privacy.gradients.ExactGradients`.
    """

    model: PromptModel
    finite_only: bool = False

    def __call__(self, question: Question, candidates: Parameters, fixed: Parameters, batch: Batch) -> Answer:
        measures = measured(self.model, question, candidates, fixed, batch, self.finite_only)
        count = measures.counted.sum(1).clamp(min=1)
        means = measures.each.sum(1) / count[:, None, None]
        return answer(self.model, question, means, measures.loss.sum(1) / count)


def answer(model: PromptModel, question: Question, means: Tensor, loss: Tensor) -> Answer:
    """Return an answer of mean measures [K, V, P] as `measured` gives them, and of mean losses [K]."""
    return Answer({"losses": means + anchor(model, question)}, loss)


@torch.no_grad()
def measured(
    model: PromptModel,
    question: Question,
    candidates: Parameters,
    fixed: Parameters,
    batch: Batch,
    finite_only: bool = True,
) -> Measures:
    """Measure every candidate on every example of its client.

    An example's row depends on that example and on the candidates alone: it is the measures of the candidates there,
    less their mean or less a constant.

    Args:
        model: the frozen model.
        question, candidates, fixed, batch: as for `Losses`.
        finite_only: let an example count as nothing whose features or losses are not finite.
    """
    batch = finite_examples(batch) if finite_only else batch
    count = next(iter(candidates.values())).shape[1]
    looks = [batch.features] if question.view is None else [batch.features, question.view(batch.features)]
    stacked = {name: value.flatten(0, 1) for name, value in candidates.items()}
    repeated = {name: value.repeat_interleave(count, 0) for name, value in fixed.items()}
    prompts = question.prompt_of({**stacked, **repeated})  # K P of them
    loss, error = _of_pairs(model, prompts, batch, looks, count)
    finite = loss.isfinite().flatten(2).all(-1)  # [K, B]
    counted = batch.mask & finite if finite_only else batch.mask
    measures = loss if question.measure == "loss" else error
    offset = measures.mean(-1, keepdim=True) if question.relative else anchor(model, question)
    each = torch.where(counted[..., None, None], measures - offset, 0.0)
    return Measures(each, counted, torch.where(counted, loss[:, :, 0].mean(-1), 0.0))


def anchor(model: PromptModel, question: Question) -> float:
    """Return the constant that an answer has beside the clipped measures: what a guess would cost, or nothing."""
    return math.log(len(model.classes)) if question.measure == "loss" and not question.relative else 0.0


def _of_pairs(
    model: PromptModel, prompts: Prompt, batch: Batch, looks: Sequence[Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """Return losses and errors [K, B, V, P] of K P prompts, each on its client's V looks [K, B, ...] at images."""
    clients, images = batch.labels.shape
    at_once = model.prompts_at_once(prompts, images)
    losses, errors = [], []
    for pairs in torch.arange(clients * count, device=batch.labels.device).split(at_once):
        chunk = map_prompt(prompts, lambda part, chosen=pairs: part[chosen.to(part.device)])  # type: ignore[misc]
        owners = pairs // count
        features, labels = model.class_features(chunk), batch.labels[owners]
        for look in looks:
            logits = model.scores(features, chunk, look[owners])  # [p, B, C]
            losses.append(example_losses(logits, Batch(look[owners], labels, batch.mask[owners])))
            errors.append((logits.argmax(-1) != labels).to(logits))

    def joined(parts: list[Tensor]) -> Tensor:
        of_looks = [torch.cat(parts[number :: len(looks)]) for number in range(len(looks))]  # V of [K P, B]
        return torch.stack([each.view(clients, count, images).mT for each in of_looks], dim=2)

    return joined(losses), joined(errors)


def without_a_model(question: Question, candidates: Parameters, fixed: Parameters, batch: Batch) -> Answer:
    """Return an answer of the right shape without a forward pass: zeros."""
    first = next(iter(candidates.values()))
    clients, count = first.shape[:2]
    zeros = torch.zeros(clients, question.views, count, device=batch.labels.device)
    return Answer({"losses": zeros}, zeros[:, 0, 0])
