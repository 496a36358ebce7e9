"""Sites that did not answer in the meeting: out of rounds until they agree, and not out for the whole experiment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from sites.owners import NAMES, NOISE, experiment, fleet, sites_at, write_site
from sordino.errors import RunError
from sordino.experiments.config import Experiment
from sordino.privacy.ledger import Ledger
from sordino.runtime.envelope import Envelope
from sordino.runtime.facts import participants
from sordino.runtime.fleet import Answer, Ask, LocalFleet, Lost, Patience
from sordino.runtime.waiting import Stalled
from sordino.sites import latecomers
from sordino.sites.coordinator import LEDGER, METRICS, Outcome, coordinate
from sordino.sites.latecomers import LEAST, SHARE, Latecomers
from sordino.sites.meeting import Meeting, Met
from sordino.sites.page import epsilon_by_site
from sordino.sites.proposal import Proposal
from sordino.sites.site import Site

TWO_OF_THREE = Patience(0.6)
SILENT = "no answer 2 s after 2 of 3 had answered"
BEFORE_ROUNDS = ("hello", "agreement")


@pytest.fixture(autouse=True)
def always_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here an answer takes no time, and rounds hardly any: a share of it would depend on the machine."""
    monkeypatch.setattr(latecomers, "SHARE", 1.0)


def asked_for(ask: Ask) -> dict[str, Envelope]:
    return {site: Envelope.decode(payload) for site, payload in ask.payloads.items()}


class Quiet(LocalFleet):
    """A fleet in which a site is not heard the first times that it is asked for something.

    Args:
        sites: all of them.
        site: the silent one.
        times: how often it is silent, by the kind of the question.
        reached: whether the question reaches it, and only its answer is lost.
    """

    def __init__(self, sites: Mapping[str, Site], site: str, times: Mapping[str, int], reached: bool = True) -> None:
        super().__init__({name: each.turn for name, each in sites.items()})
        self._site, self._times, self._reached = site, dict(times), reached
        self.asked: list[tuple[str, set[str]]] = []  # kind of each question, and who was asked

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        kinds = {site: envelope.kind for site, envelope in asked_for(ask).items()}
        (kind,) = set(kinds.values())
        self.asked.append((kind, set(kinds)))
        quiet = self._site in kinds and self._times.get(kind, 0) > 0
        if not quiet:
            yield from super().ask(ask)
            return
        self._times[kind] -= 1
        others = {site: payload for site, payload in ask.payloads.items() if self._reached or site != self._site}
        yield from (event for event in super().ask(replace(ask, payloads=others)) if event.site != self._site)
        yield Lost(self._site, SILENT)


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def stopped(over: LocalFleet, number: int) -> LocalFleet:
    """The same fleet, whose coordinator dies before a round."""
    asking = over.ask

    def dies(ask: Ask) -> Iterator[Answer | Lost]:
        if ask.round == number:
            raise KeyboardInterrupt
        return asking(ask)

    over.ask = dies  # type: ignore[method-assign]
    return over


def begun(config: Experiment, sites: Mapping[str, Site], out: Path, number: int = 3) -> None:
    """Run an experiment until its coordinator dies before a round."""
    with pytest.raises(KeyboardInterrupt):
        coordinate(config, Proposal.of(config), stopped(fleet(sites), number), out, Patience())


def goes_on(config: Experiment, over: LocalFleet, out: Path) -> Outcome:
    return coordinate(config, Proposal.of(config), over, out, TWO_OF_THREE)


