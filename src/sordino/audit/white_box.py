"""The observer of an audit's white box: it sees every noised gradient, and estimates which canaries were trained on.

It is the observer of differential privacy's definition: it knows everything but the coins, the noise, and whether a
canary that was included was in a sample. A client releases, call after call, R = sum_i b_i s_i g_i + others + noise,
where b_i is canary i's coin, s_i says whether it was sampled, which it was with probability q, and g_i is its (clipped)
gradient at the parameters of the call. The estimates of b that `decoding` makes of all R and q g_i are the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms.base import ClientData
from sordino.audit.canaries import Canaries
from sordino.audit.decoding import Decoder, Seen
from sordino.privacy.dp_sgd import ExampleGradients, example_gradients
from sordino.privacy.gradients import Batch, ExactGradients, Gradient, Parameters, PromptOf
from sordino.privacy.mechanism import ClientRoundMechanism, Mechanism, ServerRoundMechanism
from sordino.privacy.noise import Randomness
from sordino.privacy.secure_mean import ServerSums

PARALLEL = 1e-6  # of a vector's length: less of it beside others is rounding


@dataclass
class Sight:
    """What the observer has of one client's gradient in one call; parameter names to tensors.

    Attributes:
        place: in the stack of the round's participants.
        client: its number.
        call: which gradient of the training this is.
        size: of its batch, or the expected one under Poisson sampling, as if no canary were left out.
        own: its n canaries' gradients [n, ...], clipped, in units of the clip, weighed by the sampling rate.
        others: [d, ...], directions in which the rest of the sum lies.
        released: the noised sum [...], as it was released.
    """

    place: int
    client: int
    call: int
    size: float
    own: dict[str, Tensor]
    others: dict[str, Tensor]
    released: dict[str, Tensor]


class Watching:
    """A mechanism that is used as it is, with an observer of what it releases beside it.

    Which others were sampled is known to it: their coins are independent of the canaries', whose samples stay unknown.
    Groups of parameters with a clip of their own are measured in units of it. Where not clients but the server, or all
    clients together, noise the shared gradients, what was released is the mean, and R is that, scaled to a client's
    sum. Of the cotangent mechanism this observer sees the gradients that methods get, not the matrix they are made of,
    and weighs their entries alike, though noise does not reach them alike: there its bounds are lower than need be.
    """

    def __init__(self, mechanism: Mechanism, canaries: Canaries, data: ClientData) -> None:
        self._mechanism, self._canaries, self._data = mechanism, canaries, data
        # Where a mean is noised, all clients see one and the same noise: theirs are no separate looks at it.
        self._decoder = Decoder(by_clients=not self._means)
        self._calls = 0
        self._sights: list[Sight] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mechanism, name)

    def scores(self) -> Tensor:
        """[m], float64, higher for what was in; 0 where the owner never took part."""
        scores = torch.zeros(len(self._canaries.labels), dtype=torch.float64)
        for client, found in self._decoder.estimates().items():
            scores[self._mine(client).cpu()] = found
        return scores.to(self._canaries.labels.device)

    def client_end(
        self, randomness: Randomness, clients: Sequence[int], clip: Tensor | None = None
    ) -> ClientRoundMechanism:
        """Return the mechanism's own clients' end, watched."""
        mechanism_round = self._mechanism.client_end(randomness, clients, clip)
        honest = mechanism_round.gradients
        sights = self._sights = []

        def gradients(prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
            gradient = honest(prompt_of, parameters, fixed, batch)
            sights.extend(self._look(clients, prompt_of, parameters, fixed, batch, gradient))
            self._calls += 1
            return gradient

        mechanism_round.gradients = gradients
        return mechanism_round

    def server_end(
        self,
        randomness: Randomness,
        clients: Sequence[int],
        state: Mapping[str, Tensor],
        sums: ServerSums | None = None,
    ) -> ServerRoundMechanism:
        """Return the mechanism's own server's end, watched."""
        mechanism_round = self._mechanism.server_end(randomness, clients, state, sums)
        means = self._means

        def average(name: str, values: Tensor, weights: Tensor) -> Tensor:
            mean = mechanism_round.average(name, values, weights)
            for sight in self._sights:
                scaled = mean * float(weights.sum() / weights[sight.place]) * sight.size
                sight.released.update({parameter: scaled for parameter, sent_as in means.items() if sent_as == name})
            return mean

        def finish(below_clip: Tensor | None) -> dict[str, Tensor]:
            for sight in self._sights:
                self._decoder.add(self._measured(sight))
            return mechanism_round.finish(below_clip)

        return replace(mechanism_round, average=average, finish=finish)

    @property
    def _means(self) -> Mapping[str, str]:
        """The parameters of which a noised mean is released, with the upload's field."""
        settings = self._mechanism.settings
        return self._mechanism.inputs.shared if settings.on and settings.noise_by != "client" else {}

    def _look(
        self,
        clients: Sequence[int],
        prompt_of: PromptOf,
        parameters: Parameters,
        fixed: Parameters,
        batch: Batch,
        gradient: Gradient,
    ) -> Iterator[Sight]:
        """What is seen of every client that was offered canaries."""
        for place, client in enumerate(clients):
            mine, slot = self._mine(client), slice(place, place + 1)
            if not len(mine):
                continue
            if batch.sampling is None:
                # How many examples a mean was really taken of depends on the coins, so it is not looked at.
                count = float(self._data.counts[client])
                size = min(float(batch.mask.shape[1]), count)
                rate = size / count
            else:
                size, rate = float(batch.sampling.expected[place]), float(batch.sampling.rate[place])
            at, held = ({name: value[slot] for name, value in each.items()} for each in (parameters, fixed))
            labels = self._canaries.labels[mine][None]
            canaries = Batch(self._canaries.features[mine][None], labels, torch.ones_like(labels, dtype=torch.bool))
            found = self._by_example(prompt_of, at, held, canaries)
            own = [self._clipped(piece) for piece in found.pieces]
            yield Sight(
                place,
                client,
                self._calls,
                size,
                {name: rate * torch.cat([piece[name] for piece in own]) for name in parameters},
                self._directions(prompt_of, at, held, self._others(batch, place), found.penalty),
                {name: value[place] * size for name, value in gradient.values.items()},
            )

    def _by_example(self, prompt_of: PromptOf, at: Parameters, held: Parameters, batch: Batch) -> ExampleGradients:
        assert self._mechanism.model is not None
        return example_gradients(self._mechanism.model, prompt_of, at, held, batch)

    def _others(self, batch: Batch, place: int) -> Batch:
        """One client's examples in a batch that are no canaries; these are the last rows of the table."""
        if batch.rows is None:  # a batch that a method made itself: nothing is known of it
            rows = torch.zeros(1, 0, dtype=torch.int64, device=self._data.labels.device)
        else:
            rows = batch.rows[place]
            real = rows < len(self._data.features) - len(self._canaries.labels)
            rows = rows[batch.mask[place] & real][None]
        return Batch(self._data.features[rows], self._data.labels[rows], torch.ones_like(rows, dtype=torch.bool))

    def _directions(
        self, prompt_of: PromptOf, at: Parameters, held: Parameters, others: Batch, penalty: Parameters
    ) -> dict[str, Tensor]:
        """Orthonormal vectors [d, ...]: of the others' sum, of the same clipped one by one, of a penalty's gradient."""
        sums: list[dict[str, Tensor]] = []
        if self._mechanism.settings.mechanism == "dp-sgd":
            sums = [{name: torch.zeros_like(value, dtype=torch.float64, device="cpu") for name, value in at.items()}]
            sums.append({name: value.clone() for name, value in sums[0].items()})
            for piece in self._by_example(prompt_of, at, held, others).pieces:
                for total, values in zip(sums, (self._in_units(piece), self._clipped(piece)), strict=True):
                    for name in total:
                        total[name] += values[name].sum(0, keepdim=True)
        elif others.labels.numel():
            assert self._mechanism.model is not None
            sums = [self._in_units(ExactGradients(self._mechanism.model)(prompt_of, at, held, others).values)]
        sums += [self._in_units(penalty)] if penalty else []
        basis = _orthonormal([torch.cat([one[name].flatten() for name in at]) for one in sums])
        sizes = [value[0].numel() for value in at.values()]
        empty = torch.zeros(0, sum(sizes), dtype=torch.float64)
        parts = torch.cat([empty, *(each[None] for each in basis)]).split(sizes, 1)
        return {name: part.view(-1, *at[name].shape[1:]) for name, part in zip(at, parts, strict=True)}

    def _in_units(self, gradients: Parameters) -> dict[str, Tensor]:
        """Gradients [n, ...] in units of the clips, in float64 on the CPU; what is not finite is zero, as in dp-sgd."""
        values = {name: value.double().cpu() / self._unit(name) for name, value in gradients.items()}
        return {name: torch.where(value.isfinite(), value, 0.0) for name, value in values.items()}

    def _clipped(self, gradients: Parameters) -> dict[str, Tensor]:
        """Examples' gradients [n, ...] in these units, clipped as the mechanism would."""
        values, shared = self._in_units(gradients), self._mechanism.inputs.shared
        if self._mechanism.settings.mechanism != "dp-sgd":
            return values
        for group in ([n for n in values if n in shared], [n for n in values if n not in shared]):
            if group:
                norms = torch.cat([values[name].flatten(1) for name in group], 1).norm(dim=1)
                scale = 1 / norms.clamp(min=1.0)
                values |= {name: values[name] * scale.view(-1, *[1] * (values[name].ndim - 1)) for name in group}
        return values

    def _unit(self, name: str) -> float:
        """The clip of a parameter's group; 1 where gradients are not clipped."""
        settings, shared = self._mechanism.settings, self._mechanism.inputs.shared
        if settings.mechanism != "dp-sgd":
            return 1.0
        personal = settings.personal_clip if shared and name not in shared else None
        return settings.clip if personal is None else personal

    def _measured(self, sight: Sight) -> Seen:
        """A sight for the decoder, sums in units of the clips like the rest."""
        released = self._in_units(sight.released)
        return Seen(sight.client, sight.call, sight.own, sight.others, released)

    def _mine(self, client: int) -> Tensor:
        """Which canaries were offered to a client, as its rows have them."""
        return (self._canaries.owners == client).nonzero().flatten()


def _orthonormal(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Unit vectors that span the same, without those that the vectors before give but for rounding.

    Where no example is clipped, the sum of clipped gradients is the plain sum; what rounding makes of their difference
    is no direction of the others'.
    """
    basis: list[Tensor] = []
    for vector in vectors:
        rest = vector / vector.norm().clamp(min=math.ulp(0.0))
        for _ in range(2):  # the second time for what rounding left of the first
            for known in basis:
                rest = rest - (known @ rest) * known
        if rest.norm() > PARALLEL:
            basis.append(rest / rest.norm())
    return basis
