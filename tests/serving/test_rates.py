"""The window of requests by key, against the library's own storage."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from sordino.serving.server import rates
from sordino.serving.server.rates import Window

STEPS = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(0.0, 40.0)), max_size=30)


@given(STEPS, st.integers(1, 4))
def test_it_counts_as_the_definition_of_a_moving_window(steps: list[tuple[str, float]], limit: int) -> None:
    now, hits = 1000.0, []  # of granted requests: key and time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates.time, "monotonic", lambda: now)
        limiter, rate = MovingWindowRateLimiter(Window()), RateLimitItemPerMinute(limit)
        for key, pause in steps:
            now += pause
            granted = sum(name == key and at > now - 60 for name, at in hits) < limit
            assert limiter.hit(rate, key) == granted
            if granted:
                hits.append((key, now))


def test_a_request_starts_no_thread_as_it_does_with_the_librarys_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, own, library = RateLimitItemPerMinute(100), Window(), MemoryStorage()
    while (own.timer and own.timer.is_alive()) or (library.timer and library.timer.is_alive()):
        threading.Event().wait(0.01)  # for what their making started
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    MovingWindowRateLimiter(own).hit(rate, "a")
    assert started == []
    MovingWindowRateLimiter(library).hit(rate, "a")
    assert started
