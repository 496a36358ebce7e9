"""DP-SGD on a prompt's parameters: every example's gradient is clipped, the sum is noised.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1, with Poisson sampling, so that the
accounting by subsampled Gaussian mechanisms applies. A method may have personal parameters and shared ones, whose
gradients it sends to be averaged (DP-FPL); each group then has a clip and a noise of its own. Both are released of one
and the same sample, so together they are one Gaussian release with the noise multiplier (z_p^-2 + z_s^-2)^(-1/2).

Sensitivity: neighboring data sets differ in one example of one client, added or removed, with the divisor, the
expected size of a batch, unchanged. A group's sum is one of vectors of norm at most `clip`, one for each example in the
sample, so it changes by at most `clip`; what a sample contains depends on each example's own coin only. That needs each
vector to depend on its own example and on what was released before, and on nothing else: an example whose features,
loss or gradient are not finite is the vector zero, and leaves all others as they are. Kernels round a little otherwise
for a batch of another size; that alone is not covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.errors import RunError
from sordino.privacy.clipping import clipped_sum
from sordino.privacy.gradients import (
    Batch,
    ExactGradients,
    Gradient,
    Parameters,
    PromptOf,
    example_losses,
    excluding,
    finite_examples,
)
from sordino.privacy.sampling import Sampling
from sordino.randomness import Randomness


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped together.

    Attributes:
        clip: the largest norm that an example's gradient by all of them keeps.
        deviation: [K], the standard deviation of the noise that each client adds to its sum; 0 where it adds none.
    """

    clip: float
    deviation: Tensor


@dataclass(frozen=True)
class DpSgdGradients:
    """Gradients of clipped examples, divided by the expected batch size, with noise.

    Attributes:
        model: the frozen model.
        shared_names: the parameters whose gradient is sent to be averaged.
        personal, shared: the two groups; parameters that are not shared belong to `personal`.
        randomness: where the noise comes from.
        call: which gradient of the round this is, so that no noise is drawn twice.
    """

    model: PromptModel
    shared_names: frozenset[str]
    personal: Group
    shared: Group
    randomness: Randomness
    call: int = 0

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        sampling = sampled(batch)
        by = {name: torch.zeros_like(value) for name, value in parameters.items()}
        losses, penalties = [], []
        for client in range(len(batch.labels)):
            mine = slice(client, client + 1)
            own = {name: value[mine] for name, value in parameters.items()}
            rest = {name: value[mine] for name, value in fixed.items()}
            chosen = batch.mask[client]
            examples = Batch(batch.features[mine, chosen], batch.labels[mine, chosen], batch.mask[mine, chosen])
            found = example_gradients(self.model, prompt_of, own, rest, examples)
            penalties.append(found.penalty)
            for gradients in found.pieces:
                for names, group in self._groups(parameters):
                    for name, total in clipped_sum({name: gradients[name] for name in names}, group.clip).items():
                        by[name][client] += total
            losses.append(_mean(found.losses))
        for names, group in self._groups(parameters):
            for name in names:
                noise = self.randomness.normal(f"noise on {name}, {self.call}", *by[name].shape[1:]).to(by[name])
                by[name] += noise * _over_clients(group.deviation, noise)
        by = {name: value / _over_clients(sampling.expected, value) for name, value in by.items()}
        for client, penalty in enumerate(penalties):  # of no image, so no clip and no noise is due on it
            for name, gradient in penalty.items():
                by[name][client] += gradient[0]
        return Gradient(by, torch.stack(losses))

    def _groups(self, parameters: Parameters) -> list[tuple[list[str], Group]]:
        shared = [name for name in parameters if name in self.shared_names]
        personal = [name for name in parameters if name not in self.shared_names]
        return [(names, group) for names, group in ((personal, self.personal), (shared, self.shared)) if names]


def sampled(batch: Batch) -> Sampling:
    """Return how a batch was sampled.

    Raises:
        RunError: it was not sampled by coins, so no guarantee would hold.
    """
    if batch.sampling is None:
        raise RunError(
            "a batch to be noised must be sampled by coins; let the method take its batches from data.batches, whole"
        )
    return batch.sampling


