"""Operations of frozen towers with a backward pass of their own.

Weights that never train need no gradient, so a backward pass needs less than automatic differentiation keeps: an
operation says what it keeps, and how a cotangent of its output becomes the cotangents of its inputs. A vectorized
backward pass (`batched_gradients`) hands it all cotangents at once, and it takes them through the one forward pass that
was kept. Products with weights run over all of them together; attention and norms one after the other, so that nothing
that was kept is copied for each, or over all of them where they are so small that calls would take longer than copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

SMALL = 1 << 14  # numbers of a cotangent; at twice as many, copies take as long as calls


class Operation(Protocol):
    """A differentiable function of tensors, with frozen weights."""

    @property
    def forward(self) -> Callable[..., tuple[Any, tuple[Tensor, ...]]]:
        """Map the inputs to the output, or a tuple of outputs, and what `pullback` needs.

        Plain operations, so that forward mode works too.
        """
        ...

    @property
    def pullback(self) -> Callable[..., tuple[Tensor, ...]]:
        """Map a cotangent of each output, and what `forward` kept, to the cotangents of all inputs.

        Of n cotangents [n, ...] each result is [n, ...].
        """
        ...


def apply(operation: Operation, *inputs: Tensor) -> Tensor:
    """Apply an operation with one output; nothing is kept where no gradient is asked for."""
    (output,) = apply_all(operation, 1, *inputs)
    return output


def apply_all(operation: Operation, outputs: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Apply an operation with a number of outputs, each of which something depends on."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
        found: tuple[Tensor, ...] = _Apply.apply(operation, outputs, *inputs)[:outputs]
        return found
    found, _ = operation.forward(*inputs)
    return (found,) if isinstance(found, Tensor) else found


def batched_gradients(output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients [n, ...] of each input for n cotangents [n, ...] of one output, whose graph stays."""

    def gradients(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, cotangent, retain_graph=True)

    found: tuple[Tensor, ...] = torch.func.vmap(gradients)(cotangents)
    return found


def for_each(
    pullback: Callable[..., tuple[Tensor, ...]], cotangents: Tensor, kept: Sequence[Tensor], axes: Sequence[int]
) -> tuple[Tensor]:
    """Take many cotangents of one output through the pullback of one.

    Args:
        pullback: of a cotangent [N, ...] and what was kept of N sequences, to the cotangent of the one input.
        cotangents: [n, N, ...].
        kept: of the N sequences.
        axes: of each of `kept`, along which the sequences are.
    """
    if cotangents[0].numel() > SMALL:
        return (torch.stack([pullback(each, *kept)[0] for each in cotangents]),)
    copies = [torch.cat([tensor] * len(cotangents), axis) for tensor, axis in zip(kept, axes, strict=True)]
    return (pullback(cotangents.flatten(0, 1), *copies)[0].unflatten(0, cotangents.shape[:2]),)


class _Apply(torch.autograd.Function):
    """An operation; what it keeps is among its outputs, as it must be where `vmap` recomputes a forward pass."""

    @staticmethod
    def forward(operation: Operation, outputs: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        found, kept = operation.forward(*inputs)
        return (found, *kept) if outputs == 1 else (*found, *kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operation, ctx.outputs, ctx.inputs = inputs[0], inputs[1], len(inputs) - 2
        ctx.save_for_backward(*output[ctx.outputs :])
        ctx.mark_non_differentiable(*output[ctx.outputs :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        given = cotangents[: ctx.outputs]
        if given[0] is None:  # nothing depends on the outputs
            return None, None, *[None] * ctx.inputs
        return None, None, *_Pull.apply(ctx.operation, ctx.outputs, *given, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: Operation, outputs: int, *inputs: Tensor) -> Any:
        raise NotImplementedError("a stack of inputs is one input with one more axis; vmap has no part in it")


class _Pull(torch.autograd.Function):
    """A pullback as a function of its own, so that `vmap` leaves its many cotangents to it. It has no derivative."""

    @staticmethod
    def forward(operation: Operation, outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return operation.pullback(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], operation: Operation, outputs: int, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        places, kept = in_dims[2 : 2 + outputs], in_dims[2 + outputs :]
        moved = [each.movedim(place, 0) for each, place in zip(tensors, places, strict=False) if place is not None]
        if len(moved) < outputs or any(place is not None for place in kept):
            raise NotImplementedError("only the cotangents of one forward pass are taken at once")
        pulled = operation.pullback(*moved, *tensors[outputs:])
        return pulled, (0,) * len(pulled)


# torch asks for the signature at every call, and reads it from the annotations unless it is written down.
for _function in (_Apply.forward, _Pull.forward):
    setattr(_function, "__signature__", inspect.signature(_function))  # noqa: B010 (mypy knows no such attribute)
