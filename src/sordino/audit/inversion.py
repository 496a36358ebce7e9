"""Gradient inversion: labels, features and images that the server recovers from one upload.

Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019; Geiping, Bauermeister, Dröge, Moeller, Inverting Gradients,
NeurIPS 2020. There pixels are found by optimization. A prompt's gradient is easier to invert. With the frozen text
tower f, known to all, it is J^T vec(S) for J the derivative of the C class features by the context, and

    S = sum over b of (p_b - y_b) x_b^T / (B tau)    [C, D]

contains everything by which the batch enters. So S is recovered by least squares, up to the null space of J^T: class
features have unit norm, so the component of row c along the feature of class c is never seen. Then

- the row of an example's label is the one that points away from its image: rows that point away from images of their
  class name the labels (the server is granted the task's test images as examples of each class);
- minus that row is near to the sum of the class's image features;
- for a batch of one, S = e x^T has D + C unknowns only, and x is solved for, exactly if nothing is noised.

The recovered features are looked up among all images of the task, the attacker's gallery. Other clients see the mean of
uploads only: one batch of everybody's, which is harder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms.base import RoundContext, named_tensors
from sordino.audit.subject import Subject, contexts_of, coop, replaces_images
from sordino.audit.tower_map import TowerMap
from sordino.privacy.client_level import CLIP
from sordino.privacy.mechanism import WEIGHT
from sordino.randomness import Streams, derive_key
from sordino.runtime.local import LocalRuntime, Training

REFINEMENTS = 10  # of a rank-one S, each half by a linear solve


@dataclass(frozen=True)
class Attack:
    """The results for batches of one size; shares and cosines are means.

    Attributes:
        size: examples a batch; the smallest client's if clients hold fewer than the run's batch size.
        batches: number of attacked batches.
        labels_found: share of the examples whose label was named; at most `size` labels are.
        labels_right: share of the named labels that were in the batch.
        labels_chance: `labels_found` of as many labels named blindly.
        cosine: of recovered and true feature; in larger batches, of a class's row and the sum of its features.
        cosine_chance: the same of the truth and an image of the gallery at random.
        reidentified: share of recovered features that have an image of the batch (and class) as nearest of the gallery.
        reidentified_chance: the same of an image of the gallery at random.
    """

    size: int
    batches: int
    labels_found: float
    labels_right: float
    labels_chance: float
    cosine: float
    cosine_chance: float
    reidentified: float
    reidentified_chance: float


@dataclass(frozen=True)
class Inversion:
    """The results of inverting single uploads.

    Attributes:
        reason: the reason why the attack does not apply; None if it does.
        knows: the server's knowledge of the victim's context: its whole "prompt" (published, or replayed as in
            `stealing`), or the "broadcast" with the personal part as it publicly started.
        gallery: number of images among which the recovered features were looked up.
        attacks: one for each batch size.
    """

    reason: str | None
    knows: Literal["prompt", "broadcast"]
    gallery: int
    attacks: tuple[Attack, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def invert(
    subject: Subject,
    seed: int,
    batches: int = 8,
    victims: int = 2,
    knows: Literal["prompt", "broadcast"] = "prompt",
) -> Inversion:
    """Invert uploads of the run's final state, as its own mechanism lets them leave the clients.

    1. Each client draws a batch of its training images, of one example and of the run's own size, and computes a
       round's upload with fresh noise.
    2. The upload is read as a gradient of the context, and S is solved for.
    3. Labels, features and images are read off S and compared with the batch.

    Args:
        subject: the run.
        seed: decides batches and noise.
        batches: number of batches of each size; they go round the victims.
        victims: number of attacked clients, the first ones; each costs a derivative of the text tower.
        knows: the server's knowledge of the victim's context.
    """
    runtime, training = subject.runtime, subject.training
    gallery = F.normalize(subject.features[torch.from_numpy(subject.task.used)].cpu().double(), dim=-1)
    reason = inapplicable(runtime)
    if reason is not None:
        return Inversion(reason, knows, len(gallery))
    states = training.clients if knows == "prompt" else runtime.start().clients
    contexts = contexts_of(runtime.algorithm.prompt(runtime.algorithm.broadcast(training.server), states))
    contexts = contexts.expand(len(runtime.data), -1, -1)
    references = class_references(subject)
    sizes, victims = sorted({1, own_size(runtime)}), min(victims, batches, len(contexts))
    figures: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    repeats = [
        (size, turn, observe(runtime, training, size, derive_key(seed, "inversion", size, turn)))
        for size in sizes
        for turn in range(-(-batches // victims))
    ]
    for client in range(victims):
        tower = TowerMap.of(runtime.model, contexts[client])
        for size, turn, (gradients, features, labels) in repeats:
            if turn * victims + client < batches:
                truth = (features[client].cpu().double(), labels[client].cpu())
                figures[size].append(_judged(tower, gradients[client], truth, references, gallery))
        subject.progress("gradient inversion", client + 1, victims)
    return Inversion(None, knows, len(gallery), tuple(_summed(size, figures[size]) for size in sizes))


def inapplicable(runtime: LocalRuntime) -> str | None:
    """Return the reason why this method's uploads are not read as gradients of a context; None if they are."""
    about, settings = runtime.algorithm.ABOUT, runtime.settings
    if replaces_images(runtime):
        return "clients train on examples drawn from released statistics, so no upload is of an image; attack 'release'"
    if not runtime.rounds:
        return "no round is trained, so there is no upload"
    if about.pools_data:
        return "all images are in one place already; there is no upload to invert"
    if about.forward_only:
        return "uploads come of losses, and no gradient is in them"
    names = {entry.name for entry in fields(runtime.algorithm.Upload)}
    if not names:
        return "nothing that was learned leaves a client"
    if not coop(runtime):
        return "the upload is not a gradient of a context that class features alone are made of"
    if about.averages:
        return None
    if "change" not in names:
        return "the upload is not a gradient of the context"
    if settings.local_steps != 1 or settings.optimizer.name != "sgd":
        return "the upload is the change by several steps, or by Adam, and not proportional to one gradient"
    return None


