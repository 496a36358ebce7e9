"""The conformance suite over NVIDIA FLARE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.conformance import *  # noqa: F403
from engines.engine import Engine
from engines.flare_engine import flare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Iterator[Engine]:
    with flare(tmp_path_factory.mktemp("flare"), clip_folder) as started:
        yield started
