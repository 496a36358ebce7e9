"""KgCoOp: a shared context whose class features are held near those of a hand-written prompt.

Yao, Zhang, Xu, Visual-Language Prompt Tuning with Knowledge-Guided Context Optimization, CVPR 2023 (arXiv 2303.13283),
section 3.2, here with federated averaging as in PromptFL. For each of C classes let w_c be the feature of the learned
context and t_c that of the hand-written prompt, both of unit norm. The loss is the cross-entropy plus

    lambda (1 / C) sum over c of (1 - cos(w_c, t_c)),

which is half of lambda times the mean squared distance. The paper writes the squared distance itself; its code has this
half, and lambda = 8 belongs to the code. With lambda = 0 the method is PromptFL.

Choices where paper and code differ or are silent. One hand-written prompt serves all data sets; the authors have one
for each. The context starts at random, as that of all methods here, and not at the hand-written words; set
`initial_context` to start there. The authors' context is four vectors long. The penalty depends on no image, so
mechanisms add no noise to it.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from sordino.algorithms import promptfl
from sordino.algorithms.base import MethodInfo
from sordino.algorithms.general_knowledge import GeneralKnowledgeModel
from sordino.algorithms.promptfl import (
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
from sordino.algorithms.settings.kgcoop import Settings
from sordino.encoders.base import ClassTokens, DualEncoder

__all__ = [
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

ABOUT: MethodInfo = replace(promptfl.ABOUT, paper="Yao et al., KgCoOp, CVPR 2023 (arXiv 2303.13283)")


@dataclass(frozen=True)
class Model(GeneralKnowledgeModel):
    """CoOp's model with a penalty on the distance to the hand-written prompt.

    Attributes: guidance: as in `Settings`.
    """

    guidance: float = 8.0

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.hand_written, settings.guidance)

    def penalty(self, features: Tensor) -> Tensor | None:
        if not self.guidance:
            return None
        cosines = (features * self._general.to(features)).sum(-1)  # [P, C]
        return self.guidance * (1 - cosines).mean(-1)
