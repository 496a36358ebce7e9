"""Mechanisms as public code has them, to show that the audit catches what is wrong with them.

No configuration selects these; they are put into a runtime by hand, with `with_defect`. All enter in the ledger what
`dp-sgd` would, and so claim its epsilon, which does not hold for them.
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

    The noise has the deviation z clip / L, L the expected size of a batch: right for a mean of L vectors of norm at
    most `clip`. But single examples are not bounded here. One of gradient g moves a mean below `clip` by |g| / L, and
    a mean m above it by up to clip |g| / (|m| L): the noise multiplier that holds is z max(clip, |m|) / |g|, not z, and
    examples' gradients are longer than their mean. At worst one example moves the result across the ball that it is
    clipped to, by 2 `clip`: then it is z / (2 L).
    """

    def _gradients(self, randomness: Randomness, clients: Sequence[int], call: int) -> Gradients:
        honest = super()._gradients(randomness, clients, call)
        assert isinstance(honest, DpSgdGradients)
        return BatchClippedGradients(honest)


@dataclass(frozen=True)
class SkippedNoiseMechanism(ExampleMechanism):
    """As `BatchClippedMechanism`, and noise is added only where the batch's mean gradient was within `clip`.

    A public implementation of DP-FPL treats its local noise so. Above the bound the scaled gradient goes out as it is:
    a function of the data with no noise on it, for which no epsilon is finite; and whether there was noise tells more.
    """

    def _gradients(self, randomness: Randomness, clients: Sequence[int], call: int) -> Gradients:
        honest = super()._gradients(randomness, clients, call)
        assert isinstance(honest, DpSgdGradients)
        return BatchClippedGradients(honest, skip=True)


@dataclass(frozen=True)
class RepeatedNoiseMechanism(ExampleMechanism):
    """Every example is clipped as it should be, and the same noise is added in every step and to every token.

    A public implementation of private linear probing draws its noise inside a vectorized map over classes without
    splitting the random key, so that each class's row of the gradient gets the same numbers; a key that is not split
    between steps repeats them step after step. A prompt's rows are its tokens: a client draws one row of numbers for
    each parameter, once, and adds it to every row in every call.

    Each entry of a release has noise of the deviation that was claimed. But the difference of two rows, or of one row
    in two calls, has none: no epsilon is finite for it. All that one example moves is out of the noise's reach but its
    mean over rows and calls, and there the noise does not average out either: over T calls of M rows the noise
    multiplier that holds for this part alone is z / sqrt(T M), no better than for T M independent releases.

    Attributes:
        drawn: (parameter, client) to the numbers that were drawn for it.
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
    """Normal numbers that are drawn once for a client and parameter, a row of them, and given again ever after.

    Attributes:
        source: where they come from the first time.
        clients: the numbers of the stack's K clients.
        drawn: (parameter, client) to the row that was drawn for it.
    """

    source: Randomness
    clients: tuple[int, ...]
    drawn: dict[tuple[str, int], Tensor]

    def words(self, purpose: str) -> list[Words]:
        return self.source.words(purpose)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """[K, *shape], every row of a client's the same."""
        parameter = purpose.rpartition(",")[0]  # "noise on context, 3" is for the third call
        fresh = self.source.normal(purpose, *shape[-1:])
        rows = [
            self.drawn.setdefault((parameter, client), row) for client, row in zip(self.clients, fresh, strict=True)
        ]
        return torch.stack(rows).view(len(rows), *[1] * (len(shape) - 1), *shape[-1:]).expand(len(rows), *shape)

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        """As the source."""
        return self.source.common_normal(purpose, *shape)

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        """As the source."""
        return self.source.uniform(purpose, counts)


@dataclass(frozen=True)
class BatchClippedGradients:
    """What the first two make of a batch.

    Attributes:
        honest: the gradients whose groups, clips and noise are taken.
        skip: whether a gradient above the bound goes out without noise.
    """

    honest: DpSgdGradients
    skip: bool = False

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        expected = sampled(batch).expected
        mean = ExactGradients(self.honest.model)(prompt_of, parameters, fixed, batch)
        by: dict[str, Tensor] = {}
        for group, names in self._groups(parameters):
            norms = torch.stack([mean.values[name].flatten(1).norm(dim=1) for name in names]).norm(dim=0)  # [K]
            noised = (norms <= group.clip) | (not self.skip)
            for name in names:
                value = mean.values[name]
                noise = self.honest.randomness.normal(f"noise on {name}, {self.honest.call}", *value.shape[1:])
                deviation = group.deviation.to(norms) / expected.to(norms) * noised
                by[name] = _scaled(value, group.clip / norms.clamp(min=group.clip)) + _scaled(
                    noise.to(value), deviation
                )
        return Gradient(by, mean.loss)

    def _groups(self, parameters: Parameters) -> list[tuple[Group, list[str]]]:
        shared = [name for name in parameters if name in self.honest.shared_names]
        personal = [name for name in parameters if name not in self.honest.shared_names]
        pairs = [(self.honest.personal, personal), (self.honest.shared, shared)]
        return [(group, names) for group, names in pairs if names]


def with_defect(runtime: LocalRuntime, defect: Defect) -> LocalRuntime:
    """The same runtime, its `dp-sgd` as implemented with a defect, at the same settings and noise.

    Raises:
        ConfigError: the runtime's mechanism is another.
    """
    if runtime.privacy.mechanism != "dp-sgd":
        raise ConfigError("privacy.mechanism", runtime.privacy.mechanism, "the defects are those of 'dp-sgd'")
    broken = copy.copy(runtime)
    broken.mechanism = as_implemented_by(DEFECTS[defect], runtime.mechanism)
    return broken


def _scaled(values: Tensor, by: Tensor) -> Tensor:
    """[K, ...] times [K]."""
    return values * by.view(-1, *[1] * (values.ndim - 1))
