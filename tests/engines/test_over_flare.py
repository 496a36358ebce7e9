"""The conformance suite over NVIDIA FLARE."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engines.conformance import *  # noqa: F403
from engines.engine import Engine
from engines.flare_engine import flare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with flare(tmp_path_factory.mktemp("flare")) as started:
        yield started
