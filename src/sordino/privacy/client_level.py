"""The mechanism whose unit of privacy is the client: `dp-fedavg`, with a clip that may adapt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sordino.errors import RunError
from sordino.privacy.clipping import clip_jointly, wide
from sordino.privacy.ledger import ALL_CLIENTS, OBSERVERS, Channel, Ledger, Observer, Release
from sordino.privacy.mechanism import (
    CLASSES_KNOWN,
    WEIGHT,
    ClientRoundMechanism,
    Mechanism,
    ServerRoundMechanism,
    charge,
    once,
    summed_securely,
)
from sordino.privacy.settings import LEAST_CLIP, MOST_CLIP, PrivacySettings
from sordino.privacy.uploads.dithered import drawn_keys, quantized, restored
from sordino.privacy.uploads.secure_mean import ServerSums, Summed, SumTerms, SumVectors
from sordino.randomness import Randomness, noised

CLIP = "clip"  # the mechanism's state: the current bound, a scalar
COUNT = "count"  # the field of the secure sum of bits
CLIENTS_KNOWN = "who the clients are is known to all, and what one sends is compared with zeros in its place"
SAMPLE_SECRET = "no client knows which others take part in a round"
COUNT_SHARE = 0.1  # of the budget, for the count of clipped uploads that an adaptive clip follows


@dataclass(frozen=True)
class ClientMechanism(Mechanism):
    """Protect clients: `dp-fedavg`.

    McMahan, Ramage, Talwar, Zhang, Learning Differentially Private Recurrent Language Models, ICLR 2018: uploads are
    clipped to one norm, averaged with a fixed divisor, noised. With `noise_by = "client"` every upload is noised
    enough for itself, as in FedPrompt (Zhao et al., 2023). The clip may follow a quantile of the uploads' norms:
    Andrew, Thakkar, McMahan, Ramaswamy, Differentially Private Learning with Adaptive Clipping, NeurIPS 2021.

    With `compress`, uploads are integers whose rounding is the noise (`sordino.privacy.uploads.dithered`). The server
    has the dithers and sees no noise. Each of K clients adds the variance (z clip)^2 / (K - T), so that T of them who
    know their own dithers leave enough. The server adds what clients that are lost would have added.

    Sensitivity: neighboring federations differ in one client, present or not, with the divisor unchanged; the sum of
    uploads then changes by one vector of norm at most `clip`. Whether an upload is below the clip is counted as +-1/2,
    so the count changes by at most 1/2.
    """

    @property
    def samples_clients(self) -> bool:
        return self.settings.samples_clients(self.inputs.participation)

    @property
    def broadcasts_clip(self) -> bool:
        return self.settings.clip_quantile is not None

    def initial_state(self) -> dict[str, Tensor]:
        return {CLIP: torch.tensor(self.settings.clip, dtype=torch.float64)}

    def empty_ledger(self) -> Ledger:
        noise_by = self.settings.noise_by
        covered: tuple[Channel, ...] = ("mean",) if noise_by == "server" else ("mean", "upload")
        trusted: tuple[Observer, ...] = ("server",) if noise_by == "server" else ()
        assumptions = tuple(
            words(self.settings)
            for words, applies in ((summed_securely, noise_by == "shares"), (_compressed, self.compresses))
            if applies
        )
        assumptions = (CLIENTS_KNOWN, CLASSES_KNOWN, *assumptions)
        if self.samples_clients:
            assumptions = (*assumptions, SAMPLE_SECRET)
        stated = Ledger((), self._left_open(covered), trusted, assumptions, self.delta, self._randomness)
        return replace(stated, whole_persons=self.inputs.whole_persons)

    def client_end(
        self, randomness: Randomness, clients: Sequence[int], clip: Tensor | None = None
    ) -> ClientRoundMechanism:
        s, bound = self.settings, self.settings.clip if clip is None else float(clip)
        if not LEAST_CLIP <= bound <= MOST_CLIP:  # a server may tell any number
            raise RunError(
                f"the server tells a clip of {bound:g}, where rounding would undo clipping and noise; uploads are "
                f"clipped to a norm from {LEAST_CLIP:g} to {MOST_CLIP:g}"
            )
        z_upload, z_count = self._multipliers
        client_share = 1.0 if s.noise_by == "client" else 0.0

        def protect(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            learned = {name: tensor for name, tensor in tensors.items() if name != WEIGHT}
            clipped, below = clip_jointly(learned, bound)
            if self.sums_securely:
                mechanism_round.summed.append(SumVectors(self._upload_terms(bound), dict(clipped)))
            if self.compresses:
                keys = mechanism_round.keys = drawn_keys(randomness)
                codes = {name: quantized(part, self._part, keys, name) for name, part in clipped.items()}
                return tensors | codes
            for name, tensor in clipped.items():
                noise = randomness.normal(f"noise on {name}", *tensor.shape[1:])
                clipped[name] = noised(tensor, client_share * z_upload * bound, noise)
            if s.clip_quantile is not None:
                bits = noised(below.float() - 0.5, client_share * z_count / 2, randomness.normal("noise on a bit"))
                mechanism_round.below_clip = bits
                if self.sums_securely:
                    mechanism_round.summed.append(SumVectors(self._count_terms, {COUNT: bits[:, None]}))
            return tensors | clipped

        mechanism_round = ClientRoundMechanism(self.noiseless(finite_only=True), protect)
        return mechanism_round

    def server_end(
        self,
        randomness: Randomness,
        clients: Sequence[int],
        state: Mapping[str, Tensor],
        sums: ServerSums | None = None,
    ) -> ServerRoundMechanism:
        s, clip = self.settings, float(state[CLIP])
        z_upload, z_count = self._multipliers
        divisor = self.inputs.participation * len(self.inputs.sizes) if self.samples_clients else len(clients)
        server_share = 1.0 if s.noise_by == "server" else 0.0
        releases: list[Release] = []
        opened: list[Summed] = []  # the secure sum of all fields, as one vector

        def average(name: str, values: Tensor, weights: Tensor) -> Tensor:
            if sums is not None:
                if not opened:
                    opened.append(sums.of(self._upload_terms(clip), sums.fields))
                    charge(releases, 0, opened[0].noise_multiplier)
                return opened[0].fields[name].to(values) / len(opened[0].survivors)
            noise = randomness.common_normal(f"noise on the sum of {name}", *values.shape[1:])
            deviation = server_share * z_upload * clip
            if self.compresses:  # the sum has the noise of those who came
                deviation = self._part * math.sqrt(len(self.inputs.sizes) - len(clients))
            mean: Tensor = noised(wide(values).sum(0), deviation, noise).to(values) / divisor
            return mean

        def share_below(bits: Tensor | None) -> float:
            if sums is not None:
                summed = sums.of(self._count_terms, {COUNT: torch.zeros(1, 1)})
                charge(releases, 1, summed.noise_multiplier)
                return float(summed.fields[COUNT]) / len(summed.survivors) + 0.5
            assert bits is not None
            noise = randomness.common_normal("noise on the count")
            return float(noised(bits.double().sum(), server_share * z_count / 2, noise)) / divisor + 0.5

        def finish(below_clip: Tensor | None) -> dict[str, Tensor]:
            """Move the clip towards the quantile: smaller where more uploads than wanted are below it."""
            if s.clip_quantile is None:
                return dict(state)
            power = -s.clip_learning_rate * (share_below(below_clip) - s.clip_quantile)
            changed = clip * math.exp(min(max(power, -700.0), 700.0))  # of which there are floats
            changed = min(max(changed, LEAST_CLIP), MOST_CLIP)
            return {CLIP: torch.tensor(changed, dtype=torch.float64)}

        return ServerRoundMechanism(once(average), releases, finish)

    def restored(self, codes: Mapping[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        return {name: restored(part, self._part, keys, name) for name, part in codes.items()}

    @property
    def _part(self) -> float:
        """The deviation of one client's part of the noise, if uploads are compressed."""
        enough = len(self.inputs.sizes) - self.settings.colluders
        return self.noise_multiplier * self.settings.clip / math.sqrt(enough)

    def broadcast_clip(self, state: Mapping[str, Tensor]) -> Tensor | None:
        return state[CLIP] if self.broadcasts_clip else None

    def entered(self, clients: Sequence[int], rates: Sequence[Sequence[float]]) -> list[Release]:
        return self.round_releases(clients)

    def _upload_terms(self, clip: float) -> SumTerms:
        return SumTerms("the sum of uploads", "client", clip, self._multipliers[0])

    @property
    def _count_terms(self) -> SumTerms:
        return SumTerms("the count", "client", 0.5, self._multipliers[1])

    @cached_property
    def _multipliers(self) -> tuple[float, float]:
        """(z of the uploads, z of the count)."""
        if self.settings.clip_quantile is None:
            return self.noise_multiplier, math.inf
        return self.noise_multiplier / math.sqrt(1 - COUNT_SHARE), self.noise_multiplier / math.sqrt(COUNT_SHARE)

    def round_releases(self, clients: Sequence[int]) -> list[Release]:
        s, inputs = self.settings, self.inputs
        counted = s.clip_quantile is not None
        multipliers = self._multipliers if counted else self._multipliers[:1]
        what = "clipped upload" + (" and whether it was clipped" if counted else "")
        if s.noise_by == "client":
            parties = [f"client {client}" for client in clients]
            return [Release(what, party, "client", multipliers, 1.0, 1, s.noise_by, OBSERVERS) for party in parties]
        rate = inputs.participation if self.samples_clients else 1.0
        seen_by: tuple[Observer, ...] = ("clients", "public") if s.noise_by == "server" else OBSERVERS
        adds = "client" if s.compress else s.noise_by
        return [Release(f"mean {what}", ALL_CLIENTS, "client", multipliers, rate, 1, adds, seen_by)]

    def planned(self, rounds: int | None = None) -> list[Release]:
        count = self.inputs.rounds if rounds is None else rounds
        if self.settings.noise_by == "client":
            share = count / self.inputs.rounds
            return [
                replace(each, steps=math.ceil(rounds_participated * share))
                for each, rounds_participated in zip(
                    self.round_releases(range(len(self.inputs.sizes))), self.inputs.rounds_participated, strict=True
                )
            ]
        return [replace(release, steps=count) for release in self.round_releases(range(len(self.inputs.sizes)))]


def _compressed(settings: PrivacySettings) -> str:
    """Return the assumptions of compressed uploads, in words."""
    return (
        "uploads are compressed, and the error of that is the noise: the server knows the dither and sees every upload "
        f"without noise; of the clients, at most {settings.colluders} pool what they know of theirs"
    )
