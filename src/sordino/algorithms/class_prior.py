"""Class prior: the hand-written prompt, and each client's own class frequencies added to its logits.

Logits for a client whose classes are not equally frequent are corrected by the logarithm of their frequencies (Saerens
et al., Adjusting the Outputs of a Classifier to New a Priori Probabilities, Neural Computation 2002). Of n images of a
class, with kappa = max(1, the deviation of the noise on n), a client adds

    weight log((n + kappa) / kappa)

to the logit of the class. Nothing is learned of the features of any image. So this is a baseline for personalization:
where clients hold different classes and are tested on their own, most of a personal method's gain may be the prior.
Nothing is sent: a client uses its own counts. Candidates that the client's statistics are not about have the prior 0,
as have classes that it holds no image of.
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
    log_prior,
    numbers,
    prompt,
    schedule,
    server_init,
    server_round,
    statistics_of,
)
from sordino.algorithms.settings.class_prior import Settings
from sordino.privacy.ledger import Disclosure

__all__ = [
    "Broadcast",
    "Server",
    "Upload",
    "broadcast",
    "client_round",
    "prompt",
    "schedule",
    "server_init",
    "server_round",
]

Model = StatisticsModel

ABOUT = MethodInfo(
    paper="Saerens et al., Neural Computation 2002 (adjusting outputs to new a priori probabilities)",
    personal="the logarithm of its class frequencies, added to the logits",
    shared="nothing; every client uses the hand-written prompt",
    privacy="images stay; no guarantee on what the published class frequencies tell about them",
    needs="text tower, image features",
    discloses=(Disclosure("each client's class frequencies, where its prompt is published", "memory"),),
    server_uses="nothing",
    trains=False,
    statistics=True,
    counts_only=True,
)


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    statistics = statistics_of(data)
    return ClientState({"prior": log_prior(statistics, settings.prior), "classes": numbers(statistics, init)})
