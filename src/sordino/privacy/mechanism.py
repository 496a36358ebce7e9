"""A run's privacy mechanism: what it does to gradients and uploads, and what it enters in the ledger for it.

A `Mechanism` is made once a run, with its noise already matched to the budget, and opened anew for every round.
`MechanismInputs` tells it which parameters' gradients are only ever averaged, and what leaves a client.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from sordino.encoders.prompt_model import PromptModel
from sordino.errors import RunError
from sordino.privacy import accounting
from sordino.privacy.forward.losses import ExactLosses, Losses
from sordino.privacy.gradients import ExactGradients, Gradients
from sordino.privacy.ledger import OBSERVERS, Channel, Disclosure, Ledger, Release, Source
from sordino.privacy.sampling import PoissonSampler, sampling_rate
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.uploads.secure_mean import ServerSums, SumVectors
from sordino.randomness import Randomness

ServerUses = Literal["mean", "each", "shares", "nothing"]
Average = Callable[[str, Tensor, Tensor], Tensor]  # (field, values [K, ...], weights [K]) to their mean

# What a method does that does not average over all clients, in words.
INSTEAD_OF_A_MEAN: dict[ServerUses, str] = {
    "each": "looks at each upload by itself",
    "shares": "averages within clusters, on secret shares",
    "nothing": "sends nothing to be averaged",
}
WEIGHT = "weight"  # the field of an upload by which it is averaged: known to all, not learned, so never clipped
CLASSES_KNOWN = "the names of the classes are known to all"
SLACK = 1e-6  # by which a budget may seem to be passed where rounding says so


@dataclass(frozen=True)
class MechanismInputs:
    """Properties of a method and its federation that determine its privacy analysis.

    Attributes:
        trains: false for a method with no rounds.
        pools_data: whether all clients' images are handed to one place, which is the one party then.
        sizes: how many examples each client holds; how many persons, if the person is the unit of privacy.
        weights: what each client's upload weighs in a mean.
        uniform: whether they all weigh the same, whatever their size.
        batch_size: examples, or persons, a batch; None takes all.
        steps: gradients that a client takes in a round.
        linear: whether its logits are linear in the class features (`PromptModel.linear`).
        rounds_participated: in how many rounds each client takes part.
        rounds: of the whole run.
        participation: the fraction of the clients that take part in a round.
        shared: parameters whose gradient is uploaded and only ever averaged, with the name of the upload's field.
        personal: whether there are parameters besides those.
        server_uses: what the server makes of uploads.
        discloses: what leaves if nothing is noised.
        classes: C; 0 if it is not known.
        statistics: whether the method works on class statistics.
        counts_only: whether it uses their counts alone.
        one_feature: whether an image enters a method as its one feature.
        whole_persons: whether it is known whose each image is, and no person has images at two clients.
        forward_only: whether the method is given losses of candidates, and no gradient.
    """

    trains: bool
    pools_data: bool
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    uniform: bool
    batch_size: int | None
    steps: int
    linear: bool
    rounds_participated: tuple[int, ...]
    rounds: int
    participation: float
    shared: Mapping[str, str]
    personal: bool
    server_uses: ServerUses
    discloses: tuple[Disclosure, ...]
    classes: int = 0
    statistics: bool = False
    counts_only: bool = False
    one_feature: bool = True
    whole_persons: bool = False
    forward_only: bool = False

    def rate(self, client: int) -> float:
        """Return the probability with which a unit of a client, example or person, is in a batch."""
        return sampling_rate(self.batch_size, self.sizes[client])

    @cached_property
    def largest_share(self) -> float:
        """Return the largest ratio, over clients, of an upload's weight to the expected size of its batch."""
        pairs = zip(self.weights, range(len(self.sizes)), strict=True)
        return max(weight / (self.rate(client) * self.sizes[client]) for weight, client in pairs)


@dataclass
class ClientRoundMechanism:
    """The clients' end of a mechanism in one round.

    Attributes:
        gradients: what the method is given: gradients, or losses if it is a forward-only one.
        protect: turns an upload's tensors, each [K, ...], into what leaves the clients.
        rates: for each gradient that was taken, the sampling rates [K] of its batch, as they were drawn.
        below_clip: [K], 1/2 where an upload was below an adaptive clip, -1/2 where not, noised; part of the upload.
        keys: [K, bytes], of the dithers by which an upload was quantized; part of the upload.
        summed: vectors that a secure sum adds up; they never leave in the clear.
    """

    gradients: Any
    protect: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    rates: list[Tensor] = field(default_factory=list)
    below_clip: Tensor | None = None
    keys: Tensor | None = None
    summed: list[SumVectors] = field(default_factory=list)


