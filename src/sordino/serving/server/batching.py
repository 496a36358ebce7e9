"""Micro-batches: pictures of requests at the same time pass the encoder together.

As many workers compute as there are cores for it, so requests never compete for them. While all are at work, pictures
gather; once one is free, it takes its part of what is there. It waits for more only while others are announced, and
only as long as the settings say. Several small batches at once, with a core each, take less time than one that all
cores share: no core waits for another at every layer, and while one answers, the next computes. A worker alone has all
cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.serving.classifier import Answer, PromptClassifier
from sordino.serving.server.refusal import Refusal


@dataclass(frozen=True, eq=False)
class _Waiting:
    classifier: PromptClassifier
    pixels: Tensor  # [3, H, W]
    zero_shot: bool
    answer: asyncio.Future[Answer]


class Batcher:
    """A queue before the workers.

    Args:
        most: pictures of a batch.
        wait: seconds that a picture waits for others.
        longest: pictures that may wait.
        digits: decimals of probabilities.
        seen: is told the size of each batch.
        workers: batches at once; 0: as many as torch uses threads.
    """

    def __init__(
        self, most: int, wait: float, longest: int, digits: int, seen: Callable[[int], None], workers: int = 0
    ) -> None:
        self._most, self._wait, self._longest, self._digits, self._seen = most, wait, longest, digits, seen
        self._cores = torch.get_num_threads()
        self._workers, self._busy = workers or self._cores, 0
        self._announced = 0
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="encoder")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to work, in the running loop."""
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]

    async def stop(self) -> None:
        """End the work; who still waits is turned away."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), Refusal(503, "the server ends"))
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """Tell that a request will ask, when its pictures are unpacked."""
        self._announced += 1
        try:
            yield
        finally:
            self._announced -= 1

    def require_room(self, pictures: int) -> None:
        """See that so many pictures may wait now.

        Raises:
            Refusal: too many wait already.
        """
        if self._queue.qsize() + pictures > self._longest:
            raise Refusal(503, "too many pictures wait; ask again later", {"Retry-After": "1"})

    async def ask(self, classifier: PromptClassifier, pictures: list[Tensor], zero_shot: bool = False) -> list[Answer]:
        """Answer to pictures [3, H, W], with all classes.

        Raises:
            Refusal: too many wait already.
        """
        self.require_room(len(pictures))
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(classifier, pixels, zero_shot, loop.create_future()) for pixels in pictures]
        for each in waiting:
            self._queue.put_nowait(each)
        try:
            return list(await asyncio.gather(*(each.answer for each in waiting)))
        finally:
            for each in waiting:
                each.answer.cancel()  # nobody waits for it any more; no effect on one that is there

    async def _work(self) -> None:
        while True:
            batch = await self._gather()
            self._busy += 1
            try:
                await self._answer(batch)
            finally:
                self._busy -= 1

    async def _answer(self, batch: list[_Waiting]) -> None:
        groups: dict[tuple[int, bool], list[_Waiting]] = {}
        for each in batch:
            if not each.answer.done():
                groups.setdefault((id(each.classifier), each.zero_shot), []).append(each)
        for group in groups.values():
            self._seen(len(group))
            cores = max(1, self._cores // self._busy)
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, group, cores)
            except asyncio.CancelledError:
                for each in batch:
                    _fail(each, Refusal(503, "the server ends"))
                raise
            except Exception as error:  # of one prompt or its encoder: others go on
                for each in group:
                    _fail(each, error)
                continue
            for each, answer in zip(group, answers, strict=True):
                if not each.answer.done():
                    each.answer.set_result(answer)

    async def _gather(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        loop = asyncio.get_running_loop()
        until = loop.time() + self._wait
        while len(batch) < self._most:
            if waiting := self._queue.qsize():
                if len(batch) == math.ceil((len(batch) + waiting) / (self._workers - self._busy)):
                    break  # the rest is for the other workers that are free
                batch.append(self._queue.get_nowait())
                continue
            if (left := until - loop.time()) <= 0 or not self._announced:
                break
            try:
                batch.append(await asyncio.wait_for(self._queue.get(), left))
            except TimeoutError:
                break
        return batch

    def _compute(self, group: list[_Waiting], cores: int) -> list[Answer]:
        if torch.get_num_threads() != cores:  # of this worker: others have their own number
            torch.set_num_threads(cores)
        classifier = group[0].classifier
        pixels = torch.stack([each.pixels for each in group])
        return classifier.answer(pixels, len(classifier.class_names), self._digits, group[0].zero_shot)


def _fail(waiting: _Waiting, error: BaseException) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
