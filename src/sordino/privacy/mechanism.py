"""A run's privacy mechanism: what it does to gradients and uploads, and what it enters in the ledger for it.

A `Mechanism` is made once a run, with its noise already matched to the budget, and opened anew for every round. What it
needs to know of a method is in `Facts`: which parameters' gradients are only ever averaged, and what leaves a client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy import accounting
from sordino.privacy.cotangent import CotangentGradients, public_directions
from sordino.privacy.dp_sgd import DpSgdGradients, Group
from sordino.privacy.gradients import Batch, ContextOf, ExactGradients, Gradient, Gradients, Parameters
from sordino.privacy.ledger import ALL_CLIENTS, OBSERVERS, Disclosure, Ledger, Observer, Release, Way
from sordino.privacy.noise import Randomness
from sordino.privacy.settings import PrivacySettings

CLIP = "clip"  # the mechanism's state: the current bound of dp-fedavg, a scalar
WEIGHT = "weight"  # the field of an upload by which it is averaged: known to all, not learned, so never clipped
SLACK = 1e-6  # by which a budget may seem to be passed where rounding says so
COUNT_SHARE = 0.1  # of the budget, for the count of clipped uploads that an adaptive clip follows
SIZES_KNOWN = "how many examples each client holds is known to all"
SUMS_ONLY = "the server sees the sum of uploads only (secure aggregation); it is listed with what single uploads tell"


@dataclass(frozen=True)
class Facts:
    """What a mechanism must know of a method and of the federation that runs it.

    Attributes:
        trains: false for a method with no rounds.
        pools_data: whether all clients' images are handed to one place, which is the one party then.
        sizes: how many examples each client holds.
        weights: what each client's upload weighs in a mean.
        uniform: whether they all weigh the same, whatever their size.
        batch_size: examples a batch; None takes all.
        steps: gradients that a client takes in a round.
        taken: in how many rounds each client takes part.
        rounds: of the whole run.
        participation: the fraction of the clients that take part in a round.
        shared: parameters whose gradient is uploaded and only ever averaged, with the name of the upload's field.
        personal: whether there are parameters besides those.
        server_uses: what the server makes of uploads.
        discloses: what leaves if nothing is noised.
    """

    trains: bool
    pools_data: bool
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    uniform: bool
    batch_size: int | None
    steps: int
    taken: tuple[int, ...]
    rounds: int
    participation: float
    shared: Mapping[str, str]
    personal: bool
    server_uses: Literal["mean", "each", "nothing"]
    discloses: tuple[Disclosure, ...]

    def rate(self, client: int) -> float:
        """The probability with which an example of a client is in a batch."""
        return min(1.0, (self.batch_size or math.inf) / self.sizes[client])

    @cached_property
    def largest_share(self) -> float:
        """The largest ratio, over clients, of an upload's weight to the expected size of the batch it is made of."""
        pairs = zip(self.weights, range(len(self.sizes)), strict=True)
        return max(weight / (self.rate(client) * self.sizes[client]) for weight, client in pairs)


@dataclass
class Round:
    """A mechanism at work in one round.

    Attributes:
        gradients: what the method is given.
        protect: what becomes of an upload's tensors, each [K, ...], before they leave the clients.
        average: (name, values [K, ...], weights [K]) to their mean, as the server sees it.
        releases: what was released so far; filled as it happens.
        below_clip: [K], whether each upload was below an adaptive clip, noised; a part of the upload.
        finish: the mechanism's state after the round.
    """

    gradients: Gradients
    protect: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    average: Callable[[str, Tensor, Tensor], Tensor]
    releases: list[Release] = field(default_factory=list)
    below_clip: Tensor | None = None
    finish: Callable[[], dict[str, Tensor]] = dict


