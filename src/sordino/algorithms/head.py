"""Head: the mean image feature of each class in place of its text feature, the same for all clients.

Every class has one direction, its clients' mean feature at unit norm, and an image's logits are its cosines with them
times the encoder's scale: nearest class means (Mensink et al., Distance-Based Image Classification, TPAMI 2013; Snell
et al., Prototypical Networks, NeurIPS 2017), here as posterior means given noisy sums (`sordino.privacy.statistics`).
With noise they are those of Differentially Private Prototypes (Wahdany et al., AAAI 2025), drawn to the text feature as
far as noise is large. A candidate that no client has statistics of has the hand-written prompt's text feature.

There is no prompt to learn, and no prior of a client. It shows what class means alone can do.
"""

from sordino.algorithms.base import ClientData, InitContext, MethodInfo
from sordino.algorithms.class_statistics import (
    Broadcast,
    ClientState,
    Server,
    StatisticsModel,
    Upload,
    broadcast,
    client_round,
    directions,
    numbers,
    schedule,
    server_init,
    server_round,
    statistics_of,
)
from sordino.algorithms.settings.head import Settings
from sordino.encoders.prompt_model import Prompt
from sordino.privacy.ledger import Disclosure

__all__ = ["Broadcast", "Server", "Upload", "broadcast", "client_round", "schedule", "server_init", "server_round"]

Model = StatisticsModel

ABOUT = MethodInfo(
    paper="Wahdany et al., Differentially Private Prototypes, AAAI 2025 (arXiv 2406.08039)",
    personal="nothing",
    shared="the mean image feature of each class",
    privacy="with noise on class sums, (epsilon, delta) for an image; without noise none",
    needs="text tower, image features",
    discloses=(
        Disclosure("each client's class sums and counts, to the server once", "upload"),
        Disclosure("the mean features of all clients' classes, to all", "mean"),
    ),
    server_uses="mean",
    trains=False,
    statistics=True,
)


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    statistics = statistics_of(data)
    if statistics.shared is None:
        raise ValueError("a method whose MethodInfo has server_uses = 'mean' needs the means over all clients")
    everybody = directions(statistics.shared).expand(len(statistics.counts), -1, -1)
    return ClientState({"directions": everybody, "classes": numbers(statistics, init)})


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {name: part[:1] for name, part in state.prompt.items()}  # all clients have the same
