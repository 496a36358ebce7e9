"""Records of a round: its loss, its bytes, and statistics of its protocol on shares."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sordino.secure import RevealedDistances, SharedExchange

NOT_LISTED = ("opened", "clients", "sent", "received")  # fields that `ProtocolRecord.line` leaves out


@dataclass(frozen=True)
class ProtocolRecord:
    """Statistics of a round's protocol on shares.

    Attributes:
        exchanges: the number of exchanges of messages, in each of which all clients were asked.
        opened: all distances that the server saw.
        clients: the participants, by their number in the protocol.
        step: the quantization step of the vectors whose distances were opened.
        rejected: messages that the server did not accept, as (client, step, reason).
        refused: requests that clients did not answer, as (client, reason).
        seconds: the protocol's wall time.
        sent, received: bytes of the first participant's messages to and from the server.
    """

    exchanges: int
    opened: tuple[RevealedDistances, ...]
    clients: tuple[int, ...]
    step: float
    rejected: list[tuple[int, str, str]]
    refused: list[tuple[int, str]]
    seconds: float
    sent: int
    received: int

    def line(self) -> dict[str, Any]:
        """Return the record for `metrics.jsonl`: all but the distances, of which it counts the opened columns."""
        names = [entry.name for entry in fields(self) if entry.name not in NOT_LISTED]
        line = {name: getattr(self, name) for name in names}
        return line | {"columns": len(self.opened)}

    def distances(self) -> dict[str, Any]:
        """Return the distances that the server saw, for JSON; clients have their numbers in the federation."""
        return {
            "step": self.step,
            "columns": [
                {
                    "members": [self.clients[place] for place in column.members],
                    "clients": [self.clients[place] for place in column.clients],
                    "values": list(column.values),
                }
                for column in self.opened
            ],
        }


@dataclass(frozen=True)
class RoundRecord:
    """The metrics of a round.

    Attributes:
        round: counted from 1.
        loss: mean over the participants of their mean cross-entropy, in nats. Only a simulation knows it.
        participants: the number of clients that took part.
        upload_bytes, broadcast_bytes: bytes of one client's serialized messages.
        clusters: the number of each client's cluster after the round, negative for none; None if the method has none.
        protocol: statistics of the protocol on shares, or None if there was none.
    """

    round: int
    loss: float
    participants: int
    upload_bytes: int
    broadcast_bytes: int
    clusters: list[int] | None = None
    protocol: ProtocolRecord | None = None

    def line(self) -> dict[str, Any]:
        """Return the record for `metrics.jsonl`, without the values that do not apply."""
        line = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        line["protocol"] = self.protocol.line() if self.protocol else None
        return {name: value for name, value in line.items() if value is not None}


def protocol_record(uploads: Any, seconds: float) -> ProtocolRecord | None:
    """Return statistics of the secret-sharing protocol, or None if the method does not use one."""
    if not isinstance(uploads, SharedExchange):
        return None
    server, traffic = uploads.server, uploads.traffic
    return ProtocolRecord(
        traffic.exchanges,
        tuple(server.opened),
        uploads.clients,
        2.0**-server.setup.bits,
        [(uploads.clients[entry.client], entry.step, entry.reason) for entry in server.rejected],
        [(uploads.clients[place], reason) for place, reason in traffic.refusals],
        seconds,
        sum(traffic.sent.get(0, {}).values()),
        traffic.received[0],
    )
