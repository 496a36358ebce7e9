"""The two parties: their shares, their channel, and a run of both in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sordino.mpc.arithmetic.packing import MaskedShare, Octets, cut, pack, unpack
from sordino.mpc.arithmetic.ring import WORD, Shape, decode, encode
from sordino.mpc.dealing.correlations import Mask
from sordino.mpc.dealing.costs import Cost, Costs
from sordino.mpc.dealing.dealer import Dealer
from sordino.mpc.dealing.supply import CorrelatedRandomness
from sordino.mpc.errors import PartyLost

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Shared:
    """A party's share of numbers in fixed point.

    Attributes:
        share: int64 [...]. Both parties' shares add up to the integer, modulo 2^bits.
        fraction: fraction bits. The number is the integer times 2^-fraction.
        bits: log2 of the modulus for which the shares are right: 64, or fewer after a product of masks of fewer.
    """

    share: Tensor
    fraction: int
    bits: int = WORD

    @property
    def shape(self) -> Shape:
        return tuple(self.share.shape)

    def __add__(self, other: Shared) -> Shared:
        fraction = max(self.fraction, other.fraction)
        left, right = self.at(fraction), other.at(fraction)
        return Shared(left.share + right.share, left.fraction, min(left.bits, right.bits))

    def __neg__(self) -> Shared:
        return replace(self, share=-self.share)

    def __sub__(self, other: Shared) -> Shared:
        return self + -other

    def at(self, fraction: int) -> Shared:
        """Return the same numbers with as many fraction bits or more, exactly.

        Raises:
            ValueError: `fraction` is below the present one.
        """
        if fraction < self.fraction:
            raise ValueError(f"fraction = {fraction}: below {self.fraction}; truncation takes a round, see `truncate`")
        more = fraction - self.fraction
        return Shared(self.share << more, fraction, min(WORD, self.bits + more))

    def times_power_of_two(self, exponent: int) -> Shared:
        """Multiply by 2^exponent, of any sign, exactly and at no cost."""
        return replace(self, fraction=self.fraction - exponent)

    def scaled(self, integers: Tensor | int, fraction: int = 0) -> Shared:
        """Multiply by public numbers in fixed point, broadcast."""
        return replace(self, share=self.share * integers, fraction=self.fraction + fraction)

    def view(self, change: Callable[[Tensor], Tensor]) -> Shared:
        """Rearrange or sum the share's axes."""
        return replace(self, share=change(self.share))


@dataclass(frozen=True, eq=False)
class Masked:
    """Numbers x of which both parties know x - a, and neither knows the mask a.

    Attributes:
        opened: x - a modulo 2^bits, int64 [...].
        share: this party's share of a.
        mask: the name of a at the dealer.
        fraction: fraction bits of x.
        fixed: x is a factor of many products, such as a weight. Terms of masks and x - a alone are then offline work.
    """

    opened: Tensor
    share: Tensor
    mask: Mask
    fraction: int
    fixed: bool = False

    @property
    def bits(self) -> int:
        return self.mask.bits


class Channel(Protocol):
    """A connection to the other party."""

    def exchange(self, content: Octets) -> Octets:
        """Send bytes, and return those that the other party sends meanwhile.

        Raises:
            PartyLost: nothing arrived.
        """
        ...


