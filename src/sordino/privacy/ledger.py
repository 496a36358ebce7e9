"""The record of every noisy release of a run. It, not the configuration, says what was spent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Release:
    """Noisy releases of one kind.

    Attributes:
        mechanism: "gaussian", ...
        noise_multiplier: standard deviation of the noise over the sensitivity.
        sampling_rate: probability with which a unit takes part in one release.
        steps: how many releases.
        unit: "example" or "client": what neighbouring data sets differ in.
        noise_by: "client", "server", ...: who adds the noise, hence who must be trusted.
    """

    mechanism: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    unit: str
    noise_by: str


@dataclass(frozen=True)
class Ledger:
    """What a run released with noise, and in words what it disclosed without.

    Attributes:
        releases: in the order in which they happened.
        disclosures: what was sent or published with no noise on it, each a phrase.
    """

    releases: tuple[Release, ...] = ()
    disclosures: Sequence[str] = ()

    @property
    def private(self) -> bool:
        """Whether nothing that was learned from images left a client but with noise on it."""
        return not self.disclosures

    def statement(self) -> str:
        """What is protected and what is not, in words."""
        if self.private and self.releases:
            return "Everything that left a client was released with noise; see the ledger."
        if self.private:
            return "Private: nothing that was learned from images was sent or published."
        return f"Not private: {'; '.join(self.disclosures)}. No noise was added and no epsilon holds."

    def to_json(self) -> str:
        """The content of `ledger.json`; equal ledgers give equal text."""
        content = {
            "private": self.private,
            "statement": self.statement(),
            "releases": [asdict(release) for release in self.releases],
            "disclosures": list(self.disclosures),
        }
        return json.dumps(content, indent=2) + "\n"

    def digest(self) -> str:
        """SHA-256 of the ledger's text, in hex; saved prompts carry it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
