"""The record of every noisy release of a run, and of what was disclosed without noise.

It, not the configuration, says what was spent; `accounting` turns it into epsilon. It knows by digest whose data the
releases were made of, so that runs are composed over data and not over names.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from sordino.errors import RunError

Unit = Literal["example", "client"]
Observer = Literal["server", "clients", "public"]
OBSERVERS: tuple[Observer, ...] = get_args(Observer)
Source = Literal["system", "simulation"]
Channel = Literal["upload", "shares", "mean", "prompt", "memory", "images", "sizes"]

# Who sees what leaves in which way. The mean reaches all clients, and everybody who is given a prompt.
SEEN_BY: dict[Channel, tuple[Observer, ...]] = {
    "upload": ("server",),
    "shares": ("server",),
    "mean": OBSERVERS,
    "prompt": OBSERVERS,
    "memory": ("public",),
    "images": ("server",),
    "sizes": ("server",),
}
ALL_CLIENTS = "all clients"  # the party of a release that every client's data enter


@dataclass(frozen=True)
class Release:
    """Gaussian releases of one kind, made of one party's data.

    Attributes:
        content: what was released, in words.
        party: whose data they were made of: "client 3", or ALL_CLIENTS.
        unit: what neighboring data sets differ in.
        noise_multipliers: standard deviation of the noise over the sensitivity, for each vector that was released of
            one and the same sample; 0 where no noise was added.
        sampling_rate: probability with which a unit was in the sample, by independent coins; 1 where it always was.
        steps: how many releases.
        noise_by: who added the noise: "client", "server", or "shares" (a part of it by each client).
        observers: who sees the releases.
    """

    content: str
    party: str
    unit: Unit
    noise_multipliers: tuple[float, ...]
    sampling_rate: float
    steps: int
    noise_by: str
    observers: tuple[Observer, ...]

    @property
    def noise_multiplier(self) -> float:
        """That of one Gaussian release as revealing as all vectors together: (sum of z^-2)^(-1/2)."""
        least = min(self.noise_multipliers)
        if least == 0 or math.isinf(least):
            return least
        # Relative to the least, so that squares of very large or small ones neither vanish nor overflow.
        return least * float(sum((z / least) ** -2 for z in self.noise_multipliers) ** -0.5)


@dataclass(frozen=True)
class Disclosure:
    """Something that is sent or published with no noise on it.

    Attributes:
        content: what, and to whom, in words.
        channel: how it leaves: to the server in an "upload", or as what it computes on "shares"; to all as the server's
            "mean" of uploads; to the public as a client's "prompt", or as a "memory" of images that comes with it; as
            "images" that are handed over; as the "sizes" of the clients' data.
    """

    content: str
    channel: Channel

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Who sees it."""
        return SEEN_BY[self.channel]


@dataclass(frozen=True)
class Ledger:
    """What a run released with noise, and what it disclosed without.

    Attributes:
        releases: in the order in which each kind first happened; equal ones are one entry with their steps added.
        disclosures: what is left without noise.
        trusted: observers that the mechanism trusts, as they add the noise.
        assumptions: what the guarantee takes as known to everybody, or as given, in words.
        delta: at which epsilon is stated; None where nothing was released.
        randomness: "system": noise and samples are from the operating system; "simulation": they can be drawn again.
        run: a name of the run that no other has, in hex.
        data: by party, a digest of its data; equal digests are equal data.
        parts: the ledgers of several runs, where this one composes them; all else is their union then.
    """

    releases: tuple[Release, ...] = ()
    disclosures: tuple[Disclosure, ...] = ()
    trusted: tuple[Observer, ...] = ()
    assumptions: tuple[str, ...] = ()
    delta: float | None = None
    randomness: Source = "system"
    run: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Ledger, ...] = ()

    def add(self, releases: Iterable[Release]) -> Ledger:
        """The ledger with further releases entered."""
        steps = {replace(each, steps=0): each.steps for each in self.releases}
        for each in releases:
            kind = replace(each, steps=0)
            steps[kind] = steps.get(kind, 0) + each.steps
        return replace(self, releases=tuple(replace(kind, steps=count) for kind, count in steps.items()))

    @property
    def simulated(self) -> bool:
        """Whether noise was added that can be drawn again, and so protects nobody."""
        return bool(self.releases) and self.randomness == "simulation"

    @property
    def private(self) -> bool:
        """Whether all that was learned from images reached untrusted observers with noise on it, or not at all."""
        return self.noised and not self.simulated

    @property
    def noised(self) -> bool:
        """Whether a run would be private if its noise came from the operating system, as it does unless simulated."""
        open_to = {observer for each in self.disclosures for observer in each.observers} - set(self.trusted)
        noiseless = any(
            each.noise_multiplier == 0 and set(each.observers) - set(self.trusted) for each in self.releases
        )
        return not open_to and not noiseless

    def to_json(self) -> str:
        """The content of `ledger.json`; equal ledgers give equal text."""
        content = asdict(self)
        content["disclosures"] = [asdict(each) | {"observers": each.observers} for each in self.disclosures]
        content["data"] = dict(self.data)
        content["parts"] = [each.run for each in self.parts]
        return json.dumps({"private": self.private, "simulated": self.simulated, **content}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Ledger:
        """Read what `to_json` wrote.

        Raises:
            RunError: it is not a ledger.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            releases = [
                Release(**each | {name: tuple(each[name]) for name in ("noise_multipliers", "observers")})
                for each in content["releases"]
            ]
            disclosures = [Disclosure(each["content"], each["channel"]) for each in content["disclosures"]]
            return cls(
                tuple(releases),
                tuple(disclosures),
                tuple(content["trusted"]),
                tuple(content["assumptions"]),
                content["delta"],
                content["randomness"],
                str(content["run"]),
                {str(party): str(digest) for party, digest in content["data"].items()},
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"not a ledger of this version of Sordino ({error!r}); run the experiment again") from None

    def digest_of(self, party: str) -> str:
        """Return the digest of a party's data, of ALL_CLIENTS that of all parties' together; "" where it is unknown."""
        if party == ALL_CLIENTS and ALL_CLIENTS not in self.data:
            return joint_digest(self.data.values())
        return self.data.get(party, "")

    def digest(self) -> str:
        """SHA-256 of the ledger's text, in hex; saved prompts carry it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def joint_digest(digests: Iterable[str]) -> str:
    """Return a digest of several digests, whatever their order; "" of none."""
    ordered = sorted(digests)
    return hashlib.sha256("\n".join(ordered).encode()).hexdigest() if ordered else ""
