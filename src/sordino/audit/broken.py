"""Mechanisms with defects, to show which of them the audit detects.

Those of `dp-sgd` are defects of public code; those of `statistics` are ones that such a release invites. No
configuration selects them; `with_defect` puts them into a runtime. All enter in the ledger what the mechanism without
the defect would, and so claim its epsilon, which does not hold for them.
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
from sordino.privacy.mechanism import Mechanism
from sordino.privacy.statistics.mechanism import MATRIX, StatisticsMechanism
from sordino.randomness import Randomness, Words
from sordino.runtime.local import LocalRuntime

Defect = Literal["batch clipped", "noise skipped", "noise repeated", "noise a third"]
StatisticsDefect = Literal["noise left out", "noise divided", "exact counts", "released anew", "third of the noise"]
RELEASES = 100  # of `ReleasedAnewMechanism`, such as one in every round


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


@dataclass(frozen=True)
class NoiseAThirdMechanism(ExampleMechanism):
    """Examples are clipped as they should be, and the noise has a third of the deviation that the ledger says.

    The noise multiplier that holds is z / 3. At a claimed epsilon of 1 this is too small a defect for the audit.
    """

    def _gradients(self, randomness: Randomness, clients: Sequence[int], call: int) -> Gradients:
        honest = super()._gradients(randomness, clients, call)
        assert isinstance(honest, DpSgdGradients)
        return replace(honest, randomness=AlteredRandomness(randomness, scale=1 / 3))


DEFECTS: dict[Defect, type[ExampleMechanism]] = {
    "batch clipped": BatchClippedMechanism,
    "noise skipped": SkippedNoiseMechanism,
    "noise repeated": RepeatedNoiseMechanism,
    "noise a third": NoiseAThirdMechanism,
}


@dataclass(frozen=True)
class AlteredNoiseMechanism(StatisticsMechanism):
    """Class statistics leave with other noise than the ledger says; subclasses say with which."""

    def with_own_noise(self, part: str, exact: Tensor, randomness: Randomness) -> Tensor | None:
        sizes = self.inputs.sizes
        return super().with_own_noise(part, exact, self.altered(randomness, sum(sizes) / len(sizes)))

    def summed(self, part: str, exact: Tensor, randomness: Randomness) -> Tensor:
        return super().summed(part, exact, self.altered(randomness, sum(self.inputs.sizes)))

    def altered(self, randomness: Randomness, examples: float) -> AlteredRandomness:
        """Return the source of the noise on a sum over so many examples."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoiseLeftOutMechanism(AlteredNoiseMechanism):
    """Class statistics leave without noise, for which no epsilon is finite.

    Noise from a public seed is no better: whoever knows the seed subtracts it.
    """

    def altered(self, randomness: Randomness, examples: float) -> AlteredRandomness:
        return AlteredRandomness(randomness, scale=0.0)


@dataclass(frozen=True)
class NoiseDividedMechanism(AlteredNoiseMechanism):
    """The noise of a mean is added to the sum: its deviation is divided by the number of examples.

    An example moves a mean of n by 1 / n, and the sum by 1. The noise multiplier that holds is z / n.
    """

    def altered(self, randomness: Randomness, examples: float) -> AlteredRandomness:
        return AlteredRandomness(randomness, scale=1 / examples)


@dataclass(frozen=True)
class ExactCountsMechanism(StatisticsMechanism):
    """Each class's row is divided by the exact number of its examples, and multiplied by that of a class on average.

    So classes weigh alike, and rows have the size of sums. But of a class with n_c examples one moves the release by up
    to n / n_c, n the number of an average class, and not by 1. A client of rare classes is not bounded: the noise
    multiplier that holds for its examples is z n_c / n.
    """

    def exact(
        self,
        part: str,
        features: Tensor,
        labels: Tensor,
        rows: Sequence[Tensor],
        persons: Tensor | None = None,
        centers: Tensor | None = None,
    ) -> Tensor:
        exact = super().exact(part, features, labels, rows, persons, centers)
        if part != MATRIX:
            return exact
        counts = exact[..., 0]  # [K, C], in a common unit
        held = counts > 0
        average = counts.sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp(min=1)
        return exact * torch.where(held, average / torch.where(held, counts, 1.0), 1.0)[..., None]


