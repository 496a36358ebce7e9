"""How long a site rests."""

from __future__ import annotations

import pytest

from sordino.sites.rhythm import IDLE, LONGEST, SHARE, Rhythm


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def paused(rhythm: Rhythm, clock: Clock, *pauses: float) -> float:
    """Answer, and be asked again after each pause; the rest after the last answer."""
    rest = rhythm.answered()
    for pause in pauses:
        clock.now += pause
        rhythm.asked()
        clock.now += 5  # of work, which is no pause
        rest = rhythm.answered()
    return rest


def test_it_rests_for_less_than_it_had_to_wait_lately() -> None:
    clock = Clock()
    rhythm = Rhythm(0.25, 2, clock)
    assert paused(rhythm, clock, 4, 3) == 0, "it does not know enough yet"
    assert paused(rhythm, clock, 5) == pytest.approx(SHARE * 3)
    assert paused(rhythm, clock, 4, 6, 7) == pytest.approx(SHARE * 4)
    assert paused(rhythm, clock, 0.1) == pytest.approx(SHARE * 0.1), "rounds got shorter"
    assert paused(rhythm, clock, 1000, 1000, 1000) == LONGEST


def test_where_rounds_are_as_long_as_it_rests_it_rests_less_and_less() -> None:
    """A question that came at once waited for the whole rest, which must not become the pause that is learned."""
    clock = Clock()
    rhythm = Rhythm(0.25, 2, clock)
    rest = paused(rhythm, clock, 8, 8, 8)
    rests = []
    for _ in range(12):
        clock.now += rest
        rhythm.asked()
        rest = rhythm.answered()
        rests.append(rest)
    assert rests == sorted(rests, reverse=True)
    assert rests[-1] < 0.25 * 8


def test_whom_nobody_asks_asks_seldom() -> None:
    clock = Clock()
    rhythm = Rhythm(0.25, 2, clock)
    assert rhythm.nothing() == 0.25
    clock.now = 10.0
    assert rhythm.nothing() == pytest.approx(10 * IDLE)
    clock.now = 1e6
    assert rhythm.nothing() == 2
    rhythm.asked()
    assert rhythm.nothing() == 0.25


def test_a_first_question_is_no_pause() -> None:
    clock = Clock()
    rhythm = Rhythm(0.25, 2, clock)
    for _ in range(5):
        clock.now += 3
        rhythm.asked()  # and it is never answered
    assert rhythm.answered() == 0
