"""The federation in one process: all clients are one stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms.base import Algorithm, ClientData, ClientState, Clock, Server, Start, named_tensors, put, take
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import RunError
from sordino.privacy.gradients import Batch, ContextOf, ExactGradients, Gradient, Gradients, Parameters
from sordino.randomness import Streams, derive_seed
from sordino.runtime import wire
from sordino.runtime.settings import RuntimeSettings


@dataclass(frozen=True)
class Training:
    """Where a run stands after a round; all that a checkpoint must hold."""

    round: int
    server: Server
    clients: ClientState


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round.

    Attributes:
        round: counted from 1.
        loss: mean over the participants of their mean cross-entropy, in nats. Known to a simulation only.
        participants: how many clients took part.
        upload_bytes, broadcast_bytes: of one client's messages, serialised.
    """

    round: int
    loss: float
    participants: int
    upload_bytes: int
    broadcast_bytes: int


class LocalRuntime:
    """Runs the rounds of a method over K simulated clients.

    Args:
        algorithm, settings: the method.
        model: the frozen model.
        features, labels: [N, D] and [N], the table that clients' rows refer to, on the encoder's device.
        rows: K sequences of row numbers, what each client holds.
        rounds: how many rounds a whole run has.
        runtime: the `[runtime]` settings.
        seed: of the run.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        settings: Any,
        model: PromptModel,
        features: Tensor,
        labels: Tensor,
        rows: Sequence[Sequence[int]],
        rounds: int,
        runtime: RuntimeSettings,
        seed: int,
    ) -> None:
        self.algorithm, self.settings, self.model = algorithm, settings, model
        self.rounds = rounds if algorithm.ABOUT.trains else 0
        self.runtime, self.seed = runtime, seed
        if algorithm.ABOUT.pools_data:
            rows = [[row for client in rows for row in client]]
        self.data = client_data(features, labels, rows, runtime.weighting)

    def start(self) -> Training:
        """The state before the first round."""
        encoder = self.model.encoder
        start = Start(encoder.embed, encoder.context_width, self._streams(0, range(len(self.data))))
        return Training(
            0, self.algorithm.server_init(self.settings, start), self.algorithm.client_init(self.settings, start)
        )

    def round(self, training: Training) -> tuple[Training, RoundRecord]:
        """The next round.

        Raises:
            RunError: training diverged.
        """
        number = training.round + 1
        chosen = self._participants(number)
        clock = Clock(number, self.rounds, self._streams(number, chosen.tolist()))
        gradients = _Recorded(self._gradients)
        broadcast = self.algorithm.broadcast(training.server)
        upload, clients = self.algorithm.client_round(
            self.settings,
            broadcast,
            take(training.clients, chosen),
            _take_data(self.data, chosen),
            gradients,
            clock,
        )
        server = self.algorithm.server_round(self.settings, training.server, upload, clock)
        after = Training(number, server, put(training.clients, chosen, clients))
        loss = gradients.mean_loss()
        if not (math.isfinite(loss) and _finite(after)):
            raise RunError(f"training diverged in round {number} (loss {loss}); lower the learning rate")
        one_upload = wire.encode(take(upload, torch.zeros(1, dtype=torch.int64, device=chosen.device)))
        record = RoundRecord(number, loss, len(chosen), len(one_upload), len(wire.encode(broadcast)))
        return after, record

    def contexts(self, training: Training) -> Tensor:
        """The clients' prompts [K, M, E], or the one that they share [1, M, E]."""
        return self.algorithm.prompt(self.algorithm.broadcast(training.server), training.clients)

    def disclosures(self) -> tuple[str, ...]:
        """What leaves clients without noise, each a phrase."""
        sizes = "how many examples each client holds, to the server every round"
        tells_sizes = self.runtime.weighting == "examples" and "weight" in {
            field.name for field in fields(self.algorithm.Upload)
        }
        return (*self.algorithm.ABOUT.discloses, *([sizes] if tells_sizes else []))

    @cached_property
    def _gradients(self) -> Gradients:
        return ExactGradients(self.model)

    def _streams(self, number: int, clients: Sequence[int]) -> Streams:
        return Streams(self.seed, number, clients, self.data.features.device)

    def _participants(self, number: int) -> Tensor:
        """Who takes part in a round, in the order of their numbers."""
        clients = len(self.data)
        count = max(1, round(self.runtime.participation * clients))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number, "participants"))
        return torch.randperm(clients, generator=generator)[:count].sort().values.to(self.data.features.device)


def client_data(features: Tensor, labels: Tensor, rows: Sequence[Sequence[int]], weighting: str) -> ClientData:
    """The clients' rows of a feature table, padded to the largest client."""
    counts = torch.tensor([len(each) for each in rows], device=features.device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(each) for each in rows], batch_first=True)
    weights = counts.float() if weighting == "examples" else torch.ones_like(counts, dtype=torch.float32)
    return ClientData(features, labels, padded.to(features.device), counts, weights)


def _take_data(data: ClientData, chosen: Tensor) -> ClientData:
    return replace(data, rows=data.rows[chosen], counts=data.counts[chosen], weights=data.weights[chosen])


def _finite(training: Training) -> bool:
    tensors = [*named_tensors(training.server).values(), *named_tensors(training.clients).values()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


class _Recorded:
    """Gradients whose losses are kept for the log."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients, self._losses = gradients, list[Tensor]()

    def __call__(self, context_of: ContextOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
        gradient = self._gradients(context_of, parameters, fixed, batch)
        self._losses.append(gradient.loss.mean())
        return gradient

    def mean_loss(self) -> float:
        return float(torch.stack(self._losses).mean())
