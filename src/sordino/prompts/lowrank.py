"""A prompt as a rank-k product plus a residual.

Tran et al., Privacy-Preserving Personalized Federated Prompt Learning for Multimodal Large Language
Models (DP-FPL), ICLR 2025 (arXiv 2501.13904), section 4: one power iteration with a random
projection splits the local prompt p into orthonormal U, V = U^T p and the residual R = p - U V, so
that p = U V + R holds exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """p = u v + residual.

    Attributes:
        u: [..., M, k], orthonormal columns.
        v: [..., k, E].
        residual: [..., M, E]; orthogonal to the columns of u.
    """

    u: Tensor
    v: Tensor
    residual: Tensor

    def product(self) -> Tensor:
        """Return the rank-k part u v [..., M, E]."""
        return self.u @ self.v


def factorize(context: Tensor, projection: Tensor) -> Factors:
    """Split contexts by one power iteration.

    Args:
        context: [..., M, E].
        projection: [..., E, k], standard normal numbers; k is the rank, at most M.

    Returns:
        The factors. If a context has rank k or less, the product is the context itself and the
        residual is zero.

    Raises:
        ValueError: k is larger than M.
    """
    length, rank = context.shape[-2], projection.shape[-1]
    if rank > length:
        raise ValueError(f"rank {rank} is above the context's length {length}")
    span = context @ projection
    # Metal has no QR decomposition.
    u = torch.linalg.qr(span.cpu() if span.device.type == "mps" else span).Q.to(span)
    v = u.mT @ context
    return Factors(u, v, context - u @ v)
