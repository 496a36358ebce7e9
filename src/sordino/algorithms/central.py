"""Central: one context learned on all clients' images in one place. It is the upper bound for federated methods.

The training is `local`'s, with the federation as a single client. The difference is that the data are pooled, which
federated learning exists to avoid.
"""

from dataclasses import replace

from sordino.algorithms.base import MethodInfo
from sordino.algorithms.local import ABOUT as LOCAL
from sordino.algorithms.local import (
    Broadcast,
    ClientState,
    Server,
    Upload,
    broadcast,
    client_init,
    client_round,
    prompt,
    schedule,
    server_init,
    server_round,
)
from sordino.algorithms.settings.local import Settings
from sordino.privacy.ledger import Disclosure

__all__ = [
    "ABOUT",
    "Broadcast",
    "ClientState",
    "Server",
    "Settings",
    "Upload",
    "broadcast",
    "client_init",
    "client_round",
    "prompt",
    "schedule",
    "server_init",
    "server_round",
]

ABOUT: MethodInfo = replace(
    LOCAL,
    paper="Zhou et al., CoOp, IJCV 2022, on pooled data",
    personal="nothing",
    shared="all images, in one place",
    privacy="none: every image is handed over",
    discloses=(
        Disclosure("every client's images, all to one place", "images"),
        Disclosure("the prompt, where it is published", "prompt"),
    ),
    pools_data=True,
)
