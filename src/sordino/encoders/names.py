"""Checks for texts that a tokenizer cannot tell apart, or does not know."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sordino.errors import EncoderError, SordinoWarning

SHOWN = 3  # names in a warning


def check_names(
    reader: str,
    what: str,
    names: Sequence[str],
    tokens: Sequence[Sequence[int]],
    nothing: Sequence[int],
    unknown: Sequence[bool],
) -> None:
    """Refuse names that have the same tokens, and warn of unknown words.

    Two names in a script that the tokenizer does not know may read the same. Candidates with equal
    tokens have equal features under any prompt, so accuracy between them is that of guessing.

    Args:
        reader: the owner of the tokenizer, for messages.
        what: the kind of name, for messages ("class name").
        names: N names that compete with one another.
        tokens: each name's tokens, as a text tower gets them.
        nothing: the tokens of an empty name.
        unknown: for each name, whether it has words that became unknown tokens.

    Raises:
        EncoderError: two names have the same tokens, or one has none.
    """
    seen: dict[tuple[int, ...], int] = {}
    for index, (name, ids) in enumerate(zip(names, tokens, strict=True)):
        if list(ids) == list(nothing):
            raise EncoderError(f"{reader} reads nothing in {what} {name!r}; give it a name in words that it knows")
        first = seen.setdefault(tuple(ids), index)
        if first != index:
            why = ", with words that it does not know" if unknown[index] else ""
            raise EncoderError(
                f"{reader} reads {what}s {names[first]!r} and {name!r} as the same{why}; give them names that differ "
                "in more than case, accents and spaces, in a language that it knows"
            )
    warn_unknown(reader, what, [name for name, has in zip(names, unknown, strict=True) if has])


def warn_unknown(reader: str, what: str, texts: Sequence[str]) -> None:
    """Warn that these texts have words that became unknown tokens, if there are any texts."""
    if not texts:
        return
    shown = ", ".join(map(repr, texts[:SHOWN]))
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    warnings.warn(
        f"{reader} does not know words of {what} {shown}{more}: they are all one unknown token to it; use a language "
        "that it knows",
        SordinoWarning,
        stacklevel=3,
    )
