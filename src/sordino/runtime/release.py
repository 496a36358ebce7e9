"""The release of class statistics before the first round: its messages, and what both ends do with them.

1. The server asks; each client answers with its matrix, with its own noise or, to a trusted server, without. Under a
   secure sum it answers with nothing, and the sum's messages follow.
2. The server tells what all releases say together. From then on a client trains on what was released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sordino.algorithms.base import Broadcast, Upload, named_tensors
from sordino.privacy.ledger import Release
from sordino.privacy.secure_mean import ServerSums, SumVectors, sum_parties
from sordino.privacy.statistics.mechanism import FIELD, StatisticsMechanism
from sordino.privacy.statistics.posterior import Observed
from sordino.randomness import Randomness, system_bytes
from sordino.runtime import messages
from sordino.runtime.messages import MessageError, RoundHeader, UploadHeader
from sordino.secure import Carrier, Party, Refusal, answered

RELEASE_ROUND = 0  # the number of the release among the rounds
OWN = "own"  # the clients' own matrices, in what a stack of clients keeps of a release
SESSION_BYTES = 16


@dataclass(frozen=True)
class Matrix(Upload):
    """A client's class statistics.

    Attributes:
        matrix: [K, C, 1 + r].
    """

    matrix: Tensor


@dataclass(frozen=True)
class Pooled(Broadcast):
    """The statistics that all clients' releases tell together; fields are those of `Observed`, without leading axes.

    Attributes:
        statistics: name to tensor.
    """

    statistics: Mapping[str, Tensor]


def pooled_message(observed: Observed | None) -> Broadcast:
    """Return the message of pooled statistics, or an empty one if nothing is pooled."""
    return Broadcast() if observed is None else Pooled(vars(observed))


def pooled_like(mechanism: StatisticsMechanism, device: torch.device) -> Broadcast:
    """Return a message with the names, types and shapes that were agreed."""
    if not mechanism.joins:
        return Broadcast()
    classes, width = mechanism.shape
    shapes = {"sums": (classes, width - 1)}
    names = [entry.name for entry in fields(Observed)]
    return Pooled({name: torch.zeros(*shapes.get(name, (classes,)), device=device) for name in names})


def matrix_like(mechanism: StatisticsMechanism, device: torch.device) -> Upload:
    """Return an upload with the names, types and shapes that were agreed."""
    if not mechanism.uploads_matrices:
        return Upload()
    kind = torch.float64 if mechanism.uploads_exact else torch.float32
    return Matrix(torch.zeros(1, *mechanism.shape, dtype=kind, device=device))


@dataclass(frozen=True)
class ServerRelease:
    """The server's side of a release.

    Attributes:
        pooled: what all releases tell together, or None.
        releases: what the ledger enters.
    """

    pooled: Observed | None
    releases: list[Release]


def collect(
    mechanism: StatisticsMechanism,
    link: Carrier,
    randomness: Randomness,
    name: str,
    device: torch.device,
) -> ServerRelease:
    """Ask all clients for their statistics, add them up, and tell what they say together.

    Args:
        mechanism: of the run.
        link: carries messages to clients, by number.
        randomness: of the server's noise.
        name: of the release, for the ledger.
        device: that computes.

    Raises:
        MessageError: a client did not answer, or its answer is not what was agreed.
        SecureError: the secure sum failed; nothing was opened.
    """
    clients = len(mechanism.inputs.sizes)
    session = system_bytes(SESSION_BYTES).hex() if mechanism.in_shares else ""
    headers = [RoundHeader(RELEASE_ROUND, client, clients, session) for client in range(clients)]
    like = matrix_like(mechanism, device)
    answers = _asked(link, {client: messages.encode(Broadcast(), header) for client, header in enumerate(headers)})
    parts = [named_tensors(_decoded(client, answers[client], like)) for client in range(clients)]
    matrices = torch.cat([part["matrix"] for part in parts]) if mechanism.uploads_matrices else torch.zeros(0)
    total, charged = None, None
    if mechanism.in_shares:
        sums = ServerSums(mechanism.settings, session, clients, link, {})
        total, charged = mechanism.summed_in_shares(sums)
        total = total.to(device)
    elif mechanism.multipliers.total is not None:
        total = mechanism.summed(matrices, randomness)
    pooled = mechanism.pooled(matrices, total) if mechanism.joins else None
    message = pooled_message(pooled)
    _asked(link, {client: messages.encode(message, header) for client, header in enumerate(headers)})
    return ServerRelease(pooled, mechanism.released(name, charged))


class ClientsRelease:
    """A stack of clients' side of a release.

    Args:
        mechanism: of the run.
        features, labels: [N, D] and [N], the table of images.
        rows: K lists of row numbers.
        numbers: [K], the clients' numbers.
        randomness: of the clients' noise and samples.
        persons: [N], whose images they are, or None.

    Attributes:
        released: name to tensor, what the clients keep of the release; None until the server has told all of it.
    """

    def __init__(
        self,
        mechanism: StatisticsMechanism,
        features: Tensor,
        labels: Tensor,
        rows: Sequence[Tensor],
        numbers: Sequence[int],
        randomness: Randomness,
        persons: Tensor | None = None,
    ) -> None:
        self._mechanism, self._numbers, self._device = mechanism, list(numbers), features.device
        self._exact, self._own = mechanism.matrices(features, labels, rows, randomness, persons)
        self._randomness = randomness
        self._parties: dict[int, Party] = {}
        self._asked = False
        self.released: dict[str, Tensor] | None = None

    def handle(self, contents: Mapping[int, bytes]) -> list[tuple[int, bytes | Refusal]]:
        """Return the clients' replies to the server's messages, by client.

        Raises:
            MessageError: a message is not what was agreed.
        """
        if not all(messages.opens_round(content) for content in contents.values()):
            pairs = [(client, self._parties.get(client), content) for client, content in contents.items()]
            nobody = Refusal("this client is in no secure sum")
            return [(client, answered(party, content) if party else nobody) for client, party, content in pairs]
        if sorted(contents) != self._numbers:
            raise MessageError(f"a release of clients {sorted(contents)}, where {self._numbers} are here")
        headers = [messages.round_header(contents[client]) for client in self._numbers]
        everyone = len(self._mechanism.inputs.sizes)
        for client, header in zip(self._numbers, headers, strict=True):
            if (header.round, header.place, header.clients) != (RELEASE_ROUND, client, everyone):
                raise MessageError(f"client {client}'s statistics were not released, and it is asked for {header}")
        if self.released is not None:
            raise MessageError(f"clients {self._numbers} have released their statistics, and do so once")
        if not self._asked:
            return self._upload(headers[0].session, everyone)
        return self._end([contents[client] for client in self._numbers])

    def _upload(self, session: str, everyone: int) -> list[tuple[int, bytes | Refusal]]:
        mechanism, self._asked = self._mechanism, True
        if mechanism.in_shares:
            vectors = [SumVectors(mechanism.terms, {FIELD: self._exact})]
            parties = sum_parties(mechanism.settings, vectors, self._randomness, session, self._numbers, everyone)
            self._parties = dict(zip(self._numbers, parties, strict=True))
        sent = self._exact if mechanism.uploads_exact else self._own
        header = UploadHeader(RELEASE_ROUND)
        uploads: list[Upload] = [Upload()] * len(self._numbers)
        if mechanism.uploads_matrices:
            assert sent is not None
            uploads = [Matrix(matrix[None]) for matrix in sent]
        encoded = [messages.encode(upload, header) for upload in uploads]
        return list(zip(self._numbers, encoded, strict=True))

    def _end(self, contents: Sequence[bytes]) -> list[tuple[int, bytes | Refusal]]:
        like = pooled_like(self._mechanism, self._device)
        pooled = next(messages.decode(content, like) for content in contents)
        own = {} if self._own is None else {OWN: self._own}
        self._exact = torch.zeros(0)  # no longer needed
        self.released = own | (dict(pooled.statistics) if isinstance(pooled, Pooled) else {})
        return [(client, messages.encode(Upload(), UploadHeader(RELEASE_ROUND))) for client in self._numbers]


def pooled_of(released: Mapping[str, Tensor]) -> Observed | None:
    """Return the pooled statistics in what clients keep of a release, or None."""
    rest = {name: tensor for name, tensor in released.items() if name != OWN}
    return Observed(**rest) if rest else None


def _asked(link: Carrier, contents: Mapping[int, bytes]) -> dict[int, bytes]:
    answers = dict(link(contents))
    for client in contents:
        answer = answers.get(client)
        if not isinstance(answer, bytes):
            reason = f": {answer.reason}" if isinstance(answer, Refusal) else ""
            raise MessageError(f"client {client} did not release its statistics{reason}")
    return {client: answer for client, answer in answers.items() if isinstance(answer, bytes)}


def _decoded(client: int, content: bytes, like: Upload) -> Upload:
    try:
        if (number := messages.upload_header(content).round) != RELEASE_ROUND:
            raise MessageError(f"it is of round {number}")
        return messages.decode(content, like)
    except MessageError as error:
        raise MessageError(f"client {client}'s statistics are refused: {error}") from None
