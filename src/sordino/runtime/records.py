"""What the runtime tells of a round: its loss and bytes, and what a protocol on shares came to."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sordino.secure import RevealedDistances, SharedExchange

NOT_LISTED = ("opened", "clients", "sent", "received")  # of a protocol, in the metrics of a round


@dataclass(frozen=True)
class ProtocolRecord:
    """What a round's protocol on shares came to.

    Attributes:
        exchanges: of messages, in which all clients were asked.
        opened: all distances that the server saw.
        clients: the participants, by their number in the protocol.
        step: a quantization step of what distances are of.
        rejected: what the server did not take, as (client, step, reason).
        refused: what clients refused to do, as (client, reason).
        seconds: that it took.
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
        """All of it but the distances, of which it says how many clients had them opened to how many centers."""
        line = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NOT_LISTED}
        return line | {"columns": len(self.opened)}

    def distances(self) -> dict[str, Any]:
        """What the server saw, for a JSON file; clients have their number in the federation."""
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
    """What happened in a round.

    Attributes:
        round: counted from 1.
        loss: mean over the participants of their mean cross-entropy, in nats. Known to a simulation only.
        participants: how many clients took part.
        upload_bytes, broadcast_bytes: of one client's messages, serialized.
        clusters: the number of each client's cluster after the round, where a method has any; negative for none.
        protocol: what a protocol on shares between clients and server came to, where there was one.
    """

    round: int
    loss: float
    participants: int
    upload_bytes: int
    broadcast_bytes: int
    clusters: list[int] | None = None
    protocol: ProtocolRecord | None = None

    def line(self) -> dict[str, Any]:
        """The record for `metrics.jsonl`; what does not apply is left out."""
        line = {each.name: getattr(self, each.name) for each in fields(self)}
        line["protocol"] = self.protocol.line() if self.protocol else None
        return {name: value for name, value in line.items() if value is not None}


def protocol_record(uploads: Any, seconds: float) -> ProtocolRecord | None:
    """What a protocol came to; None where there was none."""
    if not isinstance(uploads, SharedExchange):
        return None
    server, traffic = uploads.server, uploads.traffic
    return ProtocolRecord(
        traffic.exchanges,
        tuple(server.opened),
        uploads.clients,
        2.0**-server.setup.bits,
        [(uploads.clients[each.client], each.step, each.reason) for each in server.rejected],
        [(uploads.clients[place], reason) for place, reason in traffic.refusals],
        seconds,
        sum(traffic.sent.get(0, {}).values()),
        traffic.received[0],
    )
