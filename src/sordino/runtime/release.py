"""The release of class statistics before the first round: its messages, and what both ends do with them.

1. The server asks; each client answers with its sums, with its own noise or, to a trusted server, without. Under a
   secure sum it answers with nothing, and the sum's messages follow. If there is a center, its sums come first, and the
   server tells them when it asks for the rest.
2. The server tells what all releases say together. From then on a client trains on what was released.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from sordino.algorithms.base import Broadcast, Upload, named_tensors
from sordino.privacy.ledger import Release
from sordino.privacy.statistics.estimates import Released
from sordino.privacy.statistics.mechanism import CENTER, MATRIX, SCATTER, StatisticsMechanism
from sordino.privacy.statistics.posterior import Observed
from sordino.privacy.uploads.secure_mean import ServerSums, SumVectors, sum_parties
from sordino.randomness import Randomness, system_bytes
from sordino.runtime import messages
from sordino.runtime.messages import MessageError, RoundHeader, UploadHeader
from sordino.secure import Carrier, Party, Refusal, answered

# Returns a part's sum with the server's noise: the one that was kept before, or else what is drawn, once it is kept.
Keep = Callable[[str, Callable[[], Tensor]], Tensor]

RELEASE_ROUND = 0  # the number of the release among the rounds
SESSION_BYTES = 16


@dataclass(frozen=True)
class Sums(Upload):
    """A client's sums.

    Attributes:
        sums: part of the release to [K, ...].
    """

    sums: Mapping[str, Tensor]


@dataclass(frozen=True)
class Told(Broadcast):
    """All that clients' releases tell together, so far: names are those of `Released.tensors`.

    Attributes:
        statistics: name to tensor, without leading axes.
    """

    statistics: Mapping[str, Tensor]


def told(statistics: Mapping[str, Tensor]) -> Broadcast:
    """Return the message that tells statistics, or an empty one if there are none."""
    return Told(statistics) if statistics else Broadcast()


def told_like(mechanism: StatisticsMechanism, stage: int, device: torch.device) -> Broadcast:
    """Return a message with the names, types and shapes that were agreed.

    Args:
        mechanism: of the run.
        stage: how many stages have been answered.
        device: where its tensors are.
    """
    if not mechanism.joins or not stage:
        return Broadcast()
    if stage < len(mechanism.stages):
        return Told({CENTER: torch.zeros(mechanism.part_shape(CENTER), device=device)})
    classes, width = mechanism.shape
    shapes: dict[str, tuple[int, ...]] = {entry.name: (classes,) for entry in fields(Observed)}
    shapes["sums"] = (classes, width - 1)
    if SCATTER in mechanism.stages[-1]:
        shapes[SCATTER] = mechanism.part_shape(SCATTER)
    return Told({name: torch.zeros(shape, device=device) for name, shape in shapes.items()})


def sums_like(mechanism: StatisticsMechanism, stage: int, device: torch.device) -> Upload:
    """Return an upload with the names, types and shapes that were agreed; see `told_like`."""
    if not mechanism.uploads_sums:
        return Upload()
    kind = torch.float64 if mechanism.uploads_exact else torch.float32
    shapes = {part: (1, *mechanism.part_shape(part)) for part in mechanism.stages[stage]}
    return Sums({part: torch.zeros(shape, dtype=kind, device=device) for part, shape in shapes.items()})


def sums_fields(mechanism: StatisticsMechanism) -> list[str]:
    """Return the names of the tensors in which a client's sums leave it, over all stages; in a secure sum masked."""
    if not mechanism.joins:
        return []
    parts = [part for stage in mechanism.stages for part in stage]
    return list(named_tensors(Sums({part: torch.zeros(0) for part in parts})))


@dataclass(frozen=True)
class ServerRelease:
    """The server's side of a release.

    Attributes:
        statistics: what all releases tell together.
        releases: what the ledger enters.
    """

    statistics: Released
    releases: list[Release]


def drawn_anew(part: str, draw: Callable[[], Tensor]) -> Tensor:
    """Keep nothing: for a server that tells nobody anything before its state is saved."""
    return draw()


