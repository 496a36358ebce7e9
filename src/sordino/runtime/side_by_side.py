"""Independent computations at the same time, each in a thread with its share of the cores.

A run alone leaves cores idle: between large products there are small ones, and Python. Several runs with a core each
take less time than one after the other with all cores. Threads have encoder and features in common, so memory grows by
what a run needs for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
Check = Callable[[], None]  # raises `Stopped` once its computation shall end


class Stopped(Exception):
    """Another computation failed, or all were interrupted."""


def side_by_side(tasks: Sequence[Callable[[Check], T]], jobs: int) -> list[T]:
    """Return the results of all tasks, in their order.

    If one fails, or this thread is interrupted, no further one begins, and the others end at their next check.

    Args:
        tasks: each is given the function to call now and then, such as after a round.
        jobs: how many at once, each with as many of the cores that torch uses; 1: one after the other in this thread,
            each with all of them.

    Raises:
        What the first of the tasks raised that failed, after all have ended.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        return [task(lambda: None) for task in tasks]
    cores, stop = torch.get_num_threads(), threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    def compute(task: Callable[[Check], T]) -> T:
        check()
        torch.set_num_threads(max(1, cores // jobs))  # of this thread
        try:
            return task(check)
        except BaseException:
            stop.set()
            raise

    threads = ThreadPoolExecutor(jobs, thread_name_prefix="side-by-side")
    try:
        futures = [threads.submit(compute, task) for task in tasks]
        wait(futures)
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, Stopped):  # who was stopped did not fail
            raise error
    return [future.result() for future in futures]
