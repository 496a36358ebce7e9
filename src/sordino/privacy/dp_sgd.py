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
from sordino.privacy.gradients import Batch, ContextOf, Gradient, Parameters, Sampling, client_losses
from sordino.privacy.noise import Randomness


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

    def __call__(self, context_of: ContextOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        sampling = sampled(batch)
        by = {name: torch.zeros_like(value) for name, value in parameters.items()}
        losses = []
        for client in range(len(batch.labels)):
            mine = slice(client, client + 1)
            own = {name: value[mine] for name, value in parameters.items()}
            rest = {name: value[mine] for name, value in fixed.items()}
            chosen = batch.mask[client]
            examples = Batch(batch.features[mine, chosen], batch.labels[mine, chosen], batch.mask[mine, chosen])
            pieces, loss = example_gradients(self.model, context_of, own, rest, examples)
            losses.append(loss)
            for gradients in pieces:
                for names, group in self._groups(parameters):
                    for name, total in clipped_sum({name: gradients[name] for name in names}, group.clip).items():
                        by[name][client] += total
        for names, group in self._groups(parameters):
            for name in names:
                noise = self.randomness.normal(f"noise on {name}, {self.call}", *by[name].shape[1:]).to(by[name])
                by[name] += noise * _over_clients(group.deviation, noise)
        return Gradient(
            {name: value / _over_clients(sampling.expected, value) for name, value in by.items()}, torch.cat(losses)
        )

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
        raise ValueError("a batch to be noised must be sampled by coins (ClientData.batches with `coins`)")
    return batch.sampling


def example_gradients(
    model: PromptModel, context_of: ContextOf, parameters: Parameters, fixed: Parameters, batch: Batch
) -> tuple[Iterator[dict[str, Tensor]], Tensor]:
    """Every example's own gradient, exact, for a stack of one client.

    The class features are computed once; the loss reaches them through (p - y) x^T / tau, known in closed form, from
    where one vectorised backward pass takes as many examples to the parameters as fit into memory at once.

    Returns:
        Pieces of the gradients, each name to [n, ...], over all examples of the batch; and the mean loss [1].
    """
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad():
        context = context_of({**leaves, **fixed})
        text = model.text_features(context)  # [1, C, D]
    logits = model.logits(text.detach(), batch.features)  # [1, B, C]
    errors = (logits.softmax(-1) - torch.nn.functional.one_hot(batch.labels, logits.shape[-1]))[0]  # [B, C]

    def pieces() -> Iterator[dict[str, Tensor]]:
        at_once = model.contexts_at_once(context.shape[1])
        for start in range(0, len(errors), at_once):
            chunk = slice(start, start + at_once)
            cotangents = model.encoder.logit_scale * errors[chunk, :, None] * batch.features[0, chunk, None, :]
            found = torch.autograd.grad(
                text, list(leaves.values()), cotangents[:, None], is_grads_batched=True, retain_graph=True
            )
            yield {name: gradient[:, 0] for name, gradient in zip(leaves, found, strict=True)}

    return pieces(), client_losses(logits, batch)


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
