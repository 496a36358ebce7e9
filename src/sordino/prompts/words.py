"""Prompts that are words: a vocabulary whose words are single tokens of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.errors import ConfigError
from sordino.prompts.contexts import FREQUENT_WORDS

# Words for pictures and what they show.
PICTURE_WORDS = (
    "photo picture image photograph drawing painting sketch cartoon art print poster scan close view scene object "
    "thing number digit letter sign animal plant person face food car texture pattern shape line color black white "
    "gray red green blue yellow brown bright dark clear low high small large big little round long old new good bad "
    "real clean"
)


@dataclass(frozen=True)
class Vocabulary:
    """Words by number.

    Attributes:
        words: V of them, each once.
        table: [V, E], their embeddings.
    """

    words: tuple[str, ...]
    table: Tensor

    @classmethod
    def of(cls, text: str, embed: Callable[[str], Tensor]) -> Vocabulary:
        """Return the words of a text that are one token each; of an empty text, those of the lists here.

        Args:
            text: words, separated by spaces.
            embed: text to its token embeddings [W, E].

        Raises:
            ConfigError: fewer than two of them are one token.
        """
        wanted = list(dict.fromkeys((text or f"{FREQUENT_WORDS} {PICTURE_WORDS}").split()))
        found = [(word, embedded) for word in wanted if len(embedded := embed(word)) == 1]
        if len(found) < 2:
            allowed = f"{len(found)} of the words are one token of this encoder; name at least two that are"
            raise ConfigError("vocabulary", text, allowed)
        return cls(tuple(word for word, _ in found), torch.cat([embedded for _, embedded in found]))

    def numbers(self, text: str, length: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Return a prompt [M] of word numbers, int64: drawn words, the last of them replaced by given ones.

        Args:
            text: words that end the prompt; may be empty.
            length: M.
            draw: V to [V] random numbers; their order is the order of the words.

        Raises:
            ConfigError: a given word is not in the vocabulary, or they do not fit.
        """
        given = text.split()
        if unknown := [word for word in given if word not in self.words]:
            allowed = f"{unknown[0]!r} is no word of the vocabulary that is one token; add it there, or leave it out"
            raise ConfigError("initial_context", text, allowed)
        if len(given) > length:
            raise ConfigError("initial_context", text, f"has {len(given)} words, more than context_length = {length}")
        order = draw(len(self.words)).argsort().cpu()
        drawn = order.repeat(-(-length // len(order)))[: length - len(given)]
        return torch.cat([drawn, torch.tensor([self.words.index(word) for word in given], dtype=torch.int64)])

    def text(self, numbers: Tensor) -> str:
        """Return a prompt [M] of word numbers as text."""
        return " ".join(self.words[number] for number in numbers.tolist())
