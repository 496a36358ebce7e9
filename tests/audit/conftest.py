"""Audits are statistical: their tests draw the same noise everywhere, so that none fails by chance."""

from __future__ import annotations

import pytest

from sordino.runtime.local import LocalRuntime


@pytest.fixture(autouse=True)
def noise_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a simulation's noise depend on nonce and seed alone: bits of features differ between machines."""
    monkeypatch.setattr(LocalRuntime, "identity", property(lambda runtime: f"seed {runtime.seed}"))