@dataclass(frozen=True)
class Mechanism:
    """No mechanism at all; the others are its subclasses.

    Attributes:
        settings: the `[privacy]` table.
        facts: of the method and federation.
        model: the frozen model.
        delta: at which the guarantee is stated.
        noise_multiplier: z, of all that is released in one step together.
    """

    settings: PrivacySettings
    facts: Facts
    model: PromptModel | None
    delta: float | None = None
    noise_multiplier: float = 0.0

    @property
    def samples_clients(self) -> bool:
        """Whether a round's participants are chosen by independent coins."""
        return False

    @property
    def samples_examples(self) -> bool:
        """Whether batches are."""
        return False

    def initial_state(self) -> dict[str, Tensor]:
        """The state before the first round."""
        return {}

    def open(self, randomness: Randomness, clients: Sequence[int], state: Mapping[str, Tensor]) -> Round:
        """The mechanism for the round in which `clients` take part."""
        assert self.model is not None
        return Round(ExactGradients(self.model), unchanged, plain_mean)

    def round_releases(self, clients: Sequence[int]) -> list[Release]:
        """What a whole round in which `clients` take part will release."""
        return []

    def planned(self, rounds: int | None = None) -> list[Release]:
        """What the first `rounds` rounds release, or the whole run; participation is spread evenly in between."""
        return []

    def affords(self, ledger: Ledger, releases: Iterable[Release]) -> bool:
        """Whether further releases keep what every untrusted observer learns within the budget, if there is one."""
        if self.settings.epsilon is None or self.delta is None:
            return True
        after = replace(ledger.add(releases), disclosures=())
        untrusted = [observer for observer in OBSERVERS if observer not in ledger.trusted]
        spent = [accounting.spent(after, observer, self.settings.unit).epsilon for observer in untrusted]
        return all(epsilon <= self.settings.epsilon + SLACK for epsilon in spent)

    def empty_ledger(self) -> Ledger:
        """The ledger before anything was released: what stays without noise, and whom the mechanism trusts."""
        return Ledger(disclosures=self._left_open())

    def _left_open(self, covered: Collection[Way] = ()) -> tuple[Disclosure, ...]:
        """What leaves without noise, if what leaves in the `covered` ways is noised or made of what is."""
        return tuple(each for each in self.facts.discloses if each.way not in covered)

    @property
    def _randomness(self) -> Literal["seed", "system"]:
        return "system" if self.settings.secure else "seed"

    @cached_property
    def total(self) -> Ledger:
        """The ledger as a whole run will leave it."""
        return self.empty_ledger().add(self.planned())


