"""Forward-only tuning: it finds what can be found, only asks for losses, and goes on where it was interrupted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sordino.errors import ConfigError, RunError
from sordino.private_tuning.search import SearchState, projection, prompts, tune
from sordino.private_tuning.search_settings import Search

SEARCH = Search(width=6, population=12, generations=40, scale=1.0)
START = torch.linspace(-1, 1, 15).view(3, 5)


def bowl(search: Search = SEARCH) -> tuple[Tensor, Tensor]:
    """A z, and the prompt that it makes."""
    z = torch.tensor([[0.5, -1.0, 0.3, 0.0, 0.8, -0.4]])
    return z, prompts(search, START, z)[0]


def distances(asked: Tensor) -> Tensor:
    return ((asked - bowl()[1]) ** 2).flatten(1).sum(1)


def test_it_finds_the_prompt_of_the_least_loss() -> None:
    prompt, found = tune(replace(SEARCH, generations=80), START, distances)
    torch.testing.assert_close(prompt, bowl()[1], rtol=0, atol=1e-2)
    assert found.least == pytest.approx(float(distances(prompt[None])), abs=1e-6)
    assert [len(generation) for generation in found.losses] == [12] * 80


def test_prompts_stay_in_the_projections_span() -> None:
    seen = []
    tune(SEARCH, START, lambda asked: (seen.append(asked), distances(asked))[1])  # type: ignore[func-returns-value]
    basis = projection(SEARCH, 3, 5).flatten(1)
    for asked in seen[:3]:
        moved = (asked - START).flatten(1)
        inside = moved @ torch.linalg.pinv(basis) @ basis
        torch.testing.assert_close(inside, moved, rtol=0, atol=1e-4)


def test_an_interrupted_search_ends_where_one_in_one_go_does() -> None:
    whole, _ = tune(SEARCH, START, distances)
    kept: list[str] = []

    def stops(asked: Tensor) -> Tensor:
        if len(kept) == 7:
            raise KeyboardInterrupt
        return distances(asked)

    with pytest.raises(KeyboardInterrupt):
        tune(SEARCH, START, stops, finished=lambda found: kept.append(found.to_json()))
    asked_again = []
    resumed, found = tune(
        SEARCH,
        START,
        lambda asked: (asked_again.append(len(asked)), distances(asked))[1],  # type: ignore[func-returns-value]
        SearchState.from_json(kept[-1]),
    )
    assert torch.equal(resumed, whole)
    assert asked_again == [12] * 33 + [1]  # no candidate is asked for twice; and the mean
    assert len(found.losses) == 40


def test_the_projection_is_the_seeds_and_of_the_stated_scale() -> None:
    wide = Search(width=200, scale=0.1)
    one, other = projection(wide, 8, 384), projection(wide, 8, 384)
    assert torch.equal(one, other)
    assert not torch.equal(one, projection(Search(width=200, scale=0.1, seed=1), 8, 384))
    z = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    moved = prompts(wide, torch.zeros(8, 384), z * 200**0.5 / z.norm())
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.1)


@pytest.mark.parametrize("width", [1, 6, 14, 15])
def test_no_direction_is_stretched(width: int) -> None:
    rows = projection(Search(width=width, scale=0.3), 3, 5).flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(width) * 0.09 * 15 / width, rtol=0, atol=1e-5)


def test_directions_are_uniform() -> None:
    """Without a choice of signs, the first entry of a row would have the sign that the decomposition gives it."""
    first = torch.stack([projection(Search(width=3, scale=1.0, seed=seed), 2, 3)[0, 0, 0] for seed in range(400)])
    assert abs(float((first > 0).double().mean()) - 0.5) < 0.1
    assert float(first.square().mean()) == pytest.approx(2 / 6, rel=0.2)  # rows of norm sqrt(2), in 6 dimensions


def test_the_mean_of_candidates_is_taken_where_it_is_better() -> None:
    search = replace(SEARCH, generations=5)
    prompt, found = tune(search, START, distances)
    assert found.least < min(min(generation) for generation in found.losses)
    assert float(distances(prompt[None])) == pytest.approx(found.least)

    _, found = tune(replace(search, generations=1), START, lambda asked: -(asked - START).flatten(1).norm(dim=1))
    assert found.least == min(found.losses[0])  # the further out the better, and a mean is further in


def test_without_a_generation_the_prompt_stays() -> None:
    prompt, found = tune(Search(width=4, population=6, generations=0), START, distances)
    assert torch.equal(prompt, START)
    assert found.least == float("inf")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RunError, match="3 candidates a generation where 12"):
        tune(SEARCH, START, distances, SearchState([[1.0, 2.0, 3.0]], [0.0] * 6))
    with pytest.raises(ConfigError, match=r"search.width = 16: must be at most the 15 numbers"):
        projection(Search(width=16), 3, 5)
    with pytest.raises(RunError, match="not finite"):
        tune(SEARCH, START, lambda asked: torch.full((len(asked),), float("nan")))
    with pytest.raises(RunError, match="damaged"):
        SearchState.from_json(b"{}")
