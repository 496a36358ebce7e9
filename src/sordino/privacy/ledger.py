"""The record of every noisy release of a run, and of everything disclosed without noise.

The ledger, not the configuration, says what was spent; `accounting` computes epsilon from it. It identifies the data of
each party by a digest, so that runs are composed over data and not over names.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from sordino.errors import RunError, cause, config_error

Unit = Literal["example", "person", "client"]
UNITS: tuple[Unit, ...] = get_args(Unit)  # from small to large: each is made of units before it
Observer = Literal["server", "clients", "public"]
OBSERVERS: tuple[Observer, ...] = get_args(Observer)
Source = Literal["system", "simulation"]
Channel = Literal["upload", "shares", "clusters", "mean", "prompt", "memory", "images", "sizes"]
NoiseSource = Literal["client", "server", "shares"]

# Of a file: no other type is taken for a text or a number, and no number that no release can have.
Text = Annotated[str, Strict()]
Multipliers = Annotated[tuple[Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)], ...], Field(min_length=1)]
Rate = Annotated[float, Strict(), Field(gt=0, le=1)]
Steps = Annotated[int, Strict(), Field(ge=1, le=10**9)]  # more than any run has, and than can be counted
Observers = Annotated[tuple[Observer, ...], Field(min_length=1)]
Delta = Annotated[float, Strict(), Field(gt=0, lt=1)]

# Observers of each channel. The mean reaches all clients, and everybody who is given a prompt.
SEEN_BY: dict[Channel, tuple[Observer, ...]] = {
    "upload": ("server",),
    "shares": ("server",),
    "clusters": ("server", "clients"),
    "mean": OBSERVERS,
    "prompt": OBSERVERS,
    "memory": ("public",),
    "images": ("server",),
    "sizes": ("server",),
}
REMEDY = "put it back as it was, or run the experiment again"
ALL_CLIENTS = "all clients"  # the party of a release that every client's data enter

# One release with less noise has a larger epsilon already, at any delta below its sampling rate: where it is above half
# of what one unit adds, that unit was in it, up to a probability of e^-316.
LEAST_PRIVATE_NOISE = 0.02


@dataclass(frozen=True)
class Release:
    """Gaussian releases of one kind, made of one party's data.

    Attributes:
        content: the released quantity, in words.
        party: the owner of the data: "client 3", or ALL_CLIENTS.
        unit: what neighboring data sets differ in.
        noise_multipliers: standard deviation of the noise over the sensitivity, for each vector that was released of
            one and the same sample; 0 if no noise was added.
        sampling_rate: probability with which a unit was in the sample, by Poisson sampling; 1 if it always was.
        steps: number of releases.
        noise_by: who added the noise: "client", "server", or "shares" (a part of it by each client).
        observers: who sees the releases.
        name: of the one release that this is, which other runs may use again; empty if it is this run's alone.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    content: Text
    party: Text
    unit: Unit
    noise_multipliers: Multipliers
    sampling_rate: Rate
    steps: Steps
    noise_by: NoiseSource
    observers: Observers
    name: Text = ""

    @property
    def noise_multiplier(self) -> float:
        """Return that of one Gaussian release as revealing as all vectors together: (sum of z^-2)^(-1/2)."""
        return combined_multiplier(self.noise_multipliers)


@dataclass(frozen=True)
class Disclosure:
    """Something that is sent or published without noise.

    Attributes:
        content: the disclosed quantity and its receivers, in words.
        channel: the way it leaves: to the server in an "upload", or as a result computed on "shares"; to all as the
            server's "mean" of uploads; to the public as a client's "prompt", or as a "memory" of images that comes with
            it; as "images" that are handed over; as the "sizes" of the clients' data.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="ignore")  # its observers follow from its channel

    content: Text
    channel: Channel

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Return the observers of the channel."""
        return SEEN_BY[self.channel]