@dataclass(frozen=True)
class ExampleMechanism(Mechanism):
    """The example as the unit of privacy: `dp-sgd` and `cotangent`."""

    @property
    def samples_examples(self) -> bool:
        return True

    def open(self, randomness: Randomness, clients: Sequence[int], state: Mapping[str, Tensor]) -> Round:
        releases: list[Release] = []

        def gradients(context_of: ContextOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
            noised = self._gradients(randomness, clients, call=len(releases))
            releases.extend(self._call_releases(clients))
            return noised(context_of, parameters, fixed, batch)

        return Round(gradients, unchanged, self._averaging(randomness), releases)

    def round_releases(self, clients: Sequence[int]) -> list[Release]:
        each = self._call_releases(clients)
        return [replace(release, steps=self.facts.steps) for release in each]

    def planned(self, rounds: int | None = None) -> list[Release]:
        share = 1.0 if rounds is None else rounds / self.facts.rounds
        times = {f"client {client}": math.ceil(count * share) for client, count in enumerate(self.facts.taken)}
        releases = self._call_releases(range(len(self.facts.sizes)))
        return [replace(each, steps=self.facts.steps * times[each.party]) for each in releases]

    def empty_ledger(self) -> Ledger:
        noise_by = self.settings.noise_by
        covered: tuple[Way, ...] = ("mean", "prompt", "sizes", *(() if noise_by == "server" else ("upload",)))
        trusted: tuple[Observer, ...] = ("server",) if noise_by != "client" or self.facts.pools_data else ()
        assumptions = (SIZES_KNOWN, *((SUMS_ONLY,) if noise_by == "shares" else ()))
        return Ledger((), self._left_open(covered), trusted, assumptions, self.delta, self._randomness)

    @cached_property
    def _multipliers(self) -> tuple[float, float]:
        """(z of the personal group, z of the shared one); where there is one group only, it gets it all."""
        if self.settings.mechanism == "cotangent" or not self.facts.shared:
            return self.noise_multiplier, self.noise_multiplier
        if not self.facts.personal:
            return self.noise_multiplier, self.noise_multiplier
        share = self.settings.shared_budget
        return self.noise_multiplier / math.sqrt(1 - share), self.noise_multiplier / math.sqrt(share)

    @cached_property
    def _directions(self) -> Tensor:
        assert self.model is not None
        return public_directions(self.model.encoder, self.settings.subspace)

    def _gradients(self, randomness: Randomness, clients: Sequence[int], call: int) -> Gradients:
        """The gradients of one call in a round; no two calls draw the same noise."""
        assert self.model is not None
        s = self.settings
        if s.mechanism == "cotangent":
            return CotangentGradients(self.model, self._directions, s.clip, self.noise_multiplier, randomness, call)
        z_personal, z_shared = self._multipliers
        personal_clip = s.clip if s.personal_clip is None or not self.facts.shared else s.personal_clip
        everyone = torch.ones(len(clients), dtype=torch.float64)
        shared = {
            "client": z_shared * s.clip * everyone,
            "server": 0.0 * everyone,
            "shares": torch.tensor([self._share(client) for client in clients], dtype=torch.float64),
        }
        return DpSgdGradients(
            self.model,
            frozenset(self.facts.shared),
            Group(personal_clip, z_personal * personal_clip * everyone),
            Group(s.clip, shared[s.noise_by]),
            randomness,
            call,
        )

    def _share(self, client: int) -> float:
        """Standard deviation that one client adds to its sum, so that the mean of all has what it needs.

        The mean of gradients S_i / L_i with weights w_i changes by at most C max_i(w_i / L_i) / W for one example, and
        has noise of deviation sqrt(sum_i (w_i s_i / L_i)^2) / W. With s_i as below the noise is z times the change.
        """
        facts = self.facts
        expected = facts.rate(client) * facts.sizes[client]
        whole = self._multipliers[1] * self.settings.clip * facts.largest_share * expected / facts.weights[client]
        return whole / math.sqrt(len(facts.sizes))

    def _averaging(self, randomness: Randomness) -> Callable[[str, Tensor, Tensor], Tensor]:
        if self.settings.noise_by != "server":
            return plain_mean
        noised = set(self.facts.shared.values())

        def average(name: str, values: Tensor, weights: Tensor) -> Tensor:
            plain = plain_mean(name, values, weights)
            if name not in noised:
                return plain
            sensitivity = self.settings.clip * self.facts.largest_share / float(weights.sum())
            noise = randomness.common_normal(f"noise on the mean of {name}", *plain.shape)
            return plain + self._multipliers[1] * sensitivity * noise.to(plain)

        return average

    def _call_releases(self, clients: Iterable[int]) -> list[Release]:
        """What one gradient releases of each client's examples."""
        return [release for client in clients for release in self._client_releases(client)]

    def _client_releases(self, client: int) -> Iterator[Release]:
        facts, by = self.facts, self.settings.noise_by

        def release(content: str, multipliers: tuple[float, ...], observers: tuple[Observer, ...]) -> Release:
            return Release(content, f"client {client}", "example", multipliers, facts.rate(client), 1, by, observers)

        z_personal, z_shared = self._multipliers
        personal = (z_personal,) if facts.personal else ()
        others: tuple[Observer, ...] = ("clients", "public")
        if self.settings.mechanism == "cotangent":
            yield release("sum of clipped cotangents of the class features", (self.noise_multiplier,), OBSERVERS)
        elif not (facts.shared and facts.personal):
            yield release("sum of clipped gradients", (self.noise_multiplier,), OBSERVERS if by == "client" else others)
        elif by == "client":
            yield release("sums of clipped gradients, personal and shared", (z_personal, z_shared), OBSERVERS)
        else:
            what = "sum of clipped personal gradients, and mean over clients of shared ones"
            yield release(what, (z_personal, z_shared), others)
        if by == "shares":
            alone = self._share(client) / self.settings.clip
            yield release("sums of clipped gradients, as this client sends them", (*personal, alone), ("server",))


@dataclass(frozen=True)
class ClientMechanism(Mechanism):
    """The client as the unit of privacy: `dp-fedavg`.

    McMahan, Ramage, Talwar, Zhang, Learning Differentially Private Recurrent Language Models, ICLR 2018: uploads are
    clipped to one norm, averaged with a fixed divisor, noised. With `noise_by = "client"` every upload is noised
    enough for itself, as in FedPrompt (Zhao et al., 2023). The clip may follow a quantile of the uploads' norms:
    Andrew, Thakkar, McMahan, Ramaswamy, Differentially Private Learning with Adaptive Clipping, NeurIPS 2021.

    Sensitivity: neighbouring federations differ in one client, present or not, with the divisor unchanged; the sum of
    uploads then changes by one vector of norm at most `clip`. Whether an upload is below the clip is counted as +-1/2,
    so the count changes by at most 1/2.
    """

    @property
    def samples_clients(self) -> bool:
        return self.settings.noise_by == "server" and self.facts.participation < 1

    def initial_state(self) -> dict[str, Tensor]:
        return {CLIP: torch.tensor(self.settings.clip, dtype=torch.float64)}

    def empty_ledger(self) -> Ledger:
        noise_by = self.settings.noise_by
        covered: tuple[Way, ...] = ("mean",) if noise_by == "server" else ("mean", "upload")
        trusted: tuple[Observer, ...] = () if noise_by == "client" else ("server",)
        assumptions = (SUMS_ONLY,) if noise_by == "shares" else ()
        return Ledger((), self._left_open(covered), trusted, assumptions, self.delta, self._randomness)

    def open(self, randomness: Randomness, clients: Sequence[int], state: Mapping[str, Tensor]) -> Round:
        assert self.model is not None
        s, clip = self.settings, float(state[CLIP])
        z_upload, z_count = self._multipliers
        divisor = self.facts.participation * len(self.facts.sizes) if self.samples_clients else len(clients)
        own_share = {"client": 1.0, "server": 0.0, "shares": 1 / math.sqrt(max(1, len(clients)))}[s.noise_by]
        server_share = 1.0 if s.noise_by == "server" else 0.0

        def protect(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            learned = {name: tensor for name, tensor in tensors.items() if name != WEIGHT}
            clipped, below = clip_jointly(learned, clip)
            for name, tensor in clipped.items():
                noise = randomness.normal(f"noise on {name}", *tensor.shape[1:]).to(tensor)
                clipped[name] = tensor + own_share * z_upload * clip * noise
            if s.clip_quantile is not None:
                noise = randomness.normal("noise on a bit").to(below.device)
                at_work.below_clip = below.float() + own_share * z_count / 2 * noise
            at_work.releases.extend(self.round_releases(clients))
            return tensors | clipped

        def average(name: str, values: Tensor, weights: Tensor) -> Tensor:
            noise = randomness.common_normal(f"noise on the sum of {name}", *values.shape[1:]).to(values)
            total: Tensor = (values.sum(0) + server_share * z_upload * clip * noise) / divisor
            return total

        def finish() -> dict[str, Tensor]:
            """Move the clip towards the quantile: smaller where more uploads than wanted are below it."""
            if s.clip_quantile is None or at_work.below_clip is None:
                return dict(state)
            noise = float(server_share * z_count / 2 * randomness.common_normal("noise on the count"))
            below = (float(at_work.below_clip[: len(clients)].sum()) + noise) / divisor
            changed = clip * math.exp(-s.clip_learning_rate * (below - s.clip_quantile))
            return {CLIP: torch.tensor(changed, dtype=torch.float64)}

        at_work = Round(ExactGradients(self.model), protect, average, finish=finish)
        return at_work

    @cached_property
    def _multipliers(self) -> tuple[float, float]:
        """(z of the uploads, z of the count)."""
        if self.settings.clip_quantile is None:
            return self.noise_multiplier, math.inf
        return self.noise_multiplier / math.sqrt(1 - COUNT_SHARE), self.noise_multiplier / math.sqrt(COUNT_SHARE)

    def round_releases(self, clients: Sequence[int]) -> list[Release]:
        s, facts = self.settings, self.facts
        counted = s.clip_quantile is not None
        multipliers = self._multipliers if counted else self._multipliers[:1]
        what = "clipped upload" + (" and whether it was clipped" if counted else "")
        if s.noise_by == "client":
            parties = [f"client {client}" for client in clients]
            return [Release(what, party, "client", multipliers, 1.0, 1, s.noise_by, OBSERVERS) for party in parties]
        rate = facts.participation if self.samples_clients else 1.0
        others: tuple[Observer, ...] = ("clients", "public")
        releases = [Release(f"mean {what}", ALL_CLIENTS, "client", multipliers, rate, 1, s.noise_by, others)]
        if s.noise_by == "shares":
            alone = tuple(z / math.sqrt(len(clients)) for z in multipliers)
            releases.append(Release(what, ALL_CLIENTS, "client", alone, 1.0, 1, s.noise_by, ("server",)))
        return releases

    def planned(self, rounds: int | None = None) -> list[Release]:
        count = self.facts.rounds if rounds is None else rounds
        if self.settings.noise_by == "client":
            share = count / self.facts.rounds
            return [
                replace(each, steps=math.ceil(taken * share))
                for each, taken in zip(self.round_releases(range(len(self.facts.sizes))), self.facts.taken, strict=True)
            ]
        return [replace(each, steps=count) for each in self.round_releases(range(len(self.facts.sizes)))]


def mechanism(settings: PrivacySettings, facts: Facts, model: PromptModel | None) -> Mechanism:
    """The mechanism of a run, with its noise matched to the budget.

    Args:
        settings: the `[privacy]` table.
        facts: of the method and federation.
        model: the frozen model; None where nothing will be run.

    Raises:
        ConfigError: the mechanism does not fit the method, or delta the number of units.
    """
    if not (settings.on and facts.trains):
        return Mechanism(settings, facts, model)
    _check(settings, facts)
    units = len(facts.sizes) if settings.unit == "client" else sum(facts.sizes)
    delta = accounting.default_delta(units) if settings.delta is None else settings.delta
    accounting.check_delta(delta, units)
    kind = ClientMechanism if settings.unit == "client" else ExampleMechanism
    if settings.noise_multiplier is not None:
        return kind(settings, facts, model, delta, settings.noise_multiplier)
    assert settings.epsilon is not None
    unknown = kind(settings, facts, model, delta, 1.0)
    judged = [each for each in unknown.planned() if set(each.observers) - set(unknown.empty_ledger().trusted)]
    schedules = {(each.sampling_rate, each.steps) for each in judged if each.steps}
    return kind(settings, facts, model, delta, accounting.noise_multiplier(settings.epsilon, delta, schedules))


def _check(settings: PrivacySettings, facts: Facts) -> None:
    if settings.unit == "client":
        if facts.server_uses != "mean":
            does = (
                "sends nothing to be averaged" if facts.server_uses == "nothing" else "looks at each upload by itself"
            )
            raise ConfigError("privacy.mechanism", "dp-fedavg", f"this method {does}; use 'dp-sgd' or 'cotangent'")
        if not facts.uniform:
            raise ConfigError(
                "runtime.weighting",
                "examples",
                "with 'dp-fedavg' every client must count the same; set it to 'uniform'",
            )
    elif settings.noise_by != "client":
        if not facts.shared:
            raise ConfigError(
                "privacy.noise_by",
                settings.noise_by,
                "this method does not upload gradients to be averaged; use 'client'",
            )
        if facts.steps != 1:
            raise ConfigError(
                "settings.local_steps",
                facts.steps,
                f"must be 1 with privacy.noise_by = {settings.noise_by!r}: the mean of one step's gradients is noised",
            )
    if settings.noise_by == "shares" and facts.participation < 1:
        raise ConfigError(
            "runtime.participation",
            facts.participation,
            "must be 1 with privacy.noise_by = 'shares', as every share counts",
        )


def unchanged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An upload that leaves as it is."""
    return tensors


def plain_mean(name: str, values: Tensor, weights: Tensor) -> Tensor:
    """The mean of values [K, ...] with weights [K] over clients; does not depend on their order beyond rounding."""
    weights = weights.to(values)
    averaged: Tensor = torch.tensordot(weights / weights.sum(), values, dims=1)
    return averaged


def clip_jointly(tensors: Mapping[str, Tensor], clip: float) -> tuple[dict[str, Tensor], Tensor]:
    """Each client's tensors [K, ...] scaled to a joint norm of at most `clip`; and [K], whether they were below it."""
    norms = torch.stack([tensor.flatten(1).double().norm(dim=1) for tensor in tensors.values()]).norm(dim=0)
    scale = torch.where(norms.isfinite(), (clip / norms.clamp(min=math.ulp(0.0))).clamp(max=1.0), 0.0)
    clipped = {}
    for name, tensor in tensors.items():
        factor = scale.to(tensor).view(-1, *[1] * (tensor.ndim - 1))
        clipped[name] = torch.where(factor > 0, tensor, 0.0) * factor
    return clipped, norms <= clip
