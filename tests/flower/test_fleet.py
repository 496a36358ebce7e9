"""Whom a fleet over Flower waits for, and for how long, with a grid that a test answers."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from sordino.flower import fleet as module
from sordino.flower.fleet import FlowerFleet, Stopped
from sordino.flower.messages import answer, read_question
from sordino.runtime.fleet import Answer, Ask, Lost
from sordino.sites.rhythm import SHARE

QUICK = 1.5  # seconds that a test really waits
SITES = ("east", "north", "west")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(module, "LOOK", 0.05)
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower gives these to the process of a run
        monkeypatch.setattr(TaskIdentity, name, 1)


@dataclass
class Grid:
    """Flower's grid, answered by a script.

    Attributes:
        says: site to its answer; a number is an error of Flower's, and None is silence.
        there: connected sites, and since when.
        strangers: connected nodes with keys that nobody lists.
        takes: whether it takes messages.
        stolen: answers bear another token.
    """

    says: dict[str, Any]
    there: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SITES, "morning"))
    strangers: int = 0
    takes: bool = True
    stolen: bool = False
    stopped: bool = False
    sent: list[tuple[str, Message]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get_nodes(self) -> Iterable[Any]:
        known = [(SITES.index(site), site.encode(), since) for site, since in self.there.items()]
        unknown = [(100 + number, f"stranger {number}".encode(), "night") for number in range(self.strangers)]
        return [
            SimpleNamespace(node_id=7000 + number, public_key=key, last_activated_at=since)
            for number, key, since in known + unknown
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        numbers: list[str | None] = []
        for message in messages:
            if not self.takes:
                numbers.append(None)
                continue
            site = SITES[message.metadata.dst_node_id - 7000]
            numbers.append(f"message {len(self.sent)}")
            message.metadata.__dict__["_message_id"] = numbers[-1]
            self.sent.append((site, message))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.stopped:
            raise RunNotRunningException
        (number,) = message_ids
        with self._lock:
            site, message = self.sent[int(number.removeprefix("message "))]
            says = self.says.get(site)
        if says is None:
            return []
        if isinstance(says, Exception):
            raise says
        if isinstance(says, int):
            reply = Message(Error(code=says, reason="patient 17"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # the server's own number
            return [reply]
        token = b"another token..." if self.stolen else read_question(message).token
        return [answer(message, token, says)]


def asked(grid: Grid, *sites: str, quorum: int = 3, deadline: float = QUICK, grace: float = 0.0) -> list[Any]:
    ask = Ask(2, {site: site.encode() for site in sites}, quorum, deadline, grace)
    return list(FlowerFleet(grid, {site.encode(): site for site in SITES}).ask(ask))


def by_site(events: list[Any]) -> dict[str, Any]:
    assert len({event.site for event in events}) == len(events), "one entry a site"
    return {event.site: event for event in events}


def test_each_site_is_given_its_own_bytes_under_its_own_name() -> None:
    grid = Grid({"east": b"1", "west": b"2"})
    assert by_site(asked(grid, "east", "west")) == {"east": Answer("east", b"1"), "west": Answer("west", b"2")}
    questions = {site: read_question(message) for site, message in grid.sent}
    assert {site: (question.site, question.content) for site, question in questions.items()} == {
        "east": ("east", b"east"),
        "west": ("west", b"west"),
    }
    assert questions["east"].token != questions["west"].token


def test_nodes_with_keys_that_nobody_lists_are_not_there() -> None:
    grid = Grid({}, {"east": "morning"}, strangers=2)
    assert FlowerFleet(grid, {b"east": "east"}).sites() == {"east"}


def test_who_is_not_connected_is_lost_at_once() -> None:
    grid = Grid({"east": b"1"}, {"east": "morning"})
    events = by_site(asked(grid, "east", "north", deadline=1e6))
    assert events == {"east": Answer("east", b"1"), "north": Lost("north", "it is not connected", asked=False)}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (5, "its node is not connected any more"),
        (3, "its answer was lost on its way"),
        (4, "its answer came too late for Flower"),
        (2, "it failed with error 2 of Flower's"),
    ],
)
def test_an_error_is_told_of_the_site_and_without_its_text(code: int, reason: str) -> None:
    """Flower sends it under the server's own number, and with the text of an exception at the site."""
    events = by_site(asked(Grid({"east": b"1", "north": code}), "east", "north", deadline=1e6))
    assert events == {"east": Answer("east", b"1"), "north": Lost("north", reason)}


def test_after_the_deadline_the_silent_are_lost() -> None:
    events = by_site(asked(Grid({"east": b"1"}), "east", "west"))
    assert events == {"east": Answer("east", b"1"), "west": Lost("west", f"no answer after {QUICK} s")}


def test_a_quorum_shortens_the_wait_to_the_grace() -> None:
    """The deadline is days away: only the grace ends this."""
    grid = Grid({"east": b"1", "north": b"2"})
    events = by_site(asked(grid, *SITES, quorum=2, deadline=1e6, grace=QUICK))
    assert events["west"] == Lost("west", f"no answer {QUICK} s after 2 of 3 had answered")


