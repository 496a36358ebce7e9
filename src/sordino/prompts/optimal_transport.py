"""Optimal transport between an image's patches and a class's prompts, for many pairs at once.

The plan T [N, V] has the least cost among plans that give each of N prompts the same mass, b = mass
/ N, and take at most a = 1 / V from each of V patches. With an entropy term it minimizes <T, C> + r
sum T (log T - 1). A mass of 1 is balanced transport: every patch gives all it has. With less mass,
the patches that fit worst stay out. Li, Huang, Wang, Shi, Global and Local Prompts Cooperation via
Optimal Transport for Federated Learning, CVPR 2024 (arXiv 2403.00041), section 3.3.

The plan is the projection of exp(-C / r) on both constraints in Kullback-Leibler divergence, T = u
K v, by the scaling algorithm of Benamou, Carlier, Cuturi, Nenna, Peyré, Iterative Bregman
Projections for Regularized Transportation Problems, SIAM J. Sci. Comput. 2015, and Chizat, Peyré,
Schmitzer, Vialard, Scaling Algorithms for Unbalanced Optimal Transport Problems, 2018. In turn u <-
min(1, a / (K v)) for patches and v <- b / (K^T u) for prompts. The iterations run on logarithms
here, so that a small r neither overflows nor underflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def transport_plan(
    cost: Tensor,
    mass: float = 1.0,
    regularization: float = 0.1,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Tensor:
    """Compute plans of least cost between uniform prompts and patches.

    They are differentiable in the cost, through all iterations. Under `torch.no_grad` they are
    constants, as in FedOTP.

    Every problem ends by itself, so a plan does not depend on the other problems of a stack. If the
    iterations of a stack ended together, one image could change the contributions of other images,
    and no clip would bound that.

    Args:
        cost: [..., N, V]; any leading axes, solved together.
        mass: in (0, 1], the part of the patches' mass that is transported.
        regularization: r, in units of the cost.
        iterations: the largest number of iterations.
        tolerance: a problem ends once none of its prompts' potentials log v moves by more.

    Returns:
        [..., N, V], not negative; rows sum to mass / N, columns to at most 1 / V up to convergence.
        A problem whose cost is not finite has a plan that is not finite, and changes no other.
    """
    prompts, patches = cost.shape[-2:]
    log_row, log_column = math.log(mass / prompts), -math.log(patches)
    log_kernel = (cost / -regularization).reshape(-1, prompts, patches)  # [Q, N, V], Q problems
    log_v = torch.zeros_like(log_kernel[..., :1])  # [Q, N, 1]
    log_u = torch.zeros_like(log_kernel[..., :1, :])  # [Q, 1, V]
    done = torch.zeros(len(log_kernel), 1, 1, dtype=torch.bool, device=cost.device)
    active = torch.arange(len(log_kernel), device=cost.device)  # the problems that still iterate
    finished: list[tuple[Tensor, Tensor]] = []  # (problems, their plans)
    for _ in range(iterations):
        new_u = (log_column - (log_kernel + log_v).logsumexp(-2, keepdim=True)).clamp(max=0.0)
        new_v = log_row - (log_kernel + new_u).logsumexp(-1, keepdim=True)
        moved = (new_v - log_v).detach().abs().amax(-2, keepdim=True)  # [Q, 1, 1]
        log_u, log_v = torch.where(done, log_u, new_u), torch.where(done, log_v, new_v)
        done = done | (moved <= tolerance)
        left = int((~done).sum())
        if not left:
            break
        if left <= len(active) // 2:  # so that all copies together are at most one more stack
            ended, kept = done.flatten(), ~done.flatten()
            finished.append((active[ended], _plans(log_u[ended], log_kernel[ended], log_v[ended])))
            active, done = active[kept], done[kept]
            log_kernel, log_u, log_v = log_kernel[kept], log_u[kept], log_v[kept]
    finished.append((active, _plans(log_u, log_kernel, log_v)))
    order = torch.cat([problems for problems, _ in finished]).argsort()
    return torch.cat([plans for _, plans in finished])[order].reshape(cost.shape)


def _plans(log_u: Tensor, log_kernel: Tensor, log_v: Tensor) -> Tensor:
    """Return plans [Q, N, V] of potentials [Q, 1, V] and [Q, N, 1]."""
    return (log_u + log_kernel + log_v).exp()
