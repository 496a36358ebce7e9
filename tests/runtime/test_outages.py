"""Sites that are not connected cost time, and no round: nothing was sent, so nothing is counted and nothing charged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.test_fleet import THIRDS, Saved, same, server_of, sites_of
from sordino.algorithms.base import named_tensors
from sordino.runtime import turns
from sordino.runtime.facts import participants
from sordino.runtime.fleet import Answer, Ask, LocalFleet, Lost, Patience
from sordino.runtime.local import LocalRuntime
from sordino.runtime.server import ServerTraining
from sordino.runtime.waiting import MOST_MISSED, POLL, Stalled, drive

PATIENT = Patience(0.6, deadline=100.0)


class Outage(LocalFleet):
    """A fleet some sites of which are not connected for a time, by a clock that goes on while somebody sleeps.

    Args:
        sites: all of them.
        gone: those of the outage.
        before: the round that it comes before.
        seconds: how long it is.
        deaf: questions of that round on that reach nobody, though all sites are connected.
    """

    def __init__(
        self, sites: Mapping[str, turns.Turns], gone: Any = (), before: int = 0, seconds: float = 0.0, deaf: int = 0
    ) -> None:
        super().__init__({name: site.turn for name, site in sites.items()})
        self.gone, self.before, self.seconds, self.deaf = frozenset(gone), before, seconds, deaf
        self.now, self.began = 0.0, None if before > 1 else 0.0
        self.saved = Saved()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def sites(self) -> frozenset[str]:
        if self.began is None and self.saved.states and self.saved.states[-1].round == self.before - 1:
            self.began = self.now
        away = self.began is not None and self.now < self.began + self.seconds
        return super().sites() - (self.gone if away else frozenset())

    def may_return(self) -> bool:
        return True

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        if self.deaf and ask.round >= self.before:
            self.deaf -= 1
            yield from (Lost(site, "it went away just now", asked=False) for site in ask.payloads)
            return
        there = self.sites()
        for site in ask.payloads.keys() - there:
            yield Lost(site, "it is not connected", asked=False)
        yield from super().ask(replace(ask, payloads={s: p for s, p in ask.payloads.items() if s in there}))


def driven(
    runtime: LocalRuntime,
    fleet: Outage,
    saved: Saved,
    patience: Patience = PATIENT,
    training: ServerTraining | None = None,
) -> ServerTraining:
    fleet.saved = saved
    return drive(server_of(runtime, THIRDS, saved, patience, training), fleet, clock=fleet.clock, sleep=fleet.sleep)


def undisturbed(runtime: LocalRuntime, folder: Path, patience: Patience = PATIENT) -> ServerTraining:
    return driven(runtime, Outage(sites_of(runtime, THIRDS, folder)), Saved(), patience)


def as_if_nothing_was(training: ServerTraining, expected: ServerTraining) -> bool:
    states = named_tensors(training.state), named_tensors(expected.state)
    return same(*states) and training.ledger.releases == expected.ledger.releases and training.round == expected.round


KINDS = [
    "dp-fpl, dp-sgd",
    "dp-fpl, adaptive clip, a secure sum",
    "dp-fpl, adaptive clip, noise by the server",
    "promptfl, statistics, noise by client",
    "secfpp",
    "pfedpg",
]


@pytest.mark.parametrize("gone", [("east", "north", "west"), ("east", "west")])
@pytest.mark.parametrize("name", KINDS)
def test_an_outage_shorter_than_the_deadline_changes_nothing(
    name: str, gone: tuple[str, ...], spec_of: Any, tmp_path: Path
) -> None:
    """To the bit, of all sites or of so many that those left are no quorum; also of sampled clients, and of sums."""
    runtime, saved = spec_of(name).build(), Saved()
    fleet = Outage(sites_of(runtime, THIRDS, tmp_path / "a"), gone, before=3, seconds=60.0)
    training = driven(runtime, fleet, saved)
    assert as_if_nothing_was(training, undisturbed(runtime, tmp_path / "b"))
    assert not any(record.void for record in saved.records)
    assert not any(saved.lost)
    assert 60.0 <= fleet.now <= 60.0 + POLL, "no longer than they were away"


def test_a_round_waits_for_no_more_than_a_quorum(spec_of: Any, tmp_path: Path) -> None:
    runtime, saved = spec_of("dp-fpl, dp-sgd").build(), Saved()
    fleet = Outage(sites_of(runtime, THIRDS, tmp_path), ["west"], before=3, seconds=60.0)
    assert driven(runtime, fleet, saved).round == runtime.rounds
    assert fleet.now == 0.0
    assert [set(lost) for lost in saved.lost] == [set(), set(), {"west"}, {"west"}]


@pytest.mark.parametrize("name", ["dp-fpl, dp-sgd", "dp-fpl, adaptive clip, noise by the server"])
@pytest.mark.parametrize("deadlines", [2.5, 3.5])
def test_an_outage_of_several_deadlines_stops_an_experiment_that_goes_on_later(
    deadlines: float, name: str, spec_of: Any, tmp_path: Path
) -> None:
    runtime, saved = spec_of(name).build(), Saved()
    expected = undisturbed(runtime, tmp_path / "b")
    fleet = Outage(sites_of(runtime, THIRDS, tmp_path / "a"), THIRDS, 3, deadlines * PATIENT.deadline)
    if deadlines > MOST_MISSED:
        with pytest.raises(Stalled, match="round 3 was not asked: .* without east and north and west"):
            driven(runtime, fleet, saved)
        assert fleet.now == pytest.approx(MOST_MISSED * PATIENT.deadline)
        assert (len(saved.states), saved.states[-1].round) == (2, 2)
        assert as_if_nothing_was(driven(runtime, fleet, saved, training=saved.states[-1]), expected)
    else:
        assert as_if_nothing_was(driven(runtime, fleet, saved), expected)
    assert not any(record.void for record in saved.records)


@pytest.mark.parametrize("name", ["dp-fpl, dp-sgd", "dp-fpl, adaptive clip, a secure sum", "secfpp"])
@pytest.mark.parametrize("before", [1, 3])
def test_a_question_that_reached_nobody_leaves_ledger_and_round(
    before: int, name: str, spec_of: Any, tmp_path: Path
) -> None:
    """Though all sites seemed to be there."""
    runtime, saved = spec_of(name).build(), Saved()
    expected = undisturbed(runtime, tmp_path / "b")
    fleet = Outage(sites_of(runtime, THIRDS, tmp_path / "a"), before=before, deaf=MOST_MISSED - 1)
    assert as_if_nothing_was(driven(runtime, fleet, saved), expected)
    assert [record.void for record in saved.records] == [""] * runtime.rounds
    sites, saved = sites_of(runtime, THIRDS, tmp_path / "c"), Saved()
    with pytest.raises(Stalled, match=f"the question of round {before} reached nobody .east: it went away just now"):
        driven(runtime, Outage(sites, before=before, deaf=MOST_MISSED), saved)
    assert [state.round for state in saved.states] == list(range(1, before))
    last = saved.states[-1] if saved.states else None
    assert as_if_nothing_was(driven(runtime, Outage(sites), saved, training=last), expected)


def test_a_sample_that_was_drawn_is_not_drawn_again(spec_of: Any, tmp_path: Path) -> None:
    """Who is in it decided whether its question reached somebody. So the round counts, and is charged."""
    spec = spec_of("dp-fpl, adaptive clip, noise by the server")
    runtime, saved = replace(spec, rounds=8).build(), Saved()
    fleet = Outage(sites_of(runtime, THIRDS, tmp_path), before=3, deaf=1)
    training = driven(runtime, fleet, saved)
    (release,) = training.ledger.releases
    assert (training.round, release.steps) == (8, 8)
    assert sum(bool(record.void) for record in saved.records) == 1


def test_a_site_that_stays_away_does_not_stop_the_rounds_of_others(spec_of: Any, tmp_path: Path) -> None:
    """Rounds differ in who takes part. Of one that reached none of its sites nothing is charged."""
    spec = spec_of("dp-fpl, dp-sgd")
    runtime = replace(spec, rounds=12, runtime={"participation": 0.2}).build()  # one client of six a round
    chosen = {number: participants(runtime.federation.seed, number, 6, 0.2).tolist() for number in range(1, 13)}
    away = [number for number, (client,) in chosen.items() if client in THIRDS["west"]]
    assert away
    saved, sites = Saved(), sites_of(runtime, THIRDS, tmp_path)
    fleet = Outage(sites, ["west"], before=1, seconds=1e9)
    training = runtime.start().at_server
    while training.round < 12:
        try:
            training = driven(runtime, fleet, saved, PATIENT, training)
        except Stalled:
            training = saved.states[-1]
    assert [number for number, record in enumerate(saved.records, 1) if record.void] == away
    charged = {number for number, (client,) in chosen.items() if client not in THIRDS["west"]}
    assert sum(release.steps for release in training.ledger.releases) <= 2 * (len(charged) + (away[0] == 1))
    assert fleet.now == pytest.approx(len(away) * PATIENT.deadline)


def test_without_the_question_nothing_was_released(spec_of: Any, tmp_path: Path) -> None:
    """A release needs all. If it is asked of some, the others' answers are spent, and the experiment fails."""
    runtime, saved = spec_of("promptfl, statistics, noise by client").build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path / "a")
    fleet = Outage(sites, ["west"], before=0, seconds=60.0)
    assert as_if_nothing_was(driven(runtime, fleet, saved), undisturbed(runtime, tmp_path / "b"))
    assert 60.0 <= fleet.now <= 60.0 + POLL
    fresh, saved = sites_of(runtime, THIRDS, tmp_path / "c"), Saved()
    with pytest.raises(Stalled, match="the release before the first round was not asked: .* without west"):
        driven(runtime, Outage(fresh, ["west"], 0, 1e9), saved)
    assert not saved.states
    assert all(site.round == 0 and not site.training.release for site in fresh.values())


def test_a_round_that_went_well_ends_a_row_of_void_ones(spec_of: Any, tmp_path: Path) -> None:
    spec = spec_of("dp-fpl, dp-sgd")
    runtime, saved = replace(spec, rounds=8).build(), Saved()
    sites = sites_of(runtime, THIRDS, tmp_path)

    class Flaky(Outage):
        def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
            for site, payload in ask.payloads.items():
                if ask.round % MOST_MISSED == 0 or site == "east":
                    yield Answer(site, sites[site].turn(payload))
                else:
                    yield Lost(site, "it fell")

    assert driven(runtime, Flaky(sites), saved).round == 8
    assert [number for number, record in enumerate(saved.records, 1) if not record.void] == [3, 6]
