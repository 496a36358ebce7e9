"""Fed-BBPT: clients learn a generator of prompts by zeroth order; the server averages it.

Lin, Sun, Shi, Wang, Huang, Shen, Tao, Efficient Federated Prompt Tuning for Black-Box Large Pre-trained Models, 2023
(arXiv 2310.03123). The model is an interface that gives losses of prompts. A client downloads the generator, takes some
steps along gradients that it estimates from losses, and sends the generator back.

No public code of it was found. For images the paper takes over BlackVIP (Oh et al., CVPR 2023, arXiv 2303.14773), whose
public code settles the optimizer, SPSA with gradient correction: the mean estimate g of a few directions, then
m <- beta m + g and a step of -a_t (g + beta m), where a_t = a / (t + o)^alpha and the distance of the two measurements
is c_t = c / t^gamma. The number t of a step counts on over rounds; m starts afresh in each, as in the other methods
here. The defaults of o, alpha, gamma, beta, c and the number of directions are that code's.

Three defaults are not. BlackVIP's triggers are uniform on [0, 0.1], and its a is 0.01. In two layers hidden units then
are near 0.06. A step of the last layer moves the prompt by a times the sum of their squares, 5e-4 times the gradient:
in 60 steps the prompt for photographs (PACS) moved by 0.08, and had a length of 2. Triggers here are uniform on
[-1, 1], so hidden units are of order one and tell positions apart, and a is 0.1. The estimate's squared error grows
with the number of parameters, so triggers and the hidden layer have width 4, not 16.

What differs. BlackVIP's generator makes a picture that is added to the pixels. Here it makes the context of the text
tower, as in all methods of the text side: each position has a trigger vector, as BlackVIP's decoder has one, and two
layers that positions share decode it. The last layer starts at zero, so the first prompt is the words. The prompt does
not depend on the image; `feddpg` has a generator that does. One answer serves all directions of a step, so it is one
release. Noise on a difference of losses is divided by 2 c like the difference: with noise, take a larger `smoothing`,
and a `privacy.clip` near the differences that are to be kept. Clients send the change of the generator.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.settings.fed_bbpt import Settings
from sordino.algorithms.zeroth_order import both_sides, directions_of, estimate
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.privacy.forward.losses import Losses, Question
from sordino.privacy.ledger import Disclosure
from sordino.prompts.contexts import vocabulary_context

ABOUT = MethodInfo(
    paper="Lin et al., Fed-BBPT, 2023 (arXiv 2310.03123)",
    personal="nothing",
    shared="a generator of the prompt",
    privacy="images stay, and no gradient is taken; no guarantee on what the generator tells about them",
    needs="text tower, forward only",
    discloses=(
        Disclosure("each client's change of the generator, to the server every round", "upload"),
        Disclosure("the averaged generator, to all", "mean"),
    ),
    server_uses="mean",
    forward_only=True,
)


@dataclass(frozen=True)
class Model(PromptModel):
    """CoOp's model, of generated contexts.

    Attributes:
        start: [M, E], the words to which the generator's output is added.
    """

    start: Tensor

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        words = vocabulary_context(
            settings.initial_context, settings.context_length, encoder.embed, lambda count: torch.arange(count)
        )
        return cls(encoder, classes, words)

    def context(self, prompt: Prompt) -> Tensor:
        """Return the contexts [P, M, E] of generators."""
        parts = {name: part.to(self.start) for name, part in named_parts(prompt).items()}
        hidden = torch.tanh(parts["trigger"] @ parts["hidden"] + parts["bias"][..., None, :])  # [P, M, h]
        generated: Tensor = hidden @ parts["out"]
        return self.start + generated

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.text_features(self.context(prompt))

    def flops(self, prompt: Prompt, images: int) -> float:
        return self.encoder.text_flops(1, len(self.start), self.classes)


@dataclass(frozen=True)
class Server(base.Server):
    generator: dict[str, Tensor]  # trigger [M, r], hidden [r, h], bias [h], out [h, E]


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    generator: dict[str, Tensor]  # likewise


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """A client keeps no state."""


@dataclass(frozen=True)
class Upload(base.Upload):
    change: dict[str, Tensor]  # of the generator by the local steps, each [K, ...]
    weight: Tensor  # [K], its weight in the average


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    draw, latent, hidden = init.streams.common_normal, settings.latent_width, settings.hidden_width
    trigger = draw("trigger", settings.context_length, latent)
    generator = {
        "trigger": torch.erf(trigger / 2**0.5),  # uniform on [-1, 1]
        "hidden": draw("hidden layer", latent, hidden) / latent**0.5,
        "bias": torch.zeros(hidden, device=trigger.device),
        "out": torch.zeros(hidden, init.context_width, device=trigger.device),
    }
    return Server(generator)


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    return ClientState()


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.generator)


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    losses: Losses,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    start = {name: value.expand(len(data), *value.shape) for name, value in broadcast.generator.items()}
    parameters, moments = dict(start), {name: torch.zeros_like(value) for name, value in start.items()}
    batches = data.batches(settings.local_steps, settings.batch_size or None, round_context.streams)
    for step, batch in enumerate(batches):
        number = (round_context.round - 1) * settings.local_steps + step + 1
        smoothing = settings.smoothing / number**settings.smoothing_decay
        rate = settings.step_size / (number + settings.step_offset) ** settings.step_decay
        directions = directions_of(parameters, settings.directions, round_context, step)
        found = losses(Question(dict), both_sides(parameters, directions, smoothing), {}, batch).losses[:, 0]
        for name, gradient in estimate(found, directions, smoothing).items():
            moments[name] = settings.momentum * moments[name] + gradient
            parameters[name] = parameters[name] - rate * (gradient + settings.momentum * moments[name])
    return Upload({name: parameters[name] - start[name] for name in start}, data.weights), state


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server({name: value + uploads.mean(f"change.{name}") for name, value in server.generator.items()})


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {name: value[None] for name, value in broadcast.generator.items()}
