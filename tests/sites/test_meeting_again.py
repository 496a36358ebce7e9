"""A meeting that broke off, and the next one with fewer sites: what was agreed binds from the first answered round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sites.owners import NAMES, NOISE, experiment, fleet, sites_at, write_site
from sordino.errors import RunError
from sordino.runtime.agreement import Agreement
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Answer, Ask, LocalFleet, Lost, Patience
from sordino.sites.coordinator import coordinate
from sordino.sites.proposal import Proposal
from sordino.sites.settings import load_site
from sordino.sites.site import Site

SHARES = {
    **{"mechanism": "dp-fedavg", "unit": "client", "noise_by": "shares", "noise_multiplier": 1.0},
    **{"colluders": 1, "delta": 1e-5, "clip": 0.1},
}
SAMPLED = {"mechanism": "dp-fedavg", "noise_by": "server", "noise_multiplier": 1.0, "delta": 0.01}
STATISTICS = {"mechanism": "statistics", "noise_multiplier": 1.0}
UNIFORM = {"weighting": "uniform"}
STEPS = [(kind, place) for kind in ("hello", "agreement") for place in range(len(NAMES) + 1)]


class Killed(BaseException):
    """The coordinator's process is gone."""


class Stops(LocalFleet):
    """A fleet whose coordinator is killed as it has heard some answers to a kind of question."""

    def __init__(self, sites: dict[str, Site], kind: str, heard: int) -> None:
        super().__init__({name: site.turn for name, site in sites.items()})
        self._kind, self._heard = kind, heard

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        kind = Envelope.decode(next(iter(ask.payloads.values()))).kind
        if kind == self._kind and not self._heard:
            raise Killed
        for number, event in enumerate(super().ask(ask), 1):
            if kind == self._kind and number == self._heard:
                raise Killed
            yield event


class Dies(LocalFleet):
    """A fleet in which a site dies at a kind of question: before it, or before its answer arrives."""

    def __init__(self, sites: dict[str, Site], kind: str, reached: bool) -> None:
        super().__init__({name: site.turn for name, site in sites.items()})
        self._kind, self._reached = kind, reached

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        for site, payload in ask.payloads.items():
            if site == "west" and Envelope.decode(payload).kind == self._kind:
                if self._reached:
                    self._sites[site](payload)
                yield Lost(site, "it is not connected")
            else:
                yield Answer(site, self._sites[site](payload))


def runs_without_west(config: Any, files: dict[str, Path], out: Path) -> None:
    two = {name: site for name, site in sites_at(files).items() if name != "west"}
    outcome = coordinate(config, Proposal.of(config), fleet(two), out, Patience())
    assert outcome.training.round == 3
    assert outcome.met.agreement.sites == {"east": [0], "north": [1]}
    parties = {release.party for release in outcome.training.ledger.releases}
    for name, site in sites_at({name: files[name] for name in two}).items():
        entry = site.ledger.experiments[Proposal.of(config).fingerprint]
        assert entry.rounds == (1, 2, 3), name
        assert {release.steps for release in entry.ledger.releases} == {3}
        assert {release.party for release in entry.ledger.releases} < parties


@pytest.mark.parametrize(("kind", "heard"), [*STEPS, ("round", 0)])
def test_a_coordinator_that_is_killed_in_the_meeting_meets_fewer_sites_then(
    kind: str, heard: int, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config, out = experiment(clip_folder, privacy=NOISE), tmp_path / "out"
    with pytest.raises(Killed):
        coordinate(config, Proposal.of(config), Stops(sites_at(site_files), kind, heard), out, Patience())
    runs_without_west(config, site_files, out)


@pytest.mark.parametrize("reached", [False, True])
@pytest.mark.parametrize("kind", ["hello", "agreement"])
def test_a_site_that_dies_in_the_meeting_blocks_no_other_one(
    kind: str, reached: bool, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config, out = experiment(clip_folder, privacy=NOISE), tmp_path / "out"
    with pytest.raises(RunError, match="2 of 3 sites take part, and 3 are needed"):
        coordinate(config, Proposal.of(config), Dies(sites_at(site_files), kind, reached), out, Patience())
    runs_without_west(config, site_files, out)


def agreed(site: Site, proposal: Proposal, sites: dict[str, list[int]], sizes: list[int]) -> Envelope:
    agreement = Agreement(sites, sizes, False)
    return Envelope.decode(site.turn(Envelope("agreement", proposal.fingerprint, agreement.facts).encode()))


def test_each_agreement_is_checked_by_itself(site_files: dict[str, Path], tmp_path: Path, clip_folder: Path) -> None:
    """A server may try several. One that the site would not have taken as the first is none as the second."""
    proposal = Proposal.of(experiment(clip_folder, privacy=SHARES, runtime=UNIFORM))
    site = Site(load_site(site_files["east"]))
    site.turn(Envelope("hello", proposal.fingerprint, proposal.facts).encode())
    first = {"east": [0], "north": [1], "west": [2]}
    assert agreed(site, proposal, first, [1] * 3).kind == "agreement"
    file = site.folder(proposal.fingerprint) / "agreement.json"
    before = file.read_bytes()
    pooled = agreed(site, proposal, {"east": [0], "north": [1, 2]}, [1] * 3)
    assert "site north holds 2 clients" in pooled.facts["reason"]
    assert "the agreement leaves out this site" in agreed(site, proposal, {"north": [0]}, [1]).facts["reason"]
    assert file.read_bytes() == before
    more = agreed(site, proposal, {**first, "south": [3]}, [1] * 4)
    assert more.kind == "agreement"
    alone = Site(load_site(site_files["north"]))
    alone.turn(Envelope("hello", proposal.fingerprint, proposal.facts).encode())
    fresh = agreed(alone, proposal, {**first, "south": [3]}, [1] * 4)
    assert more.facts == fresh.facts, "the noise is that of the new agreement, not of the one before"


@pytest.mark.parametrize(
    ("privacy", "runtime"),
    [(NOISE, {}), (SHARES, UNIFORM), (STATISTICS, {}), (SAMPLED, {**UNIFORM, "participation": 0.5})],
    ids=["examples", "sums", "statistics", "sampled"],
)
def test_what_was_agreed_binds_once_anything_is_entered(
    privacy: dict[str, Any],
    runtime: dict[str, Any],
    site_files: dict[str, Path],
    tmp_path: Path,
    clip_folder: Path,
) -> None:
    """A round of noise, of shares, a release of statistics; and where clients are sampled, to join."""
    for name in NAMES:
        write_site(tmp_path / name, name, clip_folder, {"noise_by": ["client", "server", "shares"]})
    config = experiment(clip_folder, privacy=privacy, runtime=runtime)
    proposal, kind = Proposal.of(config), "agreement" if privacy is SAMPLED else "round"
    sites = sites_at(site_files)
    with pytest.raises(Killed):
        coordinate(config, proposal, Stops(sites, kind, 1), tmp_path / "out", Patience())
    site = Site(load_site(site_files["east"]))
    before = (site.state / "ledger" / f"{proposal.fingerprint}.json").read_bytes()
    sizes = [9, 12] if not runtime else [1, 1]
    answer = agreed(site, proposal, {"east": [0], "north": [1]}, sizes)
    assert "another agreement was made before" in answer.facts["reason"]
    assert "the same sites take part, or propose the experiment with another seed" in answer.facts["reason"]
    assert (site.state / "ledger" / f"{proposal.fingerprint}.json").read_bytes() == before
