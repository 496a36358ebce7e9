import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.prompts.lowrank import factorize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 8), st.integers(0, 1000))
def test_product_and_residual_make_the_context_exactly(rank: int, seed: int) -> None:
    context = normal(8, 24, seed=seed)
    factors = factorize(context, normal(24, rank, seed=seed + 1))
    torch.testing.assert_close(factors.product() + factors.residual, context, rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.u.mT @ factors.u, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(factors.u.mT @ factors.residual, torch.zeros(rank, 24).double(), rtol=0, atol=1e-11)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_a_prompt_of_rank_k_is_its_own_best_approximation(rank: int, seed: int) -> None:
    context = normal(8, rank, seed=seed) @ normal(rank, 24, seed=seed + 1)
    factors = factorize(context, normal(24, rank, seed=seed + 2))
    left, values, right = torch.linalg.svd(context, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]  # Eckart and Young
    torch.testing.assert_close(factors.product(), best, rtol=1e-8, atol=1e-8)
    assert factors.residual.norm() < 1e-8 * context.norm()


def test_the_product_of_a_lower_rank_never_beats_the_best_one() -> None:
    context = normal(8, 24)
    values = torch.linalg.svdvals(context)
    for rank in range(1, 8):
        error = factorize(context, normal(24, rank, seed=rank)).residual.norm()
        assert values[rank:].norm() <= error < context.norm()


def test_a_stack_is_factorized_as_its_members_are() -> None:
    contexts, projections = normal(3, 8, 24), normal(3, 24, 4, seed=1)
    stacked = factorize(contexts, projections)
    for index in range(3):
        alone = factorize(contexts[index], projections[index])
        torch.testing.assert_close(stacked.u[index], alone.u)
        torch.testing.assert_close(stacked.v[index], alone.v)


def test_a_zero_context_stays_zero_and_finite() -> None:
    factors = factorize(torch.zeros(8, 24), normal(24, 4).float())
    assert factors.product().abs().max() == 0
    assert factors.u.isfinite().all()


def test_a_rank_above_the_length_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 9 is above"):
        factorize(normal(8, 24), normal(24, 9))
