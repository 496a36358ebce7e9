"""The messages between a client and the server in a round of SecPC: frozen values with a conversion to bytes and back.

A message is a safetensors file in memory: its arrays, and its numbers and words as JSON in an array
`header`. Reading one executes nothing. It checks that the message has the fields of its kind, with
their types and numbers of axes, and no others. The recipient checks properties that depend on the
round, such as lengths and ranges.

| exchange | server to each client | client to server |
|---|---|---|
| 1 | `Setup`: the round's public numbers | `Join`: takes part; its public key |
| 2 | `Deal`: deal shares now, to these keys | `Shares`: one sealed payload for each client |
| 3 | `Delivery`: the payloads for it | `Receipt`: whose payloads were in order |
| 4 .. | `Query`: which distances | `Answer`: their values at its point |
| last | `Partition`: which sums | `Answer` |

Exchanges 2 and 3 happen once for the points that are clustered, and once for the full vectors that
are averaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from sordino.secure.errors import SecureError

Purpose = Literal["point", "vector"]
Octets = NDArray[np.uint8]
OctetRows = NDArray[np.uint8]
Numbers = NDArray[np.int64]
WordRows = NDArray[np.uint64]
AnyMessage = TypeVar("AnyMessage", bound="Message")

# The content of a field, by its annotation: a scalar's type, or an array's type and number of axes.
SCALARS = {"int": int, "float": float, "str": str, "Purpose": str, "Reveal": str}
ARRAYS = {"Octets": ("u1", 1), "OctetRows": ("u1", 2), "Numbers": ("i8", 1), "WordRows": ("u8", 2)}


@dataclass(frozen=True, eq=False)
class Message:
    """The base of all messages.

    Attributes:
        round: the message's round of the protocol.
    """

    KINDS: ClassVar[dict[str, type[Message]]] = {}

    round: int

    def __init_subclass__(cls, abstract: bool = False) -> None:
        """Register a kind of message, unless it is only a common base of several kinds."""
        if not abstract:
            Message.KINDS[cls.__name__] = cls

    def to_bytes(self) -> bytes:
        """Encode the message."""
        arrays: dict[str, NDArray[Any]] = {}
        header: dict[str, object] = {"kind": type(self).__name__}
        for item in fields(self):
            value, form = getattr(self, item.name), ARRAYS.get(str(item.type))
            if form:
                arrays[item.name] = np.ascontiguousarray(value, form[0])
            else:
                header[item.name] = value
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        return safetensors.numpy.save(arrays)


@dataclass(frozen=True, eq=False)
class Join(Message):
    """A client's acceptance to take part.

    Attributes:
        sender: its number.
        key: its public key, [bytes].
    """

    sender: int
    key: Octets


@dataclass(frozen=True, eq=False)
class Deal(Message):
    """A request for shares.

    Attributes:
        purpose: the subject of sharing: "point" for clustering, "vector" for averages.
        joined: the numbers of the participants, [joined].
        keys: their public keys, [joined, bytes].
    """

    purpose: Purpose
    joined: Numbers
    keys: OctetRows


@dataclass(frozen=True, eq=False)
class Shares(Message):
    """The shares that a client deals.

    Attributes:
        sender: its number.
        purpose: as requested.
        payloads: [joined, bytes], the sealed share of each client that takes part.
    """

    sender: int
    purpose: Purpose
    payloads: OctetRows


@dataclass(frozen=True, eq=False)
class Delivery(Message):
    """The payloads that others dealt to a client.

    Attributes:
        purpose: as requested.
        dealers: their numbers, [dealers].
        payloads: [dealers, bytes].
    """

    purpose: Purpose
    dealers: Numbers
    payloads: OctetRows


@dataclass(frozen=True, eq=False)
class Receipt(Message):
    """A client's report that it opened its payloads.

    Attributes:
        sender: its number.
        purpose: as requested.
        refused: the numbers of the dealers whose payloads were refused, [refused].
    """

    sender: int
    purpose: Purpose
    refused: Numbers


@dataclass(frozen=True, eq=False)
class Query(Message):
    """A request for the distances of every row client to the center of every column set.

    Attributes:
        step: counts the questions of a round.
        first: the first mask to use; one a column.
        rows: the clients of the rows, as bits [ceil(N/8)].
        columns: the sets, as bits [C, ceil(N/8)].
    """

    step: int
    first: int
    rows: Octets
    columns: OctetRows


@dataclass(frozen=True, eq=False)
class Partition(Message):
    """A request for sums over the sets of a partition, once a sharing.

    Attributes:
        step: counts the questions of a round.
        purpose: "vector" for sums of vectors, "point" for sums of distances to the set's own
            center.
        sets: the sets, as bits [K, ceil(N/8)].
    """

    step: int
    purpose: Purpose
    sets: OctetRows


@dataclass(frozen=True, eq=False)
class Answer(Message):
    """Values at a client's point.

    Attributes:
        sender: its number.
        step: the step of the question.
        values: [rows, C] distances, [K, 1] sums of distances, or [K, length of a block] sums of
            vectors.
    """

    sender: int
    step: int
    values: WordRows


def read(content: bytes, most: int | None = None) -> Message:
    """Decode a message.

    Args:
        content: the bytes.
        most: the largest number of bytes; more are refused unread.

    Raises:
        SecureError: the bytes are no message, or too long.
    """
    if most is not None and len(content) > most:
        raise SecureError(f"malformed: {len(content)} bytes where at most {most} are due")
    try:
        arrays = safetensors.numpy.load(content)
        header = json.loads(arrays.pop("header").tobytes())
        kind = Message.KINDS[header.pop("kind")]
        given = {**header, **arrays}
        _check(kind, given)
        return kind(**given)
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise SecureError(f"malformed: not a message of a secure protocol ({type(error).__name__}: {error})") from None


def expect(content: bytes, kind: type[AnyMessage], most: int | None = None) -> AnyMessage:
    """Decode a message of a kind; see `read`.

    Raises:
        SecureError: the bytes are no message of this kind.
    """
    message = read(content, most)
    if not isinstance(message, kind):
        raise SecureError(f"out of turn: {type(message).__name__} where {kind.__name__} was due")
    return message


def kind_of(content: bytes) -> str:
    """Return the kind of a message from its header alone, "malformed" if it has no known one; arrays are not read."""
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        begin, end = json.loads(content[8:start])["header"]["data_offsets"]
        kind = str(json.loads(content[start + begin : start + end])["kind"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "malformed"
    return kind if kind in Message.KINDS else "malformed"


def pack(sets: Sequence[Iterable[int]], clients: int) -> OctetRows:
    """Encode sets of client numbers as bits, [sets, ceil(N/8)]."""
    bits = np.zeros((len(sets), clients), bool)
    for row, members in zip(bits, sets, strict=True):
        row[list(members)] = True
    return np.packbits(bits, axis=1)


def unpack(bits: OctetRows, clients: int) -> NDArray[np.bool_]:
    """Decode the sets of `pack`, as [sets, N].

    Raises:
        SecureError: the bits are for another number of clients.
    """
    if bits.shape[1] != -(-clients // 8):
        raise SecureError(f"malformed: sets of {bits.shape[1]} bytes for {clients} clients")
    return np.unpackbits(bits, axis=1, count=clients).astype(bool)


def _check(kind: type[Message], given: dict[str, object]) -> None:
    names = {item.name: str(item.type) for item in fields(kind)}
    if given.keys() != names.keys():
        raise ValueError(f"fields {sorted(given)} where {sorted(names)} are due")
    for name, form in names.items():
        value = given[name]
        if form in SCALARS:
            right = type(value) is SCALARS[form]
        else:
            dtype, axes = ARRAYS[form]
            due = (np.dtype(dtype), axes)
            right = isinstance(value, np.ndarray) and (value.dtype, value.ndim) == due
        if not right:
            raise ValueError(f"field {name!r} is of a wrong type")
