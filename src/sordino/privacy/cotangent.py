"""The cotangent mechanism: noise on the loss's derivative by the text features, before it passes the text tower.

The loss reaches a prompt through the C class features alone. With logits f_c . x / tau, one example's derivative by the
class features is (p - y) x^T / tau, [C, D]: the error of its class probabilities times its image feature. The mechanism
noises the sum of these over a batch *once*, and sends the noisy sum back through the text tower. Everything after that,
for shared and personal parameters alike, is post-processing. So there is one backward pass for the whole batch, no
gradient of a single example, and one noise for all parameters.

Noise grows with the number of entries. So image features are first projected on r fixed directions and given unit norm
again. The directions are singular vectors of *public* features: of names that have nothing to do with anybody's images,
or of public images that are nobody's training example. So they cost no privacy.

Sensitivity. Neighboring data sets differ in one example of one client, added or removed. Write z_b = P^T x_b / |P^T
x_b| for the projected feature, of norm at most 1 (0 where the projection vanishes), and e_b for p_b - y_b scaled down
to norm at most c. The released sum is S = sum over b in the sample of e_b z_b^T. Each term is a rank-one matrix of
Frobenius norm |e_b| |z_b| <= c. It depends on its own example and on earlier releases only: p_b is a function of x_b
and of the current prompts. So adding or removing one example changes S by one term, by at most c in Frobenius norm,
whatever the other examples are: the L2 sensitivity is c. If the person is the unit of privacy, e_b is p_b - y_b as it
is, and each person's sum of e_b z_b^T is scaled down to Frobenius norm c: a person has one term (`persons`). Add noise
N(0, (z c)^2) to every entry, and let each unit be in the sample independently with probability q (Poisson sampling).
Then a release is a Gaussian mechanism of noise multiplier z, subsampled at rate q. Since |p - y| <= sqrt(2) always, c
above sqrt(2) would only add noise, or above sqrt(2) for each image of a person. The later steps are division by the
public expected batch size and by tau, the product with P^T, and the backward pass. They never look at the data again.
Nor does the gradient of a penalty on prompts, which is added on the way.

This mechanism is this project's own. It is near to releasing a classifier's output-layer gradients; label-space
mechanisms and gradient projection on public subspaces (Zhou, Wu, Banerjee, Bypassing the Ambient Dimension, ICLR 2021)
are its relatives.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.encoders.base import DualEncoder
from sordino.encoders.cache import FeatureCache
from sordino.encoders.frozen.replay import repeated
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.clipping import clipped_sum, power_of_two, wide
from sordino.privacy.dp_sgd import sampled
from sordino.privacy.gradients import (
    Batch,
    Gradient,
    Parameters,
    PromptOf,
    example_losses,
    excluding,
    finite_examples,
    mean_losses,
)
from sordino.privacy.persons import person_products, together
from sordino.randomness import Randomness, noised

CONTEXT = "a photo of a"  # before public names


@dataclass(frozen=True)
class CotangentGradients:
    """Gradients that are post-processing of one noisy release a client and batch.

    Attributes:
        model: the frozen model.
        directions: [D, r] orthonormal columns, public.
        clip: c, the largest norm that p - y keeps, or a person's sum of cotangents.
        noise_multiplier: z.
        randomness: the source of the noise.
        call: the number of this gradient in the round, so that no noise is drawn twice.
    """

    model: PromptModel
    directions: Tensor
    clip: float
    noise_multiplier: float
    randomness: Randomness
    call: int = 0

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        with torch.no_grad():
            prompt = prompt_of({**parameters, **fixed})
        expected = sampled(batch).expected.to(batch.labels.device)
        classes, rank = len(self.model.classes), self.directions.shape[1]
        noise = self.randomness.normal(f"noise on the cotangent, {self.call}", classes, rank)
        pieces: dict[str, list[Tensor]] = {name: [] for name in parameters}
        losses = []
        clients, at_once = len(batch.labels), self.model.prompts_at_once(prompt, batch.labels.shape[1])
        for chunk in torch.arange(clients, device=batch.labels.device).split(at_once):
            leaves = {name: value[chunk].detach().requires_grad_() for name, value in parameters.items()}
            rest = {name: value[chunk] for name, value in fixed.items()}
            persons = None if batch.persons is None else batch.persons[chunk]
            examples = Batch(batch.features[chunk], batch.labels[chunk], batch.mask[chunk], persons=persons)
            examples = finite_examples(examples)
            with torch.enable_grad():
                prompt = prompt_of({**leaves, **rest})
                with repeated():
                    features = self.model.class_features(prompt)
                text, penalty = self.model.linear_part(features), self.model.penalty(features)
            with torch.no_grad():
                logits = self.model.scores(features, prompt, examples.features)
            sums = summed_cotangents(logits, examples, self.directions, self.clip)  # [k, C, r]
            released = noised(sums, self.clip * self.noise_multiplier, noise[chunk.to(noise.device)]).to(text)
            # From here on, nothing but `released` depends on the data.
            cotangent = (released @ self.directions.T.to(text)) * self.model.encoder.logit_scale
            cotangent = cotangent / expected[chunk].to(text)[:, None, None]
            with torch.enable_grad():
                objective = (text * cotangent).sum() + (0 if penalty is None else penalty.sum())
            gradients = torch.autograd.grad(objective, list(leaves.values()))
            for name, gradient in zip(leaves, gradients, strict=True):
                pieces[name].append(gradient)
            of_examples = example_losses(logits, examples)  # for the simulation's log only
            losses.append(mean_losses(of_examples, examples.mask & of_examples.isfinite()))
        return Gradient({name: torch.cat(parts) for name, parts in pieces.items()}, torch.cat(losses))


def summed_cotangents(logits: Tensor, batch: Batch, directions: Tensor, clip: float) -> Tensor:
    """Compute S, the sum over a client's examples of clipped (p - y) times projected features.

    If the batch says whose the examples are, it is the sum over persons of clipped sums of (p - y) times projected
    features.

    Args:
        logits: [K, B, C].
        batch: the examples.
        directions: [D, r].
        clip: c.

    Returns:
        [K, C, r], in float64. One example, or one person, more or less changes a client's matrix by at most c in
        Frobenius norm. The difference depends on that unit alone. An example whose features or logits are not finite
        adds zero.
    """
    batch = finite_examples(excluding(batch, ~logits.isfinite().all(-1)))
    errors = logits.softmax(-1) - F.one_hot(batch.labels, logits.shape[-1])
    if batch.persons is None:
        errors = errors * (clip / errors.norm(dim=-1, keepdim=True).clamp(min=clip))
    errors = wide(torch.where(batch.mask[..., None], errors, 0.0))
    projected = wide(project(batch.features, directions))
    if batch.persons is None:
        return errors.mT @ projected
    sums = errors.new_zeros(len(errors), errors.shape[-1], projected.shape[-1])
    for client, persons in enumerate(batch.persons):
        chosen = batch.mask[client].nonzero().flatten()
        chosen = chosen[together(persons[chosen])]
        for matrices in person_products(errors[client, chosen], projected[client, chosen], persons[chosen]):
            sums[client] += clipped_sum({"cotangent": matrices}, clip)["cotangent"]
    return sums


def project(features: Tensor, directions: Tensor) -> Tensor:
    """Project features [..., D] on public directions [D, r] and give them unit norm again.

    Returns:
        [..., r], zero where nothing is left. Features of any finite size have unit norm: their squares do not
        overflow.
    """
    sized = features / power_of_two(features.abs().amax(-1, keepdim=True))
    return torch.nan_to_num(F.normalize(sized @ directions.to(features), dim=-1))


def public_directions(encoder: DualEncoder, rank: int) -> Tensor:
    """Return the r leading singular directions [D, r] of the features of 1,000 public class names.

    The names are ImageNet's, as timm lists them (no image is involved), in the hand-written prompt. If r reaches D, the
    projection changes nothing. They are kept in the feature cache, as they take three seconds with the bundled encoder.
    """
    return _public_basis(encoder)[:, :rank]


def image_directions(features: Tensor, rank: int) -> Tensor:
    """Return the r leading singular directions [D, r] of public image features [n, D], less their mean.

    Source of the idea: Golatkar et al., Mixed Differential Privacy in Computer Vision (AdaMix), CVPR 2022, which
    projects gradients on a subspace of public gradients.
    """
    return _basis(features)[:, :rank]


@lru_cache(maxsize=2)
@torch.no_grad()
def _public_basis(encoder: DualEncoder) -> Tensor:
    """Return all D directions [D, D], the leading one first."""
    cache = FeatureCache()
    # Of other precisions and devices, the last bits differ.
    kind = f"public basis, {str(encoder.dtype).removeprefix('torch.')} on {encoder.device.type}"
    digest = hashlib.sha256(f"{CONTEXT}\nImageNet's names in timm {version('timm')}".encode()).digest()
    kept = cache.find(encoder.fingerprint, kind, [digest])
    if digest in kept:
        return torch.from_numpy(kept[digest]).to(encoder.device)
    from timm.data import ImageNetInfo  # slow to import

    info = ImageNetInfo()
    names = [info.index_to_description(index).partition(",")[0] for index in range(info.num_classes())]
    context = encoder.embed(CONTEXT)[None]
    chunks = [encoder.class_tokens(names[start : start + 100], compete=False) for start in range(0, len(names), 100)]
    basis = _basis(torch.cat([encoder.text_features(context, chunk)[0] for chunk in chunks])).contiguous()
    cache.store(encoder.fingerprint, kind, {digest: basis.numpy()})
    return basis.to(encoder.device)


def _basis(features: Tensor) -> Tensor:
    """Return all D singular directions [D, D] of features [n, D] less their mean, float32, the leading one first."""
    features = features.double().cpu()
    basis: Tensor = torch.linalg.svd(features - features.mean(0), full_matrices=True).Vh.T
    return basis.float()
