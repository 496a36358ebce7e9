"""The last bits of what is released tell nothing that the noise hides (Mironov, CCS 2012)."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sordino.privacy
from sordino.privacy.statistics.release import class_sums, contributions
from sordino.randomness import GRID_BITS, KeyedRandomness, Randomness, SystemRandomness, noised, simulated
from sordino.runtime.local import LocalRuntime

CPU = torch.device("cpu")
WIDTH = 512
MakeRuntime = Callable[..., LocalRuntime]


def randomness(kind: str) -> Randomness:
    if kind == "keyed":
        return KeyedRandomness(bytes(range(32)), [0], CPU)
    return SystemRandomness(1, CPU) if kind == "system" else simulated("00", "run", 1, [0], CPU)


def impossible(released: Tensor, exact: Tensor, deviation: float) -> float:
    """Return which share of numbers comes of no float32 noise, added to `exact` and rounded to float32."""
    exact, released = exact.double(), released.float()
    near = ((released.double() - exact) / deviation).float()
    candidates, up, down = [near], near, near
    for _ in range(4):
        up, down = torch.nextafter(up, torch.tensor(math.inf)), torch.nextafter(down, torch.tensor(-math.inf))
        candidates += [up, down]
    found = [(exact + deviation * noise.double()).float() == released for noise in candidates]
    return 1.0 - float(torch.stack(found).any(0).double().mean())


def excluded(released: Callable[[Tensor], Tensor], deviation: float, count: int = 20_000) -> list[tuple[float, float]]:
    """Return, for two data sets, which share of numbers excludes each: if it is the true one, and if not."""
    some = torch.nn.functional.normalize(torch.randn(1, count, generator=torch.Generator().manual_seed(0)), dim=1)
    both = some, torch.zeros_like(some)
    of = [[impossible(released(true), other, deviation) for true in both] for other in both]
    return [(of[0][0], of[0][1]), (of[1][1], of[1][0])]


def test_the_attack_breaks_float32_noise() -> None:
    """Otherwise what follows would show nothing."""
    source = SystemRandomness(1, CPU)

    def released(exact: Tensor) -> Tensor:
        noise = source.normal("noise", *exact.shape[1:]).float()
        return (exact.double() + 20.5 * noise.double()).float()

    if_true, if_not = excluded(released, 20.5)[0]
    assert if_true == 0.0
    assert if_not > 0.01, "one number of these excludes the data set"


@pytest.mark.parametrize("kind", ["system", "keyed", "simulated"])
@pytest.mark.parametrize("deviation", [0.1, 0.7, 20.5])
def test_numbers_with_noise_exclude_the_true_data_set_as_often_as_another(kind: str, deviation: float) -> None:
    source = randomness(kind)

    def released(exact: Tensor) -> Tensor:
        return noised(exact, deviation, source.normal("noise", *exact.shape[1:]))

    for if_true, if_not in excluded(released, deviation):
        assert if_true == pytest.approx(if_not, abs=0.02)


@given(
    st.floats(1e-6, 1e6),
    st.floats(-1e3, 1e3),
    st.floats(-1e3, 1e3),
    st.floats(-9, 9),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_result_depends_on_the_sum_alone(
    deviation: float, one: float, other: float, normal: float, dtype: torch.dtype
) -> None:
    """And is near it. Noise that another exact value needs for the same sum gives the same bits."""
    first, second = (torch.tensor([units * deviation]).to(dtype) for units in (one, other))
    noise = torch.tensor([normal], dtype=torch.float64)
    instead = noise + (first.double() - second.double()) / deviation
    released, total = noised(first, deviation, noise), float(first.double() + deviation * noise)
    assert released.dtype == dtype
    grid = 2.0 ** (math.floor(math.log2(deviation)) - GRID_BITS)
    assert abs(float(released) - total) <= grid / 2 + abs(total) * torch.finfo(dtype).eps
    at = total / grid
    if abs(at - math.floor(at) - 0.5) > 1e-3:  # no tie
        assert torch.equal(noised(second, deviation, instead), released)


def test_each_client_has_the_grid_of_its_own_noise() -> None:
    deviations, noise = torch.tensor([0.5, 0.0, 8.0]), torch.randn(3, 1000, dtype=torch.float64)
    exact = torch.randn(3, 1000)
    released = noised(exact, deviations, noise)
    assert torch.equal(released[1], exact[1]), "without noise nothing is changed"
    for client, step in ((0, 0.5 * 2.0**-GRID_BITS), (2, 8 * 2.0**-GRID_BITS)):
        assert torch.equal((released[client] / step).round() * step, released[client])
        assert not torch.equal((released[client] / (2 * step)).round() * 2 * step, released[client])


@pytest.mark.parametrize("noise_by", ["client", "server"])
def test_a_class_that_is_absent_is_not_found_in_a_release(noise_by: str, make_runtime: MakeRuntime) -> None:
    """One example of a class or none: rows of float32 noise showed it with certainty, at epsilon 0.1."""
    privacy = {"mechanism": "statistics", "noise_multiplier": 20.5, "noise_by": noise_by}
    rows = [list(range(10 * k, 10 * k + 10)) for k in range(4)]
    mechanism = make_runtime("promptfl", rows, {"context_length": 3}, privacy=privacy).mechanism
    image = torch.nn.functional.normalize(torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    one = class_sums(contributions(image, 0.3, None), torch.tensor([0]), 20)[None]
    source = SystemRandomness(1, CPU)
    released = (
        mechanism.with_own_noise("matrix", one, source)
        if noise_by == "client"
        else mechanism.summed("matrix", one, source)[None]
    )
    assert released is not None
    assert released.dtype == torch.float32
    deviation = float((released - one).flatten(1)[0, WIDTH + 1 :].std())
    assert deviation == pytest.approx(20.5, rel=0.05)
    assert impossible(released[0, 0], one[0, 0], 20.5) > 0.0, "float32 noise would explain all numbers"


def test_an_upload_with_noise_excludes_no_other_upload(make_runtime: MakeRuntime) -> None:
    privacy = {"mechanism": "dp-fedavg", "noise_multiplier": 5.0, "clip": 1.0}
    runtime = make_runtime("promptfl", [[0, 1], [2, 3]], {"context_length": 3}, privacy=privacy, weighting="uniform")
    end = runtime.mechanism.client_end(SystemRandomness(1, CPU), [0], torch.tensor(1.0, dtype=torch.float64))

    def released(exact: Tensor) -> Tensor:
        return end.protect({"context": exact, "weight": torch.ones(1)})["context"]

    for if_true, if_not in excluded(released, 5.0):
        assert if_true == pytest.approx(if_not, abs=0.02)


def test_all_noise_is_added_by_the_one_function() -> None:
    """In every module of the mechanisms: what a source of noise returns goes to `noised`, and nowhere else."""
    found = 0
    for file in Path(sordino.privacy.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            drawn = {
                name.id
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and _draws(node.value)
                for name in node.targets
                if isinstance(name, ast.Name)
            }
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            given_to = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "noised"]
            inside = {id(part) for call in given_to for part in ast.walk(call)}
            for node in ast.walk(function):
                used = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in drawn
                # `noise[chunk.to(noise.device)]` is inside, too.
                assert not used or id(node) in inside, f"{file.name}:{node.lineno} uses noise itself"
            found += sum(map(_draws, calls))
    assert found >= 9


def _draws(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("normal", "common_normal")
    )
