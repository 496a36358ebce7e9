"""A site's node: it stays connected to its server, and answers one question after another, in this one process.

No app of Flower's is fetched or run here: whatever the server's operator submits, a node does nothing but its site's
turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from sordino.experiments.run_lock import held
from sordino.files import FREE_SPACE, write_atomically
from sordino.flower.answering import answered
from sordino.flower.connection import Connection, Dropped, Unreachable
from sordino.progress import log
from sordino.sites.rhythm import Rhythm
from sordino.sites.site import Site

POLL, SELDOM = 0.25, 2.0  # seconds between two questions for work; the second where none came for long
AGAIN = 3.0  # seconds until a server that is away is tried again
FOLDER, NUMBER = "node", "number.json"  # in the site's state: the number that the server gave this node


def serve(
    site: Site,
    server: str,
    authority: Path,
    key: ec.EllipticCurvePrivateKey,
    tell: Callable[[str], None] = log.info,
) -> None:
    """Answer a server's questions, for ever; where it is away, wait for it.

    Args:
        site: the site.
        server: host and port.
        authority: file with the certificate that the server's is checked with.
        key: this node's.
        tell: is given a line where the connection changes.

    Raises:
        RunError: another node of this site runs on this machine.
    """
    folder = site.state / FOLDER
    told = ""
    with held(folder, instead=False):
        while True:
            try:
                connection = Connection(
                    server, str(authority), key, site.settings.policy.most_bytes, _before(folder, server)
                )
            except Unreachable as error:
                if (now := f"{server}: {error}; trying on") != told:
                    tell(told := now)
                time.sleep(AGAIN)
                continue
            write_atomically(folder / NUMBER, json.dumps({server: connection.number}).encode(), FREE_SPACE)
            tell(f"{site.settings.name} is connected to {server}")
            told = ""
            try:
                _answer(site, connection)
            except Unreachable as error:
                tell(told := f"{server}: {error}; trying on")
            finally:
                connection.close()


def _answer(site: Site, connection: Connection) -> None:
    """Answer questions until the server is away.

    Raises:
        Unreachable: it is.
    """
    rhythm = Rhythm(POLL, SELDOM)
    while True:
        try:
            message = connection.receive()
            if message is None:
                time.sleep(rhythm.nothing())
                continue
            rhythm.asked()
            start = time.monotonic()
            reply = answered(site, message)
            if reply is not None:
                connection.send(reply, time.monotonic() - start)
                time.sleep(rhythm.answered())
        except Dropped as error:
            log.info("%s", error)


def _before(folder: Path, server: str) -> int | None:
    """Return the number that this node had at a server."""
    try:
        number = json.loads((folder / NUMBER).read_text(encoding="utf-8")).get(server)
    except (OSError, ValueError, AttributeError):
        return None
    return number if isinstance(number, int) else None
