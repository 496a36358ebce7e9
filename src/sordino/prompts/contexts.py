"""Where a context starts: at words, at random vectors, or at both."""

from collections.abc import Callable

import torch
from torch import Tensor

from sordino.errors import ConfigError

RANDOM_STANDARD_DEVIATION = 0.02  # as in CoOp (Zhou et al., 2022), which all methods here descend from


def initial_context(text: str, embed: Callable[[str], Tensor], noise: Tensor) -> Tensor:
    """A context [..., M, E]: random vectors, the last of them replaced by the embeddings of hand-written words.

    Args:
        text: words that end the context, next to the class name; empty for a context that is random throughout.
        embed: text to its token embeddings [W, E]; W is at most M.
        noise: [..., M, E] standard normal numbers.

    Raises:
        ConfigError: the words do not fit into the context.
    """
    context = RANDOM_STANDARD_DEVIATION * noise
    if not text:
        return context
    words, length = embed(text).to(context), context.shape[-2]
    if len(words) > length:
        raise ConfigError("initial_context", text, f"has {len(words)} tokens, more than context_length = {length}")
    tail = words.expand(*context.shape[:-2], -1, -1)
    return torch.cat([context[..., : length - len(words), :], tail], dim=-2)
