"""The text tower's derivative as a linear map, and least squares that invert it.

A context's gradient is J^T vec(S): J the derivative of the C class features by the context, S the loss's derivative by
the class features. Everybody who has the model can invert it, by least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sordino.encoders.frozen.blocks import many_cotangents
from sordino.encoders.frozen.pullback import batched_gradients
from sordino.encoders.prompt_model import PromptModel

DENSE_ENTRIES = 32_000_000  # of J in float64, a quarter of a gigabyte; a larger J is used through products only
ITERATIONS = 60  # of conjugate gradients, if J is too large to be held
SMALLEST = 1e-14  # ratio of an eigenvalue to the largest; below it there is rounding only


@dataclass(frozen=True)
class TowerMap:
    """The linear map from S [C, D] to gradients of the context [M E], in float64; or from a part of S.

    Attributes:
        forward: S, flat, to J^T S.
        adjoint: u [M E] to J u, flat.
        matrix: J^T [M E, C D]; None if it is too large to be held.
        classes: C.
    """

    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    matrix: Tensor | None
    classes: int

    @classmethod
    def of(cls, model: PromptModel, context: Tensor) -> TowerMap:
        """Return the map at a context [M, E]."""
        entries = context.numel() * len(model.classes) * model.encoder.feature_width
        if entries <= DENSE_ENTRIES:
            jacobians = [_class_jacobian(model, context, index) for index in range(len(model.classes))]
            matrix = torch.cat(jacobians).T.cpu().double()
            return cls(lambda s: matrix @ s, lambda u: matrix.T @ u, matrix, len(model.classes))

        def forward(cotangent: Tensor) -> Tensor:
            leaf = context.detach().requires_grad_()
            with torch.enable_grad():
                text = model.text_features(leaf)
            gradient = torch.autograd.grad(text, leaf, cotangent.view_as(text).to(text))[0]
            return gradient.flatten().cpu().double()

        def adjoint(direction: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                tangent: Tensor = torch.func.jvp(
                    model.text_features, (context,), (direction.view_as(context).to(context),)
                )[1]
            return tangent.flatten().cpu().double()

        return cls(forward, adjoint, None, len(model.classes))

    def given_errors(self, errors: Tensor) -> TowerMap:
        """Return the map from x [D] for S = e x^T, with e [C] known."""
        matrix = None
        if self.matrix is not None:
            matrix = torch.einsum("mcd,c->md", self.matrix.unflatten(1, (self.classes, -1)), errors)
        return TowerMap(
            lambda x: self.forward(torch.outer(errors, x).flatten()),
            lambda u: errors @ self.adjoint(u).unflatten(0, (self.classes, -1)),
            matrix,
            1,
        )

    def given_feature(self, feature: Tensor) -> TowerMap:
        """Return the map from e [C] for S = e x^T, with x [D] known."""
        matrix = None if self.matrix is None else self.matrix.unflatten(1, (self.classes, -1)) @ feature
        return TowerMap(
            lambda e: self.forward(torch.outer(e, feature).flatten()),
            lambda u: self.adjoint(u).unflatten(0, (self.classes, -1)) @ feature,
            matrix,
            self.classes,
        )

    def solve(self, gradient: Tensor) -> Tensor:
        """Solve for the input of the map, flat, from a gradient [M E], by regularized least squares."""
        if self.matrix is None:
            return _conjugate_gradients(self.forward, self.adjoint, gradient)
        return self._ridge.solve(gradient)

    @cached_property
    def _ridge(self) -> Ridge:
        assert self.matrix is not None
        return Ridge.of(self.matrix)


def _class_jacobian(model: PromptModel, context: Tensor, index: int) -> Tensor:
    """Return the derivative of one class's feature by the context: [D, M E]."""
    alone = PromptModel(model.encoder, model.classes.part(index, index + 1))
    leaf = context.detach().requires_grad_()
    with torch.enable_grad(), many_cotangents():
        feature = alone.text_features(leaf)[0]
    directions = torch.eye(len(feature), dtype=feature.dtype, device=feature.device)
    chunks = directions.split(alone.prompts_at_once(context[None], 1))
    return torch.cat([batched_gradients(feature, [leaf], chunk)[0] for chunk in chunks]).flatten(1)


@dataclass(frozen=True)
class Ridge:
    """Least squares with the ridge of largest evidence, for one matrix [m, n] and many observations.

    Unknowns and noise are modeled as white and normal. The ratio of their variances is the one under which the
    observation is likeliest (MacKay, Bayesian Interpolation, 1992). So the attacker need not know the size of the
    noise.

    Attributes:
        matrix: [m, n].
        values, vectors: eigenvalues [r] above rounding, and eigenvectors, of the smaller of its two Gram matrices.
    """

    matrix: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Ridge:
        gram = matrix @ matrix.T if matrix.shape[1] > matrix.shape[0] else matrix.T @ matrix
        values, vectors = torch.linalg.eigh(gram)
        kept = values > SMALLEST * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
        return cls(matrix, values[kept], vectors[:, kept])

    def solve(self, observed: Tensor) -> Tensor:
        """Return the unknowns [n] of an observation [m]."""
        values, (rows, columns) = self.values, self.matrix.shape
        if not len(values) or not observed.any():
            return self.matrix.new_zeros(columns)
        wide = columns > rows
        projected = self.vectors.T @ (observed if wide else self.matrix.T @ observed)
        inside = projected if wide else projected / values.sqrt()  # the observation by left singular vectors
        outside = (observed.square().sum() - inside.square().sum()).clamp(min=0)
        ratios = values[-1] * torch.logspace(-14, 3, 69, dtype=values.dtype, device=values.device)[:, None]
        variance = ((inside.square() / (values + ratios)).sum(1) + outside / ratios[:, 0]) / rows
        surprise = rows * variance.log() + (values + ratios).log().sum(1) + (rows - len(values)) * ratios[:, 0].log()
        shrunk = self.vectors @ (projected / (values + ratios[surprise.argmin()]))
        return self.matrix.T @ shrunk if wide else shrunk


def _conjugate_gradients(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], observed: Tensor
) -> Tensor:
    """Solve least squares by CGLS (Hestenes, Stiefel, 1952); stopping early regularizes."""
    residual, steepest = observed, adjoint(observed)
    solution, direction = torch.zeros_like(steepest), steepest
    start = norm = steepest.square().sum()
    for _ in range(ITERATIONS):
        if norm <= SMALLEST * start:
            break
        image = forward(direction)
        step = norm / image.square().sum()
        solution, residual = solution + step * direction, residual - step * image
        steepest = adjoint(residual)
        before, norm = norm, steepest.square().sum()
        direction = steepest + norm / before * direction
    return solution
