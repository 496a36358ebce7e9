"""A client of SecPC. It deals shares of its point and vector, computes on others' shares, and refuses requests that
would expose a client.

For any request of the server, an honest client answers

- each round once, and only with the numbers that it computes itself, if it is told how (`agreed`);
- each question once. Masks are never used twice, and no more distances are opened than agreed;
- one partition of vectors, and one of distances, for each sharing. Two sums that differ by a client
  would give its vector;
- no set with fewer members than the minimum, nor with a member who dealt nothing;
- no round with a minimum below its own, nor below T + 2. T members of a set of T + 1 would compute
  the last one's vector from their mean.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sordino.errors import DataError
from sordino.randomness import system_bytes
from sordino.secure.cipher import Cipher, PlainCipher
from sordino.secure.errors import SecureError
from sordino.secure.field import Elements, Entropy
from sordino.secure.messages import (
    Answer,
    Deal,
    Delivery,
    Join,
    Message,
    Partition,
    Purpose,
    Query,
    Receipt,
    Shares,
    read,
    unpack,
)
from sordino.secure.setup import Setup, fewest_members
from sordino.secure.shares import (
    Held,
    in_blocks,
    masked_distances,
    payload_sizes,
    random_below,
    random_factor,
    scaled_distances,
)


class Client:
    """One client; `handle` takes a message of the server and returns the reply.

    Args:
        number: its number among the N clients, from 0.
        point: [d], the point by which it is clustered: its reduced prompt.
        vector: [L], the vector that is averaged in its cluster; may be set until it is dealt.
        cipher: its channel to other clients. By default a `PlainCipher`, which hides nothing from
            the server.
        clip: clip entries to the largest value that was agreed, instead of refusing to deal.
        minimum: the smallest set whose sum it allows to be opened. A round's own minimum may be
            higher. By default, and at least, `fewest_members(privacy)`.
        privacy: the fewest colluding clients that a round must protect against.
        agreed: the numbers that a round must have. By default, the client takes what the server says of all that
            `minimum` and `privacy` leave open: how many take part, `reveal` and `columns` too.
        entropy: the source of random bytes; the operating system, except in tests.
    """

    def __init__(
        self,
        number: int,
        point: ArrayLike,
        vector: ArrayLike | None = None,
        *,
        cipher: Cipher | None = None,
        clip: bool = False,
        minimum: int | None = None,
        privacy: int = 1,
        agreed: Setup | None = None,
        entropy: Entropy = system_bytes,
    ) -> None:
        least = fewest_members(privacy)
        minimum = least if minimum is None else minimum
        if minimum < least:
            raise ValueError(
                f"minimum = {minimum}: must be {least} or more with privacy = {privacy}, or colluding members of a set "
                "could compute another's vector; raise it"
            )
        self.number, self.point, self.vector = number, np.asarray(point, np.float64), vector
        self.cipher = PlainCipher() if cipher is None else cipher
        self.clip, self.minimum, self.privacy, self.entropy = clip, minimum, privacy, entropy
        self._agreed = agreed
        self.refused: list[tuple[int, str]] = []  # whose payloads were not in order, and why
        self._setup: Setup | None = None
        self._joined: tuple[int, ...] = ()
        self._held: dict[Purpose, Held] = {}
        self._dealt: set[Purpose] = set()
        self._summed: set[Purpose] = set()
        self._next_step = self._next_mask = 0

    def handle(self, content: bytes) -> bytes:
        """Return the reply to a message of the server.

        Raises:
            SecureError: the message is malformed, of another round or out of turn, or the client
                refuses the request.
            DataError: the point or the vector does not fit the agreed numbers.
        """
        message = read(content)
        in_round = self._setup is not None and message.round == self._setup.round
        if not isinstance(message, Setup) and not in_round:
            raise SecureError(f"client {self.number} is not in round {message.round}")
        match message:
            case Setup():
                return self._join(message).to_bytes()
            case Deal():
                return self._deal(message).to_bytes()
            case Delivery():
                return self._receive(message).to_bytes()
            case Query():
                return self._distances(message).to_bytes()
            case Partition():
                return self._sums(message).to_bytes()
        raise SecureError(f"client {self.number} does not take a {type(message).__name__}")

    def _join(self, setup: Setup) -> Message:
        """Take part in a round.

        1. Check its numbers; forget the round before.
        2. Send a public key.
        """
        self._check_agreed(setup)
        setup.check()
        before = self._setup
        if before is not None and setup.round <= before.round:
            raise SecureError(f"client {self.number} has been in round {before.round}; {setup.round} must come later")
        if setup.minimum < self.minimum or setup.privacy < self.privacy:
            raise SecureError(
                f"client {self.number} requires minimum {self.minimum} and privacy {self.privacy}; "
                f"the round offers {setup.minimum} and {setup.privacy}"
            )
        if not 0 <= self.number < setup.clients or self.point.shape != (setup.width,):
            raise SecureError(
                f"client {self.number} with a point of shape {self.point.shape} does not fit a round of "
                f"{setup.clients} clients with points of {setup.width}"
            )
        self._setup, self._joined, self._next_step, self._next_mask = setup, (), 0, 0
        self._digest = hashlib.sha256(setup.to_bytes()).hexdigest()
        self._held, self._dealt, self._summed, self.refused = {}, set(), set(), []
        return Join(setup.round, self.number, np.frombuffer(self.cipher.public_key, np.uint8))

    def _check_agreed(self, setup: Setup) -> None:
        """Refuse a round with other numbers than this client computes: they decide on what is opened."""
        if self._agreed is None:
            return
        for name in (item.name for item in fields(Setup)):
            due, offered = getattr(self._agreed, name), getattr(setup, name)
            if due != offered:
                raise SecureError(f"client {self.number} agreed on {name} = {due!r}, and the round offers {offered!r}")

    def _deal(self, request: Deal) -> Message:
        """Share the point or the vector, as requested.

        1. Quantize it and cut it into blocks.
        2. Encode it, one share a client.
        3. For a point, add shares of a factor and of masks.
        4. Seal each client's payload.
        """
        setup = self._current
        if request.purpose in self._dealt or request.purpose not in ("point", "vector"):
            raise SecureError(f"client {self.number} deals its point once and its vector once a round")
        joined = tuple(request.joined.tolist())
        is_group = len(request.keys) == len(joined) == len({*joined}) and self.number in joined
        if not is_group:
            raise SecureError(f"client {self.number} was asked to deal to {len(joined)} clients who are not a group")
        if any(not 0 <= peer < setup.clients for peer in joined) or self._joined not in (
            (),
            joined,
        ):
            raise SecureError(f"client {self.number} was asked to deal to clients who did not join")
        keys = {peer: key.tobytes() for peer, key in zip(joined, request.keys, strict=True)}
        if keys[self.number] != self.cipher.public_key:
            raise SecureError(f"the request to deal has another key of client {self.number} than it joined with")
        if any(keys.values()) and len({*keys.values()}) < len(keys):
            raise SecureError("the request to deal has one key twice; two clients must not share one")
        self.cipher.meet(keys)
        payload = self._point_shares() if request.purpose == "point" else self._vector_shares()
        sealed = []
        for peer in joined:
            context = self._context(request.purpose, self.number, peer)
            sealed.append(self.cipher.seal(peer, payload[peer].tobytes(), context))
        payloads = np.frombuffer(b"".join(sealed), np.uint8).reshape(len(joined), -1)
        self._dealt.add(request.purpose)  # from here on it will not deal again; a refusal above changes nothing
        self._joined = joined
        return Shares(setup.round, self.number, request.purpose, payloads)

    def _receive(self, delivery: Delivery) -> Message:
        """Open the payloads that others dealt.

        1. Unseal each payload; refuse those of a wrong length, or with numbers outside the field.
        2. Keep the rest.
        3. Report whose were refused.
        """
        setup, purpose = self._current, delivery.purpose
        if purpose in self._held or purpose not in self._dealt:
            raise SecureError(f"client {self.number} takes one delivery a sharing")
        dealers = delivery.dealers.tolist()
        if (
            len(dealers) != len(delivery.payloads)
            or len({*dealers}) != len(dealers)
            or not {*dealers} <= {*self._joined}
        ):
            raise SecureError(f"client {self.number} was sent payloads of clients who did not join")
        block, extra = payload_sizes(setup, purpose)
        table = np.zeros((setup.clients, block + extra), np.uint64)
        dealt = np.zeros(setup.clients, bool)
        for dealer, payload in zip(dealers, delivery.payloads, strict=True):
            try:
                context = self._context(purpose, dealer, self.number)
                content = self.cipher.unseal(dealer, payload.tobytes(), context)
                if len(content) != 8 * (block + extra):
                    raise SecureError(f"malformed: {len(content)} bytes where {8 * (block + extra)} are due")
                table[dealer] = np.frombuffer(content, "<u8")
                dealt[dealer] = True
            except SecureError as error:
                self.refused.append((dealer, str(error)))
        outside = np.flatnonzero((table >= setup.modulus).any(1)).tolist()
        self.refused += [(dealer, "out of range: numbers that are not in the field") for dealer in outside]
        table[outside], dealt[outside] = 0, False
        refused = [dealer for dealer in dealers if not dealt[dealer]]
        self._held[purpose] = Held(dealt, table[:, :block], table[:, block:])
        return Receipt(setup.round, self.number, purpose, np.array(refused, np.int64))

    def _distances(self, query: Query) -> Message:
        """Answer the distances of row clients to the centers of column sets, at this client's point, masked."""
        setup, held = self._current, self._shares("point")
        rows = unpack(query.rows[None], setup.clients)[0]
        columns = unpack(query.columns, setup.clients)
        self._take_step(query.step)
        if not self._next_mask <= query.first <= setup.columns - len(columns):
            raise SecureError(
                f"client {self.number} was asked for {len(columns)} distances from mask {query.first}; masks below "
                f"{self._next_mask} are used, and {setup.columns} were agreed"
            )
        self._check_sets(held, columns, rows)
        self._next_mask = query.first + len(columns)
        values = masked_distances(setup, held, rows, columns, query.first)
        return Answer(setup.round, self.number, query.step, values)

    def _sums(self, partition: Partition) -> Message:
        """Answer the sums over the sets of one partition, at this client's point."""
        setup, purpose, field = self._current, partition.purpose, self._current.field
        held = self._shares(purpose)
        sets = unpack(partition.sets, setup.clients)
        self._take_step(partition.step)
        if purpose in self._summed:
            raise SecureError(f"client {self.number} answers for one partition of {purpose}s a sharing")
        if (sets.sum(0) > 1).any() or (sets.sum(1) < setup.minimum).any():
            raise SecureError(f"client {self.number} sums disjoint sets of {setup.minimum} clients or more only")
        self._check_sets(held, sets, held.dealt)
        self._summed.add(purpose)
        weights = sets.astype(np.uint64)
        if purpose == "vector":
            return Answer(
                setup.round,
                self.number,
                partition.step,
                field.matmul(weights, held.values),
            )
        # Every client's distance to every set's center, [N, K], and its mask for a sum. Weights
        # keep the members' own.
        to_centers = scaled_distances(setup, held.values, sets)
        spread_mask = held.extra[:, 1 if setup.factor_bits else 0]
        masked = field.add(to_centers, spread_mask[:, None])
        totals = field.sum(field.mul(masked, weights.T), axis=0)
        return Answer(setup.round, self.number, partition.step, totals[:, None])

    def _point_shares(self) -> Elements:
        """Compute each client's payload for the point, [N, block + extra]."""
        setup, field, code = self._current, self._current.field, self._current.point_code
        blocks = in_blocks(setup.points.encode(self.point, self.clip), code.blocks)
        shares = [code.encode(blocks, self.entropy)]
        hidden = np.zeros(setup.columns, np.uint64)
        if setup.factor_bits:
            factor = random_factor(setup.factor_bits, self.entropy)
            factors = np.full((code.blocks, 1), factor, np.uint64)
            shares.append(code.encode(factors, self.entropy))
            remainders = [random_below(factor, self.entropy) for _ in range(setup.columns)]
            hidden = np.array(remainders, np.uint64)
        # Totals of the mask for a sum of distances, and of the masks for distances.
        totals = np.concatenate([np.zeros(1, np.uint64), field.reduce(hidden)])
        shares.append(code.masks(totals, setup.needed - 1, self.entropy))
        return np.concatenate(shares, axis=1)

    def _vector_shares(self) -> Elements:
        """Compute each client's payload for the vector, [N, block]."""
        setup, code = self._current, self._current.vector_code
        vector = np.zeros(0) if self.vector is None else np.asarray(self.vector, np.float64)
        if not setup.length or vector.shape != (setup.length,):
            raise DataError(
                f"client {self.number} has a vector of shape {vector.shape} where {setup.length} entries are averaged"
            )
        quantized = setup.vectors.encode(vector, self.clip)
        return code.encode(in_blocks(quantized, code.blocks), self.entropy)

    def _check_sets(self, held: Held, sets: NDArray[np.bool_], within: NDArray[np.bool_]) -> None:
        if not sets.any(1).all():
            raise SecureError(f"client {self.number} was asked about an empty set")
        if (sets & ~within).any() or (within & ~held.dealt).any():
            raise SecureError(f"client {self.number} was asked about clients of whom it has no share")

    def _take_step(self, step: int) -> None:
        if step < self._next_step:
            raise SecureError(f"client {self.number} has answered step {step}")
        self._next_step = step + 1

    def _shares(self, purpose: Purpose) -> Held:
        if purpose not in self._held:
            raise SecureError(f"client {self.number} has no shares of {purpose}s")
        return self._held[purpose]

    def _context(self, purpose: Purpose, dealer: int, recipient: int) -> bytes:
        """Return what a payload is bound to: all numbers of the round, so that nobody opens it in another one."""
        return f"sordino secpc {self._digest} {purpose} {dealer} {recipient}".encode()

    @property
    def _current(self) -> Setup:
        assert self._setup is not None
        return self._setup
