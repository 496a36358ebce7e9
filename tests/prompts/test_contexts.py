import pytest
import torch

from sordino.errors import ConfigError
from sordino.prompts.contexts import RANDOM_STANDARD_DEVIATION, initial_context


def embed(text: str) -> torch.Tensor:
    return torch.arange(1.0, 1 + 3 * len(text.split())).view(-1, 3)


def test_words_stand_last_and_random_vectors_before_them() -> None:
    noise = torch.randn(2, 5, 3)
    context = initial_context("a photo", embed, noise)
    torch.testing.assert_close(context[:, 3:], embed("a photo").expand(2, 2, 3))
    torch.testing.assert_close(context[:, :3], RANDOM_STANDARD_DEVIATION * noise[:, :3])


def test_without_words_all_is_random() -> None:
    noise = torch.randn(5, 3)
    torch.testing.assert_close(initial_context("", embed, noise), RANDOM_STANDARD_DEVIATION * noise)


def test_words_that_do_not_fit_are_refused_with_both_lengths() -> None:
    with pytest.raises(ConfigError, match=r"'a b c' has|initial_context = 'a b c': has 3 tokens.*context_length = 2"):
        initial_context("a b c", embed, torch.zeros(2, 3))