@dataclass(frozen=True)
class Ledger:
    """Everything a run released with noise or disclosed without.

    Attributes:
        releases: in the order in which each kind first happened; equal ones are one entry with their steps added.
        disclosures: everything that leaves without noise.
        trusted: observers that the mechanism trusts, because they add the noise.
        assumptions: facts that the guarantee takes as known to everybody, or as given, in words.
        delta: the probability at which epsilon is stated; None if nothing was released.
        randomness: "system": noise and samples are from the operating system; "simulation": they can be drawn again.
        run: a name of the run that no other has, in hex.
        data: by party, a digest of its data; equal digests are equal data.
        parts: the ledgers of several runs, if this one composes them; all other fields are then their union, but for
            `trusted`, whom all of them trust.
        whole_persons: whether all images of a person are known to be with one party. A person-level release requires
            it; a client-level one bounds something about a person only then.
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
    whole_persons: bool = False

    def add(self, releases: Iterable[Release]) -> Ledger:
        """Return the ledger with further releases entered."""
        entered, places = list(self.releases), dict(self._places)
        for release in releases:
            kind = replace(release, steps=0)
            place = places.get(kind)
            if place is None:
                places[kind] = len(entered)
                entered.append(release)
            elif not kind.name:  # a named release happened once, whoever uses it
                entered[place] = replace(release, steps=entered[place].steps + release.steps)
        after = replace(self, releases=tuple(entered))
        vars(after)["_places"] = places  # or each round of a run would look at what all clients ever released
        return after

    @cached_property
    def _places(self) -> dict[Release, int]:
        """Return where each kind of release is in `releases`; a kind has no steps."""
        return {replace(release, steps=0): place for place, release in enumerate(self.releases)}

    @property
    def simulated(self) -> bool:
        """True if noise was added that can be drawn again, and so protects nobody."""
        return bool(self.releases) and self.randomness == "simulation"

    @property
    def private(self) -> bool:
        """True if everything learned from images reached untrusted observers with noise on it, or not at all.

        Of several runs each must be private by itself, with the observers that it trusts.
        Noise that bounds nothing is none: where the ledger has no delta, or one release is under `LEAST_PRIVATE_NOISE`.
        Epsilon of all releases together is not computed here; see `statement.is_private`.
        """
        if self.parts:
            return all(part.private for part in self.parts)
        return self.noised and not self.simulated and not self._unbounded

    @property
    def noised(self) -> bool:
        """True if the run would be private with noise from the operating system, which it has unless simulated."""
        if self.parts:
            return all(part.noised for part in self.parts)
        trusted = set(self.trusted)
        kinds = {(min(release.noise_multipliers), release.observers) for release in self.releases}
        noiseless = any(least == 0 and set(observers) - trusted for least, observers in kinds)
        return not self.told and not noiseless

    @property
    def told(self) -> list[Disclosure]:
        """Return what leaves without noise to observers that are not trusted."""
        return [disclosure for disclosure in self.disclosures if set(disclosure.observers) - set(self.trusted)]

    @property
    def _unbounded(self) -> bool:
        """True if a single release to an untrusted observer has an epsilon that is infinite, or too large to count."""
        trusted, delta = set(self.trusted), self.delta or 0.0
        seen = {
            (release.noise_multipliers, release.sampling_rate)
            for release in self.releases
            if release.steps and set(release.observers) - trusted
        }
        return any(
            rate > delta and (delta <= 0 or combined_multiplier(multipliers) < LEAST_PRIVATE_NOISE)
            for multipliers, rate in seen
        )

    def to_json(self) -> str:
        """Return the content of `ledger.json`; equal ledgers give equal text."""
        content = asdict(replace(self, releases=(), data={}, parts=()))
        content["disclosures"] = [
            asdict(disclosure) | {"observers": disclosure.observers} for disclosure in self.disclosures
        ]
        content["parts"] = [part.run for part in self.parts]
        text = json.dumps({"private": self.private, "simulated": self.simulated, **content}, indent=2) + "\n"
        # There may be a million of these two, which json writes slowly. No string in JSON has a bare quotation mark.
        if self.releases:
            lines = ",\n".join(_texts(self.releases))
            text = text.replace('"releases": []', f'"releases": [\n{lines}\n  ]', 1)
        if self.data:
            lines = ",\n".join(f"    {json.dumps(party)}: {json.dumps(value)}" for party, value in self.data.items())
            text = text.replace('"data": {}', f'"data": {{\n{lines}\n  }}', 1)
        return text

    @classmethod
    def from_json(cls, text: str | bytes, source: object = None, remedy: str = REMEDY) -> Ledger:
        """Return the ledger that `to_json` wrote.

        Args:
            text: the content of `ledger.json`.
            source: where it was read, for messages.
            remedy: what is told to do where it is damaged.

        Raises:
            RunError: the text is not a ledger, or holds a value that no ledger has; the message names both.
        """
        place = "" if source is None else f"{source}: "
        try:
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError("it is no JSON object")
            read = _File.model_validate(content)
        except ValidationError as error:
            wrong = config_error(error, _File)
            raise RunError(f"{place}not a ledger of this version of Sordino: {wrong}; {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise RunError(f"{place}not a ledger of this version of Sordino ({cause(error)}); {remedy}") from None
        return cls(**vars(read))

    def for_others(self) -> Ledger:
        """Return it without what would let others confirm a guess of somebody's data.

        That are the digests of data, and the run's name, by which published digests are salted. Releases get names that
        nothing follows from, as those of earlier versions had the run's; equal ones stay equal.
        """
        releases = tuple(replace(each, name=release_name(each.name)) for each in self.releases)
        return replace(self, releases=releases, run="", data={}, parts=())

    def digest_of(self, party: str) -> str:
        """Return the digest of a party's data; "" if it is unknown. ALL_CLIENTS has that of all parties together."""
        if party == ALL_CLIENTS and ALL_CLIENTS not in self.data:
            return joint_digest(self.data.values())
        return self.data.get(party, "")

    def digest(self) -> str:
        """Return SHA-256 of the ledger's text, in hex; saved prompts carry it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class _File(BaseModel):
    """The part of `ledger.json` that is read; the rest follows from it."""

    model_config = ConfigDict(extra="ignore")

    releases: tuple[Release, ...]
    disclosures: tuple[Disclosure, ...]
    trusted: tuple[Observer, ...]
    assumptions: tuple[Text, ...]
    delta: Delta | None
    randomness: Source
    run: Text
    data: dict[Text, Text]
    whole_persons: Annotated[bool, Strict()] = False


def release_name(run: str) -> str:
    """Return the name of a run's one release, from which the run's own does not follow; that is "" if the run's is."""
    return hashlib.sha256(f"release of {run}".encode()).hexdigest()[:32] if run else ""


def combined_multiplier(multipliers: Sequence[float]) -> float:
    """Return (sum of z^-2)^(-1/2) over noise multipliers z."""
    least = min(multipliers)
    if least == 0 or math.isinf(least):
        return least
    # Relative to the least, so that squares of very large or small multipliers neither vanish nor overflow.
    return least * float(sum((z / least) ** -2 for z in multipliers) ** -0.5)


def _texts(releases: Iterable[Release]) -> Iterator[str]:
    """Yield each release in JSON, as part of a ledger; most differ in their party alone."""
    around: dict[tuple[Any, ...], tuple[str, str]] = {}
    for release in releases:
        fields = vars(release)
        key = tuple(value for name, value in fields.items() if name != "party")
        if key not in around:
            text = textwrap.indent(json.dumps({**fields, "party": ""}, indent=2), "    ")
            before, _, after = text.partition('"party": ""')
            around[key] = before, after
        before, after = around[key]
        yield f'{before}"party": {json.dumps(release.party)}{after}'


def joint_digest(digests: Iterable[str]) -> str:
    """Return a digest of several digests in any order; "" of none."""
    ordered = sorted(digests)
    return hashlib.sha256("\n".join(ordered).encode()).hexdigest() if ordered else ""