def collect(
    mechanism: StatisticsMechanism,
    link: Carrier,
    randomness: Randomness,
    run: str,
    device: torch.device,
    keep: Keep = drawn_anew,
) -> ServerRelease:
    """Ask all clients for their statistics, add them up, and tell what they say together.

    Args:
        mechanism: of the run.
        link: carries messages to clients, by number.
        randomness: of the server's noise.
        run: the run's name, for the ledger.
        device: that computes.
        keep: holds what the server noised from the moment before it is told. Else a server that tries again would tell
            the same sums with other noise, and nobody would count that.

    Raises:
        MessageError: a client did not answer, or its answer is not what was agreed.
        SecureError: the secure sum failed; nothing was opened.
    """
    clients = len(mechanism.inputs.sizes)
    session = system_bytes(SESSION_BYTES).hex() if mechanism.in_shares else ""
    headers = [RoundHeader(RELEASE_ROUND, client, clients, session) for client in range(clients)]

    def ask(message: Broadcast) -> dict[int, bytes]:
        known_to_all = messages.on_host(message)
        return _asked(link, {client: messages.encode(known_to_all, header) for client, header in enumerate(headers)})

    sums = ServerSums(mechanism.settings, session, clients, link, {}) if mechanism.in_shares else None
    known, charged = Released(), {}
    for stage, parts in enumerate(mechanism.stages):
        like, answers = sums_like(mechanism, stage, device), ask(told(known.tensors))
        uploads = [_decoded(client, answers[client], like) for client in range(clients)]
        each = {part: _stacked(uploads, part).to(device) for part in parts}
        totals: dict[str, Tensor | None] = {}
        for part in parts:
            totals[part] = None
            if sums is not None:
                total, charged[part] = mechanism.summed_in_shares(part, sums)
                totals[part] = total.to(device)
            elif not mechanism.by_client:
                totals[part] = keep(part, partial(mechanism.summed, part, each[part], randomness)).to(device)
            elif part != MATRIX and mechanism.joins:
                totals[part] = each[part].sum(0)
        if (center := totals.get(CENTER)) is not None:
            known = replace(known, center=center)
        if MATRIX in parts and mechanism.joins:
            pooled = mechanism.pooled(replace(known, own=each[MATRIX]), totals[MATRIX])
            known = replace(known, pooled=pooled, scatter=totals.get(SCATTER))
    ask(told({name: tensor for name, tensor in known.tensors.items() if name != CENTER}))
    return ServerRelease(known, mechanism.released(run, charged))


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
        released: what the clients keep of the release; None until the server has told all of it.
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
        self._table, self._persons = (features, labels), persons
        self._rows = mechanism.sampled(rows, randomness, persons)  # once, for all parts
        self._randomness = randomness
        self._parties: dict[int, Party] = {}
        self._stage = 0  # how many were answered
        self._known = Released()
        self.released: Released | None = None

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
        like = told_like(self._mechanism, self._stage, self._device)
        decoded = [messages.decode(contents[client], like) for client in self._numbers]
        message = decoded[0]  # all clients of a stack are told the same
        told_now = message.statistics if isinstance(message, Told) else {}
        news = {name: tensor.to(self._device) for name, tensor in told_now.items()}
        if self._stage == len(self._mechanism.stages):
            return self._end(news)
        if CENTER in news:
            self._known = replace(self._known, center=news[CENTER])
        return self._upload(headers[0].session, everyone)

    def leave_sums(self) -> None:
        """Take no part in a secure sum that was asked for so far.

        Its messages may have left already. Parties that are made again have the same vector, with the same noise, and
        other keys: a server that opens one sum with all of them, and one without a client, has that client's alone.
        """
        self._parties = {}

    def _upload(self, session: str, everyone: int) -> list[tuple[int, bytes | Refusal]]:
        mechanism, parts = self._mechanism, self._mechanism.stages[self._stage]
        self._stage += 1
        centers = mechanism.centers(self._known, self._numbers)
        exact = {part: mechanism.exact(part, *self._table, self._rows, self._persons, centers) for part in parts}
        own = {part: mechanism.with_own_noise(part, sums, self._randomness) for part, sums in exact.items()}
        if mechanism.in_shares:
            vectors = [SumVectors(mechanism.terms(part), {part: sums}) for part, sums in exact.items()]
            ends = sum_parties(mechanism.settings, vectors, self._randomness, session, self._numbers, everyone)
            self._parties = dict(zip(self._numbers, ends, strict=True))
        if MATRIX in parts:
            self._known = replace(self._known, own=own[MATRIX])
        elif not mechanism.joins:
            self._known = replace(self._known, own_center=own[CENTER])
        uploads: list[Upload] = [Upload()] * len(self._numbers)
        if mechanism.uploads_sums:
            uploaded = exact if mechanism.uploads_exact else own
            sent = {part: _on_host(uploaded[part]) for part in parts}
            uploads = [Sums({part: sent[part][place][None] for part in parts}) for place in range(len(self._numbers))]
        encoded = [messages.encode(upload, UploadHeader(RELEASE_ROUND)) for upload in uploads]
        return list(zip(self._numbers, encoded, strict=True))

    def _end(self, news: Mapping[str, Tensor]) -> list[tuple[int, bytes | Refusal]]:
        self._table = (torch.zeros(0), torch.zeros(0))  # no longer needed
        self.released = Released.of(self._known.tensors | dict(news))
        return [(client, messages.encode(Upload(), UploadHeader(RELEASE_ROUND))) for client in self._numbers]


def _on_host(sums: Tensor | None) -> Tensor:
    """Return all clients' sums [K, ...] on the CPU, in one copy."""
    assert sums is not None
    return sums.cpu()


def _stacked(uploads: Sequence[Upload], part: str) -> Tensor:
    """Return all clients' sums [K, ...] of a part; empty if they upload none."""
    parts = [upload.sums[part] for upload in uploads if isinstance(upload, Sums)]
    return torch.cat(parts) if parts else torch.zeros(0)


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