def observe(
    runtime: LocalRuntime, training: Training, size: int, seed: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return one round's uploads, of batches of `size` examples of each client, read as gradients of the context.

    Returns:
        [K, M, E] gradients up to a positive factor, and the K batches' features [B, D] and labels [B].
    """
    module, data = runtime.algorithm, runtime.data
    clients = range(len(data))
    round_context = RoundContext(
        max(1, training.round), runtime.rounds, Streams(seed, training.round, clients, data.features.device)
    )
    orders = round_context.streams.uniform("batch to invert", data.counts.tolist())
    chosen = [row[order.argsort()[:size].to(row.device)] for row, order in zip(data.rows, orders, strict=True)]
    counts = torch.tensor([len(rows) for rows in chosen], device=data.counts.device)
    # No more examples than the batch size, so that all are in the batch for certain, Poisson sampling or not.
    poisson = runtime.mechanism.sampler(round_context.streams)
    rows = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    clip = training.mechanism.get(CLIP)
    mechanism_round = runtime.mechanism.client_end(round_context.streams, list(clients), clip)
    broadcast = module.broadcast(training.server)
    batches = replace(data, rows=rows, counts=counts, poisson=poisson)
    upload, _ = module.client_round(
        runtime.settings, broadcast, training.clients, batches, mechanism_round.gradients, round_context
    )
    sent = mechanism_round.protect(named_tensors(upload))
    if mechanism_round.keys is not None:
        codes = {name: part for name, part in sent.items() if name != WEIGHT}
        read = runtime.mechanism.restored(codes, mechanism_round.keys)
        sent |= {name: part.to(data.features) for name, part in read.items()}
    if module.ABOUT.averages:
        gradient = sent[next(iter(module.ABOUT.averages.values()))]
    else:  # one step of SGD: change = -rate (gradient + decay context)
        optimizer = runtime.settings.optimizer
        context = contexts_of(module.prompt(broadcast, training.clients))
        gradient = -sent["change"] - optimizer.rate(round_context) * optimizer.weight_decay * context
    features = [data.features[client_rows] for client_rows in chosen]
    return gradient.detach(), features, [data.labels[client_rows] for client_rows in chosen]


def own_size(runtime: LocalRuntime) -> int:
    """Return the examples in a batch of the run; those of its smallest client, if that has no more."""
    smallest = int(runtime.data.counts.min())
    return min(runtime.algorithm.schedule(runtime.settings).batch_size or smallest, smallest)


def class_references(subject: Subject) -> Tensor:
    """Return mean features [C, D] of each class's test images, or of all of them for a class that has none."""
    rows = torch.from_numpy(subject.task.test)
    features, labels = subject.features[rows].cpu().double(), subject.labels[rows].cpu()
    of_class = F.one_hot(labels, len(subject.task.class_names)).to(features)  # [T, C]
    count = of_class.sum(0)[:, None]
    return torch.where(count > 0, of_class.T @ features / count.clamp(min=1), features.mean(0))


def rank_one(tower: TowerMap, gradient: Tensor, cotangent: Tensor, references: Tensor) -> tuple[Tensor, int]:
    """Solve for the feature [D] and label of a batch of one: S = e x^T by alternating least squares.

    The first S [C, D] is `cotangent`. Both e and x may change their sign, which leaves two readings. The better one has
    a feature nearer to images of the class that it names.
    """
    left, _, right = torch.linalg.svd(cotangent, full_matrices=False)
    errors, feature = left[:, 0], right[0]
    for _ in range(REFINEMENTS):
        feature = F.normalize(tower.given_errors(errors).solve(gradient), dim=0)
        errors = F.normalize(tower.given_feature(feature).solve(gradient), dim=0)
    readings = [(sign * feature, int((sign * errors).argmin())) for sign in (1, -1)]

    def likeness(reading: tuple[Tensor, int]) -> float:
        return float(F.normalize(references[reading[1]], dim=0) @ reading[0])

    return max(readings, key=likeness)


def _judged(
    tower: TowerMap, gradient: Tensor, truth: tuple[Tensor, Tensor], references: Tensor, gallery: Tensor
) -> dict[str, float]:
    """Return the figures of `Attack`, of one batch alone."""
    features, labels = truth
    observed = gradient.flatten().cpu().double()
    cotangent = tower.solve(observed).view(tower.classes, -1)  # S, [C, D]
    recovered = F.normalize(-cotangent, dim=-1)
    score = -(cotangent * references).sum(-1)
    named = [int(label) for label in score.argsort(descending=True)[: len(labels)] if score[label] > 0]
    if len(labels) == 1:
        feature, label = rank_one(tower, observed, cotangent, references)
        recovered, named = recovered.index_copy(0, labels, feature[None]), [label]
    present = sorted(set(labels.tolist()))
    cosines, by_chance, hits, hits_chance = [], [], [], []
    for label in present:
        of_class = features[labels == label]
        total = F.normalize(of_class.sum(0), dim=0)
        cosines.append(float(recovered[label] @ total))
        by_chance.append(float((gallery @ total).mean()))
        nearest = (gallery @ recovered[label]).max()
        likeness = (F.normalize(of_class, dim=-1) @ recovered[label]).max()
        hits.append(bool(likeness >= nearest - 1e-9))
        hits_chance.append(len(of_class) / len(gallery))
    return {
        "labels_found": _mean([label in named for label in labels.tolist()]),
        "labels_right": _mean([label in present for label in named]),
        "labels_chance": len(named) / tower.classes,
        "cosine": _mean(cosines),
        "cosine_chance": _mean(by_chance),
        "reidentified": _mean(hits),
        "reidentified_chance": _mean(hits_chance),
    }


def _summed(size: int, figures: list[dict[str, float]]) -> Attack:
    means = {name: _mean([figure[name] for figure in figures]) for name in figures[0]}
    return Attack(size, len(figures), **means)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / max(1, len(values)))