@dataclass(frozen=True)
class ExampleGradients:
    """Gradients of the examples of one client; zero, as the loss is, for those whose features or loss are not finite.

    Attributes:
        pieces: name to [n, ...], one after the other over all examples of the batch; computed as they are taken.
        losses: [n], cross-entropy in nats, once the pieces are taken.
        penalty: name to [1, ...], of the model's penalty; empty where it has none.
    """

    pieces: Iterator[dict[str, Tensor]]
    losses: Tensor
    penalty: dict[str, Tensor]


def example_gradients(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> ExampleGradients:
    """Every example's own gradient, exact, for a stack of one client.

    Where images meet a prompt behind the text tower, the class features are computed once, and one vectorized backward
    pass takes as many examples to the parameters as fit into memory at once. Where the prompt enters the image tower,
    every example has a copy of the parameters and is a client of its own.
    """
    batch = finite_examples(batch)
    by_example = _by_copies if model.prompts_images else _by_vectorized_backward
    return by_example(model, prompt_of, parameters, fixed, batch)


def _by_vectorized_backward(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> ExampleGradients:
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad():
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
        for rows in numbers.split(model.prompts_at_once(prompt, len(losses))) if len(losses) else ():
            found = graph.gradients(losses, rows)
            if not all(bool(gradient.isfinite().all()) for gradient in found):
                # One example's derivative is infinite. Times zero it is in the gradients of the others too.
                alone = [
                    graph.gradients(graph.losses(_row(batch, row)), torch.zeros_like(rows[:1])) for row in rows.tolist()
                ]
                found = tuple(torch.cat(gradients) for gradients in zip(*alone, strict=True))
            counted = batch.mask[0, rows]
            yield {
                name: torch.where(_over_clients(counted, gradient) > 0, gradient, 0.0)
                for name, gradient in zip(leaves, found, strict=True)
            }

    counted_losses = torch.where(batch.mask[0], losses.detach(), 0.0)
    return ExampleGradients(pieces(), counted_losses, dict(zip(leaves, of_penalty, strict=False)))


@dataclass(frozen=True)
class _Graph:
    """What the examples of a client have in common: its parameters, its prompt, and the class features."""

    model: PromptModel
    leaves: dict[str, Tensor]
    prompt: Prompt
    features: Tensor

    def losses(self, batch: Batch) -> Tensor:
        """Of every example, [B]."""
        with torch.enable_grad():
            return example_losses(self.model.scores(self.features, self.prompt, batch.features), batch)[0]

    def gradients(self, losses: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Of some of the losses [B], by each leaf [1, ...]: [n, ...]."""
        chosen = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)[rows]
        leaves = list(self.leaves.values())
        found = torch.autograd.grad(losses, leaves, chosen, is_grads_batched=True, retain_graph=True)
        return tuple(gradient[:, 0] for gradient in found)


def _row(batch: Batch, row: int) -> Batch:
    """One example of a stack of one client."""
    one = slice(row, row + 1)
    return Batch(batch.features[:, one], batch.labels[:, one], batch.mask[:, one])


def _by_copies(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> ExampleGradients:
    examples = batch.labels.shape[1]
    if not examples:  # coins may choose nobody, and no tower takes an empty stack
        return ExampleGradients(iter(()), batch.features.new_zeros(0), {})
    gradients = ExactGradients(model, finite_only=True)
    with torch.no_grad():
        at_once = model.prompts_at_once(prompt_of({**parameters, **fixed}), 1)
    losses = batch.features.new_zeros(examples)

    def copies(tensors: Parameters, count: int) -> dict[str, Tensor]:
        return {name: value.expand(count, *value.shape[1:]) for name, value in tensors.items()}

    def pieces() -> Iterator[dict[str, Tensor]]:
        for rows in torch.arange(examples, device=batch.labels.device).split(at_once):
            alone = Batch(batch.features[0, rows, None], batch.labels[0, rows, None], batch.mask[0, rows, None])
            found = gradients(prompt_of, copies(parameters, len(rows)), copies(fixed, len(rows)), alone)
            losses[rows] = found.loss
            yield found.values

    return ExampleGradients(pieces(), losses, {})


def _mean(losses: Tensor) -> Tensor:
    """0 for an empty batch."""
    return losses.sum() / max(1, len(losses))


def _over_clients(values: Tensor, like: Tensor) -> Tensor:
    """Values [K] in the type of `like`, ready to multiply a tensor [K, ...]."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
