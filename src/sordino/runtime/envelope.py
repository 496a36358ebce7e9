"""Envelopes: the messages of several clients at one site as bytes, and requests that are not a round's.

    b"sordino1" | length of the head, 4 bytes, little endian | head, JSON | contents, one after another | shared

The head names the kind, the experiment, each client's content with its length, and what else the kind says. What all
contents end with is sent once: of a broadcast that is not personal, nearly all of it goes to a site once.
Reading one executes nothing and trusts nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sordino.runtime.messages import MessageError

MAGIC = b"sordino1"
HEAD_BYTES = 2**24  # the longest head that is read; a thousand clients' numbers and lengths take 2^14
EXPANDED_BYTES = 2**31  # the most that all contents together have where they share their end
LEAST_SHARED = 64  # bytes; less is not worth an entry
Kind = Literal["hello", "agreement", "round", "evaluate", "end", "refusal", "busy"]


@dataclass(frozen=True)
class Envelope:
    """A request of the server's to a site, or its answer.

    Attributes:
        kind: of the request, and of its answer; "refusal" answers any, and so does "busy": ask again.
        experiment: its fingerprint, in hex.
        facts: JSON values by name.
        contents: message by client, by their numbers in the federation.
        refused: client to its reason, for those who do not answer.
    """

    kind: Kind
    experiment: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    contents: Mapping[int, bytes] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return it as bytes."""
        head: dict[str, Any] = {"kind": self.kind, "experiment": self.experiment}
        if self.facts:
            head["facts"] = dict(self.facts)
        if self.contents:
            head["contents"] = [[client, len(content)] for client, content in self.contents.items()]
        if self.refused:
            head["refused"] = [[client, reason] for client, reason in self.refused.items()]
        contents, shared = list(self.contents.values()), b""
        if length := _common_end(contents):
            contents, shared = [content[:-length] for content in contents], contents[0][-length:]
            head["shared"] = length
        text = json.dumps(head, separators=(",", ":")).encode()
        return b"".join([MAGIC, len(text).to_bytes(4, "little"), text, *contents, shared])

    @classmethod
    def decode(cls, content: bytes) -> Envelope:
        """Read it from bytes.

        Raises:
            MessageError: it is no envelope.
        """
        start = len(MAGIC) + 4
        length = int.from_bytes(content[len(MAGIC) : start], "little")
        if content[: len(MAGIC)] != MAGIC or length > min(HEAD_BYTES, len(content) - start):
            raise MessageError("it is no message of Sordino's, or it was cut off")
        try:
            head = json.loads(content[start : start + length])
            kind, experiment = head.pop("kind"), head.pop("experiment")
            facts, refused = head.pop("facts", {}), dict(map(_pair_of(str), head.pop("refused", [])))
            lengths = dict(map(_pair_of(int), head.pop("contents", [])))
            shared = head.pop("shared", 0)
            known = kind in get_args(Kind) and isinstance(experiment, str) and isinstance(facts, dict) and not head
            known = known and type(shared) is int and shared >= 0
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MessageError(f"its head cannot be read: {error}") from None
        if not known or min(lengths.values(), default=0) < shared:
            raise MessageError("its head has unknown entries, or entries of another type")
        if (total := sum(lengths.values())) > max(EXPANDED_BYTES, len(content)):
            raise MessageError(f"its contents have {total:,} bytes where at most {EXPANDED_BYTES:,} are read")
        end = content[len(content) - shared :]
        contents, at = {}, start + length
        for client, size in lengths.items():
            contents[client] = content[at : at + size - shared] + end
            at += size - shared
        if at + shared != len(content):
            raise MessageError(f"it has {len(content):,} bytes where its head counts {at + shared:,}")
        return cls(kind, experiment, facts, contents, refused)


def _common_end(contents: Sequence[bytes]) -> int:
    """Return how many bytes several contents all end with; 0 if that is too little to matter."""
    least = min(map(len, contents), default=0)
    if len(contents) < 2:
        return 0
    low, high = 0, least
    while low < high:  # if they agree in so many bytes, they agree in fewer
        length = (low + high + 1) // 2
        end = contents[0][len(contents[0]) - length :]
        low, high = (length, high) if all(content.endswith(end) for content in contents) else (low, length - 1)
    return low if low >= LEAST_SHARED else 0


def digest(content: bytes) -> str:
    """Return the SHA-256 of a request, in hex: what an answer belongs to."""
    return hashlib.sha256(content).hexdigest()


def _pair_of(kind: type) -> Any:
    def pair(entry: Any) -> tuple[int, Any]:
        client, value = entry
        if type(client) is not int or client < 0 or type(value) is not kind:
            raise ValueError(f"{entry!r} is no client and its {kind.__name__}")
        return client, value

    return pair
