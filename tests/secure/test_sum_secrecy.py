"""What the server of a secure sum sees: uniform, and the same for all inputs that have the same sum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy import stats

from sordino.secure.lagrange import basis
from sordino.secure.messages import read
from sordino.secure.sums import client as client_module
from sordino.secure.sums.client import SumClient
from sordino.secure.sums.masks import pair_mask, self_mask
from sordino.secure.sums.messages import MaskedInput, SumShares, Unmasking
from sordino.secure.sums.plan import plan_sum
from sordino.secure.sums.server import SecureSum, SumServer
from sordino.secure.sums.setup import SumSetup

FALSE_ALARM = 1e-6  # of a whole test of fresh randomness, by as many chi-squares as it makes
SESSION = "5e" * 16
N, D, GONE = 5, 48, 4  # client 4 deals shares and sends no vector
RUNS = 160


def setup_of(ring_bits: int = 32) -> SumSetup:
    planned = plan_sum(session=SESSION, clients=N, dimension=D, clip=1.0, colluders=1, threshold=4)
    return replace(planned, ring_bits=ring_bits)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Two sets of vectors [N, D], as different as they can be, with the same sum over those who stay."""
    zero, extreme = np.zeros((N, D)), np.zeros((N, D))
    extreme[0], extreme[1] = 0.14, -0.14
    extreme[GONE] = 0.14
    return zero, extreme


@dataclass
class Seen:
    """Counts of values of bytes, by kind of message, sender, and position of the byte within its word."""

    counts: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)

    def add(self, kind: str, sender: int, words: np.ndarray, octets: int) -> None:
        """Count the lowest `octets` bytes of little-endian words."""
        rows = np.ascontiguousarray(words).view(np.uint8).reshape(-1, words.dtype.itemsize)
        for position in range(octets):
            key = kind, sender, position
            self.counts[key] = self.counts.get(key, 0) + np.bincount(rows[:, position], minlength=256)


Watched = tuple[list[SumClient], dict[int, np.ndarray], SecureSum]


def watch(setup: SumSetup, vectors: np.ndarray, runs: int, seen: Seen) -> Iterator[Watched]:
    """Sums of the same vectors with fresh secrets: each one's clients, masked vectors, and result."""
    for _ in range(runs):
        clients = [SumClient(setup, number, vector) for number, vector in enumerate(vectors)]
        exchange, exchanges, masked = SumServer(setup).sum(), 0, {}
        messages = next(exchange)
        try:
            while True:
                exchanges += 1
                present = [number for number in messages if number != GONE or exchanges < 3]
                replies = [(number, clients[number].handle(messages[number])) for number in present]
                for number, content in replies:
                    message = read(content)
                    if isinstance(message, SumShares):
                        seen.add("sealed", number, message.payloads, 1)
                    elif isinstance(message, MaskedInput):
                        masked[number] = message.values.view(setup.word)
                        seen.add("masked", number, masked[number], setup.word.itemsize)
                    elif isinstance(message, Unmasking):
                        # Elements of the field are uniform below 2^61 - 1, so their lowest 56 bits are, to 2^-61.
                        seen.add("shares", number, message.shares, 7)
                messages = exchange.send(replies)
        except StopIteration as end:
            yield clients, masked, end.value


def uniform(counts: np.ndarray) -> float:
    return float(stats.chisquare(counts).pvalue)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    return float(stats.chi2_contingency(np.stack([one, other])).pvalue)


@pytest.mark.slow
@pytest.mark.parametrize("ring_bits", [32, 64])
def test_what_the_server_sees_is_uniform_and_does_not_depend_on_the_inputs(ring_bits: int) -> None:
    """Every byte of sealed payloads, masked vectors and shares, over sums of two fixed inputs with one result.

    Public keys are points of a curve, and not uniform bytes; they are drawn before a client looks at its vector.
    """
    setup, views, sums = setup_of(ring_bits), (Seen(), Seen()), []
    for vectors, seen in zip(inputs(), views, strict=True):
        sums += [found.total for _, _, found in watch(setup, vectors, RUNS, seen)]
    assert all((total == sums[0]).all() for total in sums)
    keys = views[0].counts.keys()
    assert keys == views[1].counts.keys()
    assert {kind for kind, _, _ in keys} == {"sealed", "masked", "shares"}
    tried = FALSE_ALARM / (3 * len(keys))
    for key in keys:
        one, other = (seen.counts[key] for seen in views)
        assert min(one.sum(), other.sum()) >= 5 * 256, key
        assert min(uniform(one), uniform(other), alike(one, other)) > tried, key


