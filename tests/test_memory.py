"""Garbage collection waits for imports, goes on whatever they end with, and is seldom and not never."""

from __future__ import annotations

import gc
import weakref

import pytest

from sordino.memory import collect_seldom, without_collection


def test_collection_waits_and_goes_on() -> None:
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled(), "the inner one leaves it to the outer one"
    assert gc.isenabled()


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(KeyError), without_collection():
        raise KeyError
    assert gc.isenabled()


def test_who_had_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


class Node:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_seldom_is_not_never() -> None:
    before = gc.get_threshold()
    try:
        collect_seldom()
        gc.collect()
        first = weakref.ref(Node())
        some = [Node() for _ in range(1000)]
        assert first() is not None
        some += [Node() for _ in range(10_000)]
        assert first() is None
    finally:
        gc.set_threshold(*before)
