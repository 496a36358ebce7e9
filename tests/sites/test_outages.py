"""A coordinator whose sites go away for a time, over each engine's fleet: no round is lost or charged for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sites.owners import NAMES, NOISE, experiment, sites_at
from sordino.cli.site_words import round_as_text
from sordino.cli.watching import print_outcome
from sordino.experiments.config import Experiment
from sordino.runtime import messages, waiting
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Answer, Ask, Fleet, LocalFleet, Lost, Patience
from sordino.runtime.waiting import MOST_MISSED, Stalled
from sordino.sites.coordinator import METRICS, OUTCOME, Outcome, coordinate
from sordino.sites.page import PAGE
from sordino.sites.proposal import Proposal
from sordino.sites.site import Site

LOOKS = 5  # at which nobody is connected


class Away:
    """Sites that are not connected at some looks, once a round was asked.

    Attributes:
        looks: how many.
        after: the round.
        gone: who is away.
    """

    def __init__(self, sites: Mapping[str, Site], looks: int = LOOKS, after: int = 2) -> None:
        self.turns: dict[str, Callable[[bytes], bytes]] = {name: site.turn for name, site in sites.items()}
        self.looks, self.after, self.gone = looks, after, frozenset(NAMES)
        self.rounds: list[int] = []

    def connected(self) -> frozenset[str]:
        if self.looks and self.rounds and self.rounds[-1] == self.after:
            self.looks -= 1
            return frozenset(self.turns) - self.gone
        return frozenset(self.turns)

    def answered(self, site: str, question: bytes) -> bytes:
        request = Envelope.decode(question)
        if request.kind == "round":
            self.rounds += [messages.round_header(content).round for content in request.contents.values()]
        return self.turns[site](question)


def local(away: Away) -> Fleet:
    class Local(LocalFleet):
        def sites(self) -> frozenset[str]:
            return away.connected()

        def may_return(self) -> bool:
            return True

    return Local({name: lambda question, name=name: away.answered(name, question) for name in NAMES})


def flare(away: Away) -> Fleet:
    from sordino.flare.fleet import FlareFleet, Told

    class Tasks:
        def sites(self) -> frozenset[str]:
            return away.connected()

        def start(self, site: str, content: bytes, told: Told) -> Callable[[], None]:
            told(away.answered(site, content))
            return lambda: None

        def aborted(self) -> bool:
            return False

        def paused(self) -> bool:
            return False

    return FlareFleet(Tasks())


def flower(away: Away) -> Fleet:
    from flower.test_fleet import Grid
    from sordino.flower.fleet import FlowerFleet
    from sordino.flower.messages import answer, read_question

    class Sites(Grid):
        def get_nodes(self) -> Any:
            self.there = dict.fromkeys(sorted(away.connected()), "morning")
            return super().get_nodes()

        def pull_messages(self, message_ids: Any) -> list[Any]:
            (number,) = message_ids
            with self._lock:
                site, message = self.sent[int(number.removeprefix("message "))]
                question = read_question(message)
                return [answer(message, question.token, away.answered(site, question.content))]

    return FlowerFleet(Sites({}), {site.encode(): site for site in NAMES})


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks follow each other, and the deadline is far away: a test counts looks."""
    monkeypatch.setattr(waiting, "POLL", 0.0)


@pytest.fixture
def as_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    from sordino.flower import fleet as module

    monkeypatch.setattr(module, "POLL", 0.01)
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower gives these to the process of a run
        monkeypatch.setattr(TaskIdentity, name, 1)


def run_over(config: Experiment, fleet: Fleet, out: Path, watch: Any = lambda line: None) -> Outcome:
    return coordinate(config, Proposal.of(config), fleet, out, Patience(0.6), watch)


def rounds_at(sites: Mapping[str, Site], config: Experiment) -> dict[str, tuple[int, ...]]:
    fingerprint = Proposal.of(config).fingerprint
    return {name: site.ledger.experiments[fingerprint].rounds for name, site in sites.items()}


@pytest.mark.parametrize("engine", [local, flare, flower])
@pytest.mark.usefixtures("as_flower")
def test_sites_that_are_not_connected_for_some_looks_cost_no_round(
    engine: Callable[[Away], Fleet], site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config, sites, told = experiment(clip_folder, privacy=NOISE, rounds=5), sites_at(site_files), list[dict[str, Any]]()
    away = Away(sites)
    outcome = run_over(config, engine(away), tmp_path / "out", told.append)
    assert away.looks == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [(line["round"], line["participants"]) for line in lines] == [(number, 3) for number in range(1, 6)]
    assert not any("lost" in line or "void" in line for line in lines)
    assert rounds_at(sites, config) == dict.fromkeys(NAMES, (1, 2, 3, 4, 5))
    each = {release.party: release.steps for release in outcome.training.ledger.releases}
    assert each == {f"client {client}": 5 for client in range(3)}
    (waits,) = (line for line in told if line.get("waits"))
    assert round_as_text(waits).startswith("round 3 waits: east: it is not connected; north: ")
    assert set(waits["lost"]) == set(NAMES), "a command that takes sites into another job looks for these"
    assert json.loads((tmp_path / "out" / OUTCOME).read_text())["void_rounds"] == 0


def failing(sites: Mapping[str, Site], rounds: int) -> LocalFleet:
    """Sites that are asked, and do not answer the first rounds in time."""

    class Silent(LocalFleet):
        def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
            kinds = {Envelope.decode(payload).kind for payload in ask.payloads.values()}
            if kinds == {"round"} and ask.round <= rounds:
                return iter([Lost(site, "no answer after 600 s") for site in ask.payloads])
            return super().ask(ask)

    return Silent({name: site.turn for name, site in sites.items()})


def test_void_rounds_stop_an_experiment_that_goes_on_and_says_how_many_they_were(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out, sites = experiment(clip_folder, privacy=NOISE, rounds=5), tmp_path / "out", sites_at(site_files)
    with pytest.raises(Stalled, match="3 rounds in a row .* repeat the command"):
        run_over(config, failing(sites, 9), out)
    assert not (out / OUTCOME).exists()
    page = (out / PAGE).read_text()
    assert "Round 3 of 5, stopped" in page
    assert "3 rounds of 3 were void." in page
    again = sites_at(site_files)
    outcome = run_over(config, failing(again, 3), out)
    assert outcome.training.round == 5
    assert rounds_at(again, config) == dict.fromkeys(NAMES, (4, 5))
    each = {release.party: release.steps for release in outcome.training.ledger.releases}
    assert each == {f"client {client}": 5 for client in range(3)}, "what may have left stays counted"
    assert json.loads((out / OUTCOME).read_text())["void_rounds"] == MOST_MISSED
    assert "3 rounds of 5 were void." in (out / PAGE).read_text()
    print_outcome(out, as_json=False)
    assert capsys.readouterr().out.startswith("5 rounds, 3 of them void, at east, north, west")


@pytest.mark.parametrize("rounds", [1, 3])
def test_an_experiment_of_void_rounds_only_is_no_success(
    rounds: int, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config = experiment(clip_folder, privacy=NOISE, rounds=rounds)
    for _ in range(2):
        with pytest.raises(Stalled, match=f"all {rounds} rounds were void"):
            run_over(config, failing(sites_at(site_files), 9), tmp_path / "out")
        assert not (tmp_path / "out" / OUTCOME).exists()
