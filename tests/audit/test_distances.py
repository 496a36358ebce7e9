"""What opened distances give away: exact where they are enough, and no more than they hold where not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sordino.algorithms import secfpp
from sordino.algorithms.secfpp_points import points
from sordino.audit.distances import _Contexts, between_clients, located
from sordino.audit.run import audit
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.runtime.local import LocalRuntime
from sordino.secure import Client, Pairs, RevealedDistances, Server, plan
from sordino.secure import run as run_protocol


def unit_points(count: int, width: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(count, width))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def squared(points: np.ndarray) -> np.ndarray:
    found: np.ndarray = ((points[:, None] - points) ** 2).sum(-1)
    return found


def opened(
    points: np.ndarray, sets: Iterable[Iterable[int]], factors: np.ndarray | None = None
) -> list[RevealedDistances]:
    """What a server sees of points, in steps of 1e-9."""
    columns = []
    for members in sets:
        chosen = sorted(members)
        values = ((points - points[chosen].mean(0)) ** 2).sum(1) * len(chosen) ** 2 * 1e18
        values = values if factors is None else values * factors
        columns.append(RevealedDistances(tuple(chosen), tuple(range(len(points))), tuple(map(round, values.tolist()))))
    return columns


def relative(found: np.ndarray | None, truth: np.ndarray) -> np.ndarray:
    """Their ratio off the diagonal, with its mean divided out."""
    assert found is not None
    ratios = found[~np.eye(len(truth), dtype=bool)] / truth[~np.eye(len(truth), dtype=bool)]
    return np.asarray(ratios / ratios.mean())


def test_distances_between_clients_are_read_as_they_are() -> None:
    points = unit_points(7, 5)
    found = between_clients(opened(points, [[i] for i in reversed(range(7))]), 7, ratios=False)
    np.testing.assert_allclose(found * 1e-18, squared(points), atol=1e-9)  # type: ignore[operator]


def test_ratios_of_all_rows_give_all_distances_but_one_scale() -> None:
    points = unit_points(7, 5)
    factors = np.random.default_rng(1).integers(2**15, 2**16, 7).astype(float)
    found = between_clients(opened(points, [[i] for i in range(7)], factors), 7, ratios=True)
    np.testing.assert_allclose(relative(found, squared(points)), 1, rtol=1e-8)


def test_centers_that_span_the_points_give_all_distances() -> None:
    points = unit_points(8, 3)
    sets = [[0, 1], [2, 3, 4], [5], [6, 7, 0], [1, 2]]
    found = between_clients(opened(points, sets), 8, ratios=False)
    np.testing.assert_allclose(relative(found, squared(points)), 1, rtol=1e-6)


def test_fewer_centers_give_less_and_never_too_much() -> None:
    points = unit_points(8, 7)
    found = between_clients(opened(points, [[0, 1], [2, 3, 4], [5, 6, 7]]), 8, ratios=False)
    assert found is not None
    assert (found * 1e-18 <= squared(points) + 1e-6).all()
    assert found.sum() * 1e-18 < 0.6 * squared(points).sum()
    assert between_clients(opened(points, [[0, 1], [2, 3, 4]]), 8, ratios=True) is None


@pytest.mark.parametrize("helpers", [1, 3, 6])
def test_helpers_give_the_part_in_their_span_exactly(helpers: int) -> None:
    points = unit_points(7, 6, seed=2)
    known, victim = points[:helpers], points[6]
    found = located(known, ((known - victim) ** 2).sum(1))
    basis = np.linalg.qr(known.T)[0]
    np.testing.assert_allclose(found, basis @ (basis.T @ victim), atol=1e-9)
    if helpers == 6:
        np.testing.assert_allclose(found, victim, atol=1e-9)


def test_the_protocols_own_distances_are_attacked() -> None:
    points = unit_points(8, 4, seed=3)
    clients = [Client(number, point) for number, point in enumerate(points)]
    setup = plan(clients=8, width=4, largest=1.0, columns=8)
    seen = run_protocol(clients, Server(setup), Pairs()).opened
    found = between_clients(seen, 8, ratios=False)
    np.testing.assert_allclose(found * 4.0**-setup.bits, squared(points), atol=1e-4)  # type: ignore[operator]


def test_a_context_is_sought_until_it_reduces_to_the_point(make_runtime: Callable[..., LocalRuntime]) -> None:
    """From where all started as well as from elsewhere; else the attack would find nothing because it did not look."""
    rows = [list(range(client, 40, 4)) for client in range(4)]
    tables = {"context_length": 16, "batch_size": 0, "optimizer": {"name": "adam", "learning_rate": 0.01}}
    runtime = make_runtime("secfpp", rows, tables | {"secfpp": {"cluster_every": 2}}, rounds=4)
    training = runtime.start()
    for _ in range(3):
        training, _ = runtime.round(training)
    state, server = training.clients, training.server
    upload = secfpp.Upload(state.domain + state.personal, state.domain)  # type: ignore[attr-defined]
    subject = SimpleNamespace(runtime=runtime, features=runtime.data.features, task=SimpleNamespace(test=np.arange(4)))
    truth = points(runtime.model, upload.context, server.start, runtime.settings.width).detach()  # type: ignore[attr-defined]
    for opened_means in (0.0, 1.0):
        server = replace(server, opened=torch.full((4,), opened_means), contexts=upload.context[[1, 2, 3, 0]])  # type: ignore[call-arg]
        found = _Contexts(subject, upload, server).sought(truth[0].numpy(), 0)  # type: ignore[arg-type]
        reached = points(runtime.model, found[None], server.start, runtime.settings.width)[0]  # type: ignore[attr-defined]
        assert float(reached.detach() @ truth[0]) > 0.9


@pytest.mark.slow
def test_an_audit_reports_them(config_file: Path, tmp_path: Path) -> None:
    overrides = ["algorithm=secfpp", "partition.clients=4", "settings.local_steps=2", "settings.secfpp.cluster_every=2"]
    out = tmp_path / "run"
    run(load_config(config_file, overrides), out)
    found = audit(out, ("distances",))["attacks"]["distances"]
    assert found["reason"] is None
    assert found["columns"] == 4
    assert found["distance_error"] < 1e-3
    cosines = [each["cosine"] for each in found["helped"]]
    assert [each["helpers"] for each in found["helped"]] == [1, 2, 3]
    assert all(each["cosine"] >= each["cosine_of_mean"] - 1e-6 for each in found["helped"])
    assert all(0 <= cosine <= 1 + 1e-6 for cosine in cosines)
    assert found["by_truth"]["cosine"] <= 1
    run(load_config(config_file), tmp_path / "other")
    assert "no distances" in audit(tmp_path / "other", ("distances",))["attacks"]["distances"]["reason"]