class Party:
    """One of the two parties, for one computation. Both run the same program on their own shares.

    Args:
        number: 0 or 1.
        channel: to the other party.
        randomness: this party's.
        costs: where `randomness` enters its bytes, too.
    """

    def __init__(self, number: int, channel: Channel, randomness: CorrelatedRandomness, costs: Costs) -> None:
        self.number, self.randomness, self.costs = number, randomness, costs
        self._channel = channel

    def exchange(self, values: Sequence[Tensor], bits: Sequence[int]) -> list[Tensor]:
        """Send integers modulo 2^bits, and return the other party's. One round, `packed_size` bytes a tensor.

        Raises:
            PartyLost: the other party is gone or astray.
        """
        contents = self._swap([pack(value, width) for value, width in zip(values, bits, strict=True)])
        return [
            unpack(part, tuple(value.shape), width) for part, value, width in zip(contents, values, bits, strict=True)
        ]

    def open(self, masked_shares: Sequence[MaskedShare]) -> list[Tensor]:
        """Send masked shares, and return their sums with the other party's. One round, likewise.

        Raises:
            PartyLost: the other party is gone or astray.
        """
        contents = self._swap([masked.packed() for masked in masked_shares])
        return [masked.opened(part) for masked, part in zip(masked_shares, contents, strict=True)]

    def _swap(self, contents: Sequence[Octets]) -> list[memoryview]:
        content = contents[0] if len(contents) == 1 else bytearray().join(contents)
        self.costs.add(Cost(rounds=1, online=len(content)))
        return cut(self._channel.exchange(content), [len(part) for part in contents])

    def only(self, number: int, values: Tensor) -> Tensor:
        """Return public values as the share of party `number`, and zeros as the other party's."""
        return values if self.number == number else torch.zeros_like(values)

    def public(self, values: Tensor | float, fraction: int) -> Shared:
        """Return shares of numbers that both parties know."""
        return Shared(self.only(0, encode(values, fraction)), fraction)


class LocalChannel:
    """A `Channel` between two threads of one process.

    Args:
        inbox, outbox: messages of either direction. None tells the reader that no more will come.
        timeout: seconds to wait for a message.
        kept: keep received messages.

    Attributes:
        received: kept messages, in order.
    """

    def __init__(
        self, inbox: SimpleQueue[Octets | None], outbox: SimpleQueue[Octets | None], timeout: float, kept: bool
    ) -> None:
        self._inbox, self._outbox, self._timeout, self._kept = inbox, outbox, timeout, kept
        self.received: list[Octets] = []

    def exchange(self, content: Octets) -> Octets:
        """See `Channel`."""
        self._outbox.put(content)
        try:
            reply = self._inbox.get(timeout=self._timeout)
        except Empty:
            raise PartyLost(f"the other party sent nothing for {self._timeout:g} s") from None
        if reply is None:
            raise PartyLost("the other party ended")
        if self._kept:
            self.received.append(reply)
        return reply

    def close(self) -> None:
        """Tell the other party that no more messages will come."""
        self._outbox.put(None)


@dataclass(frozen=True)
class RunResult(Generic[T]):
    """The result of a computation in one process.

    Attributes:
        results: of parties 0 and 1.
        costs: rounds and bytes.
        received: messages that each party received from the other, if they are kept.
    """

    results: tuple[T, T]
    costs: Costs
    received: tuple[list[Octets], list[Octets]] = field(repr=False)


def run(
    program: Callable[[Party], T],
    keys: tuple[bytes, bytes] | None = None,
    timeout: float = 600.0,
    keep_messages: bool = True,
) -> RunResult[T]:
    """Run both parties and the dealer in this process, a thread a party. Their timing does not change the result.

    Args:
        program: run by each party.
        keys: of the dealer, for tests that need the same randomness twice.
        timeout: seconds that a party waits for the other.
        keep_messages: keep every received message, to inspect the view of a party. Long computations have gigabytes.

    Raises:
        Exception: the first that a party's program raised, other than the `PartyLost` that follows from it.
    """
    dealer = Dealer(keys)
    queues = SimpleQueue[Octets | None](), SimpleQueue[Octets | None]()
    channels = [LocalChannel(queues[i], queues[1 - i], timeout, keep_messages) for i in range(2)]
    costs = [Costs(), Costs()]
    links = None, dealer
    randomness_of_both = [CorrelatedRandomness(dealer.generators[i], costs[i], links[i]) for i in range(2)]
    parties = [Party(i, channels[i], randomness_of_both[i], costs[i]) for i in range(2)]
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            results[number] = program(parties[number])
        except BaseException as error:
            errors.append(error)
        finally:
            channels[number].close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, PartyLost)), errors[0])
    return RunResult((results[0], results[1]), costs[0], (channels[0].received, channels[1].received))


def reconstruct(shares: tuple[Shared, Shared]) -> Tensor:
    """Return the numbers, float64 [...], from both parties' shares."""
    first, second = shares
    return decode(first.share + second.share, first.fraction, first.bits)
