"""Mechanisms with the defects of public code, to show that the audit detects them.

No configuration selects these; `with_defect` puts them into a runtime. All enter in the ledger what `dp-sgd` would, and
so claim its epsilon, which does not hold for them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from sordino.audit.subject import as_implemented_by
from sordino.errors import ConfigError
from sordino.privacy.dp_sgd import DpSgdGradients, Group, sampled
from sordino.privacy.example_level import ExampleMechanism
from sordino.privacy.gradients import Batch, ExactGradients, Gradient, Gradients, Parameters, PromptOf
from sordino.randomness import Randomness, Words
from sordino.runtime.local import LocalRuntime

Defect = Literal["batch clipped", "noise skipped", "noise repeated"]


@dataclass(frozen=True)
class BatchClippedMechanism(ExampleMechanism):
    """The batch's mean gradient is clipped to `clip`, and noised as if each example's had been.

    The noise has the deviation z clip / L, L the expected size of a batch. This is right for a mean of L vectors of
    norm at most `clip`, but single examples are not bounded here. An example of gradient g moves a mean below `clip` by
    |g| / L, and a mean m above it by up to clip |g| / (|m| L). So the noise multiplier that holds is
    z max(clip, |m|) / |g|, not z, and examples' gradients are longer than their mean. At worst one example moves the
    result across the ball that it is clipped to, by 2 `clip`: then the multiplier is z / (2 L).
    """

    def _gradients(self, randomness: Randomness, clients: Sequence[int], call: int) -> Gradients:
        honest = super()._gradients(randomness, clients, call)
        assert isinstance(honest, DpSgdGradients)
        return BatchClippedGradients(honest)


@dataclass(frozen=True)
class SkippedNoiseMechanism(ExampleMechanism):
    """As `BatchClippedMechanism`, and noise is added only if the batch's mean gradient was within `clip`.

    A public implementation of DP-FPL treats its local noise so. Above the bound the scaled gradient is released as it
    is: a function of the data without noise, for which no epsilon is finite. The presence of noise tells more.
    """

    def _gradients(self, randomness: Randomness, clients: Sequence[int], call: int) -> Gradients:
        honest = super()._gradients(randomness, clients, call)
        assert isinstance(honest, DpSgdGradients)
        return BatchClippedGradients(honest, skip=True)


@dataclass(frozen=True)
class RepeatedNoiseMechanism(ExampleMechanism):
    """Every example is clipped as it should be, and the same noise is added in every step and to every token.

    A public implementation of private linear probing draws its noise inside a vectorized map over classes without
    splitting the random key. So each class's row of the gradient gets the same numbers. A key that is not split between
    steps repeats them step after step. A prompt's rows are its tokens: here a client draws one row of numbers for each
    parameter, once, and adds it to every row in every call.

    Each entry of a release has noise of the deviation that was claimed. But the difference of two rows, or of one row
    in two calls, has none: no epsilon is finite for it. The noise protects only the mean of an example's influence over
    rows and calls, and there it does not average out either. Over T calls of M rows the noise multiplier that holds for
    this part alone is z / sqrt(T M), no better than for T M independent releases.

    Attributes:
        drawn: (parameter, client) to its numbers.
    """

    drawn: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def _gradients(self, randomness: Randomness, clients: Sequence[int], call: int) -> Gradients:
        honest = super()._gradients(randomness, clients, call)
        assert isinstance(honest, DpSgdGradients)
        return replace(honest, randomness=RepeatedRandomness(randomness, tuple(clients), self.drawn))


DEFECTS: dict[Defect, type[ExampleMechanism]] = {
    "batch clipped": BatchClippedMechanism,
    "noise skipped": SkippedNoiseMechanism,
    "noise repeated": RepeatedNoiseMechanism,
}


@dataclass(frozen=True)
class RepeatedRandomness:
    """Normal numbers that are drawn once for a client and parameter, a row of them, and repeated from then on.

    Attributes:
        source: the randomness of the first draw.
        clients: the numbers of the stack's K clients.
        drawn: (parameter, client) to its row.
    """

    source: Randomness
    clients: tuple[int, ...]
    drawn: dict[tuple[str, int], Tensor]

    def words(self, purpose: str) -> list[Words]:
        return self.source.words(purpose)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Return numbers [K, *shape], every row of a client's the same."""
        parameter = purpose.rpartition(",")[0]  # "noise on context, 3" is for the third call
        fresh = self.source.normal(purpose, *shape[-1:])
        rows = [
            self.drawn.setdefault((parameter, client), row) for client, row in zip(self.clients, fresh, strict=True)
        ]
        spread = torch.stack(rows).view(len(rows), *[1] * (len(shape) - 1), *shape[-1:])
        return spread.expand(len(rows), *shape)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        """Return the source's numbers."""
        return self.source.common_normal(purpose, *shape)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        """Return the source's numbers."""
        return self.source.uniform(purpose, counts)


@dataclass(frozen=True)
class BatchClippedGradients:
    """Gradients of the first two mechanisms: clipped as a batch.

    Attributes:
        honest: the gradients whose groups, clips and noise are used.
        skip: true if a gradient above the bound is released without noise.
    """

    honest: DpSgdGradients
    skip: bool = False

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        expected = sampled(batch).expected
        mean = ExactGradients(self.honest.model)(prompt_of, parameters, fixed, batch)
        released: dict[str, Tensor] = {}
        for group, names in self._groups(parameters):
            norms = torch.stack([mean.values[name].flatten(1).norm(dim=1) for name in names]).norm(dim=0)  # [K]
            noised = (norms <= group.clip) | (not self.skip)
            for name in names:
                value = mean.values[name]
                noise = self.honest.randomness.normal(f"noise on {name}, {self.honest.call}", *value.shape[1:])
                deviation = group.deviation.to(norms) / expected.to(norms) * noised
                clipped = _scaled(value, group.clip / norms.clamp(min=group.clip))
                released[name] = clipped + _scaled(noise.to(value), deviation)
        return Gradient(released, mean.loss)

    def _groups(self, parameters: Parameters) -> list[tuple[Group, list[str]]]:
        shared = [name for name in parameters if name in self.honest.shared_names]
        personal = [name for name in parameters if name not in self.honest.shared_names]
        pairs = [(self.honest.personal, personal), (self.honest.shared, shared)]
        return [(group, names) for group, names in pairs if names]


def with_defect(runtime: LocalRuntime, defect: Defect) -> LocalRuntime:
    """Return the same runtime, its `dp-sgd` implemented with a defect, at the same settings and noise.

    Raises:
        ConfigError: the runtime's mechanism is another.
    """
    if runtime.privacy.mechanism != "dp-sgd":
        raise ConfigError("privacy.mechanism", runtime.privacy.mechanism, "the defects are those of 'dp-sgd'")
    broken = copy.copy(runtime)
    broken.mechanism = as_implemented_by(DEFECTS[defect], runtime.mechanism)
    return broken


def _scaled(values: Tensor, factors: Tensor) -> Tensor:
    """Return values [K, ...] times factors [K]."""
    return values * factors.view(-1, *[1] * (values.ndim - 1))
