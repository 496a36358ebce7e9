"""Transport plans: constraints, optimality, and POT as oracle."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sordino.prompts.optimal_transport import transport_plan

EXACT = {"iterations": 5000, "tolerance": 1e-12}


def costs(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


# Iterations contract by tanh(1 / r)^2 at worst with costs in [0, 2] (Franklin and Lorenz, 1989): 5,000 of them reach
# rounding with r = 0.3, and do not with 0.1.
@given(st.integers(1, 4), st.integers(1, 9), st.floats(0.1, 1.0), st.sampled_from([0.3, 0.5, 1.0]), st.integers(0, 99))
def test_a_plan_keeps_its_constraints(prompts: int, patches: int, mass: float, weight: float, seed: int) -> None:
    plan = transport_plan(costs(3, prompts, patches, seed=seed), mass, weight, **EXACT)
    assert (plan >= 0).all()
    torch.testing.assert_close(
        plan.sum(-1), torch.full((3, prompts), mass / prompts, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert (plan.sum(-2) <= 1 / patches + 1e-9).all()


@pytest.mark.parametrize("weight", [0.2, 0.5])
def test_balanced_transport_is_pots_sinkhorn(weight: float) -> None:
    cost = costs(4, 2, 6)
    plans = transport_plan(cost, 1.0, weight, **EXACT)
    for plan, one in zip(plans, cost, strict=True):
        expected = ot.sinkhorn(
            np.full(2, 1 / 2), np.full(6, 1 / 6), one.numpy(), weight, numItermax=10000, stopThr=1e-13
        )
        np.testing.assert_allclose(plan.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("mass", [0.3, 0.8])
def test_little_entropy_gives_the_linear_programme_of_pot(mass: float) -> None:
    """With a further prompt that takes what is left at no cost, the problem is balanced, and POT solves it exactly."""
    cost = costs(5, 2, 7, seed=3)
    plans = transport_plan(cost, mass, 0.002, iterations=200_000, tolerance=1e-10)
    for plan, one in zip(plans, cost, strict=True):
        with_rest = np.vstack([one.numpy(), np.zeros(7)])
        exact = ot.emd(np.array([mass / 2, mass / 2, 1 - mass]), np.full(7, 1 / 7), with_rest)[:2]
        assert (plan * one).sum() == pytest.approx((exact * one.numpy()).sum(), abs=2e-3)
        np.testing.assert_allclose(plan.numpy(), exact, atol=5e-3)


def test_the_plan_solves_the_problem_with_entropy() -> None:
    """Karush-Kuhn-Tucker: log T = (u + v - C) / r with u <= 0, and u = 0 for patches that have something left."""
    cost, weight, mass = costs(6, 3, 8, seed=5), 0.1, 0.6
    plan = transport_plan(cost, mass, weight, **EXACT)
    potentials = weight * plan.log() + cost  # u of the patch plus v of the prompt
    v = potentials.amax(-1, keepdim=True)
    u = (potentials - v).mean(-2)
    torch.testing.assert_close(potentials - v, u[:, None].expand_as(cost), rtol=0, atol=1e-8)
    left = 1 / 8 - plan.sum(-2)
    assert (left > -1e-9).all()
    assert (left > 1e-6).any()
    assert (u <= 1e-9).all()
    assert u[left > 1e-6].abs().max() < 1e-7


def test_leading_axes_are_solved_together() -> None:
    cost = costs(2, 3, 2, 5)
    together = transport_plan(cost, 0.8, 0.1, **EXACT)
    alone = torch.stack([torch.stack([transport_plan(c, 0.8, 0.1, **EXACT) for c in row]) for row in cost])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-12)


def test_a_tiny_entropy_weight_neither_overflows_nor_vanishes() -> None:
    plan = transport_plan(costs(2, 4).float(), 0.8, 1e-4, 1000, 1e-6)
    assert plan.isfinite().all()
    assert plan.sum() == pytest.approx(0.8, rel=1e-3)


def test_gradients_go_through_the_iterations() -> None:
    cost = costs(2, 4, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: transport_plan(c, 0.7, 0.3, iterations=40, tolerance=1e-14), cost)


def test_the_envelope_theorem() -> None:
    """The derivative of the least cost with entropy is the plan: why a method may take the plan as a constant."""
    cost, weight = costs(2, 5, seed=9).requires_grad_(), 0.2
    plan = transport_plan(cost, 0.7, weight, **EXACT)
    least = (plan * cost).sum() + weight * (plan * (plan.log() - 1)).sum()
    torch.testing.assert_close(torch.autograd.grad(least, cost)[0], plan.detach(), rtol=1e-5, atol=1e-8)


# Under a privacy mechanism, an image may not decide how far other images' plans converge.

LOOSE = {"iterations": 60, "tolerance": 1e-3}  # some problems end soon, some never


def slow_and_fast(problems: int, seed: int) -> Tensor:
    """Problems of which some converge at once, and some not in a hundred iterations."""
    spreads = 10.0 ** torch.linspace(-3, 0, problems, dtype=torch.float64)
    order = torch.randperm(problems, generator=torch.Generator().manual_seed(seed))
    return costs(problems, 2, 6, seed=seed) * spreads[order, None, None]


@given(st.integers(2, 12), st.integers(0, 999), st.sampled_from([0.01, 0.1]), st.sampled_from([0.8, 1.0]))
def test_a_plan_does_not_depend_on_the_problems_beside_it(problems: int, seed: int, weight: float, mass: float) -> None:
    """To the bit: each problem's numbers are reduced in the same order, whatever else is in the stack."""
    cost = slow_and_fast(problems, seed)
    together = transport_plan(cost, mass, weight, **LOOSE)
    alone = torch.stack([transport_plan(one, mass, weight, **LOOSE) for one in cost])
    assert torch.equal(together, alone)
    assert torch.equal(transport_plan(cost.flip(0), mass, weight, **LOOSE), together.flip(0))


def test_problems_end_at_different_iterations() -> None:
    """So that the test above compares what could differ: further iterations do change the plans that ended."""
    cost = slow_and_fast(8, 0)
    plans, further = (transport_plan(cost, 0.8, 0.01, iterations=60, tolerance=t) for t in (1e-3, 1e-12))
    moved = (plans - further).abs().amax((-2, -1)) / further.amax((-2, -1))
    assert float(moved.max()) > 1e-5
    assert float(moved.min()) == 0.0  # the slowest use all iterations in both


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_a_problem_that_is_not_finite_changes_no_other(bad: float) -> None:
    cost = slow_and_fast(6, 1)
    spoiled = cost.clone()
    spoiled[2, 0, 1] = bad
    others = [0, 1, 3, 4, 5]
    assert torch.equal(transport_plan(spoiled, **LOOSE)[others], transport_plan(cost, **LOOSE)[others])


def test_gradients_do_not_depend_on_the_problems_beside_either() -> None:
    """With all iterations unrolled; what parted early keeps its graph."""
    cost = slow_and_fast(5, 2).requires_grad_()
    weights = costs(5, 2, 6, seed=4)
    together = torch.autograd.grad((transport_plan(cost, 0.7, 0.05, **LOOSE) * weights).sum(), cost)[0]
    for one, weight, gradient in zip(cost.detach(), weights, together, strict=True):
        one = one.requires_grad_()
        alone = torch.autograd.grad((transport_plan(one, 0.7, 0.05, **LOOSE) * weight).sum(), one)[0]
        torch.testing.assert_close(gradient, alone, rtol=1e-12, atol=1e-15)
