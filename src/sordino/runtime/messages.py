"""Messages between a client and the server: the bytes of a Broadcast or an Upload, and of nothing else.

A message is one safetensors file. Its tensors are those that the method's type declares. Its header names the round and
carries the other facts that the two ends of a round exchange. Reading a message executes nothing and trusts nothing:
names, types, shapes and length must be those that were agreed, and every number must be finite.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from sordino.algorithms.base import Broadcast, Upload, map_tensors, named_tensors
from sordino.errors import RunError

AnyMessage = TypeVar("AnyMessage", Broadcast, Upload)

HEADER_BYTES = 65_536  # the largest header of a message
HEAD = "sordino"  # the one entry of a message's metadata: a JSON document
ROUND = "round"  # the header's entry in every broadcast and upload, and in no message of a protocol


class MessageError(RunError):
    """A message is not what was agreed."""


class NotFinite(MessageError):
    """A tensor of a message has a number that is not finite."""


@dataclass(frozen=True)
class RoundHeader:
    """The server's message to a client besides the broadcast's tensors.

    Attributes:
        round: the round's number, from 1.
        place: the client's place among the participants, from 0. Where these are a Poisson sample, its number.
        clients: the number of participants. Where these are a Poisson sample, that of all clients: the size of the
            sample would tell who else is in it.
        session: the session of the round's secure sums, in hexadecimal digits; empty if there are none.
    """

    round: int
    place: int
    clients: int
    session: str = ""


@dataclass(frozen=True)
class UploadHeader:
    """A client's message to the server besides the upload's tensors.

    Attributes:
        round: the round's number.
        rates: for each gradient that was taken, the sampling rate of the drawn batch; empty without sampling.
    """

    round: int
    rates: tuple[float, ...] = ()


def encode(message: Broadcast | Upload, header: RoundHeader | UploadHeader) -> bytes:
    """Return a message as safetensors bytes.

    Raises:
        TypeError: the value is not a message; nothing else that a client holds can be sent.
    """
    if not isinstance(message, Broadcast | Upload):
        kind = type(message).__name__
        raise TypeError(f"{kind} may not leave its party; only a Broadcast or an Upload may be sent")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(message).items()}
    return with_head(tensors, {name: value for name, value in vars(header).items() if value not in ("", ())})


def on_host(message: AnyMessage) -> AnyMessage:
    """Return a message on the CPU. Parts that are cut from it and encoded cost no further copy from another device."""
    return map_tensors(message, lambda _, tensor: tensor.detach().cpu())


def with_head(tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> bytes:
    """Return tensors as safetensors bytes, with JSON values by name; equal ones make equal bytes."""
    # One entry only: safetensors writes several in no fixed order.
    document = json.dumps(dict(head), sort_keys=True, separators=(",", ":"))
    return safetensors.torch.save(dict(tensors), metadata={HEAD: document})


def opens_round(content: bytes) -> bool:
    """Return whether bytes from the server are a broadcast that opens a round; protocol messages are not."""
    return ROUND in head_of(content)


def round_header(content: bytes) -> RoundHeader:
    """Read the header of a broadcast.

    Raises:
        MessageError: an entry is missing, unknown or of another type.
    """
    entries = head_of(content)
    _check_entries(entries, {"round", "place", "clients"}, {"session"})
    numbers = {name: _count(name, entries[name]) for name in ("round", "place", "clients")}
    session = entries.get("session", "")
    if not isinstance(session, str):
        raise MessageError(f"session {session!r} is not text")
    return RoundHeader(**numbers, session=session)


def upload_header(content: bytes) -> UploadHeader:
    """Read the header of an upload.

    Raises:
        MessageError: an entry is missing, unknown or of another type.
    """
    entries = head_of(content)
    _check_entries(entries, {"round"}, {"rates"})
    rates = entries.get("rates", [])
    if not (isinstance(rates, list) and all(isinstance(rate, float | int) and 0 <= rate <= 1 for rate in rates)):
        raise MessageError(f"rates {rates!r} are not a list of probabilities")
    return UploadHeader(_count("round", entries["round"]), tuple(map(float, rates)))


def decode(content: bytes, like: AnyMessage, *, finite: bool = True) -> AnyMessage:
    """Return a message of the same type as `like`, on the CPU.

    A round has a message of every client. They are stacked on the CPU, and moved to another device together.

    Args:
        content: bytes from another party.
        like: a message with the names, types and shapes that were agreed.
        finite: whether numbers that are not finite are refused.

    Raises:
        MessageError: the bytes are too many, or are no message; or a tensor is unknown, missing, or of another type or
            shape.
        NotFinite: a tensor has a number that is not finite.
    """
    agreed = named_tensors(like)
    longest = _longest(like)
    if len(content) > longest:
        raise MessageError(f"it has {len(content):,} bytes where at most {longest:,} were agreed")
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise MessageError(f"it is no message: {error}") from None
    unknown = sorted(tensors.keys() - agreed.keys())
    missing = sorted(agreed.keys() - tensors.keys())
    if unknown:
        raise MessageError(f"it has tensors that were not agreed: {', '.join(unknown)}")
    if missing:
        raise MessageError(f"it lacks tensors: {', '.join(missing)}")
    return map_tensors(like, lambda name, old: _checked(name, tensors[name], old, finite))


def deflated(content: bytes) -> bytes:
    """Return the bytes of a message in fewer ones (DEFLATE, RFC 1951)."""
    return zlib.compress(content, 9)


def inflated(content: bytes, like: Broadcast | Upload) -> bytes:
    """Return the bytes of a message that were `deflated`.

    No more are made than a message like `like` may have, whatever the content claims.

    Raises:
        MessageError: they are no such bytes, or too many.
    """
    longest = _longest(like)
    reader = zlib.decompressobj()
    try:
        whole = reader.decompress(content, longest + 1)
    except zlib.error as error:
        raise MessageError(f"it is no compressed message: {error}") from None
    if len(whole) > longest:
        raise MessageError(f"it has more than the {longest:,} bytes that were agreed")
    if not reader.eof or reader.unused_data:
        raise MessageError("it is no compressed message: it does not end where its bytes do")
    return whole


def _longest(like: Broadcast | Upload) -> int:
    """Return the most bytes that a message may have."""
    return HEADER_BYTES + sum(tensor.numel() * tensor.element_size() for tensor in named_tensors(like).values())


def _checked(name: str, tensor: Tensor, agreed: Tensor, finite: bool) -> Tensor:
    if tensor.dtype != agreed.dtype:
        raise MessageError(f"tensor {name!r} is of type {tensor.dtype} where {agreed.dtype} was agreed")
    if tensor.shape != agreed.shape:
        raise MessageError(f"tensor {name!r} has shape {list(tensor.shape)} where {list(agreed.shape)} was agreed")
    if finite and not bool(tensor.isfinite().all()):
        raise NotFinite(f"tensor {name!r} has a number that is not finite")
    return tensor


def _check_entries(entries: Mapping[str, object], required: set[str], optional: set[str]) -> None:
    unknown = sorted(entries.keys() - required - optional)
    missing = sorted(required - entries.keys())
    if unknown or missing:
        raise MessageError(f"its header has unknown entries {unknown} and lacks {missing}")


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MessageError(f"{name} {value!r} is no number from 0")
    return value


def head_of(content: bytes) -> dict[str, Any]:
    """Return the entries of a message's header, or none if the bytes have no readable header."""
    length = int.from_bytes(content[:8], "little")
    if length > HEADER_BYTES:
        return {}
    try:
        document = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEAD])
        return document if isinstance(document, dict) else {}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return {}
