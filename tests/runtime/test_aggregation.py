"""Aggregations against scipy and numpy, what attackers can do to each, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sordino.algorithms import base
from sordino.errors import ConfigError
from sordino.privacy.mechanism import plain_mean
from sordino.runtime.aggregation import aggregated, bounded, median, trimmed_mean
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(8 * k, 8 * k + 8)) for k in range(5)]
TABLES = {"context_length": 3, "local_steps": 1, "batch_size": 0, "rank": 2}
ROBUST = ["trimmed-mean", "median", "norm-bound"]


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, 2, 3]
    other: Tensor  # [K, 4]
    weight: Tensor  # [K]


def upload_of(clients: int, seed: int = 0) -> Upload:
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(clients, *shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (4,))]
    return Upload(*numbers, torch.rand(clients, generator=generator, dtype=torch.float64) + 0.1)


def mean_of(settings: RuntimeSettings, upload: Upload, name: str = "change") -> Tensor:
    return aggregated(settings, upload, plain_mean).mean(name)


def settings_of(kind: str, **values: float) -> RuntimeSettings:
    return RuntimeSettings(aggregation=kind, **({"trim": 0.25, "norm_bound": 0.5} | values))  # type: ignore[arg-type]


clients_and_seed = given(st.integers(1, 12), st.integers(0, 1000))


@clients_and_seed
def test_the_median_is_numpys(clients: int, seed: int) -> None:
    values = upload_of(clients, seed).change
    np.testing.assert_allclose(median(values).numpy(), np.median(values.numpy(), axis=0), rtol=1e-14)


@given(st.integers(1, 12), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.4, 0.49]))
def test_the_trimmed_mean_is_scipys(clients: int, seed: int, trim: float) -> None:
    values = upload_of(clients, seed).change
    expected = scipy.stats.trim_mean(values.numpy(), trim, axis=0)
    np.testing.assert_allclose(trimmed_mean(values, trim).numpy(), expected, rtol=1e-12, atol=1e-15)


def test_a_fraction_that_is_a_whole_number_of_clients_cuts_that_many() -> None:
    """0.29 * 100 is a little below 29 in floating point."""
    values = torch.zeros(100, 1)
    values[:29] = -1e6
    assert trimmed_mean(values, 0.29) == 0


@clients_and_seed
def test_without_trimming_it_is_the_mean_of_clients_that_count_the_same(clients: int, seed: int) -> None:
    upload = upload_of(clients, seed)
    alike = plain_mean("change", upload.change, torch.ones(clients))
    torch.testing.assert_close(mean_of(settings_of("trimmed-mean", trim=0.0), upload), alike)


@clients_and_seed
def test_a_bound_that_nobody_reaches_changes_nothing(clients: int, seed: int) -> None:
    upload = upload_of(clients, seed)
    torch.testing.assert_close(
        mean_of(settings_of("norm-bound", norm_bound=1e6), upload), mean_of(RuntimeSettings(), upload), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", ["mean", *ROBUST])
@clients_and_seed
def test_the_order_of_clients_does_not_matter(kind: str, clients: int, seed: int) -> None:
    upload = upload_of(clients, seed)
    order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed))
    for name in ("change", "other"):
        torch.testing.assert_close(
            mean_of(settings_of(kind), base.take(upload, order), name), mean_of(settings_of(kind), upload, name)
        )


OUTLIERS = st.sampled_from([1e30, -1e30, float("inf"), float("-inf"), float("nan")])


@given(st.integers(1, 12), st.integers(0, 1000), st.lists(OUTLIERS, min_size=1, max_size=6))
def test_fewer_than_half_of_the_clients_leave_the_median_among_the_others(
    clients: int, seed: int, outliers: list[float]
) -> None:
    values = upload_of(clients, seed).change
    attackers = min(len(outliers), (clients - 1) // 2)
    for client, outlier in enumerate(outliers[:attackers]):
        values[client] = outlier
    honest = values[attackers:]
    found = median(values)
    assert bool(((found >= honest.amin(0)) & (found <= honest.amax(0))).all())


@given(st.integers(3, 12), st.integers(0, 1000), st.lists(OUTLIERS, min_size=6, max_size=6))
def test_as_many_attackers_as_are_cut_leave_the_trimmed_mean_among_the_others(
    clients: int, seed: int, outliers: list[float]
) -> None:
    values, trim = upload_of(clients, seed).change, 0.34
    attackers = int(trim * clients)
    for client, outlier in enumerate(outliers[:attackers]):
        values[client] = outlier
    honest, found = values[attackers:], trimmed_mean(values, trim)
    assert bool(((found >= honest.amin(0) - 1e-12) & (found <= honest.amax(0) + 1e-12)).all())


@given(st.integers(2, 12), st.integers(0, 1000), st.floats(1e-3, 1e3), OUTLIERS | st.floats(-1e6, 1e6))
def test_a_client_moves_the_bounded_mean_by_its_share_of_the_bound_at_most(
    clients: int, seed: int, bound: float, value: float
) -> None:
    """All fields together, compared with a client that sends zeros."""
    upload, settings = upload_of(clients, seed), settings_of("norm-bound", norm_bound=bound)
    share = float(upload.weight[0] / upload.weight.sum())
    for tensor in (upload.change, upload.other):
        tensor[0] = 0.0
    silent = [mean_of(settings, upload, name) for name in ("change", "other")]
    for tensor in (upload.change, upload.other):
        tensor[0] = value
    moved = [mean_of(settings, upload, name) - at for name, at in zip(("change", "other"), silent, strict=True)]
    assert float(torch.cat([each.flatten() for each in moved]).norm()) <= bound * share * (1 + 1e-9)


def test_the_bound_leaves_weights_and_directions_alone() -> None:
    upload = upload_of(4)
    short = bounded(upload, 0.1)
    assert torch.equal(short.weight, upload.weight)
    for client in range(4):
        whole, cut = (torch.cat([u.change[client].flatten(), u.other[client]]) for u in (upload, short))
        assert float(cut.norm()) == pytest.approx(0.1)
        assert float(torch.nn.functional.cosine_similarity(whole, cut, dim=0)) == pytest.approx(1)


@pytest.mark.parametrize("kind", ROBUST)
@pytest.mark.parametrize("name", ["promptfl", "fedprompt", "dp-fpl"])
def test_any_method_whose_server_takes_a_mean_can_have_it(name: str, kind: str, make_runtime: MakeRuntime) -> None:
    """The server moves by the aggregate of what clients sent: of the median's five clients, two may send anything."""
    values = {"aggregation": kind, "trim": 0.4, "norm_bound": 1e-3}
    plain, robust = make_runtime(name, ROWS, TABLES), make_runtime(name, ROWS, TABLES, **values)
    loud = make_runtime(name, ROWS, TABLES, **values)
    loud.boosts = {0: 1e6, 1: 1e6}
    start = plain.start()
    contexts = [runtime.round(start)[0].server.context for runtime in (plain, robust, loud)]  # type: ignore[attr-defined]
    moved = [float((context - start.server.context).norm()) for context in contexts]  # type: ignore[attr-defined]
    assert not torch.equal(contexts[0], contexts[1])
    assert 0 < moved[2] < 10 * moved[0]


