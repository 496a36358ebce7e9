"""The conformance suite over Flower."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.conformance import *  # noqa: F403
from engines.engine import Engine
from flower.parties import flower

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Iterator[Engine]:
    with flower(tmp_path_factory.mktemp("flower"), clip_folder) as started:
        yield started
