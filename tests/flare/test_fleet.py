"""Whom a fleet waits for, and for how long, with tasks that a test answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from sordino.flare.fleet import Aborted, FlareFleet, Paused, Told
from sordino.runtime.fleet import Answer, Ask, Lost

QUICK = 1.5  # seconds that a test really waits


@dataclass
class Tasks:
    """FLARE's tasks, answered by a script: site to what it says, or None for nothing."""

    says: dict[str, bytes | str | None]
    there: frozenset[str] | None = None
    stop: bool = False
    pause: bool = False
    started: dict[str, bytes] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    withdrawn: list[str] = field(default_factory=list)

    def sites(self) -> frozenset[str]:
        return frozenset(self.says) if self.there is None else self.there

    def start(self, site: str, content: bytes, told: Told) -> Callable[[], None]:
        self.started[site], self.told[site] = content, told
        if (said := self.says[site]) is not None:
            told(said)
            told("FLARE ended its task: ok")  # as FLARE does after every answer
        return lambda: self.withdrawn.append(site)

    def aborted(self) -> bool:
        return self.stop

    def paused(self) -> bool:
        return self.pause


def ask(*sites: str, quorum: int = 3, deadline: float = QUICK, grace: float = 0.0) -> Ask:
    return Ask(2, {site: site.encode() for site in sites}, quorum, deadline, grace)


def test_each_site_is_given_its_own_bytes_and_answers_once() -> None:
    tasks = Tasks({"east": b"1", "west": b"2"})
    events = list(FlareFleet(tasks).ask(ask("east", "west", quorum=2, deadline=1e6)))
    assert tasks.started == {"east": b"east", "west": b"west"}
    assert sorted(events, key=lambda event: event.site) == [Answer("east", b"1"), Answer("west", b"2")]
    assert tasks.withdrawn == []


def test_who_is_not_connected_is_lost_at_once_and_a_failure_is_told() -> None:
    tasks = Tasks({"east": b"1", "west": "it failed: EXECUTION_EXCEPTION"})
    events = list(FlareFleet(tasks).ask(ask("east", "north", "west", deadline=1e6)))
    assert Lost("north", "it is not connected", asked=False) in events
    assert Lost("west", "it failed: EXECUTION_EXCEPTION") in events
    assert Answer("east", b"1") in events
    assert len(events) == 3
    assert "north" not in tasks.started


def test_after_the_deadline_the_silent_are_lost_and_their_tasks_withdrawn() -> None:
    tasks = Tasks({"east": b"1", "west": None})
    events = list(FlareFleet(tasks).ask(ask("east", "west", quorum=2)))
    assert events == [Answer("east", b"1"), Lost("west", f"no answer after {QUICK} s")]
    assert tasks.withdrawn == ["west"]


def test_a_quorum_shortens_the_wait_to_the_grace() -> None:
    """The deadline is days away: only the grace ends this."""
    tasks = Tasks({"east": b"1", "north": b"2", "west": None})
    events = list(FlareFleet(tasks).ask(ask("east", "north", "west", quorum=2, deadline=1e6, grace=QUICK)))
    assert events[-1] == Lost("west", f"no answer {QUICK} s after 2 of 3 had answered")
    assert tasks.withdrawn == ["west"]


def test_a_grace_does_not_outlast_the_deadline() -> None:
    tasks = Tasks({"east": b"1", "west": None})
    events = list(FlareFleet(tasks).ask(ask("east", "west", quorum=1, grace=1e6)))
    assert events[-1] == Lost("west", f"no answer after {QUICK} s")


def test_an_answer_within_the_grace_counts() -> None:
    tasks = Tasks({"east": b"1", "west": None})
    events = []
    for event in FlareFleet(tasks).ask(ask("east", "west", quorum=1, deadline=1e6, grace=1e6)):
        events.append(event)
        if event.site == "east":  # from another thread, as FLARE's answers come
            threading.Timer(0.05, tasks.told["west"], [b"2"]).start()
    assert events == [Answer("east", b"1"), Answer("west", b"2")]


def test_an_aborted_job_ends_the_question_and_withdraws_all() -> None:
    tasks = Tasks({"east": None, "west": None}, stop=True)
    with pytest.raises(Aborted):
        list(FlareFleet(tasks).ask(ask("east", "west", deadline=1e6)))
    assert sorted(tasks.withdrawn) == ["east", "west"]


def test_a_job_that_is_paused_ends_between_two_rounds_and_not_in_one() -> None:
    """A round may have several questions, and a round that was given up in the middle is charged for nothing."""
    tasks = Tasks({"east": b"1"})
    fleet = FlareFleet(tasks)
    first = Ask(2, {"east": b"east"}, 1, 1e6, 0.0)
    list(fleet.ask(first))
    tasks.pause = True
    assert list(fleet.ask(first)) == [Answer("east", b"1")]
    assert list(fleet.ask(replace(first, round=0))) == [Answer("east", b"1")], "a late site's hello, between two rounds"
    assert list(fleet.ask(first)) == [Answer("east", b"1")], "the end, after the last round"
    tasks.started.clear()
    with pytest.raises(Paused, match="before round 3"):
        list(fleet.ask(Ask(3, {"east": b"east"}, 1, 1e6, 0.0)))
    assert not tasks.started


def test_waiting_for_sites_ends_with_the_job() -> None:
    """No round is open then, so nothing is given up."""
    tasks = Tasks({"east": b"1"}, frozenset())
    fleet = FlareFleet(tasks)
    assert fleet.may_return()
    tasks.pause = True
    with pytest.raises(Paused, match="while it waits for sites"):
        fleet.may_return()
    tasks.stop = True
    with pytest.raises(Aborted):
        fleet.may_return()


def test_who_stops_listening_leaves_no_task() -> None:
    tasks = Tasks({"east": b"1", "west": None})
    events = FlareFleet(tasks).ask(ask("east", "west", deadline=1e6))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert tasks.withdrawn == ["west"]