def test_a_boost_is_what_a_mean_cannot_bear(make_runtime: MakeRuntime) -> None:
    """Model replacement: the mean moves by the attacker's change times its boost over the number of clients."""
    quiet, loud = (make_runtime("promptfl", ROWS, TABLES, weighting="uniform") for _ in range(2))
    alone = make_runtime("promptfl", ROWS[:1], TABLES)
    loud.boosts = {0: 11.0}
    start = quiet.start()
    at, boosted, own = (r.round(start)[0].server.context for r in (quiet, loud, alone))  # type: ignore[attr-defined]
    torch.testing.assert_close(boosted - at, 10 * (own - start.server.context) / 5)  # type: ignore[attr-defined]


def test_noise_that_clients_add_themselves_can_be_aggregated_as_one_likes(make_runtime: MakeRuntime) -> None:
    privacy, values = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0}, {"norm_bound": 0.1, "trim": 0.2}
    runtimes = [
        make_runtime("fedprompt", ROWS, TABLES, weighting="uniform", privacy=privacy, aggregation=kind, **values)
        for kind in ("mean", *ROBUST)
    ]
    after = [runtime.round(runtime.start())[0] for runtime in runtimes]
    assert len({training.ledger.digest() for training in after}) == 1
    assert len({training.server.context.sum().item() for training in after}) > 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("local", {}, "runtime.aggregation = 'median': this method sends nothing to be averaged; use 'mean'"),
        ("zero-shot", {}, "runtime.aggregation = 'median': this method sends nothing"),
        ("promptfl", {"aggregation": "norm-bound"}, "runtime.norm_bound = None: .*needs it"),
        (
            "promptfl",
            {"aggregation": "trimmed-mean", "trim": 0.1},
            "runtime.trim = 0.1: cuts nobody of 5 .* 0.2 or more",
        ),
        (
            "promptfl",
            {"privacy": {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "noise_by": "server"}},
            "runtime.aggregation = 'median': with privacy.noise_by = 'server' .*noise_by = 'client'",
        ),
        (
            "dp-fpl",
            {"privacy": {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "noise_by": "shares"}},
            "runtime.aggregation = 'median': with privacy.noise_by = 'shares'",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    name: str, values: dict[str, object], message: str, make_runtime: MakeRuntime
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_runtime(name, ROWS, TABLES, **({"aggregation": "median", "weighting": "uniform"} | values))
