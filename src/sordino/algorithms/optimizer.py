"""torch's optimizers and schedules for stacks of clients.

torch keeps an optimizer's state beside the parameter objects. Here it is part of a method's own state, so that it is
checkpointed, sliced by client, and never shared. Each client's slice is a separate parameter to torch, so clients that
took part in different numbers of rounds stay independent.

An optimizer is among a method's settings, which are checked before torch is imported; so functions import it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from sordino.algorithms.settings import STRICT

if TYPE_CHECKING:
    from torch import Tensor

    from sordino.algorithms.base import RoundContext

    OptimizerState = Mapping[str, Tensor]  # each [K, ...]; empty before the first step

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, as in torch


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """One of torch's optimizers and its schedule over rounds.

    Momentum, weight decay and schedule are plain by default. They are not those of code that is built on Dassl, as that
    of CoOp: momentum 0.9, weight decay 0.0005, and often a cosine schedule after an epoch of warm-up.

    Attributes:
        name: torch.optim.SGD, Adam or AdamW.
        learning_rate: before the schedule.
        momentum: of SGD.
        weight_decay: as in torch.
        schedule: "cosine" anneals to zero at the last round, "constant" does not.
        max_norm: longer gradients are shortened to this Euclidean norm, each client's of each parameter, for that now
            and then one step of a text tower has a gradient a hundred times the usual (Pascanu, Mikolov and Bengio, On
            the Difficulty of Training Recurrent Neural Networks, ICML 2013). Infinity bounds nothing.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: NonNegativeFloat = 0.002
    momentum: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    max_norm: PositiveFloat = math.inf

    def bounded(self, gradients: Tensor) -> Tensor:
        """Return gradients [K, ...] with each client's at a norm of at most `max_norm`."""
        if math.isinf(self.max_norm):
            return gradients
        norms = gradients.flatten(1).norm(dim=1).clamp(min=self.max_norm)
        factors: Tensor = self.max_norm / norms
        return gradients * factors.view(-1, *[1] * (gradients.ndim - 1))

    def rate(self, round_context: RoundContext) -> float:
        """Return the learning rate of a round."""
        return _rates(self.schedule, self.learning_rate, round_context.rounds)[round_context.round - 1]

    def step(
        self, parameters: Tensor, gradients: Tensor, state: OptimizerState, rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step of K independent optimizers.

        Args:
            parameters, gradients: [K, ...].
            state: the state that the last step returned; empty before the first.
            rate: the learning rate of this step.

        Returns:
            The new parameters, and the new state with each tensor [K, ...].
        """
        import torch

        slices = [part.detach().clone() for part in parameters]
        old = [{name: value[index].clone() for name, value in state.items()} for index in range(len(slices))]
        with torch.no_grad():
            new = self._stepped(slices, list(self.bounded(gradients)), old, rate)
        return torch.stack(slices), {name: torch.stack(values) for name, values in new.items()}

    def _stepped(
        self, slices: list[Tensor], gradients: list[Tensor], state: list[dict[str, Tensor]], rate: float
    ) -> dict[str, list[Tensor]]:
        """Step each client's parameters in place, and return its new state.

        With torch's functions rather than its classes: these import torch's compiler, which takes longer than torch
        itself does, in every process of a site or a server.
        """
        import torch
        from torch.optim.adam import adam
        from torch.optim.sgd import sgd

        if self.name == "sgd":
            buffers = [before.get("momentum_buffer") for before in state]
            sgd(
                slices,
                gradients,
                buffers,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                lr=rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            return {"momentum_buffer": [buffer for buffer in buffers if buffer is not None]} if self.momentum else {}
        averages, squares, steps = [], [], []
        for part, before in zip(slices, state, strict=True):
            averages.append(before["exp_avg"] if before else torch.zeros_like(part))
            squares.append(before["exp_avg_sq"] if before else torch.zeros_like(part))
            steps.append(before["step"] if before else torch.zeros(()))
        adam(
            slices,
            gradients,
            averages,
            squares,
            [],
            steps,
            decoupled_weight_decay=self.name == "adamw",
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )
        return {"exp_avg": averages, "exp_avg_sq": squares, "step": steps}

    def initial_state(self, parameters: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step, with all its tensors present, so that stacks can be sliced."""
        import torch

        _, state = self.step(parameters, torch.zeros_like(parameters), {}, rate=0.0)
        return {name: torch.zeros_like(value) for name, value in state.items()}


@lru_cache
def _rates(schedule: str, learning_rate: float, rounds: int) -> tuple[float, ...]:
    """Return every round's learning rate, as of torch's CosineAnnealingLR: each is made from the one before it."""
    if schedule == "constant":
        return (learning_rate,) * rounds
    rates = [learning_rate]
    for number in range(1, rounds):
        before, now = (1 + math.cos(math.pi * step / rounds) for step in (number - 1, number))
        rates.append(now / before * rates[-1])
    return tuple(rates)
