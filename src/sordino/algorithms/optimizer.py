"""torch's optimizers and schedules for stacks of clients.

torch keeps an optimizer's state beside the parameter objects. Here it is part of a method's own state, so that it is
checkpointed, sliced by client, and never shared. Each client's slice is a separate parameter to torch, so clients that
took part in different numbers of rounds stay independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from sordino.algorithms.base import STRICT, RoundContext

OptimizerState = Mapping[str, Tensor]  # each [K, ...]; empty before the first step


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """One of torch's optimizers and its schedule over rounds.

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
        slices = [part.detach().clone() for part in parameters]
        optimizer = self._make(slices, rate)
        for index, (part, gradient) in enumerate(zip(slices, self.bounded(gradients), strict=True)):
            part.grad = gradient
            if state:
                optimizer.state[part] = {name: value[index].clone() for name, value in state.items()}
        optimizer.step()
        kept = {name for name, value in optimizer.state[slices[0]].items() if isinstance(value, Tensor)}
        new_state = {name: torch.stack([optimizer.state[part][name] for part in slices]) for name in sorted(kept)}
        return torch.stack(slices), new_state

    def _make(self, slices: list[Tensor], rate: float) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": rate, "weight_decay": self.weight_decay}
        if self.name == "sgd":
            return torch.optim.SGD(slices, momentum=self.momentum, **options)
        return (torch.optim.Adam if self.name == "adam" else torch.optim.AdamW)(slices, **options)

    def initial_state(self, parameters: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step, with all its tensors present, so that stacks can be sliced."""
        _, state = self.step(parameters, torch.zeros_like(parameters), {}, rate=0.0)
        return {name: torch.zeros_like(value) for name, value in state.items()}


@lru_cache
def _rates(schedule: str, learning_rate: float, rounds: int) -> tuple[float, ...]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    if schedule == "constant":
        return (learning_rate,) * rounds
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=rounds)
    rates = []
    for _ in range(rounds):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return tuple(rates)
