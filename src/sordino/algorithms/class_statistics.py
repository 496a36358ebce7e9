"""The common part of methods on class statistics: their model, and that they have no rounds.

A client's statistics are made before the first round, with noise or without (`sordino.privacy.statistics`). All that
these methods do with them is arithmetic, so they compute no gradient and send nothing more. A client's prompt is up to
two tensors about classes, and the classes' numbers, by which they are found again among other candidates:

    directions [P, C, D]   unit-norm features of classes, zero where nothing is known
    prior [P, C]           added to the logits
    classes [P, C]         see `sordino.prompts.by_class`

The hand-written prompt is not among them: it is a setting. Where noise is large, expected means are the text features
of "a photo of a", whatever that setting is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, RoundContext, Schedule, Uploads
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.privacy.gradients import Gradients
from sordino.privacy.statistics.estimates import ClassStatistics
from sordino.prompts.by_class import at_candidates, class_numbers


@dataclass(frozen=True)
class StatisticsModel(PromptModel):
    """CoOp's model with the hand-written prompt, whose class features and logits a client's statistics change.

    With the hand-written prompt's class feature t and the client's direction m, a class has the feature
    normalize(t + strength (m - t)). A candidate that the prompt has no direction for has the feature t.

    Attributes:
        prompt_text: the words before the class name.
        strength: of the residual m - t; 0 leaves t, 1 is m.
    """

    prompt_text: str = "a photo of a"
    strength: float = 1.0

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, settings.prompt_text)

    def class_features(self, prompt: Prompt) -> Tensor:
        parts = named_parts(prompt)
        text = self._hand_written.expand(len(parts["classes"]), -1, -1)
        if "directions" not in parts:
            return text
        directions, known = at_candidates(parts["directions"].to(text), parts["classes"], self._candidates)
        known = known & (directions != 0).any(-1)
        changed = F.normalize(text + self.strength * (directions - text), dim=-1)
        return torch.where(known[..., None], changed, text)

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        logits, parts = self.logits(features, images), named_parts(prompt)
        if "prior" not in parts:
            return logits
        prior, _ = at_candidates(parts["prior"].to(logits), parts["classes"], self._candidates)
        return logits + prior[:, None, :]

    def flops(self, prompt: Prompt, images: int) -> float:
        # The text tower works once for all prompts, see `_hand_written`.
        return 2.0 * images * len(self.classes) * self.encoder.feature_width

    @cached_property
    def _hand_written(self) -> Tensor:
        """Return t, [C, D]."""
        with torch.no_grad():
            return self.text_features(self.encoder.embed(self.prompt_text)[None])[0]

    @cached_property
    def _candidates(self) -> Tensor:
        """Return the candidates' numbers, [C]."""
        return class_numbers(self.classes.names, self.encoder.device)


def statistics_of(data: ClientData) -> ClassStatistics:
    """Return the clients' class statistics.

    Raises:
        ValueError: the runtime made none, though the method's ABOUT asks for them.
    """
    if data.statistics is None:
        raise ValueError("a method whose MethodInfo has statistics = True needs ClientData.statistics; there are none")
    return data.statistics


def directions(means: Tensor) -> Tensor:
    """Return class means [..., D] at unit norm; a mean of zero stays zero, as it has no direction."""
    return F.normalize(means, dim=-1)


def log_prior(statistics: ClassStatistics, weight: float) -> Tensor:
    """Return each client's log prior of the classes, up to a constant: weight log((n + kappa) / kappa), [K, C].

    n is the expected number of the client's examples of a class. kappa, at least 1, is the deviation of the noise on
    it. So a class without any has 0, and numbers that could be noise alone count for little.
    """
    kappa = statistics.count_deviation.clamp(min=1)[:, None]
    return weight * torch.log1p(statistics.counts.clamp(min=0) / kappa)


def numbers(statistics: ClassStatistics, init: InitContext) -> Tensor:
    """Return the numbers of the classes that statistics are about, one copy for each client: [K, C]."""
    found = class_numbers(init.class_names, statistics.counts.device)
    return found.expand(len(statistics.counts), -1).clone()


# A method without rounds, which sends nothing but its statistics.


@dataclass(frozen=True)
class Server(base.Server):
    """The server keeps no state."""


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    """The server tells nothing but what statistics are made of."""


@dataclass(frozen=True)
class ClientState(base.ClientState):
    prompt: Mapping[str, Tensor]  # each [K, ...], see the module


@dataclass(frozen=True)
class Upload(base.Upload):
    """Nothing but statistics leaves a client."""


def schedule(settings: Any) -> Schedule:
    return Schedule(0, None)


def server_init(settings: Any, init: InitContext) -> Server:
    return Server()


def broadcast(server: Server) -> Broadcast:
    return Broadcast()


def client_round(
    settings: Any,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    gradients: Gradients,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    return Upload(), state


def server_round(settings: Any, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return server


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return state.prompt