@dataclass
class ServerRoundMechanism:
    """The server's end of a mechanism in one round.

    Attributes:
        average: (field, values [K, ...], weights [K]) to their mean, with noise where the server or a secure sum adds
            it. Under a secure sum it looks at no value.
        releases: what the round released; a secure sum enters the noise of those who survived it.
        finish: from the uploads' `below_clip` [K], or None, to the mechanism's state after the round.
    """

    average: Average
    releases: list[Release]
    finish: Callable[[Tensor | None], dict[str, Tensor]] = lambda below_clip: {}


@dataclass(frozen=True)
class Mechanism:
    """No mechanism at all; the others are its subclasses.

    Attributes:
        settings: the `[privacy]` table.
        inputs: of the method and federation.
        model: the frozen model.
        delta: at which the guarantee is stated.
        noise_multiplier: z, of all that is released in one step together.
        public: [n, D], features of public images; None without any.
    """

    settings: PrivacySettings
    inputs: MechanismInputs
    model: PromptModel | None
    delta: float | None = None
    noise_multiplier: float = 0.0
    public: Tensor | None = None

    def noiseless(self, finite_only: bool = False) -> Gradients | Losses:
        """Return what the method is given, without noise.

        Args:
            finite_only: let an example that is not finite count as nothing.
        """
        assert self.model is not None
        if self.inputs.forward_only:
            return ExactLosses(self.model, finite_only)
        return ExactGradients(self.model, finite_only)

    @property
    def samples_clients(self) -> bool:
        """Tell whether a round's participants are a Poisson sample."""
        return False

    @property
    def noised_by_server(self) -> bool:
        """Tell whether a trusted server adds noise to the mean of a round's uploads, which is all that may be used."""
        return self.settings.on and self.inputs.trains and self.settings.noise_by == "server"

    @property
    def samples_examples(self) -> bool:
        """Tell whether batches are Poisson samples, of examples or of persons."""
        return False

    def sampler(self, randomness: Randomness) -> PoissonSampler | None:
        """Return what draws the batches of one round; None if batches are no Poisson samples."""
        if not self.samples_examples:
            return None
        return PoissonSampler(randomness, self.settings.person_images if self.settings.by_person else None)

    @property
    def compresses(self) -> bool:
        """Tell whether uploads are integers, whose rounding is the noise."""
        return self.settings.on and self.inputs.trains and self.settings.compress

    def restored(self, codes: Mapping[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        """Return uploads with noise, each [K, ...], from the integers that were sent; see `compresses`."""
        raise NotImplementedError

    @property
    def broadcasts_clip(self) -> bool:
        """Tell whether the clip adapts, so that the server broadcasts it every round."""
        return False

    def broadcast_clip(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """Return the clip that clients are told, where it adapts; part of the broadcast."""
        return None

    @property
    def releases_statistics(self) -> bool:
        """Tell whether class statistics leave the clients once, before the first round."""
        return False

    def initial_state(self) -> dict[str, Tensor]:
        """Return the state before the first round."""
        return {}

    def client_end(
        self, randomness: Randomness, clients: Sequence[int], clip: Tensor | None = None
    ) -> ClientRoundMechanism:
        """Return the clients' end of a round.

        Args:
            randomness: where their noise comes from.
            clients: the K clients of the stack, by number.
            clip: what the server broadcast of an adaptive clip.
        """
        return ClientRoundMechanism(self.noiseless(), unchanged)

    def server_end(
        self,
        randomness: Randomness,
        clients: Sequence[int],
        state: Mapping[str, Tensor],
        sums: ServerSums | None = None,
    ) -> ServerRoundMechanism:
        """Return the server's end of a round.

        Args:
            randomness: where the server's noise comes from.
            clients: who takes part, by number.
            state: the mechanism's, after the round before.
            sums: the server's end of secure sums, where `noise_by` is "shares".
        """
        return ServerRoundMechanism(plain_mean, [])

    @property
    def sums_securely(self) -> bool:
        """Tell whether a secure sum adds uploads up, so that the server sees none of them."""
        return self.settings.on and self.inputs.trains and self.settings.noise_by == "shares"

    def entered(self, clients: Sequence[int], rates: Sequence[Sequence[float]]) -> list[Release]:
        """Return what a round released.

        Args:
            clients: who took part.
            rates: for each gradient that was taken, the clients' sampling rates, as they were drawn.
        """
        return []

    def round_releases(self, clients: Sequence[int]) -> list[Release]:
        """Return what a whole round in which `clients` take part is planned to release."""
        return []

    def check(self, releases: Iterable[Release], clients: Sequence[int]) -> None:
        """See that a round released what accounting planned for it, before anything of it leaves.

        Args:
            releases: as they were entered, with the rates of the batches that were drawn.
            clients: who took part.

        Raises:
            RunError: it released something else, so the planned epsilon would not hold.
        """
        entered = Ledger().add(releases).releases
        planned = Ledger().add(self.round_releases(clients)).releases
        if set(entered) == set(planned):
            return
        difference = _difference(entered, planned)
        raise RunError(
            f"the method does not keep to its schedule, so its epsilon would not hold: {difference}; nothing of this "
            "round was released; mend the method's schedule(settings)"
        )

    def planned(self, rounds: int | None = None) -> list[Release]:
        """Return the releases of the first `rounds` rounds, or of the whole run.

        Participation is spread evenly over the rounds.
        """
        return []

    def affords(self, ledger: Ledger, releases: Iterable[Release]) -> bool:
        """Tell whether every untrusted observer stays within the budget, if there is one, after further releases."""
        if self.settings.epsilon is None or self.delta is None:
            return True
        after = replace(ledger.add(releases), disclosures=())
        untrusted = [observer for observer in OBSERVERS if observer not in ledger.trusted]
        spent = [accounting.spent(after, observer, self.settings.unit).epsilon for observer in untrusted]
        return all(epsilon <= self.settings.epsilon + SLACK for epsilon in spent)

    def empty_ledger(self) -> Ledger:
        """Return the ledger before any release: disclosures without noise, and whom the mechanism trusts."""
        return Ledger(disclosures=self._left_open())

    def _left_open(self, covered: Collection[Channel] = ()) -> tuple[Disclosure, ...]:
        """Return the disclosures without noise, if all in the `covered` channels is noised or made of noised values."""
        return tuple(part for part in self.inputs.discloses if part.channel not in covered)

    @property
    def _randomness(self) -> Source:
        return "simulation" if self.settings.simulation else "system"

    @cached_property
    def total(self) -> Ledger:
        """Return the ledger as a whole run will leave it."""
        return self.empty_ledger().add(self.planned())


def _difference(entered: Sequence[Release], planned: Sequence[Release]) -> str:
    """Return the first difference of two rounds in words."""

    def words(release: Release | None) -> str:
        return "none" if release is None else f"{release.steps} at sampling rate {release.sampling_rate:.4g}"

    for party in dict.fromkeys(release.party for release in (*planned, *entered)):
        drawn = {release for release in entered if release.party == party}
        plan = {release for release in planned if release.party == party}
        if drawn != plan:
            extra = "; ".join(sorted(map(words, drawn - plan))) or "none"
            missing = "; ".join(sorted(map(words, plan - drawn))) or "none"
            return f"releases of {party} in a round: {missing} planned, {extra} drawn"
    return "another order of releases"


def summed_securely(settings: PrivacySettings) -> str:
    """Return the assumptions of a secure sum, in words."""
    together = f"at most {settings.colluders} of them pool what they know, with each other or with the server"
    return f"clients' uploads are added up by a secure sum, in which all keep to the protocol and {together}"


def charge(releases: list[Release], place: int, noise_multiplier: float) -> None:
    """Enter, in place, what a secure sum's survivors really noised: the noise multiplier of one of the vectors."""
    for number, release in enumerate(releases):
        multipliers = list(release.noise_multipliers)
        multipliers[place] = noise_multiplier
        releases[number] = replace(release, noise_multipliers=tuple(multipliers))


def once(average: Average) -> Average:
    """Means that are released once, however often a server asks: fresh noise would be another release."""
    means: dict[str, Tensor] = {}

    def released(name: str, values: Tensor, weights: Tensor) -> Tensor:
        if name not in means:
            means[name] = average(name, values, weights)
        return means[name]

    return released


def unchanged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an upload as it is."""
    return tensors


def plain_mean(name: str, values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over clients of values [K, ...], with weights [K].

    The clients' order changes it by rounding only.
    """
    weights = weights.to(values)
    averaged: Tensor = torch.tensordot(weights / weights.sum(), values, dims=1)
    return averaged