def test_an_answer_that_hangs_holds_nobody_up() -> None:
    """Flower waits for the rest of an answer that is half sent; the deadline is one all the same."""
    grid, rest = Grid({"east": b"1"}), threading.Event()
    pull = grid.pull_messages

    def hanging(numbers: Iterable[str]) -> list[Message]:
        (number,) = numbers
        if grid.sent[int(number.removeprefix("message "))][0] == "west":
            rest.wait()
        return pull([number])

    grid.pull_messages = hanging  # type: ignore[method-assign]
    try:
        events = by_site(asked(grid, "east", "west"))
    finally:
        rest.set()
    assert events == {"east": Answer("east", b"1"), "west": Lost("west", f"no answer after {QUICK} s")}


class Hands:
    """A clock that goes on as far as somebody waits, and nobody calls the waiting off."""

    def __init__(self) -> None:
        self.now, self.rests = 0.0, list[float]()

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.rests.append(seconds)
        return False


def test_the_first_look_is_after_most_of_the_time_that_answers_took_and_the_next_ones_soon() -> None:
    hands, grid = Hands(), Grid({})
    over = FlowerFleet(grid, {b"east": "east"}, lambda: hands.now)
    asking, token, looks = module._Asking(Ask(1, {"east": b""}, 1, 10.0, 0.0)), b"t" * 16, []
    asking.over = hands  # type: ignore[assignment]
    pull = grid.pull_messages
    for took in (1.0, 1.0, 2.0, 1.0):
        (number,) = grid.push_messages([module.question(7000, module.Question("east", token, b""), 1, 10.0)])
        assert number is not None
        there = hands.now + took
        grid.pull_messages = lambda n, there=there: pull(n) if hands.now >= there else []  # type: ignore[method-assign]
        grid.says, hands.rests = {"east": b"yes"}, []
        over._look(asking, "east", number, token)
        assert asking.heard.get_nowait() == ("east", b"yes")
        assert there <= hands.now <= there + 1.5 * module.POLL
        looks.append(hands.rests)
    assert {rest for rests in looks[:3] for rest in rests} == {module.POLL}, "three answers are not known yet"
    assert looks[3][0] == pytest.approx(SHARE * 1.0, abs=2 * module.POLL), "of the shortest"
    assert set(looks[3][1:]) == {module.POLL}


def test_an_answer_without_the_questions_token_is_none() -> None:
    events = asked(Grid({"east": b"1"}, stolen=True), "east", deadline=1e6)
    assert events == [Lost("east", "it sent an answer without the question's token")]


def test_an_answer_that_cannot_be_read_is_that_sites_alone() -> None:
    events = by_site(asked(Grid({"east": b"1", "west": ValueError("garbage")}), "east", "west", deadline=1e6))
    assert events == {"east": Answer("east", b"1"), "west": Lost("west", "its answer cannot be read")}


def test_a_node_that_was_started_again_is_asked_again() -> None:
    """The first message is lost with the old process, and Flower says so at some time."""
    grid = Grid({"east": b"1"})
    pull = grid.pull_messages

    def pulled(numbers: Iterable[str]) -> list[Message]:
        (number,) = numbers
        index = int(number.removeprefix("message "))
        of_west = [place for place, (site, _) in enumerate(grid.sent) if site == "west"]
        if index not in of_west:
            return pull([number])
        grid.there["west"] = "noon"
        if len(of_west) < 2:
            return []
        with grid._lock:
            return Grid({"west": 5 if index == of_west[0] else b"2"}, sent=grid.sent).pull_messages([number])

    grid.pull_messages = pulled  # type: ignore[method-assign]
    events = by_site(asked(grid, "east", "west", deadline=30))
    assert events == {"east": Answer("east", b"1"), "west": Answer("west", b"2")}
    contents = [read_question(message).content for site, message in grid.sent if site == "west"]
    assert contents == [b"west", b"west"], "the same question, so that the site gives the answer that it kept"


def test_a_message_that_the_server_does_not_take_loses_the_site() -> None:
    lost = Lost("east", "the server takes no message for it", asked=False)
    assert asked(Grid({"east": b"1"}, takes=False), "east") == [lost]


def test_a_stopped_run_ends_the_question() -> None:
    with pytest.raises(Stopped):
        asked(Grid({}, stopped=True), "east", deadline=1e6)


def test_a_run_that_is_stopped_waits_for_no_sites() -> None:
    grid = Grid({})

    def stopped() -> Iterable[Any]:
        raise RunNotRunningException

    grid.get_nodes = stopped  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        FlowerFleet(grid, {}).sites()


def test_a_question_ends_with_its_deadline_at_the_server_too() -> None:
    grid = Grid({"east": b"1"})
    asked(grid, "east", deadline=40.0)
    assert grid.sent[0][1].metadata.ttl == pytest.approx(40.0 + module.SPARE)
