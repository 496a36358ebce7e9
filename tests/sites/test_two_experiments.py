"""Two experiments at once: each has a process of its own at each site, over the site's one state folder."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sites.owners import NAMES, NOISE, experiment, sites_at, write_site
from sordino.experiments.config import Experiment
from sordino.experiments.run_lock import held
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Answer, Ask, LocalFleet, Lost, Patience
from sordino.sites import answers
from sordino.sites.answers import BusyAskedAgain
from sordino.sites.coordinator import Outcome, coordinate
from sordino.sites.ledger import epsilon_of
from sordino.sites.proposal import Proposal
from sordino.sites.settings import load_site
from sordino.sites.site import BUSY, Site

SHARES = {
    **{"mechanism": "dp-fedavg", "unit": "client", "noise_by": "shares", "noise_multiplier": 1.0},
    **{"colluders": 1, "delta": 1e-5, "clip": 0.1},
}
STATISTICS = {"mechanism": "statistics", "noise_multiplier": 1.0, "noise_by": "shares", "colluders": 1}
KINDS = {"examples": NOISE, "sums": SHARES, "statistics": STATISTICS}


class Order:
    """Lets one message of two experiments through at a time, in an order that a seed draws."""

    def __init__(self, seed: int) -> None:
        self._draw, self._changed = random.Random(seed), threading.Condition()
        self._there = ["one", "other"]
        self._next = self._draw.choice(self._there)

    @contextmanager
    def message(self, name: str) -> Iterator[None]:
        with self._changed:
            assert self._changed.wait_for(lambda: self._next == name, 120)
            try:
                yield
            finally:
                self._go_on()

    def over(self, name: str) -> None:
        with self._changed:
            self._there.remove(name)
            self._go_on()

    def _go_on(self) -> None:
        self._next = self._draw.choice(self._there) if self._there else ""
        self._changed.notify_all()


class Ordered(LocalFleet):
    """The sites of one experiment, asked as an order says."""

    def __init__(self, sites: dict[str, Site], name: str, order: Order) -> None:
        super().__init__({site: self._in_order(each.turn, name, order) for site, each in sites.items()})

    @staticmethod
    def _in_order(turn: Callable[[bytes], bytes], name: str, order: Order) -> Callable[[bytes], bytes]:
        def asked(request: bytes) -> bytes:
            with order.message(name):
                return turn(request)

        return asked


class Parallel:
    """Asks all sites at once, as engines do."""

    def __init__(self, sites: dict[str, Site]) -> None:
        self._sites = sites

    def sites(self) -> frozenset[str]:
        return frozenset(self._sites)

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        with ThreadPoolExecutor() as threads:
            turns = [(site, threads.submit(self._sites[site].turn, asked)) for site, asked in ask.payloads.items()]
            yield from (Answer(site, turn.result()) for site, turn in turns)


def of_kind(clip: Path, kind: str, seed: int, **tables: Any) -> Experiment:
    runtime = {"weighting": "uniform"} if kind != "examples" else {}
    return experiment(clip, privacy=KINDS[kind], seed=seed, runtime=runtime, **tables)


def both(one: Callable[[], Outcome], other: Callable[[], Outcome]) -> list[Outcome]:
    with ThreadPoolExecutor(2) as threads:
        return [future.result() for future in [threads.submit(one), threads.submit(other)]]


def ran(config: Experiment, over: Any, out: Path, lines: list[dict[str, Any]]) -> Outcome:
    return coordinate(config, Proposal.of(config), over, out, Patience(), lines.append)


def check_both(configs: list[Experiment], outcomes: list[Outcome], lines: list[dict[str, Any]], files: Any) -> None:
    """No round is void or lost somebody, and each site's ledger composes both experiments."""
    assert [line for line in lines if line.get("void") or line.get("lost") or line.get("lost_clients")] == []
    assert [outcome.met.left_out for outcome in outcomes] == [{}, {}]
    for site in sites_at(files).values():
        entries = site.ledger.experiments
        assert entries.keys() == {Proposal.of(config).fingerprint for config in configs}
        assert all(set(entry.rounds) >= {1, 2, 3} for entry in entries.values())
        assert all(release.steps in (1, 3) for entry in entries.values() for release in entry.ledger.releases)
        alone = [site.ledger.spent_in(name, "example", 1e-3) for name in entries]
        together = site.ledger.spent("example", 1e-3)
        assert together == epsilon_of([entry.ledger for entry in entries.values()], "example", 1e-3)
        assert together > max(alone)


