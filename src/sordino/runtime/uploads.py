"""The uploads of a round, as the server reads them: what every participant sent, and who is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import (
    AnyUpload,
    ClippedUpload,
    CompressedUpload,
    StatedWeight,
    Upload,
    map_tensors,
    named_tensors,
)
from sordino.errors import RunError
from sordino.privacy.ledger import Ledger
from sordino.privacy.mechanism import WEIGHT, Average
from sordino.privacy.uploads.dithered import KEY_BYTES
from sordino.runtime import messages
from sordino.runtime.facts import Federation, stacked
from sordino.runtime.messages import MessageError, NotFinite
from sordino.secure import Refusal

Replies = Mapping[int, bytes | Refusal]  # by client


class RoundError(RunError):
    """A round failed after something was released.

    Attributes:
        ledger: the ledger, including the round's releases.
    """

    def __init__(self, message: str, ledger: Ledger) -> None:
        super().__init__(message)
        self.ledger = ledger


class Diverged(RoundError):
    """Training reached numbers that are not finite."""


@dataclass(frozen=True)
class Uploads:
    """The uploads of a round.

    Attributes:
        clients: whose they are, ascending.
        parts: the tensors of each, [1, ...].
        rates: for each gradient that was taken, the clients' sampling rates.
        lost: those who were asked and did not upload what was agreed, with the reason of each.
        sent: bytes of the first.
    """

    clients: list[int]
    parts: list[dict[str, Tensor]]
    rates: list[list[float]]
    lost: dict[int, MessageError]
    sent: int

    @property
    def reasons(self) -> dict[int, str]:
        """Return why uploads are lost, in words, by client."""
        return {client: str(error) for client, error in self.lost.items()}


def read_uploads(federation: Federation, number: int, chosen: Sequence[int], replies: Replies) -> Uploads:
    """Return the uploads of a round's participants, and whose are lost.

    Args:
        federation: what all parties agreed on.
        number: of the round.
        chosen: the participants, ascending.
        replies: those that came.
    """
    uploads = Uploads([], [], [], {}, 0)
    rates: list[tuple[float, ...]] = []
    for client in chosen:
        try:
            header, part = _read(federation, number, client, replies)
            if rates and len(header.rates) != len(rates[0]):
                raise MessageError(f"{len(header.rates)} gradients were taken, and {len(rates[0])} by others")
        except MessageError as error:
            uploads.lost[client] = error
            continue
        uploads.clients.append(client)
        uploads.parts.append(part)
        rates.append(header.rates)
    together = [list(drawn) for drawn in zip(*rates, strict=True)]
    first = replies[uploads.clients[0]] if uploads.clients else b""
    sent = len(first) if isinstance(first, bytes) else 0
    return Uploads(uploads.clients, uploads.parts, together, uploads.lost, sent)


def error_of(number: int, client: int, error: MessageError, ledger: Ledger) -> RoundError:
    """Return the error of a round that needed an upload that is lost."""
    if isinstance(error, NotFinite):
        return Diverged(f"training diverged in round {number}: client {client}'s {error}", ledger)
    if isinstance(error, NoAnswer):
        return RoundError(f"round {number}: client {client} {error}", ledger)
    return RoundError(f"round {number}: client {client}'s upload is refused: {error}", ledger)


class NoAnswer(MessageError):
    """A client did not answer."""


def stacked_upload(federation: Federation, parts: Sequence[Mapping[str, Tensor]]) -> tuple[Upload, Tensor | None]:
    """Return the participants' uploads as one stack, and the bits of an adaptive clip.

    Under a secure sum the server sees the weights only. All other tensors are NaN, so that no code can use them
    unnoticed.
    """
    schema, like = federation.schemas.upload, _agreed(federation)
    count, below_clip = len(parts), None
    received = stacked(parts, named_tensors(like))
    if isinstance(like, CompressedUpload):
        codes = {name.removeprefix("codes."): part for name, part in received.items() if name.startswith("codes.")}
        public = {name.removeprefix("public."): part for name, part in received.items() if name.startswith("public.")}
        noised = federation.mechanism.restored(codes, received["key"])
        own = named_tensors(schema)
        received = public | {name: part.to(own[name]) for name, part in noised.items()}
    if isinstance(like, ClippedUpload):
        below_clip = received.pop("below_clip")
        received = {name.removeprefix("upload."): tensor for name, tensor in received.items()}
    hidden = isinstance(like, StatedWeight) or type(like) is Upload

    def seen(name: str, tensor: Tensor) -> Tensor:
        if name in received or not hidden:
            return received[name]
        return torch.full((count, *tensor.shape[1:]), math.nan, dtype=tensor.dtype, device=tensor.device)

    return map_tensors(schema, seen), below_clip


def means_alone(federation: Federation, upload: AnyUpload, average: Average) -> base.Uploads[AnyUpload]:
    """Return uploads of which a method gets means and nothing else, where a trusted server adds noise to these.

    What it looked at besides would leave without noise. So all learned tensors are NaN. Where clients are sampled,
    there is a row for each client of the federation, as the size of the sample has no noise either.

    Args:
        federation: what all parties agreed on.
        upload: of the participants, each tensor [n, ...].
        average: (field, values [n, ...], weights [n]) to the mean with noise.
    """
    received, sampled = named_tensors(upload), federation.mechanism.samples_clients

    def shown(name: str, tensor: Tensor) -> Tensor:
        rows = federation.clients if sampled else len(tensor)
        if name == WEIGHT:
            return tensor.new_ones(rows) if sampled else tensor
        nothing = math.nan if tensor.is_floating_point() else -1
        return tensor.new_full((1, *tensor.shape[1:]), nothing).expand(rows, *tensor.shape[1:])

    each = map_tensors(upload, shown)
    there = named_tensors(each)

    def mean(name: str, values: Tensor, weights: Tensor) -> Tensor:
        assert values is there[name], f"{name}: a method gets means of fields as they were uploaded"
        return average(name, received[name], received[WEIGHT])

    return base.Uploads(each, mean)


def _agreed(federation: Federation) -> Upload:
    """Return an upload with the names, types and shapes that were agreed."""
    bits = torch.zeros(1) if federation.mechanism.broadcasts_clip else None
    keys = torch.zeros(1, KEY_BYTES, dtype=torch.uint8) if federation.mechanism.compresses else None
    return federation.upload_message(federation.schemas.upload, bits, keys)


def _read(
    federation: Federation, number: int, client: int, replies: Replies
) -> tuple[messages.UploadHeader, dict[str, Tensor]]:
    """Return one client's upload.

    Raises:
        MessageError: it did not answer, or not as was agreed, or other batches were drawn than planned.
    """
    reply = replies.get(client)
    if reply is None:
        raise NoAnswer("did not answer")
    if isinstance(reply, Refusal):
        raise NoAnswer(f"did not answer: {reply.reason}")
    if federation.mechanism.compresses:
        reply = messages.inflated(reply, _agreed(federation))
    header = messages.upload_header(reply)
    if header.round != number:
        raise MessageError(f"it is of round {header.round}")
    # A robust aggregation handles numbers that are not finite; a mean does not.
    strict = federation.runtime.aggregation == "mean"
    part = named_tensors(messages.decode(reply, _agreed(federation), finite=strict))
    mechanism = federation.mechanism
    try:  # a client's end checks this too, before it sends; this one may be another program
        mechanism.check(mechanism.entered([client], [[rate] for rate in header.rates]), [client])
    except RunError as error:
        raise MessageError(str(error)) from None
    return header, part
