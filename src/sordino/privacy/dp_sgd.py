"""DP-SGD on a prompt's parameters: every example's gradient is clipped, the sum is noised.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1, with Poisson sampling, so that the
accounting by subsampled Gaussian mechanisms applies. A method may have personal parameters and shared ones, whose
gradients it sends to be averaged (DP-FPL). Each group then has a clip and a noise of its own. Both are released of one
and the same sample, so together they are one Gaussian release with the noise multiplier (z_p^-2 + z_s^-2)^(-1/2).

Sensitivity: neighboring data sets differ in one example of one client, added or removed. The divisor, the expected size
of a batch, stays the same. A group's sum has one vector of norm at most `clip` for each example in the sample, so it
changes by at most `clip`. Each example is in the sample independently of all others. This needs each vector to depend
on its own example and on earlier releases, and on nothing else. So an example whose features, loss or gradient are not
finite has the vector zero, and leaves all other vectors as they are. Kernels round a little differently for a batch of
another size; that alone is not covered. If the person is the unit, a person has one vector, the clipped sum of all
their examples' gradients (`persons`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.encoders.frozen.blocks import many_cotangents
from sordino.encoders.frozen.pullback import batched_gradients
from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.errors import RunError
from sordino.privacy.clipping import clipped_sum, wide
from sordino.privacy.gradients import (
    Batch,
    ExactGradients,
    Gradient,
    Parameters,
    PromptOf,
    excluding,
    finite_examples,
)
from sordino.privacy.persons import person_sums, together
from sordino.privacy.sampling import Sampling
from sordino.randomness import Randomness, noised

# Examples in one vectorized backward pass even if a forward pass is too large to be kept: such a pass is recomputed for
# each backward pass, and a backward pass needs little more than one layer's memory for an example.
LEAST_AT_ONCE = 4


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped together.

    Attributes:
        clip: the largest norm that an example's gradient by all of them keeps, or a person's sum of them.
        deviation: [K], the standard deviation of the noise that each client adds to its sum; 0 if it adds none.
    """

    clip: float
    deviation: Tensor


@dataclass(frozen=True)
class DpSgdGradients:
    """Gradients of clipped examples, or of clipped persons, divided by the expected batch size, with noise.

    Attributes:
        model: the frozen model.
        shared_names: the parameters whose gradient is sent to be averaged.
        personal, shared: the two groups; parameters that are not shared belong to `personal`.
        randomness: the source of the noise.
        call: the number of this gradient in the round, so that no noise is drawn twice.
    """

    model: PromptModel
    shared_names: frozenset[str]
    personal: Group
    shared: Group
    randomness: Randomness
    call: int = 0

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        sampling = sampled(batch)
        sums = {name: wide(torch.zeros_like(value)) for name, value in parameters.items()}
        losses, penalties = [], []
        for client in range(len(batch.labels)):
            slot = slice(client, client + 1)
            trained = {name: value[slot] for name, value in parameters.items()}
            rest = {name: value[slot] for name, value in fixed.items()}
            chosen = batch.mask[client].nonzero().flatten()
            persons = None if batch.persons is None else batch.persons[client, chosen]
            if persons is not None:
                chosen, persons = chosen[together(persons)], persons[together(persons)]
            examples = Batch(batch.features[slot, chosen], batch.labels[slot, chosen], batch.mask[slot, chosen])
            result = example_gradients(self.model, prompt_of, trained, rest, examples)
            penalties.append(result.penalty)
            for piece in result.pieces if persons is None else person_sums(result.pieces, persons):
                for names, group in self._groups(parameters):
                    clipped = clipped_sum({name: piece[name] for name in names}, group.clip)
                    for name, total in clipped.items():
                        sums[name][client] += total
            losses.append(_mean(result.losses))
        for names, group in self._groups(parameters):
            for name in names:
                shape = sums[name].shape[1:]
                noise = self.randomness.normal(f"noise on {name}, {self.call}", *shape)
                sums[name] = noised(sums[name], group.deviation, noise).to(parameters[name])
        means = {name: value / _over_clients(sampling.expected, value) for name, value in sums.items()}
        # The penalty depends on no image, so it needs no clip and no noise.
        for client, penalty in enumerate(penalties):
            for name, gradient in penalty.items():
                means[name][client] += gradient[0]
        return Gradient(means, torch.stack(losses))

    def _groups(self, parameters: Parameters) -> list[tuple[list[str], Group]]:
        shared = [name for name in parameters if name in self.shared_names]
        personal = [name for name in parameters if name not in self.shared_names]
        return [(names, group) for names, group in ((personal, self.personal), (shared, self.shared)) if names]


def sampled(batch: Batch) -> Sampling:
    """Return the rates and expected sizes with which a batch was sampled.

    Raises:
        RunError: the batch is not a Poisson sample, so no guarantee would hold.
    """
    if batch.sampling is None:
        raise RunError(
            "a batch to be noised must be a Poisson sample; let the method take its batches from data.batches, whole"
        )
    return batch.sampling


@dataclass(frozen=True)
class ExampleGradients:
    """Gradients of the examples of one client. Gradient and loss are zero if features or loss are not finite.

    Attributes:
        pieces: name to [n, ...], one after the other over all examples of the batch; computed as they are read.
        losses: [n], cross-entropy in nats, once the pieces are read.
        penalty: name to [1, ...], of the model's penalty; empty if it has none.
    """

    pieces: Iterator[dict[str, Tensor]]
    losses: Tensor
    penalty: dict[str, Tensor]


