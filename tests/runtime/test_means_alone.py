"""Where a trusted server adds noise to means, a method gets these and nothing else of a round's uploads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from runtime.federations import SIX
from sordino.algorithms.base import RoundContext, Uploads, named_tensors
from sordino.runtime.local import LocalRuntime

MakeRuntime = Callable[..., LocalRuntime]
TABLES = {"context_length": 3, "batch_size": 5, "local_steps": 1, "dp-fpl": {"rank": 2}}
BY_SERVER = {"noise_by": "server", "noise_multiplier": 1.0, "delta": 0.1}
CLIENTS, EXAMPLES = BY_SERVER | {"mechanism": "dp-fedavg"}, BY_SERVER | {"mechanism": "dp-sgd", "delta": 1e-3}


@pytest.mark.parametrize(
    ("name", "privacy", "participation"),
    [
        ("promptfl", CLIENTS, 0.5),
        ("promptfl", CLIENTS, 1.0),
        ("feddtpt-votes", CLIENTS, 0.5),
        ("dp-fpl", EXAMPLES, 1.0),
    ],
)
def test_a_method_sees_no_upload_and_no_size_of_a_sample(
    name: str, privacy: dict[str, Any], participation: float, make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighting = "uniform" if privacy is CLIENTS else "examples"
    options = {"privacy": privacy, "participation": participation, "weighting": weighting}
    rounds = 6 if participation == 1 else 40  # samples of one size only: below 1e-19
    runtime = make_runtime(name, SIX, TABLES, rounds=rounds, **options)
    seen: list[tuple[Uploads[Any], RoundContext]] = []
    real = runtime.algorithm.server_round

    def spy(settings: Any, server: Any, uploads: Uploads[Any], context: RoundContext) -> Any:
        seen.append((uploads, context))
        return real(settings, server, uploads, context)

    monkeypatch.setattr(runtime.algorithm, "server_round", spy)
    training, took_part = runtime.start(), set()
    for _ in range(runtime.rounds):
        training, record = runtime.round(training)
        took_part.add(record.participants)
        assert all(tensor.isfinite().all() for tensor in named_tensors(training.server).values())
    assert len(took_part) > 1 or participation == 1
    for uploads, context in seen:
        assert list(context.streams.clients) == list(range(6))
        for key, tensor in named_tensors(uploads.each).items():
            assert len(tensor) == 6
            assert bool((tensor == 1).all()) if key == "weight" and privacy is CLIENTS else True
            assert key == "weight" or bool(tensor.isnan().all())
            with pytest.raises(AssertionError, match="as they were uploaded"):  # of other numbers there is no mean
                uploads.average(key, 2 * tensor, tensor)


@pytest.mark.parametrize("name", ["promptfl", "feddtpt-votes"])
def test_a_round_of_nobody_cannot_be_told_from_one_of_somebody(name: str, make_runtime: MakeRuntime) -> None:
    """Under much noise a round's result is that of noise, also where the sample is empty: no method counts uploads."""
    loud = CLIENTS | {"noise_multiplier": 1e3}
    for participation in (1e-9, 1 - 1e-9):
        runtime = make_runtime(name, SIX, TABLES, privacy=loud, participation=participation, weighting="uniform")
        start = runtime.start()
        after, record = runtime.round(start)
        assert record.participants == (0 if participation < 0.5 else 6)
        before = named_tensors(start.server)
        assert any(not torch.equal(tensor, before[key]) for key, tensor in named_tensors(after.server).items())