@dataclass(frozen=True)
class ReleasedAnewMechanism(AlteredNoiseMechanism):
    """Statistics are released anew in each round or after each restart, with fresh noise, and are counted once.

    All that T releases tell is in their mean, for which the noise multiplier is z / sqrt(T). This mechanism releases
    that mean, of T = `RELEASES`.
    """

    def altered(self, randomness: Randomness, examples: float) -> AlteredRandomness:
        return AlteredRandomness(randomness, draws=RELEASES)


@dataclass(frozen=True)
class ThirdOfNoiseMechanism(AlteredNoiseMechanism):
    """The noise has a third of the deviation that the ledger says: the defect of `NoiseAThirdMechanism`."""

    def altered(self, randomness: Randomness, examples: float) -> AlteredRandomness:
        return AlteredRandomness(randomness, scale=1 / 3)


STATISTICS_DEFECTS: dict[StatisticsDefect, type[StatisticsMechanism]] = {
    "noise left out": NoiseLeftOutMechanism,
    "noise divided": NoiseDividedMechanism,
    "exact counts": ExactCountsMechanism,
    "released anew": ReleasedAnewMechanism,
    "third of the noise": ThirdOfNoiseMechanism,
}


@dataclass(frozen=True)
class AlteredRandomness:
    """The mean of several draws of normal numbers, scaled; all else as the source draws it.

    Attributes:
        source: of the numbers.
        scale: factor on each normal number.
        draws: number of independent draws that are averaged.
    """

    source: Randomness
    scale: float = 1.0
    draws: int = 1

    def words(self, purpose: str) -> list[Words]:
        return self.source.words(purpose)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Return altered numbers [K, *shape]."""
        return self._mean([self.source.normal(name, *shape) for name in self._names(purpose)])

    def common_normal(self, purpose: str, *shape: int) -> Tensor:
        """Return altered numbers that every party draws alike."""
        return self._mean([self.source.common_normal(name, *shape) for name in self._names(purpose)])

    def uniform(self, purpose: str, counts: Sequence[int]) -> list[Tensor]:
        """Return the source's numbers."""
        return self.source.uniform(purpose, counts)

    def _names(self, purpose: str) -> list[str]:
        return [f"{purpose}, {draw}" if draw else purpose for draw in range(self.draws)]

    def _mean(self, drawn: Sequence[Tensor]) -> Tensor:
        return self.scale * torch.stack(list(drawn)).mean(0)


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


def with_defect(runtime: LocalRuntime, defect: Defect | StatisticsDefect) -> LocalRuntime:
    """Return the same runtime, its `dp-sgd` or `statistics` implemented with a defect, at the same settings and noise.

    Raises:
        ConfigError: the runtime's mechanism is another.
    """
    pairs = (*DEFECTS.items(), *STATISTICS_DEFECTS.items())
    kinds: dict[str, type[Mechanism]] = {str(name): kind for name, kind in pairs}
    meant = "dp-sgd" if defect in DEFECTS else "statistics"
    if runtime.privacy.mechanism != meant:
        raise ConfigError("privacy.mechanism", runtime.privacy.mechanism, f"this defect is one of those of {meant!r}")
    broken = copy.copy(runtime)
    vars(broken).pop("clients", None)  # they may have been made with the mechanism without the defect
    broken.mechanism = as_implemented_by(kinds[defect], runtime.mechanism)
    return broken


def _scaled(values: Tensor, factors: Tensor) -> Tensor:
    """Return values [K, ...] times factors [K]."""
    return values * factors.view(-1, *[1] * (values.ndim - 1))
