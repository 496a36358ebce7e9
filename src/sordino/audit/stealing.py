"""Prompt stealing: the part of a client's personal prompt that others can reconstruct.

Another client sees the broadcast, and the public start of the personal part; it uses these in the victim's place. The
server sees more. If a context is a sum, p = p_G + p_L, the gradient by p_G that a client uploads *is* the gradient by
its whole context. With it the server repeats the victim's steps: personal parameters reach the loss through the context
alone, so their gradients follow by the chain rule. The server lacks the victim's own randomness, here the projections
by which DP-FPL draws its factors (Tran et al., ICLR 2025), and draws others instead. If personal gradients are noised
apart from shared ones, it lacks that noise too.

A stolen prompt is no failure of differential privacy. That protects each example, of which the stolen prompt tells no
more than the uploads did. The attack shows if "personal" means "kept to oneself".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms.base import ClientState, RoundContext, map_tensors, named_tensors, put, take
from sordino.audit.subject import Subject, contexts_of, coop
from sordino.audit.wiretap import Message, no_data, repeated, same_end
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.gradients import Batch, Gradient, Parameters, PromptOf
from sordino.randomness import Streams, derive_key
from sordino.runtime.local import LocalRuntime

DRAWS = 8  # of the thief's own randomness; the reconstructions are averaged


@dataclass(frozen=True)
class Theft:
    """A stolen prompt, compared with the victim's.

    Attributes:
        cosine: of the stolen and the true change of the personal part since its start; 0 if nothing was stolen.
        agreement: share of the test images that both prompts give the same class.
        local_accuracy: of the stolen prompt, on the victim's own classes.
    """

    cosine: float
    agreement: float
    local_accuracy: float


@dataclass(frozen=True)
class Victim:
    """One client and the thefts of its prompt.

    Attributes:
        client: its number.
        local_accuracy: of its own prompt.
        by_client: by another client, from the broadcast alone.
        by_server: by the server, which replays uploads with randomness of its own.
        by_server_with_luck: by a server that drew the victim's randomness; this separates the two causes of the gap.
    """

    client: int
    local_accuracy: float
    by_client: Theft
    by_server: Theft
    by_server_with_luck: Theft


@dataclass(frozen=True)
class Stealing:
    """The results of prompt stealing.

    Attributes:
        reason: the reason why there is nothing to steal, or nothing to steal it from; None if there is.
        same_run: true if the repeated run, whose uploads were recorded, ended at the run's state. With noise from the
            operating system it does not, and its own prompts are the victims.
        victims: every client.
    """

    reason: str | None
    same_run: bool = True
    victims: tuple[Victim, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def steal(subject: Subject, seed: int) -> Stealing:
    """Steal every client's prompt, as another client and as the server.

    1. Repeat the run with its own seed, and record everything that reaches the server.
    2. Replay every client's rounds from the public start, as the server, several times, and average.
    3. Compare stolen prompts with the victims', under the last broadcast.

    Args:
        subject: the run.
        seed: of the thief's own randomness.
    """
    runtime = subject.runtime
    reason = inapplicable(runtime)
    if reason is not None:
        return Stealing(reason)
    training, messages = repeated(subject)
    start = subject.begun().clients
    seeds = [derive_key(seed, "thief", draw) for draw in range(DRAWS)]
    with_other_draws = _mean([replayed(runtime, messages, start, thief) for thief in seeds])
    with_same_draws = replayed(runtime, messages, start, runtime.seed)
    broadcast = runtime.algorithm.broadcast(training.server)

    def contexts(states: Any) -> Tensor:
        return contexts_of(runtime.algorithm.prompt(broadcast, states))

    judge = _Judge.of(subject, contexts(training.clients), contexts(start))
    thefts = [judge.compare(contexts(states)) for states in (start, with_other_draws, with_same_draws)]
    victims = tuple(
        Victim(client, accuracy, *(theft[client] for theft in thefts)) for client, accuracy in enumerate(judge.accuracy)
    )
    return Stealing(None, same_end(training, subject.training), victims)


def inapplicable(runtime: LocalRuntime) -> str | None:
    """Return the reason why nothing can be stolen from this method's uploads; None if something can."""
    about = runtime.algorithm.ABOUT
    if not about.trains or about.personal == "nothing":
        return "no client has a prompt of its own; the shared one is known to all participants"
    if not fields(runtime.algorithm.Upload):
        return "nothing that was learned leaves a client, so neither the server nor other clients learn of its prompt"
    if not about.averages or not coop(runtime):
        return "the upload is not a gradient of the context"
    return None


