"""DP-Residual: the hand-written prompt's class features, moved toward the client's class means, plus its class prior.

Client k has for class c the mean feature of its images, as far as noisy statistics tell it; where they do not, the mean
over all clients, and behind it the text feature (`sordino.privacy.statistics`). With the text feature t_c of the
hand-written prompt and the mean's direction m_kc, the class feature is

    normalize(t_c + strength (m_kc - t_c)),

and the logit has the log prior of `class-prior`. A candidate without statistics has the feature t_c and the prior 0.

Relatives. TaskRes (Yu et al., Task Residual for Tuning Vision-Language Models, CVPR 2023) learns such a residual of the
class features by gradients, with the text features fixed. Tip-Adapter (Zhang et al., ECCV 2022) adds a memory of single
image features to the logits. Here the residual is read off class sums, so one release of these is all that privacy pays
for, and there are no rounds.

A shared context could be learned beside the residual by federated averaging. It was tried without noise, on seeds 10
and 11, and is left out. On Caltech-101 (`examples/dp_fpl_tradeoff_caltech.toml`, 8 rounds) local, neighbor and novel
accuracy are 97.7, 88.8 and 44.4% with it, and 97.7, 89.2 and 44.4% without. On digits (20 rounds) it adds 0.7 points of
local accuracy where clients have two classes each, and 2.8 under Dirichlet(0.3), where a prior of 0 gives about as
much.

Choose `prior` for what clients are asked: it trades accuracy on other clients' classes for that on their own
(docs/results.md).
"""

from typing import Any, Self

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
    log_prior,
    numbers,
    prompt,
    schedule,
    server_init,
    server_round,
    statistics_of,
)
from sordino.algorithms.settings.dp_residual import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
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


class Model(StatisticsModel):
    """The common model, with the strength of the residual from the settings."""

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.prompt_text, settings.residual)


ABOUT = MethodInfo(
    paper="none; relatives are TaskRes (Yu et al., CVPR 2023) and Tip-Adapter (Zhang et al., ECCV 2022)",
    personal="a residual of each class's feature, and the logarithm of its class frequencies",
    shared="the mean image feature of each class",
    privacy="with noise on class sums and counts, (epsilon, delta) for an image; without noise none",
    needs="text tower, image features",
    discloses=(
        Disclosure("each client's class sums and counts, to the server once", "upload"),
        Disclosure("the mean features of all clients' classes, to all", "mean"),
        Disclosure("each client's class means and class frequencies, where its prompt is published", "memory"),
    ),
    server_uses="mean",
    trains=False,
    statistics=True,
)


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    statistics = statistics_of(data)
    return ClientState(
        {
            "directions": directions(statistics.means),
            "prior": log_prior(statistics, settings.prior),
            "classes": numbers(statistics, init),
        }
    )
