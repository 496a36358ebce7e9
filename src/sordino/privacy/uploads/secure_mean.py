"""Means of clients' vectors by a secure sum, with the noise that clients add in shares: its two ends.

The server learns the noised sum and nothing else (`sordino.secure.sums`). Colluding clients can take their own shares
of the noise off, and some clients may drop out, so every share is large enough for the rest. Both ends derive the sum's
numbers from the same terms, so that a server cannot have a client join another sum than the client expects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sordino.privacy.ledger import Unit
from sordino.privacy.settings import PrivacySettings
from sordino.randomness import Randomness
from sordino.secure import Carrier, SecureError, SumClient, SumServer, SumSetup, Traffic, carry_exchange, plan_sum
from sordino.secure.messages import read
from sordino.secure.sums.messages import SumMessage


@dataclass(frozen=True)
class SumTerms:
    """The terms of one sum, and of the noise that it must have.

    Attributes:
        purpose: tells this sum from the round's others, and its noise from theirs.
        unit: of privacy.
        clip: the sensitivity before quantization. Where the client is the unit, every client's vector has a joint norm
            of at most `clip`; where the example or the person is, one of them changes a vector by at most that.
        noise_multiplier: z that must be left when clients drop out and collude; 0 adds no noise.
        largest: a bound on entries that does not depend on the data; by default `clip`.
    """

    purpose: str
    unit: Unit
    clip: float
    noise_multiplier: float
    largest: float | None = None

    def setup(self, settings: PrivacySettings, session: str, clients: int, dimension: int) -> SumSetup:
        """Return the sum's numbers, as both ends compute them.

        Args:
            settings: who may collude and drop out.
            session: of the round, in hexadecimal digits; no two rounds share one.
            clients: how many take part in the round.
            dimension: entries of a client's vector.
        """
        return plan_sum(
            session=hashlib.sha256(f"{session} {self.purpose}".encode()).hexdigest(),
            clients=clients,
            dimension=dimension,
            clip=self.clip,
            unit="client" if self.unit == "client" else "example",  # a person's part was bounded as an example's is
            largest=self.largest,
            noise_multiplier=self.noise_multiplier,
            threshold=clients - settings.dropouts,
            # A sum without noise promises nothing, so it may be one in which colluders could subtract.
            colluders=settings.colluders if self.noise_multiplier else 0,
        )


@dataclass(frozen=True)
class SumVectors:
    """Vectors that clients bring to one sum.

    Attributes:
        terms: of the sum.
        fields: name to [K, ...]; all fields of a client are one vector.
    """

    terms: SumTerms
    fields: Mapping[str, Tensor]


class SumParty:
    """One client in the secure sums of one round; `handle` takes a message of the server and gives the reply.

    Args:
        number: the client's place among those who take part, from 0.
        parties: its end of each sum.
    """

    def __init__(self, number: int, parties: Sequence[SumClient]) -> None:
        self.number = number
        self._parties = {party.setup.digest: party for party in parties}

    def handle(self, content: bytes) -> bytes:
        """Return the reply to a message of the server.

        Raises:
            SecureError: the message is malformed, or of a sum that this round does not have, or is refused.
        """
        longest = max(party.setup.largest_message for party in self._parties.values())
        message = read(content, longest)
        if not isinstance(message, SumMessage):
            raise SecureError(f"client {self.number} is in a sum and does not take a {type(message).__name__}")
        party = self._parties.get(message.setup.tobytes())
        if party is None:
            raise SecureError("foreign: of another session, or a sum with other numbers")
        return party.handle(content)


def sum_parties(
    settings: PrivacySettings,
    vectors: Sequence[SumVectors],
    randomness: Randomness,
    session: str,
    places: Sequence[int],
    clients: int,
) -> list[SumParty]:
    """Return the clients' ends of a round's sums.

    Args:
        settings: who may collude and drop out.
        vectors: of the K clients of a stack, for every sum.
        randomness: where their noise comes from.
        session: of the round.
        places: [K], each client's place among those who take part.
        clients: how many take part.
    """
    ends: list[list[SumClient]] = [[] for _ in places]
    for summed in vectors:
        flat = torch.cat([field.detach().flatten(1).double().cpu() for field in summed.fields.values()], 1)
        setup = summed.terms.setup(settings, session, clients, flat.shape[1])
        noise = randomness.words(f"noise on {summed.terms.purpose}")
        for end, place, row, bits in zip(ends, places, flat.numpy(), noise, strict=True):
            end.append(SumClient(setup, place, row, bits=bits))
    return [SumParty(place, end) for place, end in zip(places, ends, strict=True)]


@dataclass(frozen=True)
class Summed:
    """A secure sum as it was opened.

    Attributes:
        fields: the sums [...] by name.
        noise_multiplier: what the survivors' noise is charged; 0 without noise.
        survivors: whose vectors are in it, by their index among those who uploaded.
    """

    fields: dict[str, Tensor]
    noise_multiplier: float
    survivors: list[int]


class ServerSums:
    """The server's end of the secure sums of one round.

    Args:
        settings: who may collude and drop out.
        session: of the round.
        clients: how many take part.
        carrier: brings messages to them, by their places.
        fields: name to [1, ...], an upload's learned fields, for names, shapes and types.
        present: the places of those who uploaded; by default of all.

    Attributes:
        sent, received: bytes of the first client's messages so far.
    """

    def __init__(
        self,
        settings: PrivacySettings,
        session: str,
        clients: int,
        carrier: Carrier,
        fields: Mapping[str, Tensor],
        present: Sequence[int] | None = None,
    ) -> None:
        self._settings, self._session, self._clients, self._carrier = settings, session, clients, carrier
        self.fields = dict(fields)
        self._present = list(range(clients) if present is None else present)
        self.sent = self.received = 0

    def of(self, terms: SumTerms, fields: Mapping[str, Tensor]) -> Summed:
        """Sum several fields as one vector a client.

        Args:
            terms: of the sum.
            fields: name to a tensor whose shape after the first axis, and type, the field has.

        Raises:
            SecureError: too few clients answered; nothing was opened.
        """
        sizes = [field.shape[1:].numel() for field in fields.values()]
        setup = terms.setup(self._settings, self._session, self._clients, sum(sizes))
        traffic = Traffic()
        opened = carry_exchange(SumServer(setup).sum(), self._carrier, traffic)
        self.sent += sum(traffic.sent.get(0, {}).values())
        self.received += traffic.received[0]
        charged = setup.charge(opened.survivors).noise_multiplier if terms.noise_multiplier else 0.0
        parts = torch.from_numpy(np.asarray(opened.values)).split(sizes)
        pairs = zip(fields.items(), parts, strict=True)
        summed = {name: part.view(field.shape[1:]).to(field) for (name, field), part in pairs}
        order = {place: number for number, place in enumerate(self._present)}
        return Summed(summed, charged, [order[place] for place in opened.survivors])