@pytest.mark.parametrize("left_out", ["self_mask", "pair_mask"])
def test_with_one_kind_of_mask_left_out_partial_sums_would_be_seen(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests here can fail: without either mask, what is left of one vector when the other comes off is plain."""
    setup, vectors = setup_of(), inputs()[1]

    def none(setup: SumSetup, *others: object) -> np.ndarray:
        return np.zeros(setup.dimension, setup.word)

    monkeypatch.setattr(client_module, left_out, none)
    counts = np.zeros(256, np.int64)
    for _ in range(40):
        clients = [SumClient(setup, number, vector) for number, vector in enumerate(vectors)]
        server = SumServer(setup)
        exchange = server.sum()
        messages = next(exchange)
        for _ in range(2):
            messages = exchange.send([(number, clients[number].handle(messages[number])) for number in messages])
        message = read(clients[0].handle(messages[0]))
        assert isinstance(message, MaskedInput)
        rest = message.values.view(setup.word)
        if left_out == "pair_mask":
            rest = rest - self_mask(setup, 0, clients[0]._seed)
        else:
            for peer in range(1, N):
                key = clients[peer]._mask_private.public_key().public_bytes_raw()
                rest = rest - pair_mask(setup, clients[0]._mask_private, 0, peer, key)
        counts += np.bincount(rest.view(np.uint8), minlength=256)
    assert uniform(counts) < FALSE_ALARM / 10**6


def test_what_is_left_when_the_server_and_a_colluder_take_off_all_they_can_is_uniform() -> None:
    """They know the seeds of the living, the key of the dead, and the colluder's own masks and vector.

    Any proper subset of the other survivors' vectors stays hidden; their full sum is what it is.
    """
    setup, vectors, colluder = setup_of(), inputs()[1], 3
    honest = [client for client in range(N) if client not in (GONE, colluder)]
    subsets = [each for size in range(1, len(honest) + 1) for each in itertools.combinations(honest, size)]
    counts = {each: np.zeros((4, 256), np.int64) for each in subsets}
    for clients, masked, _ in watch(setup, vectors, RUNS, Seen()):
        left: dict[int, np.ndarray] = {}
        for number in honest:
            rest = masked[number] - self_mask(setup, number, clients[number]._seed)
            for known in (GONE, colluder):
                key = clients[number]._mask_private.public_key().public_bytes_raw()
                rest = rest + pair_mask(setup, clients[known]._mask_private, known, number, key)
            left[number] = rest
        for each in subsets:
            total = np.sum([left[number] for number in each], axis=0, dtype=setup.word)
            if len(each) == len(honest):
                exact = sum(setup.quantize(vectors[number]) for number in each)
                assert (total.view(np.int32) == exact).all()
            octets = total.view(np.uint8).reshape(-1, 4)
            for position in range(4):
                counts[each][position] += np.bincount(octets[:, position], minlength=256)
    hidden = [each for each in subsets if len(each) < len(honest)]
    assert len(hidden) == 6
    for each in hidden:
        for position in range(4):
            assert uniform(counts[each][position]) > FALSE_ALARM / (4 * len(hidden)), (each, position)


def test_fewer_shares_than_the_threshold_say_nothing_of_a_secret() -> None:
    """Of two fixed secrets: each of t - 1 shares, differences, and what they would decode to, are uniform and alike.

    The last is the secret itself if the polynomial's degree is below t - 1.
    """
    setup = setup_of()
    views: list[dict[str, np.ndarray]] = []
    for secret in (bytes(32), bytes([255]) * 32):
        counts: dict[str, np.ndarray] = {}
        for clients in dealt(setup, secret, 160):
            shares = [clients[holder]._held[0].reshape(-1) for holder in range(1, setup.threshold)]
            field_ = setup.code.field
            pairs = [field_.sub(one, other) for one, other in itertools.combinations(shares, 2)]
            nodes = tuple(setup.code.alphas[1 : setup.threshold])
            decoded = field_.matmul(basis(field_, nodes, setup.code.betas[:1]), np.stack(shares))
            for name, values in (("one", shares), ("difference", pairs), ("decoded", list(decoded))):
                octets = np.concatenate(values).view(np.uint8).reshape(-1, 8)[:, :7]
                counts[name] = counts.get(name, 0) + np.bincount(octets.reshape(-1), minlength=256)
        views.append(counts)
    for name in views[0]:
        one, other = (view[name] for view in views)
        assert min(uniform(one), uniform(other), alike(one, other)) > FALSE_ALARM / 9, name


def test_as_many_shares_as_the_threshold_give_the_secret() -> None:
    setup = setup_of()
    (clients,) = dealt(setup, bytes(range(32)), 1)
    holders = [1, 2, 3, 4]
    shares = np.stack([clients[holder]._held[0][0] for holder in holders])
    limbs = setup.code.decode(shares, holders, setup.threshold - 1).values[0]
    assert sum(int(limb) << 60 * place for place, limb in enumerate(limbs)).to_bytes(32, "little") == bytes(range(32))


def dealt(setup: SumSetup, secret: bytes, runs: int) -> Iterator[list[SumClient]]:
    """Clients who hold shares of each other's secrets, those of client 0 both as given."""
    for _ in range(runs):
        clients = [SumClient(setup, number, np.zeros(D)) for number in range(N)]
        clients[0]._seed = clients[0]._mask_secret = secret
        exchange = SumServer(setup).sum()
        messages = next(exchange)
        for _ in range(2):
            messages = exchange.send([(number, clients[number].handle(messages[number])) for number in messages])
        for number in messages:
            clients[number].handle(messages[number])
        yield clients
