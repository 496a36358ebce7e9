"""A site's end for a plain SuperNode of Flower's, which fetches and runs apps; `sordino flower node` does neither.

The variable SORDINO_SITE of the SuperNode's environment names the site's file.
"""

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sordino.flower.answering import answered
from sordino.flower.names import SITE_VARIABLE
from sordino.sites.settings import load_site
from sordino.sites.site import Site

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Answer one question."""
    site = Site(load_site(Path(os.environ[SITE_VARIABLE])))
    reply = answered(site, message)
    if reply is None:
        raise ValueError("this is no question of Sordino's")
    return reply
