"""Initial contexts: words, random vectors, or both."""

from collections.abc import Callable

import torch
from torch import Tensor

from sordino.errors import ConfigError

# As in CoOp (Zhou et al., 2022), from which all methods here descend.
RANDOM_STANDARD_DEVIATION = 0.02
FREQUENT_WORDS = (
    "the of and to in a is that was it for on with as be at by this from or an are not have but one all they which you "
    "we were her his their there been has when who will more no if out so said what up its about into than them can "
    "only other new some could time these two may then do first any my now such like our over man me even most made"
)


def initial_context(text: str, embed: Callable[[str], Tensor], noise: Tensor) -> Tensor:
    """Return a context [..., M, E]: random vectors, the last of them replaced by embeddings of hand-written words.

    Args:
        text: words that end the context, next to the class name; empty for a context that is random
            throughout.
        embed: text to its token embeddings [W, E]; W is at most M.
        noise: [..., M, E] standard normal numbers.

    Raises:
        ConfigError: the words do not fit into the context.
    """
    return _ending(RANDOM_STANDARD_DEVIATION * noise, text, embed)


def vocabulary_context(
    text: str,
    length: int,
    embed: Callable[[str], Tensor],
    draw: Callable[[int], Tensor],
) -> Tensor:
    """Return a context [M, E]: embeddings of frequent words, the last of them replaced by hand-written words.

    Args:
        text: words that end the context, next to the class name; may be empty.
        length: M; no word comes twice before all have come once.
        embed: text to its token embeddings [W, E].
        draw: W to [W] random numbers; their order is the order of the words.

    Raises:
        ConfigError: the words do not fit into the context.
    """
    words = embed(FREQUENT_WORDS)
    order = draw(len(words)).argsort().to(words.device)
    repetitions = -(-length // len(words))
    return _ending(words[order.repeat(repetitions)[:length]], text, embed)


def _ending(context: Tensor, text: str, embed: Callable[[str], Tensor]) -> Tensor:
    """Replace the end of a context [..., M, E] by hand-written words, if there are any."""
    if not text:
        return context
    words, length = embed(text).to(context), context.shape[-2]
    if len(words) > length:
        raise ConfigError(
            "initial_context",
            text,
            f"has {len(words)} tokens, more than context_length = {length}",
        )
    tail = words.expand(*context.shape[:-2], -1, -1)
    return torch.cat([context[..., : length - len(words), :], tail], dim=-2)
