"""DP-SGD on a prompt's parameters: every example's gradient is clipped, the sum is noised.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, algorithm 1, with Poisson sampling, so that the
accounting by subsampled Gaussian mechanisms applies. A method may have personal parameters and shared ones, whose
gradients it sends to be averaged (DP-FPL); each group then has a clip and a noise of its own. Both are released of one
and the same sample, so together they are one Gaussian release with the noise multiplier (z_p^-2 + z_s^-2)^(-1/2).

Sensitivity: neighbouring data sets differ in one example of one client, added or removed, with the divisor, the
expected size of a batch, unchanged. A group's sum is one of vectors of norm at most `clip`, one for each example in the
sample, so it changes by at most `clip`; what a sample contains depends on each example's own coin only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.gradients import Batch, ExactGradients, Gradient, Parameters, PromptOf, example_losses
from sordino.privacy.noise import Randomness
from sordino.privacy.sampling import Sampling


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
    """How a batch was sampled.

    Raises:
        ValueError: not by coins, so that no guarantee would hold.
    """
    if batch.sampling is None:
        raise ValueError("a batch to be noised must be sampled by coins (ClientData.batches with `poisson`)")
    return batch.sampling


@dataclass(frozen=True)
class ExampleGradients:
    """Gradients of the examples of one client.

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

    Where images meet a prompt behind the text tower, the class features are computed once, and one vectorised backward
    pass takes as many examples to the parameters as fit into memory at once. Where the prompt enters the image tower,
    every example has a copy of the parameters and is a client of its own.
    """
    by_example = _by_copies if model.prompts_images else _by_vectorised_backward
    return by_example(model, prompt_of, parameters, fixed, batch)


def _by_vectorised_backward(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> ExampleGradients:
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad():
        prompt = prompt_of({**leaves, **fixed})
        features = model.class_features(prompt)
        losses = example_losses(model.scores(features, prompt, batch.features), batch)[0]  # [B]
        penalty = model.penalty(features)
    of_penalty = (
        ()
        if penalty is None
        else torch.autograd.grad(penalty.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True)
    )

    def pieces() -> Iterator[dict[str, Tensor]]:
        chosen = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        for rows in chosen.split(model.prompts_at_once(prompt, len(losses))) if len(losses) else ():
            found = torch.autograd.grad(losses, list(leaves.values()), rows, is_grads_batched=True, retain_graph=True)
            yield {name: gradient[:, 0] for name, gradient in zip(leaves, found, strict=True)}

    return ExampleGradients(pieces(), losses.detach(), dict(zip(leaves, of_penalty, strict=False)))


def _by_copies(
    model: PromptModel, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> ExampleGradients:
    examples = batch.labels.shape[1]
    if not examples:  # coins may choose nobody, and no tower takes an empty stack
        return ExampleGradients(iter(()), batch.features.new_zeros(0), {})
    gradients = ExactGradients(model)
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
            yield found.by

    return ExampleGradients(pieces(), losses, {})


def _mean(losses: Tensor) -> Tensor:
    """0 for an empty batch."""
    return losses.sum() / max(1, len(losses))


def clipped_sum(gradients: dict[str, Tensor], clip: float) -> dict[str, Tensor]:
    """The sum over examples of gradients [n, ...], each example's scaled to a joint norm of at most `clip`.

    An example whose gradient is not finite counts as zero: it may neither leak nor spoil the sum.
    """
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)  # [n]
    scale = torch.where(norms.isfinite(), (clip / norms.clamp(min=math.ulp(0.0))).clamp(max=1.0), 0.0)
    return {
        name: torch.tensordot(scale, torch.where(_over_clients(scale, gradient) > 0, gradient, 0.0), dims=1)
        for name, gradient in gradients.items()
    }


def _over_clients(values: Tensor, like: Tensor) -> Tensor:
    """Values [K] in the type of `like`, ready to multiply a tensor [K, ...]."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))
