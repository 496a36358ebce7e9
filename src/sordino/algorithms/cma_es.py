"""CMA-ES as a function of tensors: K searches side by side, whose state can be sent, sliced and kept.

Hansen, The CMA Evolution Strategy: A Tutorial (arXiv 1604.00772), figure 6, with negative weights, and with the rates
of the package `cma`, which the authors of FedBPT use. That keeps a search in an object with a random state of its
own. Here it is part of a method's state: a server sends it, clients go on from it, and a resumed run goes on to the
bit. So the update is written again, and tests compare it with the package's. Step sizes follow cumulative step-size
adaptation.

Only the order of losses matters: any increasing function of them leaves a search as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rates:
    """The constants of a search.

    Attributes:
        weights: of a generation's candidates from the best to the worst, [P] of float; the positive ones sum to 1.
        parents: the number of positive ones.
        effective: mu_eff, the effective number of parents.
        path, rank_one, rank_mu: c_c, c_1 and c_mu, of the covariance.
        step, damping: c_sigma and d_sigma, of the step size.
        gap: generations for which one root of the covariance serves.
    """

    weights: tuple[float, ...]
    parents: int
    effective: float
    path: float
    rank_one: float
    rank_mu: float
    step: float
    damping: float
    gap: int

    @classmethod
    def of(cls, width: int, population: int, all_parents: bool = False) -> Rates:
        """Return the constants for a search in `width` numbers.

        Args:
            width: N.
            population: P, at least 2 unless all are parents.
            all_parents: give every candidate a positive weight, as if it were of the better half of 2 P.
        """
        last = population + 0.5 if all_parents else (population + 1) / 2
        raw = [math.log(last) - math.log(place + 1) for place in range(population)]
        positive, negative = [w for w in raw if w > 0], [-w for w in raw if w < 0]
        effective = sum(positive) ** 2 / sum(w**2 for w in positive)
        rank_one = min(1.0, (2 * population if all_parents else population) / 6) * 2 / ((width + 1.3) ** 2 + effective)
        rank_mu = min(1 - rank_one, 2 * (0.25 + effective + 1 / effective - 2) / ((width + 2) ** 2 + effective))
        scale = 0.0
        if negative and rank_mu > 0:
            of_negative = sum(negative) ** 2 / sum(w**2 for w in negative)
            # So that the covariance neither decays nor loses its positive definiteness.
            most = (
                1 + rank_one / rank_mu,
                1 + 2 * of_negative / (effective + 2),
                (1 - rank_one - rank_mu) / (width * rank_mu),
            )
            scale = min(most) / sum(negative)
        step = (effective + 2) / (width + effective + 3)
        return cls(
            tuple(w / sum(positive) if w > 0 else w * scale for w in raw),
            len(positive),
            effective,
            (4 + effective / width) / (width + 4 + 2 * effective / width),
            rank_one,
            rank_mu,
            step,
            1 + 2 * max(0.0, math.sqrt((effective - 1) / (width + 1)) - 1) + step,
            max(1, math.floor(1 / (10 * width * (rank_one + rank_mu)))),
        )


@dataclass(frozen=True)
class Search:
    """K searches in N numbers, float64.

    Attributes:
        mean: [K, N], of the distribution that candidates are drawn from.
        step: [K], sigma, its step size.
        covariance: [K, N, N], its covariance over sigma^2.
        path: [K, N], p_c, the path of the mean.
        step_path: [K, N], p_sigma, the path of the mean in units of the distribution.
        generation: the number of generations since the paths were zero.
    """

    mean: Tensor
    step: Tensor
    covariance: Tensor
    path: Tensor
    step_path: Tensor
    generation: int = 0

    @classmethod
    def at(cls, mean: Tensor, step: Tensor, covariance: Tensor) -> Search:
        """Return searches that start at a mean [K, N] with steps [K] and covariances [K or 1, N, N]; paths are zero."""
        mean = mean.double()
        covariance = covariance.double().expand(len(mean), -1, -1)
        return cls(mean, step.double(), covariance, torch.zeros_like(mean), torch.zeros_like(mean))


@dataclass(frozen=True)
class Roots:
    """The symmetric root of covariances and its inverse, each [K, N, N].

    The symmetric one does not depend on the order or sign of eigenvectors.
    """

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> Roots:
        """Return the roots of positive definite matrices [K, N, N]."""
        values, vectors = torch.linalg.eigh(covariance)
        scales = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()[..., None, :]
        return cls((vectors * scales) @ vectors.mT, (vectors / scales) @ vectors.mT)

    def expand(self, clients: int) -> Roots:
        """Return the same roots for so many clients."""
        return Roots(self.root.expand(clients, -1, -1), self.inverse.expand(clients, -1, -1))


def ask(search: Search, roots: Roots, normal: Tensor) -> Tensor:
    """Return candidates [K, P, N] of standard normal numbers [K, P, N]."""
    return search.mean[:, None] + search.step[:, None, None] * normal.double() @ roots.root


def tell(search: Search, roots: Roots, rates: Rates, candidates: Tensor, losses: Tensor, adapts: bool = True) -> Search:
    """Return the searches after a generation.

    Args:
        search: before it.
        roots: of the covariance that the candidates were drawn with.
        rates: for N and P.
        candidates: [K, P, N].
        losses: [K, P]; only their order matters, and the first of equal ones counts as the better.
        adapts: false leaves the covariance as it was, for searches that end before its root is taken again.
    """
    width = search.mean.shape[1]
    order = losses.argsort(dim=1, stable=True)
    ranked = candidates.double().gather(1, order[..., None].expand_as(candidates))
    weights = search.mean.new_tensor(rates.weights)
    mean = (weights[: rates.parents, None] * ranked[:, : rates.parents]).sum(1)
    moved = (mean - search.mean) / search.step[:, None]
    shift = math.sqrt(rates.effective) * (moved[:, None] @ roots.inverse)[:, 0]
    step_path = (1 - rates.step) * search.step_path + math.sqrt(rates.step * (2 - rates.step)) * shift
    generation = search.generation + 1
    squared = step_path.square().sum(1) / width
    # A path that is long for its age stops the path of the covariance for a while, lest it grow too fast.
    goes_on = (squared / (1 - (1 - rates.step) ** (2 * generation)) < 2 + 4 / (width + 1)).double()
    path = (1 - rates.path) * search.path
    path = path + (goes_on * math.sqrt(rates.path * (2 - rates.path) * rates.effective))[:, None] * moved
    covariance = _adapted(search, roots, rates, ranked, path, goes_on) if adapts else search.covariance
    # The expected norm of a standard normal vector.
    expected = math.sqrt(2) * math.exp(math.lgamma((width + 1) / 2) - math.lgamma(width / 2))
    growth = rates.step / rates.damping * (step_path.norm(dim=1) / expected - 1)
    return replace(
        search,
        mean=mean,
        step=search.step * growth.clamp(max=1.0).exp(),
        covariance=covariance,
        path=path,
        step_path=step_path,
        generation=generation,
    )


def _adapted(search: Search, roots: Roots, rates: Rates, ranked: Tensor, path: Tensor, goes_on: Tensor) -> Tensor:
    """Return covariances [K, N, N] after a generation.

    Args:
        search, roots, rates: as for `tell`.
        ranked: [K, P, N], candidates from the best to the worst.
        path: [K, N], the new path.
        goes_on: [K], 1 where the path went on, 0 where it stopped.
    """
    width, weights = search.mean.shape[1], search.mean.new_tensor(rates.weights)
    steps = (ranked - search.mean[:, None]) / search.step[:, None, None]
    lengths = (steps @ roots.inverse).norm(dim=-1)  # [K, P], Mahalanobis lengths
    # A step with a negative weight counts with the expected length, so that no long one takes all variance away.
    shares = torch.where(weights < 0, weights * width / (lengths + 1e-9).square(), weights)
    missing = (1 - goes_on) * rates.path * (2 - rates.path)
    kept = 1 - rates.rank_one * (1 - missing) - rates.rank_mu * sum(rates.weights)
    of_path = rates.rank_one * path[:, :, None] * path[:, None, :]
    of_steps = rates.rank_mu * (steps.mT * shares[:, None]) @ steps
    return kept[:, None, None] * search.covariance + of_path + of_steps
