"""Parts of prompts are found by the names of classes."""

from __future__ import annotations

import torch

from sordino.prompts.by_class import at_candidates, class_number, class_numbers


def test_a_number_is_the_same_in_every_process_and_fits_an_int64() -> None:
    """Prompt files hold such numbers, so they may never change."""
    assert class_number("cat") == 3384531337138527105
    numbers = class_numbers([f"class {number}" for number in range(1000)])
    assert numbers.dtype == torch.int64
    assert len(numbers.unique()) == 1000
    assert (numbers >= 0).all()


def test_values_follow_their_classes() -> None:
    """Each prompt has an order of its own; a candidate may be asked for twice, or be unknown."""
    names = [["cat", "dog", "bird"], ["bird", "cat", "fish"]]
    classes = torch.stack([class_numbers(row) for row in names])
    values = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], [[3.5, 35.0], [1.5, 15.0], [4.5, 45.0]]])
    found, known = at_candidates(values, classes, class_numbers(["bird", "tree", "cat", "bird", "dog"]))
    assert known.tolist() == [[True, False, True, True, True], [True, False, True, True, False]]
    assert found[..., 0].tolist() == [[3.0, 0.0, 1.0, 3.0, 2.0], [3.5, 0.0, 1.5, 3.5, 0.0]]
    torch.testing.assert_close(found[..., 1], 10 * found[..., 0], rtol=0, atol=0)


def test_unknown_candidates_get_zeros_even_beside_numbers_that_are_not_finite() -> None:
    classes = class_numbers(["cat"])[None]
    found, known = at_candidates(torch.tensor([[float("nan")]]), classes, class_numbers(["dog"]))
    assert (found.tolist(), known.tolist()) == ([[0.0]], [[False]])


def test_a_prompt_that_knows_no_class_gives_zeros() -> None:
    found, known = at_candidates(torch.ones(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64), class_numbers(["cat"]))
    assert found.equal(torch.zeros(2, 1, 5))
    assert not known.any()