def example_gradients(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> ExampleGradients:
    """Compute every example's exact gradient for a stack of one client.

    If images meet the prompt behind the text tower, the class features are computed once. One vectorized backward pass
    then serves as many examples as fit into memory. If the prompt enters the image tower, or the image the text tower,
    every example has a copy of the parameters and is a client of its own.
    """
    batch = finite_examples(batch)
    apart = model.prompts_images or model.conditions_on_images
    by_example = _by_copies if apart else _by_vectorized_backward
    return by_example(model, prompt_of, parameters, fixed, batch)


def _by_vectorized_backward(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> ExampleGradients:
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad(), many_cotangents():
        prompt = prompt_of({**leaves, **fixed})
        features = model.class_features(prompt)
        penalty = model.penalty(features)
    graph = _Graph(model, leaves, prompt, features)
    losses = graph.losses(batch)
    if not bool(losses.isfinite().all()):
        batch = excluding(batch, ~losses.isfinite()[None])
        losses = graph.losses(batch)
    of_penalty = (
        ()
        if penalty is None
        else torch.autograd.grad(penalty.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True)
    )

    def pieces() -> Iterator[dict[str, Tensor]]:
        numbers = torch.arange(len(losses), device=losses.device)
        at_once = max(LEAST_AT_ONCE, model.prompts_at_once(prompt, len(losses)))
        for rows in numbers.split(at_once) if len(losses) else ():
            gradients = graph.gradients(losses, rows)
            if not all(bool(gradient.isfinite().all()) for gradient in gradients):
                # One example's derivative is infinite. Times zero it is in the gradients of the others too.
                # So every example gets a backward pass of its own.
                alone = [
                    graph.gradients(graph.losses(_row(batch, row)), torch.zeros_like(rows[:1])) for row in rows.tolist()
                ]
                gradients = tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
            counted = batch.mask[0, rows]
            yield {
                name: torch.where(_over_clients(counted, gradient) > 0, gradient, 0.0)
                for name, gradient in zip(leaves, gradients, strict=True)
            }

    counted_losses = torch.where(batch.mask[0], losses.detach(), 0.0)
    return ExampleGradients(pieces(), counted_losses, dict(zip(leaves, of_penalty, strict=False)))


@dataclass(frozen=True)
class _Graph:
    """The part of a client's graph that its examples share: its parameters, its prompt, and the class features."""

    model: PromptModel
    leaves: dict[str, Tensor]
    prompt: Prompt
    features: Tensor

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of every example, [B]."""
        with torch.enable_grad():
            return self.model.losses(self.features, self.prompt, batch.features, batch.labels)[0]

    def gradients(self, losses: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients [n, ...] of some of the losses [B] by each leaf [1, ...]."""
        chosen = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)[rows]
        leaves = list(self.leaves.values())
        return tuple(gradient[:, 0] for gradient in batched_gradients(losses, leaves, chosen))


def _row(batch: Batch, row: int) -> Batch:
    """Return a batch of one example, from a stack of one client."""
    one = slice(row, row + 1)
    return Batch(batch.features[:, one], batch.labels[:, one], batch.mask[:, one])


def _by_copies(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> ExampleGradients:
    examples, of_penalty = batch.labels.shape[1], _penalty_gradients(model, prompt_of, parameters, fixed)
    if not examples:  # a Poisson sample may be empty, and no tower takes an empty stack
        return ExampleGradients(iter(()), batch.features.new_zeros(0), of_penalty)
    gradients = ExactGradients(model, finite_only=True, penalized=False)  # the penalty is no example's
    with torch.no_grad():
        at_once = model.prompts_at_once(prompt_of({**parameters, **fixed}), 1)
    losses = batch.features.new_zeros(examples)

    def copies(tensors: Parameters, count: int) -> dict[str, Tensor]:
        return {name: value.expand(count, *value.shape[1:]) for name, value in tensors.items()}

    def pieces() -> Iterator[dict[str, Tensor]]:
        for rows in torch.arange(examples, device=batch.labels.device).split(at_once):
            alone = Batch(batch.features[0, rows, None], batch.labels[0, rows, None], batch.mask[0, rows, None])
            gradient = gradients(prompt_of, copies(parameters, len(rows)), copies(fixed, len(rows)), alone)
            losses[rows] = gradient.loss
            yield gradient.values

    return ExampleGradients(pieces(), losses, of_penalty)


def _penalty_gradients(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters
) -> dict[str, Tensor]:
    """Return the gradients [1, ...] of one client's penalty on its prompt; none if the model has no penalty."""
    if type(model).penalty is PromptModel.penalty:  # so that no class features are computed for nothing
        return {}
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad():
        penalty = model.penalty(model.class_features(prompt_of({**leaves, **fixed})))
    if penalty is None:
        return {}
    gradients = torch.autograd.grad(penalty.sum(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _mean(losses: Tensor) -> Tensor:
    """Return the mean of losses [n]; 0 for an empty batch."""
    return losses.sum() / max(1, len(losses))


def _over_clients(values: Tensor, like: Tensor) -> Tensor:
    """Return values [K] in the type of `like` and in a shape that broadcasts over a tensor [K, ...]."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
