"""The server of a secure sum. It relays sealed shares, adds masked vectors, and opens only their sum.

`sum` is a generator, as those of SecPC's server are. It yields the messages for each client,
`{client: bytes}`, and receives the replies, `[(client, bytes), ...]`. The transport authenticates
the senders.

**Adversary.** A server that follows the protocol and analyzes all that it sees, together with any T
clients who do the same. They learn the sum of the others' noised vectors and the times at which
clients dropped out, and nothing else. A masked vector is uniform while its self mask's seed is
unknown, or the key of a pairwise mask with a client outside the coalition.

**Steps**, each with the clients who answered the one before, of whom there must be t.

1. Each advertises a key for sealing and a key for the agreement on masks.
2. Each deals Shamir shares of its mask key and of the seed of a self mask, sealed to each other
   client.
3. Each sends its vector + noise + self mask + sum of signed pairwise masks, modulo 2^32 or 2^64.
4. Each is told whose vectors came (living), and who dealt and sent none (dead). It seals a
   confirmation of that to every other living client.
5. Each who has t confirmations of the same gives a share of the seed of every living client, and of
   the key of every dead one. From t shares the server computes the self masks of the living, and
   the masks that the dead left in the sum.

**Late vectors.** A vector that arrives after the server named its sender dead stays hidden by the
self mask. This is the reason for two masks, and for clients' refusal to give both kinds of share
about one client.

**Two stories.** Without step 4 a server could name every client dead to t others and living to the
rest, each of whom sees t living: of 11 clients with t = 6, it would open the sum of two. Such a
server does not follow the protocol. Clients refuse it all the same, as long as it passes on the
keys unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from sordino.secure.distances import Exchange
from sordino.secure.encryption import TAG, is_key
from sordino.secure.errors import SecureError, TooFewAnswers
from sordino.secure.field import Elements
from sordino.secure.mailbox import Mailbox, Rejection
from sordino.secure.messages import AnyMessage, Message, Octets
from sordino.secure.sums.masks import Ring, from_limbs, pair_mask, self_mask
from sordino.secure.sums.messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Invitation,
    MaskedInput,
    Roster,
    SumDelivery,
    SumMessage,
    SumShares,
    Unmasking,
    UnmaskRequest,
)
from sordino.secure.sums.setup import LIMBS, SEALED, SECRET, Integers, SumSetup


@dataclass(frozen=True)
class SecureSum:
    """The result of a sum for the server.

    Attributes:
        total: [d], the sum of quantized vectors and their noise, in steps.
        values: [d], the same in the vectors' units.
        survivors: the clients whose vectors are in it, ascending.
    """

    total: Integers
    values: NDArray[np.float64]
    survivors: tuple[int, ...]


class SumServer:
    """One sum's server.

    Args:
        setup: the sum's numbers.

    Raises:
        SecureError: the setup is invalid.
    """

    def __init__(self, setup: SumSetup) -> None:
        setup.check()
        self.setup = setup
        self._mailbox = Mailbox(setup.round, range(setup.clients), setup.largest_message)
        self._mask_keys: dict[int, bytes] = {}

    @property
    def rejected(self) -> list[Rejection]:
        """Return the rejected messages and their senders."""
        return self._mailbox.rejected

    def sum(self) -> Exchange[SecureSum]:
        """Open the sum of the vectors of all who send one.

        Raises:
            TooFewAnswers: fewer than t clients answered a step; nothing was opened.
            SecureError: their shares contradict each other beyond correction.
        """
        setup = self.setup
        roster = yield from self._advertised()
        dealers, deliveries = yield from self._dealt(roster)
        living, total = yield from self._masked(deliveries)
        confirmations = yield from self._confirmed(dealers, living)
        shares = yield from self._unmasked(dealers, confirmations)
        for number, client in enumerate(dealers):
            secret = from_limbs(shares[number])
            if client in living:
                total -= self_mask(setup, client, secret)
            else:
                total -= self._left_by(client, secret, living)
        signed = total.view(f"<i{setup.word.itemsize}").astype(np.int64)
        return SecureSum(signed, signed.astype(np.float64) * setup.step, tuple(living))

    def _advertised(self) -> Exchange[Roster]:
        """Run step 1: return the participants and their keys."""

        def wrong(message: Advertisement) -> str | None:
            shapes = message.sealing_key.shape, message.mask_key.shape
            if shapes != ((SECRET,), (SECRET,)):
                return f"malformed: keys of {shapes} bytes where 32 are due"
            # A key of small order, passed on, would have every client refuse.
            if not (is_key(message.sealing_key.tobytes()) and is_key(message.mask_key.tobytes())):
                return "malformed: a public key that is not one"
            return None

        answers = yield from self._ask(Invitation(*self._head), Advertisement, "advertising", wrong)
        self._refuse_shared_keys(answers)
        members = self._enough(answers, "advertising")
        self._mask_keys = {member: answers[member].mask_key.tobytes() for member in members}
        return Roster(
            *self._head,
            np.array(members, np.int64),
            np.stack([answers[member].sealing_key for member in members]),
            np.stack([answers[member].mask_key for member in members]),
        )

    def _dealt(self, roster: Roster) -> Exchange[tuple[list[int], dict[int, Message]]]:
        """Run step 2: return the dealers, and the delivery of the others' shares to each of them."""
        members: list[int] = roster.members.tolist()

        def wrong(message: SumShares) -> str | None:
            due, shape = (len(members) - 1, SEALED), message.payloads.shape
            if shape == due:
                return None
            return f"malformed: payloads of shape {shape} where {due} is due"

        answers = yield from self._ask(roster, SumShares, "sharing", wrong)
        dealers = self._enough(answers, "sharing")
        place = {member: number for number, member in enumerate(members)}
        deliveries: dict[int, Message] = {}
        for client in dealers:
            others = [dealer for dealer in dealers if dealer != client]
            # A dealer's payloads are in the roster's order without its own.
            payloads = [answers[dealer].payloads[place[client] - (dealer < client)] for dealer in others]
            deliveries[client] = SumDelivery(
                *self._head,
                np.array(others, np.int64),
                np.stack(payloads),
            )
        return dealers, deliveries

    def _masked(self, deliveries: dict[int, Message]) -> Exchange[tuple[list[int], Ring]]:
        """Run step 3: return the clients whose vectors came, and the sum of these masked vectors."""
        setup = self.setup

        def wrong(message: MaskedInput) -> str | None:
            due = setup.dimension * setup.word.itemsize
            if len(message.values) == due:
                return None
            return f"malformed: {len(message.values)} bytes where {due} are due"

        answers = yield from self._ask(deliveries, MaskedInput, "masking", wrong)
        living = self._enough(answers, "masking")
        total = np.zeros(setup.dimension, setup.word)
        for client in living:
            total += answers[client].values.view(setup.word)
        return living, total

    def _confirmed(self, dealers: list[int], living: list[int]) -> Exchange[dict[int, Message]]:
        """Run step 4: return the others' confirmations for each client who confirmed."""
        dead = sorted({*dealers} - {*living})

        def wrong(message: Confirmation) -> str | None:
            due = (len(living) - 1, TAG)
            return None if message.tags.shape == due else f"malformed: tags of {message.tags.shape} where {due} is due"

        request = UnmaskRequest(*self._head, np.array(living, np.int64), np.array(dead, np.int64))
        questions: dict[int, Message] = dict.fromkeys(living, request)
        answers = yield from self._ask(questions, Confirmation, "confirming", wrong)
        clients = self._enough(answers, "confirming")
        place = {client: number for number, client in enumerate(living)}
        confirmations: dict[int, Message] = {}
        for client in clients:
            others = [other for other in clients if other != client]
            # As with payloads, a client's tags are in order without its own.
            tags = [answers[other].tags[place[client] - (other < client)] for other in others]
            numbers = np.array(others, np.int64)
            confirmations[client] = Confirmations(*self._head, numbers, np.reshape(tags, (-1, TAG)).astype(np.uint8))
        return confirmations

    def _unmasked(self, dealers: list[int], confirmations: dict[int, Message]) -> Exchange[Elements]:
        """Run step 5: return the limbs of one secret of each dealer, [dealers, 5]."""
        code = self.setup.code

        def wrong(message: Unmasking) -> str | None:
            if message.shares.shape != (len(dealers), LIMBS):
                return f"malformed: shares of shape {message.shares.shape} where {(len(dealers), LIMBS)} is due"
            if (message.shares >= code.field.modulus).any():
                return "out of range: numbers that are not in the field"
            return None

        answers = yield from self._ask(confirmations, Unmasking, "unmasking", wrong)
        clients = self._enough(answers, "unmasking")
        shares = np.stack([answers[client].shares for client in clients])
        decoded = code.decode(shares, clients, self.setup.threshold - 1, "unmasking")
        for client in decoded.bad:
            self._mailbox.exclude(client, "unmasking", "its shares contradict the others'")
        secrets: Elements = decoded.values[0]
        return secrets

    def _left_by(self, client: int, secret: bytes, living: list[int]) -> Ring:
        """Compute the masks that the living added for a client who dropped out.

        Raises:
            SecureError: the decoded secret is not that of the advertised key.
        """
        private = X25519PrivateKey.from_private_bytes(secret)
        if private.public_key().public_bytes_raw() != self._mask_keys[client]:
            raise SecureError(f"the shares that client {client} dealt are not of the key that it advertised")
        left = np.zeros(self.setup.dimension, self.setup.word)
        for survivor in living:
            left -= pair_mask(self.setup, private, client, survivor, self._mask_keys[survivor])
        return left

    def _ask(
        self,
        question: Message | dict[int, Message],
        kind: type[AnyMessage],
        step: str,
        wrong: Callable[[AnyMessage], str | None],
    ) -> Exchange[dict[int, AnyMessage]]:
        """Return the good replies by client; clients with no reply, or a bad one, are not asked again."""

        def refused(message: AnyMessage) -> str | None:
            assert isinstance(message, SumMessage)
            try:
                message.check_setup(self.setup)
            except SecureError as error:
                return str(error)
            return wrong(message)

        answers = yield from self._mailbox.ask(question, kind, step, refused)
        self._mailbox.clients = tuple(sorted(answers))
        return answers

    def _enough(self, answers: Mapping[int, Message], step: str) -> list[int]:
        if len(answers) < self.setup.threshold:
            remedy = "nothing is opened; wait for more clients, or plan the sum with a lower threshold"
            raise TooFewAnswers(step, self.setup.threshold, len(answers), remedy)
        return sorted(answers)

    def _refuse_shared_keys(self, answers: dict[int, Advertisement]) -> None:
        """Leave out clients with a key that appears twice: honest clients would refuse the whole roster."""
        owners: dict[bytes, set[int]] = {}
        twice: set[int] = set()
        for client, answer in answers.items():
            for key in (answer.sealing_key.tobytes(), answer.mask_key.tobytes()):
                twice |= {client} if key in owners else set()
                owners.setdefault(key, set()).add(client)
        twice |= {client for clients in owners.values() if len(clients) > 1 for client in clients}
        for client in sorted(twice):
            del answers[client]
            self._mailbox.exclude(client, "advertising", "one of its keys is advertised twice")
        self._mailbox.clients = tuple(sorted(answers))

    @property
    def _head(self) -> tuple[int, Octets]:
        return self.setup.round, np.frombuffer(self.setup.digest, np.uint8)