@pytest.mark.parametrize("reached", [True, False])
@pytest.mark.parametrize("kind", BEFORE_ROUNDS)
def test_a_site_that_was_not_heard_as_an_experiment_goes_on_is_in_later_rounds(
    kind: str, reached: bool, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """At hello or at the agreement, whether the question reached it or not."""
    config, out = experiment(clip_folder, privacy=NOISE, rounds=6), tmp_path / "out"
    begun(config, sites_at(site_files), out)
    again = sites_at(site_files)
    quiet = Quiet(again, "north", {kind: 3}, reached)
    outcome = goes_on(config, quiet, out)
    lines = lines_of(out)
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["participants"] for line in lines] == [3, 3, 2, 2, 3, 3]
    assert [line.get("lost", {}) for line in lines] == [
        {},
        {},
        *[{"north": f"it has not agreed: {SILENT}"}] * 2,
        {},
        {},
    ]
    assert not outcome.met.left_out
    assert dict(outcome.met.rounds) == {"east": 2, "north": 2, "west": 2}
    repeated = [names for asked, names in quiet.asked if asked in BEFORE_ROUNDS][2:]
    assert all(names == {"north"} for names in repeated), "the others are not asked again"
    fingerprint = Proposal.of(config).fingerprint
    taken = {name: site.ledger.experiments[fingerprint] for name, site in again.items()}
    assert taken["east"].rounds == taken["west"].rounds == (1, 2, 3, 4, 5, 6)
    assert taken["north"].rounds == (1, 2, 5, 6), "nothing left it without an agreement"
    known = epsilon_by_site(outcome.training.ledger, outcome.met.agreement, "example")
    delta = outcome.training.ledger.delta or 0
    assert known["east"] == pytest.approx(again["east"].ledger.spent("example", delta))
    assert known["north"] >= again["north"].ledger.spent("example", delta), "the coordinator counts what may have left"
    assert list((again["north"].folder(fingerprint) / "prompts").iterdir()), "the end is told to all"


