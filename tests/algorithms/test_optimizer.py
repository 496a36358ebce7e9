import math
import subprocess
import sys

import pytest
import torch

from sordino.algorithms.base import RoundContext
from sordino.algorithms.optimizer import Optimizer
from sordino.randomness import Streams

CASES = [
    (
        Optimizer("sgd", 0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD([p], 0.1, 0.9, weight_decay=0.01),
    ),
    (Optimizer("sgd", 0.1), lambda p: torch.optim.SGD([p], 0.1)),
    (Optimizer("adam", 0.1), lambda p: torch.optim.Adam([p], 0.1)),
    (Optimizer("adamw", 0.1, weight_decay=0.1), lambda p: torch.optim.AdamW([p], 0.1, weight_decay=0.1)),
]


def round_context(number: int, rounds: int) -> RoundContext:
    return RoundContext(number, rounds, Streams(0, number, [0], torch.device("cpu")))


@pytest.mark.parametrize(("ours", "make"), CASES)
def test_equals_torch_on_a_parameter_of_its_own(ours: Optimizer, make) -> None:
    """Also where clients of the stack took different numbers of steps."""
    start = torch.randn(3, 4, 5)
    parameters, state = start.clone(), ours.initial_state(start)
    references = [torch.nn.Parameter(start[k].clone()) for k in range(3)]
    optimizers = [make(reference) for reference in references]
    for number in range(6):
        chosen = [0, 2] if number % 2 else [0, 1, 2]
        gradients = torch.randn(len(chosen), 4, 5)
        part, new = ours.step(parameters[chosen], gradients, {k: v[chosen] for k, v in state.items()}, rate=0.1)
        parameters[chosen] = part
        for name in state:
            state[name][chosen] = new[name]
        for index, client in enumerate(chosen):
            references[client].grad = gradients[index]
            optimizers[client].step()
    torch.testing.assert_close(parameters, torch.stack([reference.data for reference in references]), rtol=0, atol=0)


def test_the_first_state_is_what_a_step_expects() -> None:
    for ours, _ in CASES:
        start = torch.randn(2, 3)
        state = ours.initial_state(start)
        _, new = ours.step(start, torch.randn(2, 3), state, 0.1)
        assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in new.items()}


def test_cosine_schedule_anneals_from_the_rate_towards_zero() -> None:
    ours = Optimizer("sgd", 0.4, schedule="cosine")
    for number in (1, 2, 5, 10):
        expected = 0.4 * 0.5 * (1 + math.cos(math.pi * (number - 1) / 10))
        assert ours.rate(round_context(number, 10)) == pytest.approx(expected, abs=1e-12)


def test_constant_schedule_is_constant() -> None:
    assert {Optimizer("adam", 0.4).rate(round_context(number, 10)) for number in range(1, 11)} == {0.4}


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_bounds_each_clients_gradient_as_torch_does(name: str) -> None:
    """Longer gradients are shortened, each by its own norm; shorter ones, and zero, stay as they are."""
    start = torch.randn(4, 4, 5, dtype=torch.float64)
    gradients = torch.randn(4, 4, 5, dtype=torch.float64) * torch.tensor([0.0, 0.01, 1.0, 500.0])[:, None, None]
    bounded, plain = Optimizer(name, 0.1, max_norm=2.0), Optimizer(name, 0.1)
    stepped, _ = bounded.step(start, gradients, {}, 0.1)
    for client in range(4):
        reference = torch.nn.Parameter(start[client].clone())
        reference.grad = gradients[client].clone()
        torch.nn.utils.clip_grad_norm_([reference], 2.0)
        optimizer = torch.optim.SGD([reference], 0.1) if name == "sgd" else torch.optim.Adam([reference], 0.1)
        optimizer.step()
        torch.testing.assert_close(stepped[client], reference.data, rtol=0, atol=1e-5)
    unbounded, _ = plain.step(start, gradients, {}, 0.1)
    torch.testing.assert_close(stepped[:2], unbounded[:2], rtol=0, atol=0)
    assert name == "adam" or not torch.allclose(stepped[3], unbounded[3])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_bound_is_positive(bad: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        Optimizer("sgd", 0.1, max_norm=bad)


@pytest.mark.parametrize("rounds", [1, 2, 7, 100])
def test_the_cosine_schedule_is_torchs_to_the_bit(rounds: int) -> None:
    ours = Optimizer("sgd", 0.3, schedule="cosine")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=rounds)
    for number in range(1, rounds + 1):
        assert ours.rate(round_context(number, rounds)) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_a_step_imports_no_compiler() -> None:
    """It takes seconds to import, in every process of a site."""
    code = f"""
import sys
from math import inf
import torch
from sordino.algorithms.optimizer import Optimizer
for ours in {[ours for ours, _ in CASES]!r}:
    ours.step(torch.ones(2, 3), torch.ones(2, 3), ours.initial_state(torch.ones(2, 3)), 0.1)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
