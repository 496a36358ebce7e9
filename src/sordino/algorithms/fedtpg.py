"""FedTPG: a shared generator makes the context of the class names, so that it has one for new classes too.

Qiu, Li, Mummadi, Ganesh, Li, Peng, Lin, Federated Text-driven Prompt Generation for Vision-Language Models, ICLR 2024
(arXiv 2310.06123), section 4. T [C, D] are the text features of the bare class names. M learned queries Q [M, E] attend
to them, and a feed-forward layer makes the context of what they find:

    x = CrossAttention(LayerNorm(Q), LayerNorm(T)),    context = x + FeedForward(x).

All of the generator is shared and averaged; a client keeps nothing. Names that nobody trained on have a context by the
same generator. The order of the names does not matter, but which names are candidates together does.

As in the authors' code: four heads with an output layer and with biases (but for the keys, where a bias cancels in the
softmax), and no sum of queries and what they attend to; the feed-forward layer is LayerNorm, a linear layer to 8 E
numbers of which half gate the other half by GELU, and one back to E; M = 4; SGD of rate 0.003 with momentum 0.9, weight
decay 0.00001 and a cosine schedule, on batches of 128. Choices where that does not fit here: initial weights are normal
with the variance of torch's own; clients' optimizers start afresh each round; every client's context is generated of
all candidates of the task, not of its own classes alone, because all methods here choose among them all; the generator
reads names with the full stop that ends every sentence here, which the code's names lack; clients weigh by their
numbers of examples by default, where the code takes the plain mean of those selected, as `runtime.weighting =
"uniform"` does.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms.averaged import (
    Broadcast,
    ClientState,
    Server,
    Upload,
    broadcast,
    client_init,
    client_round,
    disclosures,
    prompt,
    schedule,
    server_round,
)
from sordino.algorithms.base import InitContext, MethodInfo
from sordino.algorithms.layers import linear, linear_weight
from sordino.algorithms.settings.fedtpg import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.errors import ConfigError
from sordino.prompts.contexts import RANDOM_STANDARD_DEVIATION

__all__ = [
    "Broadcast",
    "ClientState",
    "Server",
    "Upload",
    "broadcast",
    "client_init",
    "client_round",
    "prompt",
    "schedule",
    "server_round",
]

WIDER = 4  # times E, the width within the feed-forward layer

ABOUT = MethodInfo(
    paper="Qiu et al., FedTPG, ICLR 2024 (arXiv 2310.06123)",
    personal="nothing",
    shared="a generator, which makes the context of the class names",
    privacy="images stay; no guarantee on what the generator tells about them",
    needs="text tower",
    discloses=disclosures("the generator"),
    server_uses="mean",
)


@dataclass(frozen=True)
class Model(PromptModel):
    """CoOp's model with a context that a generator makes of the candidates' names.

    Attributes: heads: as in `Settings`.
    """

    heads: int = 4

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.heads)

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.text_features(self.context(named_parts(prompt)))

    def context(self, generator: dict[str, Tensor]) -> Tensor:
        """Return the contexts [P, M, E] that P generators make of the candidates' names."""
        names = self._names.to(generator["queries"])[None]  # [1, C, D]
        queries = _normalized(generator["queries"], generator, "query_norm")
        names = _normalized(names, generator, "name_norm")  # [P, C, D]
        query, key, value = (
            linear(given, generator, name).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [P, heads, ..., E / heads]
            for name, given in (("query", queries), ("key", names), ("value", names))
        )
        attention = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        found = linear((attention @ value).transpose(1, 2).flatten(2), generator, "output")  # [P, M, E]
        inner, gates = linear(_normalized(found, generator, "inner_norm"), generator, "inner").chunk(2, dim=-1)
        return found + linear(inner * F.gelu(gates), generator, "outer")

    def flops(self, prompt: Prompt, images: int) -> float:
        # The generator is a small part of one sentence in the text tower, of which there are C.
        return self.encoder.text_flops(1, named_parts(prompt)["queries"].shape[-2], self.classes)

    @cached_property
    def _names(self) -> Tensor:
        """Return T [C, D]."""
        with torch.no_grad():
            bare = torch.zeros(1, 0, self.encoder.context_width, device=self.encoder.device)
            return self.text_features(bare)[0]


def _normalized(x: Tensor, parts: dict[str, Tensor], name: str) -> Tensor:
    """Return x [P or 1, n, width] after P layer norms."""
    return F.layer_norm(x, x.shape[-1:]) * parts[name][:, None] + parts[f"{name}_bias"][:, None]


def check(settings: Settings, model: PromptModel, clients: int) -> None:
    """Refuse heads that do not share the width of a context.

    Raises:
        ConfigError: they do not.
    """
    width = model.encoder.context_width
    if width % settings.heads:
        raise ConfigError(
            "settings.fedtpg.heads", settings.heads, f"must divide the width of a context, {width} with this encoder"
        )


def server_init(settings: Settings, init: InitContext) -> Server:
    width, features = init.context_width, init.feature_width
    queries = init.streams.common_normal("queries", settings.context_length, width)
    generator = {"queries": RANDOM_STANDARD_DEVIATION * queries}
    layers = {
        "query": (width, width),
        "key": (width, features),
        "value": (width, features),
        "output": (width, width),
        "inner": (2 * WIDER * width, width),
        "outer": (width, WIDER * width),
    }
    for name, (outputs, inputs) in layers.items():
        generator[name] = linear_weight(init, name, outputs, inputs)
        if name != "key":
            generator[f"{name}_bias"] = torch.zeros(outputs).to(queries)
    for name, size in (("query_norm", width), ("name_norm", features), ("inner_norm", width)):
        generator[name] = torch.ones(size).to(queries)
        generator[f"{name}_bias"] = torch.zeros(size).to(queries)
    return Server(generator)
