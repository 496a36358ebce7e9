"""Passes through a frozen tower as CUDA graphs.

A pass with few contexts is a thousand small kernels, and a host launches them slower than an accelerator runs them.
A round repeats the pass with the same shapes, so it is recorded once, forward and backward, and then replayed: two
launches. A recording holds the memory that its pass needs, so only a few are kept.

What is recorded has its place in memory. A second forward pass overwrites what the first one kept. A backward pass then
goes through its own forward pass again before it, so results never depend on the order.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from sordino.encoders.frozen.pullback import apply

# Passes of the same shapes that run as they are before one is recorded. The first ones also load what kernels need.
BEFORE = 2
# What the recordings of an encoder may keep in all, where the largest pass keeps 1.
MOST = 2.0
# Passes after which a recording that was not replayed may make room for another.
IDLE = 100

Compute = Callable[[Tensor], Tensor]
Record = Callable[[Callable[[], None]], Callable[[], None]]

_log = logging.getLogger(__name__)
_repeated: ContextVar[bool] = ContextVar("repeated", default=False)


@contextmanager
def repeated(wanted: bool = True) -> Iterator[None]:
    """Let passes of this block be replayed: each has one backward pass, of one cotangent, or none.

    Nothing in it may recompute a pass in backward, as the recomputed one would not be replayed.
    """
    token = _repeated.set(wanted)
    try:
        yield
    finally:
        _repeated.reset(token)


@dataclass
class Kept:
    """A recording.

    Attributes:
        recorded: None if the pass could not be recorded.
        size: what it keeps, where the largest pass keeps 1.
        used: the number of the call that it last served.
    """

    recorded: Pass | None
    size: float
    used: int


class Replays:
    """The recorded passes of an encoder."""

    def __init__(self) -> None:
        self._calls = 0
        self._uses: Counter[Any] = Counter()
        self._kept: dict[Any, Kept] = {}

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        """A copy has none: recordings refer to places in memory."""
        return Replays, ()

    def __call__(self, encode: Callable[[Tensor, Any], Tensor], context: Tensor, classes: Any, size: float) -> Tensor:
        """Return `encode(context, classes)`, from a recording where there is one or should be one.

        Args:
            encode: deterministic, differentiable in the context, and the same for equal arguments.
            context: any shape.
            classes: further input; the object itself is part of what is recorded.
            size: what the pass keeps, where the largest pass keeps 1.
        """
        if not (_repeated.get() and records(context) and context.requires_grad and size <= 1):
            return encode(context, classes)
        key = getattr(encode, "__name__", ""), id(classes), context.shape, context.dtype
        self._calls += 1
        self._uses[key] += 1
        if self._uses[key] <= BEFORE or not (key in self._kept or self._has_room(size)):
            return encode(context, classes)
        if key not in self._kept:
            recorded = self._recorded(lambda x: encode(x, classes), context)
            self._kept[key] = Kept(recorded, size if recorded else 0, self._calls)
        kept = self._kept[key]
        kept.used = self._calls
        return encode(context, classes) if kept.recorded is None else apply(kept.recorded, context)

    def _has_room(self, size: float) -> bool:
        """Tell whether another recording fits, after those that are idle were forgotten if they are in its way."""
        idle = [key for key, kept in self._kept.items() if self._calls - kept.used > IDLE]
        while size + sum(kept.size for kept in self._kept.values()) > MOST:
            if not idle:
                return False
            key = idle.pop(0)
            del self._kept[key], self._uses[key]
        return True

    def _recorded(self, compute: Compute, like: Tensor) -> Pass | None:
        try:
            return Pass(compute, like, cuda_graph)
        except RuntimeError as error:  # not enough memory, or an operation that cannot be recorded
            _log.warning("a pass is launched kernel by kernel, as it cannot be recorded: %s", error)
            return None


def records(tensor: Tensor) -> bool:
    """Tell whether passes on a tensor's device can be recorded."""
    return tensor.is_cuda


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record what some work launches, and return what launches it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class Pass:
    """A recorded pass, with its backward pass, as an operation with a pullback of its own.

    Args:
        compute: what is recorded; differentiable.
        like: an input, whose shape, type and device all inputs have.
        record: see `cuda_graph`.
    """

    def __init__(self, compute: Compute, like: Tensor, record: Record) -> None:
        self._compute = compute
        self._lock = Lock()
        self._turn = 0  # which input the kept activations belong to; a backward pass uses them up
        with torch.inference_mode(False):
            self._input = torch.empty_like(like, requires_grad=True)
            with torch.no_grad():
                self._input.copy_(like)
            self._warm_up()
            self._replay = record(self._run)
            self._cotangent = torch.empty_like(self._output)
            self._replay_back = record(self._run_back)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self._lock:
            self._load(x)
            return self._output.detach().clone(), (x, torch.tensor(self._turn))

    def pullback(self, cotangent: Tensor, x: Tensor, turn: Tensor) -> tuple[Tensor]:
        if cotangent.ndim > self._output.ndim:
            return (torch.stack([self.pullback(each, x, turn)[0] for each in cotangent]),)
        with self._lock:
            if int(turn) != self._turn:
                self._load(x)
            self._cotangent.copy_(cotangent)
            self._replay_back()
            self._turn += 1
            return (self._gradient.clone(),)

    def _load(self, x: Tensor) -> None:
        with torch.no_grad():
            self._input.copy_(x)
        self._replay()
        self._turn += 1

    def _run(self) -> None:
        with torch.enable_grad():
            self._output = self._compute(self._input)

    def _run_back(self) -> None:
        (self._gradient,) = torch.autograd.grad(self._output, [self._input], self._cotangent)

    def _warm_up(self) -> None:
        """Go through the pass on a stream that is not the default one, as a recording is made on."""
        if not self._input.is_cuda:
            return
        leaf = self._input.detach().clone().requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.enable_grad():
            output = self._compute(leaf)
            torch.autograd.grad(output, [leaf], torch.zeros_like(output))
        torch.cuda.current_stream().wait_stream(side)
