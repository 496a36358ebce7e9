"""Two parties in a process, their costs, and what a dealer refuses."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch

from mpc.both import KEYS, computed, held, normal
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.dealing.correlations import Correlation, Mask, Product
from sordino.mpc.dealing.costs import Cost, Costs, protocol
from sordino.mpc.dealing.dealer import Dealer
from sordino.mpc.dealing.supply import CorrelatedRandomness
from sordino.mpc.errors import MaskReused, PartyLost
from sordino.mpc.protocols.linear import mask_and_open, multiply, product, reveal
from sordino.mpc.protocols.party import Party, Shared, run


def test_with_the_same_keys_every_message_is_the_same() -> None:
    x = held(normal(5, 4), 16)

    def program(party: Party) -> list[torch.Tensor]:
        return reveal(party, multiply(party, x(party), x(party)))

    first, again, other = run(program, KEYS), run(program, KEYS), run(program)
    assert first.received == again.received != other.received
    assert (first.results[0][0] == other.results[1][0]).all()


def test_a_party_that_fails_ends_the_other_and_its_error_is_raised() -> None:
    def program(party: Party) -> None:
        if party.number == 1:
            raise ZeroDivisionError("mine")
        reveal(party, party.public(1.0, 4))

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(program, timeout=5)


def test_a_silent_party_is_given_up() -> None:
    def program(party: Party) -> None:
        if party.number == 0:
            reveal(party, party.public(1.0, 4))

    with pytest.raises(PartyLost, match="ended"):
        run(program, timeout=5)


def test_parties_that_run_different_programs_are_told_so() -> None:
    def program(party: Party) -> None:
        reveal(party, party.public(torch.ones(3 + party.number), 4))

    with pytest.raises(PartyLost, match="astray"):
        run(program, timeout=60)


def test_masks_are_new_each_time_and_a_dealer_deals_no_number_twice() -> None:
    randomness = CorrelatedRandomness(Prg(), Costs())
    (first, share), (second, other) = randomness.mask((9,), 64), randomness.mask((9,), 64)
    assert first.number != second.number
    assert not (share == other).any()
    dealer, mask = Dealer(), Mask(0, (2,), 64)
    dealer.deal(1, Product(mask, mask, "multiply"))
    for number in (0, 1):
        with pytest.raises(MaskReused, match="new keys"):
            dealer.deal(number, Product(mask, mask, "multiply"))


def test_party_0_is_sent_nothing_by_the_dealer() -> None:
    class Unasked:
        def deal(self, number: int, correlation: object) -> bytes:
            raise AssertionError

    dealer, costs = Dealer(KEYS), Costs()
    mask, _ = CorrelatedRandomness(dealer.generators[0], costs).mask((3,), 64)
    correlation = Product(mask, mask, "multiply")
    share = CorrelatedRandomness(dealer.generators[0], costs)
    share.mask((3,), 64)
    drawn = share.correlated(correlation)
    sent = torch.frombuffer(bytearray(Dealer(KEYS).deal(1, correlation)), dtype=torch.int64)
    value = sum(generator.integers(0, (3,)) for generator in dealer.generators)
    assert (drawn + sent == value * value).all()


def test_costs_are_entered_by_label_and_protocol() -> None:
    @protocol
    def outer(party: Party, x: Shared) -> Shared:
        (masked,) = mask_and_open(party, x, bits=12)
        return product(party, masked, masked, "multiply")

    def program(party: Party) -> Shared:
        with party.costs.label("layer 1"):
            outer(party, held(normal(10), 4)(party))
        return multiply(party, *[held(normal(10), 4)(party)] * 2)

    _, costs = computed(program)
    assert costs.by_protocol() == {"outer": Cost(1, 15, 15), "multiply": Cost(1, 160, 80)}
    assert costs.by_protocol(2)["outer/mask_and_open"] == Cost(1, 15, 0)
    assert costs.by_label() == {"layer 1": Cost(1, 15, 15), "": Cost(1, 160, 80)}
    assert costs.total == Cost(2, 175, 95)
    assert "outer" in costs.table()
    assert costs.table().splitlines()[-1].split() == ["total", "2", "175", "95"]


def test_fraction_bits_meet_exactly() -> None:
    x, y = held(torch.tensor([1.5, -2.25]), 4), held(torch.tensor([0.125, 8.0]), 10, seed=1)

    def program(party: Party) -> Shared:
        return (x(party) - y(party) + party.public(torch.tensor([0.5, 0.25]), 2)).times_power_of_two(1).scaled(3)

    values, costs = computed(program)
    assert values.tolist() == [6 * 1.875, 6 * -10.0]
    assert costs.total == Cost()
    with pytest.raises(ValueError, match="truncate"):
        computed(lambda party: x(party).at(3))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("limit", [1, 300, 2**31])
def test_what_is_prepared_is_ordered_ahead_within_the_limit_and_numbers_are_still_used_once(
    limit: int, ahead: bool
) -> None:
    """Of 16 bytes each, from a dealer that takes orders; they are right whatever was under way."""

    class Orders:
        def __init__(self, dealer: Dealer) -> None:
            self.dealer, self.waiting, self.most = dealer, deque[tuple[int, Correlation]](), 0

        def ask(self, number: int, correlation: Correlation) -> None:
            self.waiting.append((number, correlation))
            self.most = max(self.most, len(self.waiting))

        def dealt(self) -> bytes:
            return self.dealer.deal(*self.waiting.popleft())

        def deal(self, number: int, correlation: Correlation) -> bytes:
            assert not self.waiting
            return self.dealer.deal(number, correlation)

    dealer = Dealer(KEYS)
    orders = Orders(dealer)
    randomness_of_both = [CorrelatedRandomness(dealer.generators[i], Costs(), orders if i else None) for i in range(2)]

    def asked(randomness: CorrelatedRandomness) -> tuple[list[int], list[torch.Tensor]]:
        numbers, shares = [], []
        for _ in range(50):
            mask, own = randomness.mask((2,), 64)
            numbers.append(mask.number)
            shares += [own, randomness.correlated(Product(mask, mask, "multiply"))]
        return numbers, shares

    used = []
    for randomness in randomness_of_both:
        with randomness.recording() as trace:
            asked(randomness)
        randomness.prepare(trace, limit, ahead)
        used.append(asked(randomness))
        assert used[-1][0] == list(range(100, 200, 2))
        randomness.correlated(Product(Mask(0, (2,), 64), Mask(0, (2,), 64), "multiply"))  # and goes on without
    assert 1 <= orders.most <= max(1, min(50, -(-limit // 16)))
    assert orders.most == 50 or limit < 2**31
    whole = [first + second for first, second in zip(used[0][1], used[1][1], strict=True)]
    for mask, square in zip(whole[::2], whole[1::2], strict=True):
        assert torch.equal(mask * mask, square)


def test_the_next_turn_is_drawn_while_one_is_used_and_an_error_of_it_is_raised() -> None:
    """A dealer that fails at the fourth order: the second turn is asked for before the first is used up."""
    reached = threading.Event()

    class Failing:
        def __init__(self) -> None:
            self.dealer, self.orders, self.broken = Dealer(KEYS), 0, False

        def deal(self, number: int, correlation: Correlation) -> bytes:
            self.orders += self.broken
            if self.orders == 3:
                reached.set()
            if self.orders == 4:
                raise PartyLost("the dealer is lost")
            return self.dealer.deal(number, correlation)

    link = Failing()
    randomness = CorrelatedRandomness(link.dealer.generators[1], Costs(), link)

    def ask() -> None:
        mask, _ = randomness.mask((2,), 64)
        randomness.correlated(Product(mask, mask, "multiply"))

    with randomness.recording() as trace:
        for _ in range(4):
            ask()
    link.broken = True
    randomness.prepare(trace, 2 * 2 * 16, ahead=True)  # a turn is two masks and two products
    ask()
    assert reached.wait(10)
    ask()
    with pytest.raises(PartyLost, match="the dealer is lost"):
        ask()


def test_a_number_is_drawn_once() -> None:
    """By either party, in whatever way it is asked for."""
    for dealer in (None, Dealer(KEYS)):
        randomness = CorrelatedRandomness(Dealer(KEYS).generators[0], Costs(), dealer)
        mask, _ = randomness.mask((2,), 64)
        randomness.correlated(Product(mask, mask, "multiply"))
        randomness._next = mask.number  # as it would after a fault
        with pytest.raises(MaskReused, match="randomness 0 was drawn before"):
            randomness.mask((2,), 64)
        with pytest.raises(MaskReused, match="randomness 1 was drawn before"):
            randomness.correlated(Product(mask, mask, "multiply"))
