"""The micro-batcher: every picture gets its own answer, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from sordino.serving.server.batching import Batcher
from sordino.serving.server.refusal import Refusal


class Echo:
    """In the place of a classifier: answers with each picture's first number."""

    class_names = ("a",)

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.go, self.started = fails, threading.Event(), threading.Event()
        self.go.set()

    def answer(self, pixels: Tensor, top: int, digits: int, zero_shot: bool) -> list[Any]:
        self.started.set()
        self.go.wait(60)
        if self.fails:
            raise RuntimeError("broken")
        return [(self, float(row[0, 0, 0]), zero_shot) for row in pixels]


def picture(value: float) -> Tensor:
    return torch.full((3, 2, 2), value)


def run(most: int, longest: int, main: Any, wait: float = 0.01, workers: int = 1) -> list[int]:
    """Run a coroutine with a batcher; the sizes of its batches."""
    sizes: list[int] = []

    async def whole() -> None:
        batcher = Batcher(most, wait, longest, 2, sizes.append, workers)
        batcher.start()
        try:
            await main(batcher)
        finally:
            await batcher.stop()

    asyncio.run(whole())
    return sizes


def test_everybody_gets_their_own_answer_of_their_own_prompt() -> None:
    one, two = Echo(), Echo()

    async def main(batcher: Batcher) -> None:
        asks = [batcher.ask((one, two)[n % 2], [picture(n), picture(-n)], n % 3 == 0) for n in range(20)]  # type: ignore[arg-type]
        for n, answers in enumerate(await asyncio.gather(*asks)):
            prompt = (one, two)[n % 2]
            assert answers == [(prompt, n, n % 3 == 0), (prompt, -n, n % 3 == 0)]

    sizes = run(7, 100, main)
    assert sum(sizes) == 40
    assert 1 < max(sizes) <= 7


def test_what_comes_while_the_encoder_works_passes_together() -> None:
    echo = Echo()

    async def main(batcher: Batcher) -> None:
        echo.go.clear()
        first = asyncio.create_task(batcher.ask(echo, [picture(0)]))  # type: ignore[arg-type]
        await asyncio.to_thread(echo.started.wait, 60)
        rest = [asyncio.create_task(batcher.ask(echo, [picture(n)])) for n in range(1, 9)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        echo.go.set()
        await asyncio.gather(first, *rest)

    assert run(8, 100, main) == [1, 8]


def test_a_broken_prompt_fails_alone_and_others_go_on() -> None:
    broken, whole = Echo(fails=True), Echo()

    async def main(batcher: Batcher) -> None:
        asks = [batcher.ask(broken, [picture(1)]), batcher.ask(whole, [picture(2)])]  # type: ignore[arg-type]
        failed, answered = await asyncio.gather(*asks, return_exceptions=True)
        assert isinstance(failed, RuntimeError)
        assert answered == [(whole, 2, False)]
        assert await batcher.ask(whole, [picture(3)]) == [(whole, 3, False)]  # type: ignore[arg-type]

    run(8, 100, main)


def test_a_full_queue_turns_away_and_who_gave_up_costs_nothing() -> None:
    echo = Echo()

    async def main(batcher: Batcher) -> None:
        echo.go.clear()
        first = asyncio.create_task(batcher.ask(echo, [picture(0)]))  # type: ignore[arg-type]
        await asyncio.to_thread(echo.started.wait, 60)
        waits = asyncio.create_task(batcher.ask(echo, [picture(1), picture(2)]))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="too many") as refusal:
            await batcher.ask(echo, [picture(3)])  # type: ignore[arg-type]
        assert refusal.value.status == 503
        waits.cancel()
        await asyncio.sleep(0)
        echo.go.set()
        assert await first == [(echo, 0, False)]
        assert await batcher.ask(echo, [picture(4)]) == [(echo, 4, False)]  # type: ignore[arg-type]

    assert run(1, 2, main) == [1, 1]  # those that were given up were not computed


def test_who_waits_at_the_end_is_told() -> None:
    echo = Echo()

    async def main(batcher: Batcher) -> None:
        echo.go.clear()
        asks = [asyncio.create_task(batcher.ask(echo, [picture(n)])) for n in range(3)]  # type: ignore[arg-type]
        await asyncio.to_thread(echo.started.wait, 60)
        await batcher.stop()
        echo.go.set()
        for error in await asyncio.gather(*asks, return_exceptions=True):
            assert isinstance(error, Refusal)
            assert error.status == 503

    run(1, 100, main)


def test_free_workers_divide_what_waits_and_a_slow_one_keeps_nobody_waiting() -> None:
    slow, fast = Echo(), Echo()

    async def main(batcher: Batcher) -> None:
        pictures = [picture(n) for n in range(8)]
        assert await batcher.ask(fast, pictures) == [(fast, n, False) for n in range(8)]  # type: ignore[arg-type]
        slow.go.clear()
        first = asyncio.create_task(batcher.ask(slow, [picture(0)]))  # type: ignore[arg-type]
        await asyncio.to_thread(slow.started.wait, 60)
        assert len(await batcher.ask(fast, pictures)) == 8  # type: ignore[arg-type]
        assert not first.done()
        slow.go.set()
        await first

    sizes = run(8, 100, main, workers=2)
    assert sorted(sizes[:2]) == [4, 4]
    assert sizes[2:] == [1, 8]  # the other worker took all, the first one being at work


def test_a_worker_has_its_part_of_the_cores() -> None:
    """Alone it has all of them; of two at once each has half. The threads of the caller are left alone."""
    before, seen = torch.get_num_threads(), []

    class Counting(Echo):
        def answer(self, *arguments: Any) -> list[Any]:
            seen.append(torch.get_num_threads())
            return super().answer(*arguments)

    alone, first, second = Counting(), Counting(), Counting()

    async def main(batcher: Batcher) -> None:
        await batcher.ask(alone, [picture(0)])  # type: ignore[arg-type]
        first.go.clear()
        held = asyncio.create_task(batcher.ask(first, [picture(0)]))  # type: ignore[arg-type]
        await asyncio.to_thread(first.started.wait, 60)
        await batcher.ask(second, [picture(0)])  # type: ignore[arg-type]
        first.go.set()
        await held

    torch.set_num_threads(4)
    try:
        run(8, 100, main, workers=2)
        assert seen == [4, 4, 2]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_nobody_waits_for_others_unless_they_are_announced() -> None:
    echo = Echo()

    async def main(batcher: Batcher) -> None:
        began = asyncio.get_running_loop().time()
        await batcher.ask(echo, [picture(0)])  # type: ignore[arg-type]
        assert asyncio.get_running_loop().time() - began < 30
        with batcher.announced():
            first = asyncio.create_task(batcher.ask(echo, [picture(1)]))  # type: ignore[arg-type]
            await asyncio.sleep(0.05)
            assert not first.done()
        await asyncio.gather(first, batcher.ask(echo, [picture(2)]))  # type: ignore[arg-type]

    assert run(2, 100, main, wait=60) == [1, 2]
