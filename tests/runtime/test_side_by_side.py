"""Computations in threads give what they give one after the other, and end together where one fails."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from sordino.runtime.side_by_side import Check, Stopped, side_by_side


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def until_stopped(check: Check) -> None:
    while True:
        check()


def test_results_come_in_the_order_of_the_tasks_whichever_ends_first() -> None:
    second_is_over = threading.Event()

    def first(check: Check) -> str:
        assert second_is_over.wait(60), "the second runs meanwhile"
        return "first"

    def second(check: Check) -> str:
        second_is_over.set()
        return "second"

    assert side_by_side([first, second], 2) == ["first", "second"]


@pytest.mark.parametrize(
    ("jobs", "tasks", "at_once", "cores"), [(1, 3, 1, 4), (2, 5, 2, 2), (3, 4, 3, 1), (9, 2, 2, 2)]
)
def test_cores_are_divided_among_those_at_work(jobs: int, tasks: int, at_once: int, cores: int) -> None:
    together = threading.Barrier(at_once)
    seen: list[int] = []

    def task(number: int) -> Callable[[Check], int]:
        def compute(check: Check) -> int:
            if number < at_once:
                together.wait(60)
            seen.append(torch.get_num_threads())
            return number

        return compute

    assert side_by_side([task(number) for number in range(tasks)], jobs) == list(range(tasks))
    assert seen == [cores] * tasks
    assert torch.get_num_threads() == 4


def test_one_at_a_time_is_this_thread() -> None:
    assert side_by_side([lambda check: threading.current_thread()], 5) == [threading.current_thread()]


def test_where_one_fails_the_others_end_and_no_further_one_begins() -> None:
    ended: list[str] = []
    begun = threading.Event()

    def goes_on(check: Check) -> None:
        begun.set()
        try:
            until_stopped(check)
        except Stopped:
            ended.append("the first")
            raise

    def fails(check: Check) -> None:
        assert begun.wait(60)
        raise ValueError("of the second")

    def never(check: Check) -> None:
        ended.append("the third")

    with pytest.raises(ValueError, match="of the second"):
        side_by_side([goes_on, fails, never], 2)
    assert ended == ["the first"]
    assert torch.get_num_threads() == 4


def test_an_interruption_ends_all() -> None:
    begun, ended, waiting = threading.Event(), threading.Event(), threading.main_thread().ident or 0

    def waits(check: Check) -> None:
        begun.set()
        until_stopped(check)

    def interrupts(check: Check) -> None:
        assert begun.wait(60)
        signal.pthread_kill(waiting, signal.SIGINT)
        try:
            until_stopped(check)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        side_by_side([interrupts, waits], 2)
    assert ended.is_set()