@pytest.mark.parametrize("kind", BEFORE_ROUNDS)
def test_an_old_copy_whose_answers_came_late_is_refused_and_draws_no_noise(
    kind: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Its kept agreement says nothing of the rounds since, in which its original drew noise."""
    config, out, state = (
        experiment(clip_folder, privacy=NOISE, rounds=8),
        tmp_path / "out",
        tmp_path / "north" / "state",
    )
    sites = sites_at(site_files)

    begun(config, sites, out, number=2)
    shutil.copytree(state, tmp_path / "copy")
    begun(config, sites, out, number=5)
    shutil.move(state, tmp_path / "newest")
    shutil.copytree(tmp_path / "copy", state)
    (ledger,) = (state / "ledger").glob("*.json")
    before = ledger.read_bytes()
    with pytest.raises(KeyboardInterrupt):  # its coordinator dies once more, and it is late again
        goes_on(config, stopped(Quiet(sites_at(site_files), "north", {kind: 2}, reached=False), 7), out)
    outcome = goes_on(config, Quiet(sites_at(site_files), "north", {kind: 2}), out)
    assert "this site answered round 4, and its state ends with round 1" in outcome.met.left_out["north"]
    assert [line["participants"] for line in lines_of(out)] == [3] * 4 + [2] * 4
    assert ledger.read_bytes() == before
    shutil.rmtree(state)
    shutil.move(tmp_path / "newest", state)
    assert sites_at(site_files)["north"].ledger.experiments[Proposal.of(config).fingerprint].rounds == (1, 2, 3, 4)


@pytest.mark.parametrize("back", [True, False])
def test_an_old_copy_that_takes_its_place_between_two_rounds_is_refused(
    back: bool, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Where a site that is started again is asked at once, no hello and no agreement come before a round."""
    write_site(tmp_path / "north", "north", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    config, out, state = (
        experiment(clip_folder, privacy=NOISE, rounds=8),
        tmp_path / "out",
        tmp_path / "north" / "state",
    )
    ledgers: list[bytes] = []

    class Swaps(LocalFleet):
        def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
            ((kind, _),) = {(envelope.kind, ask.round): 0 for envelope in asked_for(ask).values()}
            if kind == "round":
                self._before(ask.round)
            return super().ask(ask)

        def _before(self, number: int) -> None:
            if number == 2:
                shutil.copytree(state, tmp_path / "copy")
            elif number == 5:
                shutil.move(state, tmp_path / "newest")
                shutil.copytree(tmp_path / "copy", state)
            elif number == 7:
                ledgers.extend(path.read_bytes() for name in ("copy", "north/state") for path in ledger_of(name))
                if back:
                    shutil.rmtree(state)
                    shutil.move(tmp_path / "newest", state)
            if number in (5, 6, 7):  # the second process of the copy has what the first one was told
                self._sites["north"] = sites_at(site_files)["north"].turn

    def ledger_of(name: str) -> list[Path]:
        return sorted((tmp_path / name / "ledger").glob("*.json"))

    over = Swaps({name: site.turn for name, site in sites_at(site_files).items()})
    outcome = goes_on(config, over, out)
    lines = lines_of(out)
    assert [line["participants"] for line in lines] == [3] * 4 + [2] * 2 + [3 if back else 2] * 2
    for line in lines[4:6]:
        assert "this site answered round 4, and its state ends with round 1" in line["lost"]["north"]
        assert line["accuracy"]["local"] is None, "its prompts would be old ones"
    assert len(ledgers) == 2
    assert ledgers[0] == ledgers[1], "it drew no noise"
    rounds = sites_at(site_files)["north"].ledger.experiments[Proposal.of(config).fingerprint].rounds
    assert rounds == ((1, 2, 3, 4, 7, 8) if back else (1,))
    assert bool(outcome.accuracy) == back


def test_a_line_whose_state_was_not_written_counts_as_answered_by_a_late_site(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """The coordinator runs that round again. A copy from before it would draw its noise a second time."""
    config, out = experiment(clip_folder, privacy=NOISE, rounds=4), tmp_path / "out"
    begun(config, sites_at(site_files), out)
    shutil.rmtree(out / "checkpoint")  # as if the process had died after it wrote the second round's line
    agreements: list[Any] = []

    class Notes(Quiet):
        def ask(self, ask: Ask) -> Any:
            agreements.extend(e.facts["answered"] for e in asked_for(ask).values() if e.kind == "agreement")
            return super().ask(ask)

    goes_on(config, Notes(sites_at(site_files), "north", {"hello": 1}), out)
    assert agreements == [2, 2, 2]


def test_a_refusal_stays_one(site_files: dict[str, Path], tmp_path: Path, clip_folder: Path) -> None:
    """A site that refuses is not asked for its hello again, and one that refuses when it is late neither."""
    config, out = experiment(clip_folder, rounds=6), tmp_path / "out"
    begun(config, sites_at(site_files), out)
    write_site(tmp_path / "north", "north", clip_folder, {"experiments": ["ab" * 32]})
    for late in (0, 1):
        quiet = Quiet(sites_at(site_files), "north", {"hello": late}, reached=False)
        if late == 0:
            with pytest.raises(KeyboardInterrupt):
                goes_on(config, stopped(quiet, 5), out)
        else:
            assert "is not in policy.experiments" in goes_on(config, quiet, out).met.left_out["north"]
        hellos = [names for kind, names in quiet.asked if kind == "hello"]
        assert hellos == [set(NAMES), {"north"}][: late + 1]
    assert [line["participants"] for line in lines_of(out)] == [3, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("kind", BEFORE_ROUNDS)
def test_in_a_new_experiment_only_who_is_in_the_agreement_is_asked_again(
    kind: str, site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Who takes part decides noise, weights and numbers, so one that never said hello does not join later."""
    config, sites = experiment(clip_folder, privacy=NOISE, rounds=4), sites_at(site_files)
    quiet = Quiet(sites, "north", {kind: 2}, reached=False)
    outcome = goes_on(config, quiet, tmp_path / "out")
    participants = [line["participants"] for line in lines_of(tmp_path / "out")]
    hellos = [names for asked, names in quiet.asked if asked == "hello"]
    if kind == "hello":
        assert set(outcome.met.agreement.sites) == {"east", "west"}
        assert outcome.met.left_out == {"north": SILENT}
        assert participants == [2, 2, 2, 2]
        assert hellos == [set(NAMES)]
        assert Proposal.of(config).fingerprint not in sites["north"].ledger.experiments
    else:
        assert not outcome.met.left_out
        assert participants == [2, 3, 3, 3]
        assert hellos == [set(NAMES), {"north"}, {"north"}]
        assert set(outcome.training.ledger.data) == {"client 0", "client 1", "client 2"}


ONE_STEP = {"context_length": 2, "batch_size": 0, "local_steps": 1, "dp-fpl": {"rank": 1}}
CLUSTERS = ONE_STEP | {"secfpp": {"clusters": 2, "cluster_every": 2}}
BY_SHARES = {"mechanism": "dp-fedavg", "noise_by": "shares", "noise_multiplier": 1.0}
UNIFORM = {"weighting": "uniform"}


@pytest.mark.parametrize(
    ("method", "tables"),
    [
        ("dp-fpl", {"privacy": BY_SHARES, "settings": ONE_STEP, "runtime": UNIFORM}),
        ("secfpp", {"settings": CLUSTERS, "runtime": UNIFORM}),
    ],
)
def test_protocols_of_several_clients_go_on_without_a_late_site_and_then_with_it(
    method: str, tables: dict[str, Any], site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config, out = experiment(clip_folder, method, rounds=5, **tables), tmp_path / "out"
    begun(config, sites_at(site_files), out)
    outcome = goes_on(config, Quiet(sites_at(site_files), "north", {"hello": 2}), out)
    lines = lines_of(out)
    assert "north" in lines[2]["lost"]
    assert [line["participants"] for line in lines[3:]] == [3, 3]
    assert not any("void" in line for line in lines[3:])
    assert not outcome.met.left_out


def test_a_release_that_needs_all_waits_for_a_late_site(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Statistics are released once, by all. Without a site the experiment would have failed."""
    statistics = {"mechanism": "statistics", "noise_multiplier": 1.0, "noise_by": "client"}
    config, out = experiment(clip_folder, privacy=statistics), tmp_path / "out"
    waits: list[tuple[str, float]] = []

    class Notes(Quiet):
        def ask(self, ask: Ask) -> Any:
            waits.extend((envelope.kind, ask.deadline) for envelope in asked_for(ask).values())
            return super().ask(ask)

    late = Notes(sites_at(site_files), "north", {"agreement": 1})
    outcome = goes_on(config, late, out)
    assert outcome.training.released
    assert waits[6:8] == [("hello", TWO_OF_THREE.deadline), ("agreement", TWO_OF_THREE.deadline)]
    with pytest.raises(RunError, match="the release before the first round was not asked: .* without north"):
        goes_on(
            experiment(clip_folder, privacy=statistics, seed=1),
            Quiet(sites_at(site_files), "north", {"agreement": 9}),
            tmp_path / "never",
        )


def test_who_comes_after_the_last_round_keeps_its_prompts(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    config, out = experiment(clip_folder, "dp-fpl", rounds=4), tmp_path / "out"
    begun(config, sites_at(site_files), out)
    again = sites_at(site_files)
    outcome = goes_on(config, Quiet(again, "north", {"hello": 3}), out)
    assert [line["participants"] for line in lines_of(out)] == [3, 3, 2, 2]
    assert not outcome.met.left_out
    assert list((again["north"].folder(Proposal.of(config).fingerprint) / "prompts").iterdir())


def test_a_late_site_that_tells_its_accuracy_is_asked_for_it(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    write_site(tmp_path / "north", "north", clip_folder, {"tells": ["sizes", "class_names", "accuracy"]})
    config, out = experiment(clip_folder, rounds=6), tmp_path / "out"
    begun(config, sites_at(site_files), out)
    goes_on(config, Quiet(sites_at(site_files), "north", {"hello": 2}), out)
    assert [line["round"] for line in lines_of(out) if "accuracy" in line] == [1, 2, 4, 5, 6]


def test_a_site_that_was_late_in_every_process_has_its_data_in_the_ledger(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """The first coordinator dies before it wrote a ledger; the second hears of the site's data after a round."""
    config, out = experiment(clip_folder, privacy=NOISE), tmp_path / "out"
    begun(config, sites_at(site_files), out, number=1)
    outcome = goes_on(config, Quiet(sites_at(site_files), "north", {"hello": 2}), out)
    with pytest.raises(Stalled, match="all 3 rounds were void"):  # the sites have answered them
        coordinate(config, Proposal.of(config), fleet(sites_at(site_files)), tmp_path / "other", Patience())
    alone = Ledger.from_json((tmp_path / "other" / LEDGER).read_text())
    assert dict(outcome.training.ledger.data) == dict(alone.data)
    assert len(set(outcome.training.ledger.data.values())) == 3


@dataclass
class Repeated:
    """A meeting whose site stays away for as long as it is waited for, by a clock of its own.

    Attributes:
        now: seconds.
        waits: seconds of each time that it waited.
        connected: whether the silent site is there at all.
    """

    patience: Patience
    now: float = 0.0
    waits: list[float] = field(default_factory=list)
    connected: bool = True
    fleet: LocalFleet = field(default_factory=lambda: LocalFleet({}))

    def again(self, met: Met, answered: Mapping[str, int], seconds: float) -> Met:
        self.waits.append(seconds)
        self.now += seconds if self.connected else 0.0
        return met


AWAY = Met(cast(Any, None), cast(Any, None), (), {}, {}, {"north": SILENT}, frozenset(), frozenset({"north"}))


@pytest.mark.parametrize("grace", [0.0, 2.0, 30.0, 1e6])
def test_a_site_that_stays_away_costs_a_share_of_the_time(grace: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latecomers, "SHARE", SHARE)
    meeting = Repeated(Patience(0.6, deadline=600.0, grace=grace))
    late = Latecomers(cast(Meeting, meeting), AWAY, lambda: meeting.now)
    rounds, each = 2000, 3.0
    for _ in range(rounds):
        late.again({})
        meeting.now += each
    once = min(max(grace, LEAST), 600.0)
    assert set(meeting.waits) == {once}
    waited = sum(meeting.waits)
    assert meeting.now == pytest.approx(waited + rounds * each)
    assert waited <= SHARE * meeting.now + once, "no more than it may"
    assert waited > SHARE * meeting.now - once - each, "and no less: who is back is not out for long"
    meeting.waits.clear()
    late.again({}, last=True)
    late.again({}, needed=True)
    assert meeting.waits == [once, 600.0]


def test_a_site_that_is_not_connected_costs_nothing_and_is_asked_before_every_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latecomers, "SHARE", SHARE)
    meeting = Repeated(Patience(0.6), connected=False)
    late = Latecomers(cast(Meeting, meeting), AWAY, lambda: meeting.now)
    for _ in range(50):
        late.again({})
    assert (len(meeting.waits), meeting.now) == (50, 0.0)


def test_rounds_do_not_wait_for_who_has_not_agreed() -> None:
    asks: list[Ask] = []

    class Notes(LocalFleet):
        def ask(self, ask: Ask) -> Any:
            asks.append(ask)
            return super().ask(ask)

    meeting = Repeated(Patience(0.6), fleet=Notes(dict.fromkeys(NAMES, lambda request: request)))
    late = Latecomers(cast(Meeting, meeting), AWAY)
    events = list(late.ask(Ask(4, {name: name.encode() for name in NAMES}, 2, 9.0, 3.0)))
    lost = Lost("north", f"it has not agreed: {SILENT}", asked=False)
    assert events == [lost, Answer("east", b"east"), Answer("west", b"west")]
    assert asks == [Ask(4, {"east": b"east", "west": b"west"}, 2, 9.0, 3.0)]
    assert late.sites() == {"east", "west"}


def test_an_old_copy_is_refused_also_where_a_part_of_the_clients_takes_part(
    site_files: dict[str, Path], tmp_path: Path, clip_folder: Path
) -> None:
    """Who is asked in a round follows from the seed, so the coordinator knows who has answered it."""
    config = experiment(clip_folder, privacy=NOISE, rounds=8, runtime={"participation": 0.67})
    asked = {number: participants(config.seed, number, 3, 0.67).tolist() for number in range(1, 9)}
    mine = [number for number, clients in asked.items() if 1 in clients]  # north is the second by name
    assert len(mine) >= 4
    assert all(len(clients) == 2 for clients in asked.values())
    state, copied, back = tmp_path / "north" / "state", mine[1], mine[3]

    class Swaps(LocalFleet):
        def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
            ((kind, _),) = {(envelope.kind, ask.round): 0 for envelope in asked_for(ask).values()}
            if kind == "round" and ask.round == copied:
                shutil.copytree(state, tmp_path / "copy")
            if kind == "round" and ask.round == back:
                shutil.rmtree(state)
                shutil.copytree(tmp_path / "copy", state)
                self._sites["north"] = sites_at(site_files)["north"].turn
            return super().ask(ask)

    over = Swaps({name: site.turn for name, site in sites_at(site_files).items()})
    few = Patience(0.5)
    coordinate(config, Proposal.of(config), over, tmp_path / "out", few)
    lost = {line["round"]: line["lost"]["north"] for line in lines_of(tmp_path / "out") if "lost" in line}
    assert list(lost) == mine[3:]
    told = f"this site answered round {mine[2]}, and its state ends with round {mine[0]}"
    assert all(told in reason for reason in lost.values())
    entry = sites_at(site_files)["north"].ledger.experiments[Proposal.of(config).fingerprint]
    assert entry.rounds == (mine[0],), "the copy drew no noise"
