"""Mechanisms whose unit of privacy is the example or the person: `dp-sgd` and `cotangent`, and who adds their noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sordino.errors import RunError
from sordino.privacy.clipping import wide
from sordino.privacy.cotangent import CotangentGradients, image_directions, public_directions
from sordino.privacy.dp_sgd import DpSgdGradients, Group, sampled
from sordino.privacy.forward.losses import Answer, Losses, Question
from sordino.privacy.forward.noised import NoisedLosses
from sordino.privacy.gradients import Batch, Gradient, Gradients, Parameters, PromptOf
from sordino.privacy.ledger import OBSERVERS, Channel, Ledger, Observer, Release
from sordino.privacy.mechanism import (
    CLASSES_KNOWN,
    WEIGHT,
    Average,
    ClientRoundMechanism,
    Mechanism,
    ServerRoundMechanism,
    charge,
    once,
    plain_mean,
    summed_securely,
    unchanged,
)
from sordino.privacy.uploads.secure_mean import ServerSums, SumTerms, SumVectors
from sordino.randomness import Randomness, noised

SUBSPACE = 16  # public directions of `cotangent` by default
SIZES_KNOWN = "how many examples each client holds is known to all"
PERSONS_KNOWN = "how many persons each client holds is known to all, and each image is listed as its own person's"
IMAGES_PUBLIC = "the images in data.public are public, and were chosen without a look at any client's images"


@dataclass(frozen=True)
class ExampleMechanism(Mechanism):
    """Protect examples, or persons with all their images: `dp-sgd` and `cotangent`.

    If the person is the unit, persons are sampled, and the sum of each one's contributions is clipped. All numbers of
    units in the inputs (sizes, and so rates, weights and divisors) are then numbers of persons. Everything below holds
    for either unit, because a unit's contribution to a client's sum has norm at most `clip`, and nobody else's changes
    with it.
    """

    @property
    def samples_examples(self) -> bool:
        return True

    def client_end(
        self, randomness: Randomness, clients: Sequence[int], clip: Tensor | None = None
    ) -> ClientRoundMechanism:
        rates: list[Tensor] = []
        noun = "losses" if self.inputs.forward_only else "gradients"
        released: set[int] = set()  # draws; a second release of one sample is no independent one

        def sample_once(batch: Batch) -> int:
            """Enter the sample of a batch, which is released from once; return how many came before it."""
            sampling = sampled(batch)
            if (batch.persons is not None) != self.settings.by_person:
                raise RunError(
                    f"a batch to be noised must be a sample of what privacy.unit = {self.settings.unit!r} names; let "
                    "the method take its batches from data.batches, whole"
                )
            if sampling.draw in released:
                raise RunError(
                    f"the method takes two {noun} of one batch, which accounting does not allow for; take a new "
                    "batch of data.batches for each"
                )
            released.add(sampling.draw)
            rates.append(sampling.rate)
            return len(released) - 1

        def gradients(prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
            call = sample_once(batch)
            return self._gradients(randomness, clients, call)(prompt_of, parameters, fixed, batch)

        def losses(question: Question, candidates: Parameters, fixed: Parameters, batch: Batch) -> Answer:
            call = sample_once(batch)
            return self._losses(randomness, call)(question, candidates, fixed, batch)

        def offer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for name in self._noised_fields:
                values = tensors[name]
                weights = tensors[WEIGHT].to(values)
                weighted = values * weights.view(-1, *[1] * (values.ndim - 1))
                mechanism_round.summed.append(SumVectors(self._sum_terms(name), {name: weighted}))
            return tensors

        given = losses if self.inputs.forward_only else gradients
        mechanism_round = ClientRoundMechanism(given, offer if self.sums_securely else unchanged, rates)
        return mechanism_round

    def server_end(
        self,
        randomness: Randomness,
        clients: Sequence[int],
        state: Mapping[str, Tensor],
        sums: ServerSums | None = None,
    ) -> ServerRoundMechanism:
        releases: list[Release] = []
        return ServerRoundMechanism(self._averaging(randomness, releases, sums), releases)

    def entered(self, clients: Sequence[int], rates: Sequence[Sequence[float]]) -> list[Release]:
        return [release for drawn in rates for release in self._call_releases(clients, drawn)]

    def round_releases(self, clients: Sequence[int]) -> list[Release]:
        of_one_gradient = self._call_releases(clients, self._rates(clients))
        return [replace(release, steps=self.inputs.steps) for release in of_one_gradient]

    def planned(self, rounds: int | None = None) -> list[Release]:
        share = 1.0 if rounds is None else rounds / self.inputs.rounds
        times = {
            f"client {client}": math.ceil(count * share) for client, count in enumerate(self.inputs.rounds_participated)
        }
        clients = range(len(self.inputs.sizes))
        releases = self._call_releases(clients, self._rates(clients))
        return [replace(release, steps=self.inputs.steps * times[release.party]) for release in releases]

    def empty_ledger(self) -> Ledger:
        noise_by = self.settings.noise_by
        covered: tuple[Channel, ...] = (
            "mean",
            "prompt",
            "sizes",
            *(() if noise_by == "server" else ("upload", "shares", "clusters")),
        )
        trusted: tuple[Observer, ...] = ("server",) if noise_by == "server" or self.inputs.pools_data else ()
        assumptions = [PERSONS_KNOWN if self.settings.by_person else SIZES_KNOWN, CLASSES_KNOWN]
        if noise_by == "shares":
            assumptions.append(summed_securely(self.settings))
        if self.settings.directions == "images":
            assumptions.append(IMAGES_PUBLIC)
        stated = Ledger((), self._left_open(covered), trusted, tuple(assumptions), self.delta, self._randomness)
        return replace(stated, whole_persons=self.inputs.whole_persons)

    @cached_property
    def _multipliers(self) -> tuple[float, float]:
        """(z of the personal group, z of the shared one); where there is one group only, it gets it all."""
        if self.settings.mechanism == "cotangent" or not self.inputs.shared:
            return self.noise_multiplier, self.noise_multiplier
        if not self.inputs.personal:
            return self.noise_multiplier, self.noise_multiplier
        share = self.settings.shared_budget
        return self.noise_multiplier / math.sqrt(1 - share), self.noise_multiplier / math.sqrt(share)

    @cached_property
    def _directions(self) -> Tensor:
        assert self.model is not None
        encoder, rank = self.model.encoder, self.settings.subspace or SUBSPACE
        if self.settings.directions == "names":
            return public_directions(encoder, rank)
        assert self.public is not None
        return image_directions(self.public, rank).to(encoder.device)

    def _gradients(self, randomness: Randomness, clients: Sequence[int], call: int) -> Gradients:
        """Return the gradients of one call in a round; no two calls draw the same noise."""
        assert self.model is not None
        s = self.settings
        if s.mechanism == "cotangent":
            return CotangentGradients(self.model, self._directions, s.clip, self.noise_multiplier, randomness, call)
        z_personal, z_shared = self._multipliers
        personal_clip = s.clip if s.personal_clip is None or not self.inputs.shared else s.personal_clip
        everyone = torch.ones(len(clients), dtype=torch.float64)
        shared = (z_shared * s.clip if s.noise_by == "client" else 0.0) * everyone
        return DpSgdGradients(
            self.model,
            frozenset(self.inputs.shared),
            Group(personal_clip, z_personal * personal_clip * everyone),
            Group(s.clip, shared),
            randomness,
            call,
        )

    def _losses(self, randomness: Randomness, call: int) -> Losses:
        """Return the losses of one call in a round; no two calls draw the same noise."""
        assert self.model is not None
        return NoisedLosses(self.model, self.settings.clip, self.noise_multiplier, randomness, call)

    @cached_property
    def _noised_fields(self) -> tuple[str, ...]:
        """Return the upload's fields whose mean gets noise, where clients do not add it alone."""
        return tuple(self.inputs.shared.values())

    @cached_property
    def _sensitivity(self) -> float:
        """Bound the change of a weighted sum by one unit.

        The mean of gradients S_i / L_i with weights w_i changes by at most C max_i(w_i / L_i) / W for one unit, which
        is with one client.
        """
        return self.settings.clip * self.inputs.largest_share

    def _sum_terms(self, name: str) -> SumTerms:
        """Return the terms on which a field is summed securely; its entries may be all of a client's units'."""
        largest = self._sensitivity * max(self.inputs.sizes)
        return SumTerms(f"the sum of {name}", self.settings.unit, self._sensitivity, self._multipliers[1], largest)

    def _averaging(self, randomness: Randomness, releases: list[Release], sums: ServerSums | None) -> Average:
        """Return means with noise where the server, or all clients together, add it."""
        z_shared = self._multipliers[1]
        least: list[float] = []  # each field is summed on its own, with survivors of its own

        def by_server(name: str, values: Tensor, weights: Tensor) -> Tensor:
            if name not in self._noised_fields:
                return plain_mean(name, values, weights)
            plain = plain_mean(name, wide(values), weights)
            noise = randomness.common_normal(f"noise on the mean of {name}", *plain.shape)
            return noised(plain, z_shared * self._sensitivity / float(weights.sum()), noise).to(values)

        def in_shares(name: str, values: Tensor, weights: Tensor) -> Tensor:
            if name not in self._noised_fields:
                raise RunError(
                    f"the method averages {name!r}, which is not among the gradients that it declares as averaged; "
                    "a secure sum would show it without noise; use privacy.noise_by = 'client'"
                )
            assert sums is not None
            summed = sums.of(self._sum_terms(name), {name: values})
            least.append(summed.noise_multiplier)
            charge(releases, -1, min(least))
            return summed.fields[name] / weights.to(values)[summed.survivors].sum()

        return {"client": plain_mean, "server": once(by_server), "shares": once(in_shares)}[self.settings.noise_by]

    def _rates(self, clients: Iterable[int]) -> list[float]:
        """Return the planned sampling rates."""
        return [self.inputs.rate(client) for client in clients]

    def _call_releases(self, clients: Iterable[int], rates: Iterable[float]) -> list[Release]:
        """Return the releases of one gradient, for clients whose units were sampled at these rates."""
        pairs = zip(clients, rates, strict=True)
        return [release for client, rate in pairs for release in self._client_releases(client, rate)]

    def _client_releases(self, client: int, rate: float) -> Iterator[Release]:
        inputs, noise_by, unit = self.inputs, self.settings.noise_by, self.settings.unit

        def release(content: str, multipliers: tuple[float, ...], observers: tuple[Observer, ...]) -> Release:
            return Release(content, f"client {client}", unit, multipliers, rate, 1, noise_by, observers)

        z_personal, z_shared = self._multipliers
        seen_by: tuple[Observer, ...] = ("clients", "public") if noise_by == "server" else OBSERVERS
        if self.settings.mechanism == "cotangent":
            yield release("sum of clipped cotangents of the class features", (self.noise_multiplier,), OBSERVERS)
        elif inputs.forward_only:
            yield release("sum of clipped losses of candidate prompts", (self.noise_multiplier,), OBSERVERS)
        elif not (inputs.shared and inputs.personal):
            yield release("sum of clipped gradients", (self.noise_multiplier,), seen_by)
        elif noise_by == "client":
            yield release("sums of clipped gradients, personal and shared", (z_personal, z_shared), OBSERVERS)
        else:
            what = "sum of clipped personal gradients, and mean over clients of shared ones"
            yield release(what, (z_personal, z_shared), seen_by)
