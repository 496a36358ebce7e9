"""Versions that two parties tell each other with their first messages.

Both servers run one program, whose numbers must agree to the last bit, and messages have no form of their own for each
version. So all parties of a session run the same version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sordino
from sordino.errors import shortened

PROTOCOL = 1  # raised with every change of messages, or of what the servers compute
VERSIONS = "versions"  # key in the header of an end's first message


def own_versions() -> dict[str, Any]:
    """Return this party's versions, for a header."""
    return {"package": sordino.__version__, "protocol": PROTOCOL}


def other_version(header: Mapping[str, Any], party: str, own: str) -> str | None:
    """Compare the versions in a party's first message with one's own.

    Args:
        header: of the message.
        party, own: names of the other party and of this one.

    Returns:
        A sentence that names both versions, or None if they are equal.
    """
    theirs, ours = header.get(VERSIONS), own_versions()
    if theirs == ours:
        return None
    other = f"{party} runs {_named(theirs)}"
    return f"{other}, and {own} runs {_named(ours)}; install one version at all parties"


def _named(versions: Any) -> str:
    if not isinstance(versions, dict):
        return "an older sordino, which tells no version"
    package, protocol = (_plain(versions.get(key)) for key in ("package", "protocol"))
    return f"sordino {package} with protocol {protocol}"


def _plain(value: Any) -> str:
    """Return a version as text: as it is if it is plain, for it comes from another party."""
    text = str(value)
    return text if len(text) < 40 and text.isprintable() else shortened(text)
