"""Processes that start at once: forked from one that has imported what they need, and computed nothing."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sordino.encoders.clip", "sordino.runtime.local", "sordino.runtime.turns"])


def started(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process that runs a function, with as many threads as this one has."""
    process = CONTEXT.Process(target=_run, args=(target, torch.get_num_threads(), *arguments), daemon=True)
    process.start()
    return process


def code_of(process: ForkServerProcess, seconds: float = 60) -> int | None:
    """The exit code of a process that ends by itself."""
    process.join(seconds)
    return process.exitcode


def _run(target: Callable[..., None], threads: int, *arguments: Any) -> None:
    torch.set_num_threads(threads)
    target(*arguments)
