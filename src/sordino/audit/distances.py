"""Reconstruction of prompts from the distances that a server opens when it clusters clients on secret shares.

SecFPP's server opens squared distances between reduced prompts. This attack uses everything that one clustering opened,
first for the distances between all clients, then for prompts:

1. *Distances.* If those between clients were opened, there is nothing to do. With "ratios", each row has a factor of
   its own; distances are symmetric, so all factors follow from one of them. If only distances to centers were opened,
   the Gram matrix is completed from them (Nyström), exactly if centers and points span the same space.
2. *Points.* Distances give points up to a rotation, so the server alone has no coordinate of any. It gets some from
   clients who help it. Let a_1, ..., a_A be the points of A clients. As all points have unit norm, every other point x
   obeys 2 a_i . x = 1 + |a_i|^2 - |x - a_i|^2. So its part within the helpers' span is known, and of the rest only its
   length.
3. *Prompts.* Gradient descent finds a context whose reduction is the reconstructed point. It starts at the mean
   domain-level context of the victim's cluster, which the protocol opens to the server by design, or at the common
   start if that was not opened. It runs once for the attacker's best point, and once for the true one, which no
   attacker has.

For comparison, two results need no distances: the mean of the helpers' points, and that cluster's mean as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sordino import secure
from sordino.algorithms import secfpp
from sordino.algorithms.base import RoundContext
from sordino.algorithms.secfpp_points import points
from sordino.audit.subject import Subject
from sordino.randomness import Streams
from sordino.secure import RevealedDistances, to_one_scale

Floats = NDArray[np.float64]
STEPS, RATE = 300, 0.01  # of the descent to a context; the rate falls to zero on a cosine


@dataclass(frozen=True)
class Helped:
    """The server's knowledge of others' points if some clients help it.

    Attributes:
        helpers: number of clients that give it their points.
        cosine: of the reconstructed and the true point, mean over the other clients.
        cosine_of_mean: of the helpers' mean point instead, which needs no distance.
    """

    helpers: int
    cosine: float
    cosine_of_mean: float


@dataclass(frozen=True)
class Prompt:
    """A reconstructed context, compared with the victim's.

    Attributes:
        cosine: of the reconstructed and the true change of the whole context since the start.
        agreement: share of the test images that both give the same class.
    """

    cosine: float
    agreement: float


@dataclass(frozen=True)
class Exposure:
    """The results of the attack on opened distances.

    Attributes:
        reason: the reason why there is nothing to attack; None if there is.
        columns: number of centers to which distances were opened.
        distance_error: of the reconstructed distances between clients, relative, up to one factor for all; mean.
        helped: by the number of helpers.
        by_best, by_truth: the victims' prompts from the best reconstructed point, and from the true one; mean over
            victims.
        by_mean: the mean domain-level context of the victim's cluster; None if that was not opened.
    """

    reason: str | None
    columns: int = 0
    distance_error: float = 0.0
    helped: tuple[Helped, ...] = ()
    by_best: Prompt | None = None
    by_truth: Prompt | None = None
    by_mean: Prompt | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def expose(subject: Subject, seed: int, victims: int = 3) -> Exposure:
    """Cluster the run's final state once more, and attack the distances that the server opens.

    Args:
        subject: the run.
        seed: decides batches, noise, and the helpers.
        victims: number of clients whose prompts are attacked.
    """
    runtime, training = subject.runtime, subject.training
    if runtime.algorithm.ABOUT.server_uses != "shares":
        return Exposure("no distances are opened in this method")
    settings, server = runtime.settings, training.server
    assert isinstance(server, secfpp.Server)
    assert isinstance(training.clients, secfpp.ClientState)
    number = training.round - training.round % settings.cluster_every
    if not number:
        return Exposure("the run ended before its first clustering")
    clients = range(len(runtime.data))
    streams = Streams(seed, number, clients, server.start.device)
    round_context = RoundContext(number, runtime.rounds, streams, len(clients))
    mechanism_round = runtime.mechanism.client_end(round_context.streams, list(clients))
    broadcast = secfpp.broadcast(server)
    data = runtime.clients.training_data(training.at_clients)
    upload, _ = secfpp.client_round(
        settings, broadcast, training.clients, data, mechanism_round.gradients, round_context
    )
    model = runtime.model
    parties = secfpp.client_exchange(settings, model, broadcast, upload, clients, round_context)
    carrier = secure.in_process(parties)
    exchange = secfpp.server_exchange(settings, model, server, upload, clients, round_context, carrier)
    exchange.cluster(secfpp.searching(settings))
    truth = np.stack([party.point for party in parties])
    distances = between_clients(exchange.server.opened, len(truth), settings.reveal == "ratios")
    if distances is None:
        return Exposure("rows of distances to centers have scales of their own", len(exchange.server.opened))
    order = np.random.default_rng(seed).permutation(len(truth))
    distances, error = _to_scale(distances, truth)
    counts = sorted({1, 2, len(truth) // 4, len(truth) // 2, len(truth) - 1} - {0, len(truth)})
    helped = tuple(_helped(distances, truth, order[:count]) for count in counts)
    contexts = _Contexts(subject, upload, server)
    chosen = order[-min(victims, len(truth) - 1) :]
    helpers = order[: len(truth) - len(chosen)]
    best = {int(victim): located(truth[helpers], distances[victim, helpers]) for victim in chosen}
    return Exposure(
        None,
        len(exchange.server.opened),
        error,
        helped,
        contexts.mean(chosen, lambda victim: contexts.sought(best[victim], victim)),
        contexts.mean(chosen, lambda victim: contexts.sought(truth[victim], victim)),
        contexts.mean(chosen, contexts.of_cluster),
    )


def between_clients(opened: Sequence[RevealedDistances], count: int, ratios: bool) -> Floats | None:
    """Compute squared distances [N, N] between clients, up to one factor, from columns of those to centers.

    Args:
        opened: the distances that the server opened, of all N clients.
        count: N.
        ratios: true if each row has a factor of its own.

    Returns:
        The distances; None if they cannot be computed from the opened ones.
    """
    columns = np.stack([column.squared(1.0) for column in opened], axis=1)  # [N, columns]
    singles = {column.members[0]: number for number, column in enumerate(opened) if len(column.members) == 1}
    if len(singles) == count:
        matrix = columns[:, [singles[client] for client in range(count)]]
        return to_one_scale(matrix) if ratios else matrix
    if ratios:
        return None
    weights = np.array(
        [[(client in column.members) / len(column.members) for client in range(count)] for column in opened]
    )
    centered = np.eye(count) - 1 / count
    # Without the means over rows and over columns, distances are -2 X C^T, with X the points and C the centers.
    products = -centered @ (columns - columns.mean(1, keepdims=True)) / 2  # [N, columns]
    spread = weights - weights.mean(0)
    gram = products @ np.linalg.pinv(spread @ products, rcond=1e-9) @ products.T
    norms = np.diag(gram)
    squared: Floats = np.maximum(norms[:, None] + norms - gram - gram.T, 0.0)
    return squared


def _to_scale(distances: Floats, truth: Floats) -> tuple[Floats, float]:
    """Return distances with the one factor that fits best, and their mean relative error.

    An attacker gets the factor from two helpers' distance.
    """
    tiny = np.finfo(float).tiny
    true = ((truth[:, None] - truth) ** 2).sum(-1)
    scaled = distances * (distances * true).sum() / max((distances**2).sum(), tiny)
    others = ~np.eye(len(truth), dtype=bool)
    errors = np.abs(scaled - true)[others] / np.maximum(true[others], tiny)
    return scaled, float(errors.mean())


def located(helpers: Floats, distances: Floats) -> Floats:
    """Compute the part of a unit-norm point that its squared distances to known points determine.

    Args:
        helpers: [A, d], the known points.
        distances: [A], squared.

    Returns:
        [d], within the helpers' span; the part orthogonal to it stays unknown and is zero.
    """
    sides = (1 + (helpers**2).sum(1) - distances) / 2
    point: Floats = np.linalg.pinv(helpers, rcond=1e-6) @ sides
    return point


def _helped(distances: Floats, truth: Floats, helpers: NDArray[np.int64]) -> Helped:
    others = np.setdiff1d(np.arange(len(truth)), helpers)
    known = truth[helpers]
    mean = known.mean(0)
    by_distances = [_cosine(located(known, distances[client, helpers]), truth[client]) for client in others]
    by_mean = [_cosine(mean, truth[client]) for client in others]
    return Helped(len(helpers), float(np.mean(by_distances)), float(np.mean(by_mean)))


def _cosine(one: Floats, other: Floats) -> float:
    scale = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / scale if scale else 0.0


class _Contexts:
    """Contexts that an attacker reconstructs, and their distance to the victims'."""

    def __init__(self, subject: Subject, upload: secfpp.Upload, server: secfpp.Server) -> None:
        self.runtime, self.upload, self.server = subject.runtime, upload, server
        self.images = subject.features[torch.from_numpy(subject.task.test)]

    def mean(self, victims: Sequence[int] | NDArray[np.int64], of: Callable[[int], Tensor | None]) -> Prompt | None:
        """Return the mean figures of the victims' contexts that `of` returns; None if it returns none."""
        contexts = [(int(victim), of(int(victim))) for victim in victims]
        figures = [self._judged(victim, context) for victim, context in contexts if context is not None]
        if not figures:
            return None
        return Prompt(*(float(np.mean([figure[part] for figure in figures])) for part in (0, 1)))

    def sought(self, point: Floats, victim: int) -> Tensor:
        """Return a context [M, E] whose reduction points where `point` does, near the victim's cluster's mean."""
        start = self.server.start.to(self.upload.context)
        known = self.of_cluster(victim)
        begin = start if known is None else known.to(start)
        nudge = 1e-2 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).to(start)
        context = (begin + nudge).requires_grad_()  # the start itself has no direction
        target = torch.from_numpy(point).to(start)
        optimizer = torch.optim.Adam([context], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            reached = points(self.runtime.model, context[None], start, self.runtime.settings.width)[0]
            (1 - F.cosine_similarity(reached, target, dim=0)).backward()
            optimizer.step()
            schedule.step()
        return context.detach()

    def of_cluster(self, victim: int) -> Tensor | None:
        """Return the mean context [M, E] of the victim's cluster; None if it was not opened."""
        return self.server.contexts[victim] if self.server.opened[victim] else None

    @torch.no_grad()
    def _judged(self, victim: int, context: Tensor) -> tuple[float, float]:
        """Return the cosine of a context's change with the true one, and the share of images classified alike."""
        true, start = self.upload.context[victim], self.server.start
        cosine = F.cosine_similarity((context - start).flatten(), (true - start).flatten(), dim=0)
        both = self.runtime.model.predict(torch.stack([context.to(true), true]), self.images).argmax(-1)
        return float(cosine), float((both[0] == both[1]).float().mean())