@dataclass(frozen=True)
class Replayed:
    """Gradients by a method's parameters, computed from an observed gradient by the context.

    They are called as `sordino.privacy.gradients.Gradients` are, and ignore the batch.

    Attributes:
        observed: [K, M, E].
    """

    observed: Tensor

    def __call__(self, prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.enable_grad():
            context = contexts_of(prompt_of({**leaves, **fixed}))
        gradients = torch.autograd.grad(context, list(leaves.values()), self.observed.to(context))
        no_losses = self.observed.new_zeros(len(self.observed))
        return Gradient(dict(zip(leaves, gradients, strict=True)), no_losses)


@dataclass(frozen=True)
class _ThiefStreams(Streams):
    """Randomness of a party that has the draws common to all parties, and draws the clients' own with another seed."""

    thief: int = 0

    def generators(self, purpose: str) -> list[np.random.Generator]:
        return Streams(self.thief, self.round, self.clients, self.device).generators(purpose)


def replayed(runtime: LocalRuntime, messages: Sequence[Message], start: ClientState, thief: int) -> ClientState:
    """Return the clients' states as the server reconstructs them, by the method's own `client_round`.

    A client that takes several steps a round uploads their mean gradient, which is then used for each step.
    """
    states, device = start, runtime.data.features.device
    uploaded = next(iter(runtime.algorithm.ABOUT.averages.values()))
    for message in messages:
        if not message.clients:
            continue
        stack = torch.tensor(message.clients, device=device)
        streams = _ThiefStreams(runtime.seed, message.number, message.clients, device, thief)
        _, after = runtime.algorithm.client_round(
            runtime.settings,
            message.broadcast,
            take(states, stack),
            no_data(runtime, len(message.clients)),
            Replayed(message.upload[uploaded]),
            RoundContext(message.number, runtime.rounds, streams),
        )
        states = put(states, stack, after)
    return states


def _mean(states: Sequence[ClientState]) -> ClientState:
    named = [named_tensors(state) for state in states]
    return map_tensors(states[0], lambda name, _: torch.stack([tensors[name] for tensors in named]).mean(0))


@dataclass(frozen=True)
class _Judge:
    """Compares prompts with the victims'.

    Attributes:
        model, features, labels: the test images [T, D] and [T].
        weights: [K, T], the clients' local splits.
        true, start: [K, M, E], the victims' prompts, and the same with the personal part as it started.
        predicted: [K, T], by the victims' prompts.
        accuracy: of the victims' prompts, on each local split.
    """

    model: PromptModel
    features: Tensor
    labels: Tensor
    weights: Tensor
    true: Tensor
    start: Tensor
    predicted: Tensor
    accuracy: list[float]

    @classmethod
    def of(cls, subject: Subject, true: Tensor, start: Tensor) -> _Judge:
        rows = torch.from_numpy(subject.task.test)
        features, labels = subject.features[rows], subject.labels[rows].cpu()
        weights, model = torch.from_numpy(subject.task.local), subject.runtime.model
        predicted = _predictions(model, true, features)
        accuracy = _weighted(predicted == labels, weights)
        return cls(model, features, labels, weights, true, start, predicted, accuracy)

    def compare(self, stolen: Tensor) -> list[Theft]:
        """Compare stolen prompts [K, M, E], one for each victim, with the victims'."""
        predicted = _predictions(self.model, stolen, self.features)
        stolen_change, true_change = ((prompts - self.start).flatten(1).double() for prompts in (stolen, self.true))
        cosines = F.cosine_similarity(stolen_change, true_change).tolist()
        agreement = (predicted == self.predicted).double().mean(1).tolist()
        accuracy = _weighted(predicted == self.labels, self.weights)
        return [Theft(*figures) for figures in zip(cosines, agreement, accuracy, strict=True)]


def _predictions(model: PromptModel, contexts: Tensor, features: Tensor) -> Tensor:
    """Return the class [K, T] that each prompt gives each image, on the CPU."""
    return torch.cat([model.predict(context[None], features).argmax(-1).cpu() for context in contexts])


def _weighted(correct: Tensor, weights: Tensor) -> list[float]:
    values: list[float] = (correct.double() * weights).sum(1).tolist()
    return values
