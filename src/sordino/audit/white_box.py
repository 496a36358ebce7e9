"""The white-box observer of an audit: it sees every noised gradient, and estimates which canaries were trained on.

It is the observer of differential privacy's definition. It knows everything but the inclusion bits, the noise, and the
samples of included canaries. A client releases, call after call, R = sum_i b_i s_i g_i + others + noise. Here b_i is
canary i's inclusion bit; s_i is 1 if it was sampled, which has probability q, and 0 if not; g_i is its (clipped)
gradient at the parameters of the call. Of a forward-only method the call is for losses of candidates, and g_i are the
canary's (clipped) measures of them; what is said of gradients here is true of those. The scores are the estimates of b
that `decoding` computes from all R and q g_i.
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
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.dp_sgd import ExampleGradients, example_gradients
from sordino.privacy.forward.losses import Answer, Question, anchor, measured
from sordino.privacy.gradients import Batch, Gradient, Parameters, PromptOf
from sordino.privacy.mechanism import ClientRoundMechanism, Mechanism, ServerRoundMechanism
from sordino.privacy.uploads.secure_mean import ServerSums
from sordino.randomness import Randomness

Asked = PromptOf | Question  # what a method asks with: gradients, or losses
PARALLEL = 1e-6  # of a vector's length: less of it beside others is rounding


@dataclass
class Sight:
    """The observer's view of one client's gradient in one call; parameter names to tensors.

    Attributes:
        place: in the stack of the round's participants.
        client: its number.
        call: the number of this gradient in the training.
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
    """An unchanged mechanism with an observer of its releases.

    The observer knows which other examples were sampled: Poisson samples are independent, so the canaries' samples stay
    unknown. Groups of parameters with a clip of their own are measured in units of it. If the server, or all clients
    together, noise the shared gradients, the release is the mean, and R is the mean scaled to a client's sum. Of the
    cotangent mechanism this observer sees the gradients that methods get, not the matrix behind them. It weighs their
    entries alike, though noise does not reach them alike: there its bounds are lower than need be.
    """

    def __init__(self, mechanism: Mechanism, canaries: Canaries, data: ClientData) -> None:
        self._mechanism, self._canaries, self._data = mechanism, canaries, data
        # If a mean is noised, all clients see one and the same noise, and not independent noises.
        self._decoder = Decoder(by_clients=not self._means)
        self._calls = 0
        self._sights: list[Sight] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mechanism, name)

    def scores(self) -> Tensor:
        """Return scores [m], float64, higher for included canaries; 0 if the owner never took part."""
        scores = torch.zeros(len(self._canaries.labels), dtype=torch.float64)
        for client, estimates in self._decoder.estimates().items():
            scores[self._canaries_of(client).cpu()] = estimates
        return scores.to(self._canaries.labels.device)

    def client_end(
        self, randomness: Randomness, clients: Sequence[int], clip: Tensor | None = None
    ) -> ClientRoundMechanism:
        """Return the mechanism's clients' end, with the observer."""
        mechanism_round = self._mechanism.client_end(randomness, clients, clip)
        honest = mechanism_round.gradients
        sights = self._sights = []

        def gradients(asked: Asked, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient | Answer:
            gradient: Gradient | Answer = honest(asked, parameters, fixed, batch)
            sights.extend(self._look(clients, asked, parameters, fixed, batch, gradient))
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
        """Return the mechanism's server's end, with the observer."""
        mechanism_round = self._mechanism.server_end(randomness, clients, state, sums)
        means = self._means

        def average(name: str, values: Tensor, weights: Tensor) -> Tensor:
            mean = mechanism_round.average(name, values, weights)
            for sight in self._sights:
                scaled = mean * float(weights.sum() / weights[sight.place]) * sight.size
                sight.released.update({parameter: scaled for parameter, sent in means.items() if sent == name})
            return mean

        def finish(below_clip: Tensor | None) -> dict[str, Tensor]:
            for sight in self._sights:
                self._decoder.add(self._measured(sight))
            return mechanism_round.finish(below_clip)

        return replace(mechanism_round, average=average, finish=finish)

    @property
    def _means(self) -> Mapping[str, str]:
        """Return the parameters of which a noised mean is released, with the upload's field."""
        settings = self._mechanism.settings
        return self._mechanism.inputs.shared if settings.on and settings.noise_by != "client" else {}

    def _look(
        self,
        clients: Sequence[int],
        asked: Asked,
        parameters: Parameters,
        fixed: Parameters,
        batch: Batch,
        gradient: Gradient | Answer,
    ) -> Iterator[Sight]:
        """Yield the view of every client that holds canaries."""
        for place, client in enumerate(clients):
            held_canaries, slot = self._canaries_of(client), slice(place, place + 1)
            if not len(held_canaries):
                continue
            if batch.sampling is None:
                # The true number of examples behind a mean depends on the inclusion bits, so it is not used.
                count = float(self._data.counts[client])
                size = min(float(batch.mask.shape[1]), count)
                rate = size / count
            else:
                size, rate = float(batch.sampling.expected[place]), float(batch.sampling.rate[place])
            point = {name: value[slot] for name, value in parameters.items()}
            held = {name: value[slot] for name, value in fixed.items()}
            features = self._canaries.features[held_canaries][None]
            labels = self._canaries.labels[held_canaries][None]
            canaries = Batch(features, labels, torch.ones_like(labels, dtype=torch.bool))
            like = {name: value[slot] for name, value in gradient.values.items()}
            examples = self._by_example(asked, point, held, canaries)
            clipped = [self._clipped(piece) for piece in examples.pieces]
            yield Sight(
                place,
                client,
                self._calls,
                size,
                {name: rate * torch.cat([piece[name] for piece in clipped]) for name in like},
                self._directions(like, asked, point, held, self._others(batch, place), examples.penalty),
                {name: (value[0] - self._constant(asked)) * size for name, value in like.items()},
            )

    def _by_example(self, asked: Asked, point: Parameters, held: Parameters, batch: Batch) -> ExampleGradients:
        assert self._mechanism.model is not None
        return contributions(self._mechanism.model, asked, point, held, batch)

    def _constant(self, asked: Asked) -> float:
        """Return what every number of a release has beside the sum over examples."""
        assert self._mechanism.model is not None
        return anchor(self._mechanism.model, asked) if isinstance(asked, Question) else 0.0

    def _others(self, batch: Batch, place: int) -> Batch:
        """Return one client's examples in a batch without the canaries, which are the last rows of the table."""
        if batch.rows is None:  # a batch that a method made itself: its rows are unknown
            rows = torch.zeros(1, 0, dtype=torch.int64, device=self._data.labels.device)
        else:
            rows = batch.rows[place]
            real = rows < len(self._data.features) - len(self._canaries.labels)
            rows = rows[batch.mask[place] & real][None]
        return Batch(self._data.features[rows], self._data.labels[rows], torch.ones_like(rows, dtype=torch.bool))

    def _directions(
        self,
        like: Parameters,
        asked: Asked,
        point: Parameters,
        held: Parameters,
        others: Batch,
        penalty: Parameters,
    ) -> dict[str, Tensor]:
        """Return orthonormal vectors [d, ...] that span the rest of a client's sum, of the shapes in `like` [1, ...].

        They span the others' sum, the sum of the others clipped one by one, and a penalty's gradient.
        """
        sums: list[dict[str, Tensor]] = []
        if self._mechanism.settings.mechanism == "dp-sgd":
            zeros = {name: torch.zeros_like(value, dtype=torch.float64, device="cpu") for name, value in like.items()}
            sums = [zeros, {name: value.clone() for name, value in zeros.items()}]
            for piece in self._by_example(asked, point, held, others).pieces:
                for total, values in zip(sums, (self._in_units(piece), self._clipped(piece)), strict=True):
                    for name in total:
                        total[name] += values[name].sum(0, keepdim=True)
        elif others.labels.numel():
            exact = self._mechanism.noiseless()(asked, point, held, others).values  # type: ignore[arg-type]
            sums = [self._in_units({name: value - self._constant(asked) for name, value in exact.items()})]
        sums += [self._in_units(penalty)] if penalty else []
        basis = _orthonormal([torch.cat([total[name].flatten() for name in like]) for total in sums])
        sizes = [value[0].numel() for value in like.values()]
        empty = torch.zeros(0, sum(sizes), dtype=torch.float64)
        parts = torch.cat([empty, *(vector[None] for vector in basis)]).split(sizes, 1)
        return {name: part.view(-1, *like[name].shape[1:]) for name, part in zip(like, parts, strict=True)}

    def _in_units(self, gradients: Parameters) -> dict[str, Tensor]:
        """Return gradients [n, ...] in units of the clips, in float64 on the CPU; zero if not finite, as in dp-sgd."""
        values = {name: value.double().cpu() / self._unit(name) for name, value in gradients.items()}
        return {name: torch.where(value.isfinite(), value, 0.0) for name, value in values.items()}

    def _clipped(self, gradients: Parameters) -> dict[str, Tensor]:
        """Return examples' gradients [n, ...] in units of the clips, clipped as the mechanism would."""
        values, shared = self._in_units(gradients), self._mechanism.inputs.shared
        if self._mechanism.settings.mechanism != "dp-sgd":
            return values
        for group in ([n for n in values if n in shared], [n for n in values if n not in shared]):
            if group:
                norms = torch.cat([values[name].flatten(1) for name in group], 1).norm(dim=1)
                scale = 1 / norms.clamp(min=1.0)
                for name in group:
                    values[name] = values[name] * scale.view(-1, *[1] * (values[name].ndim - 1))
        return values

    def _unit(self, name: str) -> float:
        """Return the clip of a parameter's group; 1 if gradients are not clipped."""
        settings, shared = self._mechanism.settings, self._mechanism.inputs.shared
        if settings.mechanism != "dp-sgd":
            return 1.0
        personal = settings.personal_clip if shared and name not in shared else None
        return settings.clip if personal is None else personal

    def _measured(self, sight: Sight) -> Seen:
        """Return a sight for the decoder, sums in units of the clips like the rest."""
        released = self._in_units(sight.released)
        return Seen(sight.client, sight.call, sight.own, sight.others, released)

    def _canaries_of(self, client: int) -> Tensor:
        """Return the numbers of a client's canaries, in the order of its rows."""
        return (self._canaries.owners == client).nonzero().flatten()


def contributions(
    model: PromptModel, asked: Asked, point: Parameters, held: Parameters, batch: Batch
) -> ExampleGradients:
    """Return what every example of one client adds to the sum before it is clipped: a gradient, or measures."""
    if isinstance(asked, Question):
        measures = measured(model, asked, point, held, batch)
        return ExampleGradients(iter([{"losses": measures.each[0]}]), measures.loss[0], {})
    return example_gradients(model, asked, point, held, batch)


def _orthonormal(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return unit vectors that span the same space; vectors that earlier ones span up to rounding are left out.

    If no example is clipped, the sum of clipped gradients is the plain sum. Their difference is then rounding, and no
    direction of the others'.
    """
    basis: list[Tensor] = []
    for vector in vectors:
        rest = vector / vector.norm().clamp(min=math.ulp(0.0))
        for _ in range(2):  # the second pass removes the first one's rounding
            for known in basis:
                rest = rest - (known @ rest) * known
        if rest.norm() > PARALLEL:
            basis.append(rest / rest.norm())
    return basis
