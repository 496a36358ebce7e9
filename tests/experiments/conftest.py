from __future__ import annotations

from collections.abc import Iterator

import pytest

from sordino.algorithms import METHODS


@pytest.fixture(autouse=True)
def methods() -> Iterator[None]:
    """Put the methods back as they were before a test, which may add some from files."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)
