"""A node's end: a question goes to the site's turn, and its answer goes back; errors of the site stay at the site."""

from __future__ import annotations

from flwr.app import Message

from sordino.errors import SordinoError
from sordino.flower.messages import answer, read_question
from sordino.progress import log
from sordino.sites.site import Site, refusal


def answered(site: Site, message: Message) -> Message | None:
    """Return the reply to a message; None to one that is no question.

    The name in a question is the one that the server's file has for this node's key.
    """
    try:
        asked = read_question(message)
    except ValueError as error:
        log.warning("the server sent %s; it is not answered", error)
        return None
    name = site.settings.name
    if asked.site != name:
        reason = f"this site's file says name = {name!r}, and the server's file has {asked.site!r} for its key"
        return answer(message, asked.token, refusal(f"{reason}; write the same in both"))
    try:
        content = site.turn(asked.content)
    except SordinoError as error:
        content = refusal(str(error))
    except Exception as error:
        # A failure of the program fails this one turn. Its text may tell of data, so it stays in the site's log.
        log.exception("the site failed")
        content = refusal(f"it failed with {type(error).__name__}; its own log says more")
    return answer(message, asked.token, content)