@pytest.mark.parametrize(
    ("kinds", "seed"),
    [
        (("sums", "sums"), 0),
        (("sums", "sums"), 1),
        (("sums", "examples"), 2),
        (("examples", "examples"), 3),
        (("statistics", "sums"), 4),
        (("statistics", "examples"), 5),
    ],
)
def test_two_experiments_at_once_end_as_if_each_were_alone(
    kinds: tuple[str, str], seed: int, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """In whatever order their messages come: a secure sum survives what another process of its site answers."""
    order, configs = Order(seed), [of_kind(clip_folder, kind, number) for number, kind in enumerate(kinds)]
    lines: list[dict[str, Any]] = []

    def one(number: int, name: str) -> Outcome:
        try:
            over = Ordered(sites_at(site_files), name, order)
            return ran(configs[number], over, tmp_path / name, lines)
        finally:
            order.over(name)

    outcomes = both(lambda: one(0, "one"), lambda: one(1, "other"))
    check_both(configs, outcomes, lines, site_files)


@pytest.mark.parametrize("kind", ["sums", "examples"])
def test_who_comes_while_a_site_answers_waits(
    kind: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Nobody orders the messages of the two here: they meet at the sites."""
    configs = [of_kind(clip_folder, kind, number) for number in range(2)]
    lines: list[dict[str, Any]] = []
    outcomes = both(
        lambda: ran(configs[0], Parallel(sites_at(site_files)), tmp_path / "one", lines),
        lambda: ran(configs[1], Parallel(sites_at(site_files)), tmp_path / "other", lines),
    )
    check_both(configs, outcomes, lines, site_files)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_budget_that_pays_for_less_than_two_experiments_is_kept(
    seed: int, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Each plan is affordable as its site says hello. What the other released is read before each charge."""
    config = experiment(clip_folder, privacy=NOISE | {"delta": 1e-3})
    alone = sites_at(site_files)["east"]
    coordinate(config, Proposal.of(config), Parallel({"east": alone}), tmp_path / "alone", Patience())
    epsilon = 1.1 * alone.ledger.spent("example", 1e-3)
    (tmp_path / "east" / "state").rename(tmp_path / "before")
    write_site(tmp_path / "east", "east", clip_folder, {"epsilon": epsilon, "delta": 1e-3})
    order, lines = Order(seed), list[dict[str, Any]]()

    def one(number: int, name: str) -> None:
        config = experiment(clip_folder, privacy=NOISE | {"delta": 1e-3}, seed=number)
        try:
            ran(config, Ordered(sites_at({"east": site_files["east"]}), name, order), tmp_path / name, lines)
        finally:
            order.over(name)

    with ThreadPoolExecutor(2) as threads:
        both_end = [threads.submit(one, 1, "one"), threads.submit(one, 2, "other")]
        errors = [ended.exception() for ended in both_end]
    assert "policy.epsilon" in str([errors, lines]), "it was gone before the end of both"
    spent = Site(load_site(site_files["east"])).ledger.spent("example", 1e-3)
    assert 0 < spent <= epsilon


def test_a_busy_site_tells_that_it_is_and_nothing_else(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config = experiment(clip_folder)
    proposal = Proposal.of(config)
    site = Site(load_site(site_files["east"]), wait=0.1)
    request = Envelope("hello", proposal.fingerprint, proposal.facts).encode()
    with held(tmp_path / "east" / "state"), ThreadPoolExecutor() as threads:
        answer = Envelope.decode(threads.submit(site.turn, request).result())
    assert (answer.kind, answer.facts) == ("busy", {"reason": BUSY})
    assert Envelope.decode(site.turn(request)).kind == "hello"


def test_a_refusal_names_no_place_at_the_site(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment(clip_folder, privacy=NOISE)
    sites = sites_at(site_files)
    outcome = coordinate(config, Proposal.of(config), Parallel(sites), tmp_path / "out", Patience())
    fingerprint = Proposal.of(config).fingerprint
    (sites["east"].folder(fingerprint) / "turn.safetensors").write_bytes(b"damaged")
    again = Envelope("agreement", fingerprint, outcome.met.agreement.facts).encode()
    reason = str(Envelope.decode(Site(load_site(site_files["east"])).turn(again)).facts["reason"])
    assert "turn.safetensors is damaged" in reason
    assert str(tmp_path) not in reason
    assert str(os.getpid()) not in reason


class Busy(LocalFleet):
    """A fleet in which one site is busy some times, before it answers a kind of question."""

    def __init__(self, sites: dict[str, Site], kind: str, times: int) -> None:
        super().__init__({name: site.turn for name, site in sites.items()})
        turn, self.left = sites["west"].turn, times

        def west(request: bytes) -> bytes:
            if Envelope.decode(request).kind != kind or self.left == 0:
                return turn(request)
            self.left -= 1
            return Envelope("busy", "", {"reason": BUSY}).encode()

        self._sites["west"] = west


@pytest.mark.parametrize("kind", ["hello", "agreement", "round", "evaluate", "end"])
def test_a_busy_site_is_asked_again_and_is_lost_nowhere(
    kind: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "AGAIN", 0.01)
    write_site(tmp_path / "west", "west", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    config, lines = experiment(clip_folder, privacy=NOISE, runtime={"evaluate_every": 1}), list[dict[str, Any]]()
    busy = Busy(sites_at(site_files), kind, 3)
    outcome = ran(config, busy, tmp_path / "out", lines)
    assert busy.left == 0
    assert outcome.met.left_out == {}
    assert [(line["participants"], line.get("void")) for line in lines] == [(3, None)] * 3
    assert set(outcome.accuracy) == {"client 2"}


@pytest.mark.parametrize(("quorum", "seconds"), [(3, 59.0), (2, 9.0)])
def test_a_site_that_stays_busy_is_waited_for_like_one_that_is_silent(quorum: int, seconds: float) -> None:
    """Until the deadline; and no longer than the grace once enough others answered."""
    clock = [0.0]

    def rest(seconds: float) -> None:
        clock[0] += seconds

    answer = Envelope("round", "ab").encode()
    busy = Envelope("busy", "", {"reason": BUSY}).encode()
    sites = LocalFleet({"east": lambda _: answer, "north": lambda _: answer, "west": lambda _: busy})
    ask = Ask(1, dict.fromkeys(NAMES, b""), quorum, deadline=60.0, grace=10.0)
    events = list(BusyAskedAgain(sites, lambda: clock[0], rest).ask(ask))
    assert events[2:] == [Lost("west", "it is busy with another experiment")]
    assert [event for event in events[:2] if isinstance(event, Answer)] == events[:2]
    assert clock[0] == seconds
