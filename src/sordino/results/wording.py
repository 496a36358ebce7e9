"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import ROUND_CEILING, Context
from pathlib import PurePosixPath, PureWindowsPath

# Whom the secrecy of private tuning trusts, after "as long as".
ON_SHARES = "servers and dealer keep to the protocol and no two of the three combine what they know"


def rounded_up(value: float, digits: int = 3) -> str:
    """Return three digits, or more, never less than the value: a privacy loss must not look smaller than it is."""
    if math.isinf(value) or math.isnan(value):
        return "∞"
    rounded = float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(value)))
    return f"{rounded:.{max(digits, 6)}g}".replace("e-0", "e-")


def human_bytes(size: float) -> str:
    """Return a size in decimal units: 1 kB is 1,000 bytes."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Return a duration in seconds with one decimal: `9.7`, `1,234.5`."""
    return f"{seconds:,.1f}"


def listed(items: Iterable[object]) -> str:
    """Return items in words: `a`, `a and b`, `a, b and c`."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def dataset_name(source: str) -> str:
    """Return a data set's name, without a place on a disk: `imagefolder:photos` of `imagefolder:/home/kim/photos`.

    Pages for others show this. The folders above are their owner's affair: names of users, wards or projects.
    """
    scheme, colon, place = source.partition(":")
    on_the_hub = scheme == "hf" and not _is_absolute(place)
    name = f"{scheme}:{place_name(place)}" if colon and not on_the_hub else source
    return "".join(sign if sign.isprintable() else "?" for sign in name)[:200]


def place_name(path: str) -> str:
    """Return the last name of a path of any system, for readers whom the folders above do not concern."""
    return PureWindowsPath(path).name


def without_places(text: str, values: Iterable[object]) -> str:
    """Return a text in which those of some values that are absolute paths are their last names."""
    places = [value for value in values if isinstance(value, str) and _is_absolute(value)]
    for place in sorted(places, key=len, reverse=True):  # the deeper ones first, whose beginnings others may be
        text = text.replace(place, place_name(place))
    return text


def _is_absolute(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
