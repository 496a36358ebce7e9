"""A client of a secure sum.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017. For
any request of the server, an honest client answers

- the five messages of one round in their order, each once, and for its own setup only;
- with shares for t members or more, and with a masked vector only once t members dealt theirs;
- one request to unmask. In it, living and dead are disjoint and are all who dealt, and at least t
  are living, itself among them. So it never gives both kinds of share about one client;
- with shares only once t living clients, itself among them, have confirmed to each other that they
  were sent that request and that roster. As 2 t > n + T, no two requests can have so many. So a
  server that names other clients dead to each client opens nothing (Bonawitz et al., section 6.2,
  with seals in the place of signatures).

A request that it refuses changes nothing: it still answers one that is in order.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import ArrayLike

from sordino.errors import DataError
from sordino.randomness import system_bytes
from sordino.secure.encryption import TAG, EncryptingCipher
from sordino.secure.errors import SecureError
from sordino.secure.field import Elements, Entropy
from sordino.secure.messages import Numbers, Octets, read
from sordino.secure.sums.discrete_gaussian import Bits, discrete_gaussian, system_bits
from sordino.secure.sums.masks import pair_mask, self_mask, to_limbs
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
from sordino.secure.sums.setup import LIMBS, SEALED, SECRET, SumSetup

ORDER: tuple[type[SumMessage], ...] = (Invitation, Roster, SumDelivery, UnmaskRequest, Confirmations)


class SumClient:
    """One client in one sum; `handle` takes a message of the server and returns the reply.

    Args:
        setup: the sum's numbers, as the client knows them. The client must not enter two sums of
            one session and round: two draws of noise for one vector would protect it less.
        number: its number among the n clients, from 0.
        vector: [d], in its own units; may be set until the vector is masked.
        bits: the source of noise: the operating system, except in simulations.
        entropy: the source of secrets and shares: the operating system, except in tests.

    Raises:
        SecureError: the setup is invalid, or has no client of that number.
    """

    def __init__(
        self,
        setup: SumSetup,
        number: int,
        vector: ArrayLike | None = None,
        *,
        bits: Bits = system_bits,
        entropy: Entropy = system_bytes,
    ) -> None:
        setup.check()
        if not 0 <= number < setup.clients:
            raise SecureError(
                f"client {number} is not one of the {setup.clients} of this sum, numbered from 0",
            )
        self.setup, self.number, self.vector = setup, number, vector
        self._bits, self._entropy = bits, entropy
        self._cipher = EncryptingCipher(b"sordino secure sum")
        self._seed = entropy(SECRET)
        self._mask_secret = entropy(SECRET)
        self._mask_private = X25519PrivateKey.from_private_bytes(self._mask_secret)
        self._mask_keys: dict[int, bytes] = {}
        self._held: dict[
            int,
            Elements,
        ] = {}  # [2, 5]: a share of each dealer's seed, and of its key
        self._roster = b""
        self._request: UnmaskRequest | None = None
        self._stage = 0

    def handle(self, content: bytes) -> bytes:
        """Return the reply to a message of the server.

        Raises:
            SecureError: the message is malformed, of another sum or out of turn, or the client
                refuses the request.
            DataError: there is no vector, or it does not fit the setup.
        """
        message = read(content, self.setup.largest_message)
        if not isinstance(message, SumMessage):
            raise SecureError(f"client {self.number} is in a sum and does not take a {type(message).__name__}")
        message.check_setup(self.setup)
        if self._stage == len(ORDER) or type(message) is not ORDER[self._stage]:
            done = self._stage == len(ORDER)
            due = "nothing more" if done else f"a {ORDER[self._stage].__name__}"
            kind = type(message).__name__
            raise SecureError(f"out of turn: client {self.number} was sent a {kind} where {due} is due")
        reply: SumMessage
        match message:
            case Invitation():
                reply = self._advertise()
            case Roster():
                reply = self._deal(message)
            case SumDelivery():
                reply = self._mask(message)
            case UnmaskRequest():
                reply = self._confirm(message)
            case Confirmations():
                reply = self._unmask(message)
        self._stage += 1
        return reply.to_bytes()

    def _advertise(self) -> SumMessage:
        keys = (
            np.frombuffer(self._cipher.public_key, np.uint8),
            np.frombuffer(self._own_mask_key, np.uint8),
        )
        return Advertisement(*self._head, self.number, *keys)

    def _deal(self, roster: Roster) -> SumMessage:
        """Deal shares of both secrets.

        1. Check the roster: at least t members, all different, and this client with its own keys.
        2. Share the seed of the self mask and the key of the pairwise masks among all n, by Shamir.
        3. Keep the own share; seal each other member's.
        """
        members = self._members(roster.members, "roster")
        count, number = len(members), self.number
        if roster.sealing_keys.shape != (count, SECRET) or roster.mask_keys.shape != (
            count,
            SECRET,
        ):
            shapes = roster.sealing_keys.shape, roster.mask_keys.shape
            raise SecureError(f"malformed: keys of shapes {shapes} for {count} members")
        sealing_keys = {member: key.tobytes() for member, key in zip(members, roster.sealing_keys, strict=True)}
        mask_keys = {member: key.tobytes() for member, key in zip(members, roster.mask_keys, strict=True)}
        keys = self._cipher.public_key, self._own_mask_key
        if (sealing_keys.get(number), mask_keys.get(number)) != keys:
            raise SecureError(f"the roster does not have client {number} with the keys that it advertised")
        if len({*sealing_keys.values(), *mask_keys.values()}) < 2 * count:
            raise SecureError(
                "the roster has one key twice; two clients, or one client's purposes, must not share one",
            )
        secrets = np.concatenate([to_limbs(self._seed), to_limbs(self._mask_secret)])
        shares = self.setup.code.encode(secrets[None], self._entropy)  # [n, 10]
        self._cipher.meet(sealing_keys)
        sealed = [
            self._cipher.seal(
                member,
                shares[member].astype("<u8").tobytes(),
                self._context(number, member),
            )
            for member in members
            if member != number
        ]
        self._held = {number: shares[number].reshape(2, LIMBS)}
        self._mask_keys, self._roster = mask_keys, hashlib.sha256(roster.to_bytes()).digest()
        payloads = np.frombuffer(b"".join(sealed), np.uint8).reshape(count - 1, SEALED)
        return SumShares(*self._head, number, payloads)

    def _mask(self, delivery: SumDelivery) -> SumMessage:
        """Send the vector, noised and masked.

        1. Check the dealers: all are members, at least t with this client. Open their payloads.
        2. Bound the vector, quantize it, add the client's share of noise.
        3. Add the self mask, and a signed mask for each dealer.
        """
        setup, number = self.setup, self.number
        held = self._opened(delivery)
        if self.vector is None:
            raise DataError(f"client {number} has no vector; give it one before it masks")
        exact = setup.quantize(self.vector)
        exact += discrete_gaussian(int(setup.deviations[number]), setup.dimension, self._bits)
        total = exact.astype(setup.word)  # modulo 2^32 or 2^64, negative numbers in the upper half
        total += self_mask(setup, number, self._seed)
        for peer in held:
            total += pair_mask(setup, self._mask_private, number, peer, self._mask_keys[peer])
        self._held |= held
        return MaskedInput(*self._head, number, total.view(np.uint8))

    def _opened(self, delivery: SumDelivery) -> dict[int, Elements]:
        """Open the shares that others dealt to this client, [2, 5] by dealer."""
        setup, number = self.setup, self.number
        dealers = delivery.dealers.tolist()
        everyone = self._members(np.sort(np.append(delivery.dealers, number)), "delivery")
        if not {*everyone} <= self._mask_keys.keys():
            raise SecureError(f"client {number} was sent payloads of clients who are not on its roster")
        if delivery.payloads.shape != (len(dealers), SEALED):
            raise SecureError(f"malformed: payloads of shape {delivery.payloads.shape} of {len(dealers)} dealers")
        held: dict[int, Elements] = {}
        for dealer, payload in zip(dealers, delivery.payloads, strict=True):
            content = self._cipher.unseal(dealer, payload.tobytes(), self._context(dealer, number))
            shares = np.frombuffer(content, "<u8").astype(np.uint64).reshape(2, LIMBS)
            if (shares >= setup.code.field.modulus).any():
                raise SecureError(f"the shares of client {dealer} are not in the field")
            held[dealer] = shares
        return held

    def _confirm(self, request: UnmaskRequest) -> SumMessage:
        """Check who is named living and dead, and tell each other living client of it."""
        number = self.number
        living, dead = request.living.tolist(), request.dead.tolist()
        both = {*living} & {*dead}
        if both:
            raise SecureError(f"clients {sorted(both)[:5]} are named living and dead; their vectors would be exposed")
        self._members(request.living, "list of the living")
        if number not in living:
            raise SecureError(f"client {number} is asked to unmask a sum that it is not named in")
        named = sorted(living + dead)
        if named != sorted(self._held) or dead != sorted(dead):
            raise SecureError(
                f"{len(named)} clients are named living or dead where exactly the {len(self._held)} who dealt are due"
            )
        self._request = request
        tags = [self._cipher.seal(peer, b"", self._confirmed(number, peer)) for peer in living if peer != number]
        return Confirmation(*self._head, number, np.frombuffer(b"".join(tags), np.uint8).reshape(-1, TAG))

    def _unmask(self, confirmations: Confirmations) -> SumMessage:
        """Give one share about each client who dealt: of a living client's seed, or of a dead one's key.

        It does so if t living clients, itself among them, confirmed the same request. Words that are not in order do
        not count: one client's bad word keeps nobody from answering.
        """
        assert self._request is not None
        number, living, dead = self.number, self._request.living.tolist(), {*self._request.dead.tolist()}
        members = confirmations.members.tolist()
        if members != sorted({*members} & ({*living} - {number})) or len(confirmations.tags) != len(members):
            raise SecureError("malformed: confirmations are due of living clients, once each, in order")
        confirmed = 1 + sum(
            self._has_confirmed(member, tag.tobytes()) for member, tag in zip(members, confirmations.tags, strict=True)
        )
        if confirmed < self.setup.threshold:
            raise SecureError(
                f"{confirmed} clients confirm who is living and dead where at least {self.setup.threshold} are due; "
                "the server may have told others otherwise"
            )
        shares = np.stack([self._held[client][1 if client in dead else 0] for client in sorted(self._held)])
        return Unmasking(*self._head, number, shares)

    def _has_confirmed(self, member: int, tag: bytes) -> bool:
        try:
            return self._cipher.unseal(member, tag, self._confirmed(member, self.number)) == b""
        except SecureError:
            return False

    def _confirmed(self, sender: int, recipient: int) -> bytes:
        """Return the context of a confirmation: roster and request, and whose word it is."""
        assert self._request is not None
        request = hashlib.sha256(self._request.to_bytes()).digest()
        ends = sender.to_bytes(4, "big") + recipient.to_bytes(4, "big")
        return b"confirmed" + self.setup.digest + self._roster + request + ends

    def _members(self, numbers: Numbers, what: str) -> list[int]:
        """Check clients' numbers: ascending, of this sum, at least t."""
        members: list[int] = numbers.tolist()
        ascending = bool(members) and members == sorted({*members})
        if not ascending or not 0 <= members[0] <= members[-1] < self.setup.clients:
            raise SecureError(f"malformed: the {what} does not name clients once each, in order")
        if len(members) < self.setup.threshold:
            raise SecureError(f"the {what} has {len(members)} clients where at least {self.setup.threshold} are due")
        return members

    def _context(self, dealer: int, recipient: int) -> bytes:
        return b"shares" + self.setup.digest + dealer.to_bytes(4, "big") + recipient.to_bytes(4, "big")

    @property
    def _head(self) -> tuple[int, Octets]:
        return self.setup.round, np.frombuffer(self.setup.digest, np.uint8)

    @property
    def _own_mask_key(self) -> bytes:
        return self._mask_private.public_key().public_bytes_raw()
