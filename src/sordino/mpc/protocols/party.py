"""The two servers: what each holds, how they speak, and both of them in one process."""

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
        share: int64 [...]; the sum of both parties' is the integer, modulo 2^bits.
        fraction: fraction bits; the number is the integer times 2^-fraction.
        bits: modulo what the shares are right: 64, or fewer after a product of masks of fewer.
    """

    share: Tensor
    fraction: int
    bits: int = WORD

    @property
    def shape(self) -> Shape:
        return tuple(self.share.shape)

    def __add__(self, other: Shared) -> Shared:
        left, right = self.at(max(self.fraction, other.fraction)), other.at(max(self.fraction, other.fraction))
        return Shared(left.share + right.share, left.fraction, min(left.bits, right.bits))

    def __neg__(self) -> Shared:
        return replace(self, share=-self.share)

    def __sub__(self, other: Shared) -> Shared:
        return self + -other

    def at(self, fraction: int) -> Shared:
        """The same numbers with as many or more fraction bits, exactly."""
        if fraction < self.fraction:
            raise ValueError(f"fraction = {fraction}: below {self.fraction}; truncation takes a round, see `truncate`")
        more = fraction - self.fraction
        return Shared(self.share << more, fraction, min(WORD, self.bits + more))

    def doubled(self, times: int) -> Shared:
        """The numbers times 2^times, of any sign, exactly and at no cost."""
        return replace(self, fraction=self.fraction - times)

    def scaled(self, integers: Tensor | int, fraction: int = 0) -> Shared:
        """The numbers times public ones in fixed point, broadcast."""
        return replace(self, share=self.share * integers, fraction=self.fraction + fraction)

    def view(self, change: Callable[[Tensor], Tensor]) -> Shared:
        """The share with its axes rearranged, or summed."""
        return replace(self, share=change(self.share))


@dataclass(frozen=True, eq=False)
class Masked:
    """A number of which x - a is known to both parties, and the mask a to neither.

    Attributes:
        opened: x - a modulo 2^bits, int64 [...].
        share: this party's share of a.
        mask: its name at the dealer.
        fraction: fraction bits of x.
        fixed: it is a factor of many products, such as a weight: what these have of masks alone is offline work.
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
    """The way to the other party."""

    def exchange(self, content: Octets) -> Octets:
        """Send bytes, and give those that the other sends meanwhile.

        Raises:
            PartyLost: none came.
        """
        ...


class Party:
    """One of the two servers, for one computation.

    Both run the same program, and differ in what they hold.

    Args:
        number: 0 or 1.
        channel: to the other.
        randomness: of dealt randomness.
        costs: those of the randomness.
    """

    def __init__(self, number: int, channel: Channel, randomness: CorrelatedRandomness, costs: Costs) -> None:
        self.number, self.randomness, self.costs = number, randomness, costs
        self._channel = channel

    def exchange(self, values: Sequence[Tensor], bits: Sequence[int]) -> list[Tensor]:
        """Send integers modulo 2^bits, and give the other party's: one round, `packed_size` bytes a tensor.

        Raises:
            PartyLost: the other party is gone or astray.
        """
        theirs = self._swap([pack(value, width) for value, width in zip(values, bits, strict=True)])
        return [
            unpack(part, tuple(value.shape), width) for part, value, width in zip(theirs, values, bits, strict=True)
        ]

    def open(self, masked_shares: Sequence[MaskedShare]) -> list[Tensor]:
        """Send shares less masks, and give their sums with the other party's: one round, likewise.

        Raises:
            PartyLost: the other party is gone or astray.
        """
        theirs = self._swap([each.packed() for each in masked_shares])
        return [each.opened(part) for each, part in zip(masked_shares, theirs, strict=True)]

    def _swap(self, contents: Sequence[Octets]) -> list[memoryview]:
        content = contents[0] if len(contents) == 1 else bytearray().join(contents)
        self.costs.add(Cost(rounds=1, online=len(content)))
        return cut(self._channel.exchange(content), [len(each) for each in contents])

    def only(self, number: int, values: Tensor) -> Tensor:
        """What is public, as the share of one party, and nothing as the other's."""
        return values if self.number == number else torch.zeros_like(values)

    def public(self, values: Tensor | float, fraction: int) -> Shared:
        """Shares of numbers that both know."""
        return Shared(self.only(0, encode(values, fraction)), fraction)


class LocalChannel:
    """Between two threads of one process.

    Args:
        inbox, outbox: None in them ends the other's waiting.
        timeout: seconds to wait for the other.
        kept: whether messages are.

    Attributes:
        received: all that came, in order, if they are kept.
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
        """Tell the other that no more will come."""
        self._outbox.put(None)


@dataclass(frozen=True)
class Ran(Generic[T]):
    """What a computation in one process came to.

    Attributes:
        results: of parties 0 and 1.
        costs: rounds and bytes.
        received: the messages that each party had from the other, if they are kept.
    """

    results: tuple[T, T]
    costs: Costs
    received: tuple[list[Octets], list[Octets]] = field(repr=False)


def run(
    program: Callable[[Party], T],
    keys: tuple[bytes, bytes] | None = None,
    timeout: float = 600.0,
    keep_messages: bool = True,
) -> Ran[T]:
    """Both parties and the dealer in this process, a thread a party; the result does not depend on their timing.

    Args:
        program: what each runs.
        keys: of the dealer, for tests that need the same randomness twice.
        timeout: seconds that one waits for the other.
        keep_messages: for a look at what a party saw; a long computation has gigabytes of them.

    Raises:
        Exception: the first that a party's program raised, where it is not about the other's end.
    """
    dealer, queues = Dealer(keys), (SimpleQueue[Octets | None](), SimpleQueue[Octets | None]())
    channels = [LocalChannel(queues[i], queues[1 - i], timeout, keep_messages) for i in range(2)]
    costs = [Costs(), Costs()]
    randomness_of_both = [CorrelatedRandomness(dealer.generators[i], costs[i], dealer if i else None) for i in range(2)]
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
    return Ran((results[0], results[1]), costs[0], (channels[0].received, channels[1].received))


def reconstruct(shares: tuple[Shared, Shared]) -> Tensor:
    """The numbers, float64 [...], of both parties' shares."""
    first, second = shares
    return decode(first.share + second.share, first.fraction, first.bits)
