"""What a server sees of a whole forward pass, and its shares of results: the same, statistically, for all inputs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mpc.both import KEYS, held, normal
from mpc.small import batches, sentences, small_tower
from sordino.mpc.arithmetic.packing import MaskedShare, unpack
from sordino.mpc.arithmetic.ring import encode, lowest, share
from sordino.mpc.dealing.correlations import Correlation
from sordino.mpc.dealing.supply import DealerLink
from sordino.mpc.errors import MaskReused
from sordino.mpc.protocols.attention import random_feature_attention
from sordino.mpc.protocols.fourier import cosine_and_sine, gelu
from sordino.mpc.protocols.linear import concatenated, mask_and_open, triple_product, truncate
from sordino.mpc.protocols.party import Party, Shared, run
from sordino.mpc.protocols.roots import Norm, calibrate, inverse_root, layer_norm, variance_root
from sordino.mpc.tower.calibration import Calibration
from sordino.mpc.tower.encoder import Encoder, encode_sentences, shared_weights
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan

ENOUGH = 5  # times that each value of a byte is expected, at least
FALSE_ALARM = 1e-6  # of a whole test of fresh randomness, by as many chi-squares as it makes
BATCH = 160  # sentences of eight tokens: five times 256 rows, of which a root opens one entry each


@dataclass
class Seen:
    """Integers that a server was sent, with their bits: one entry a tensor, in order.

    `opened`: what it knows of opened values when it takes its own mask's share away: they are under the other's alone.
    """

    online: list[tuple[Tensor, int]] = field(default_factory=list)
    opened: list[tuple[Tensor, int]] = field(default_factory=list)
    dealt: list[tuple[Tensor, int]] = field(default_factory=list)

    def counts(self) -> list[tuple[str, np.ndarray]]:
        """How often each value of a byte comes, by message and position of the byte within its integers.

        Of the bits left over, likewise. Bytes of messages that are too short for that, such as a gain's, are pooled.
        """
        found: list[tuple[str, np.ndarray]] = []
        pooled = np.zeros(256, np.int64)
        for kind, messages in (("online", self.online), ("opened", self.opened), ("dealt", self.dealt)):
            for number, (values, bits) in enumerate(messages):
                for start, counts in by_position(values, bits):
                    if counts.sum() >= ENOUGH * len(counts):
                        found.append((f"{kind} {number}, bit {start} of {bits}", counts))
                    else:
                        pooled += counts
        return [*found, ("short messages", pooled)] if pooled.any() else found


def by_position(values: Tensor, bits: int, first: int = 0) -> list[tuple[int, np.ndarray]]:
    """How often each value comes of eight bits of integers, from `first` up, and of those left over; and where."""
    flat = values.reshape(-1).numpy()
    widths = [(start, min(8, bits - start)) for start in range(first, bits, 8)]
    return [(start, np.bincount(flat >> start & 2**width - 1, minlength=2**width)) for start, width in widths]


def uniform(counts: np.ndarray) -> float:
    """The p-value of a chi-square test that all values are equally frequent."""
    return float(stats.chisquare(counts).pvalue)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """That of one that both have the same frequencies."""
    table = np.stack([one, other])
    return float(stats.chi2_contingency(table[:, table.any(0)]).pvalue)  # of values that were seen at all


class Overheard:
    """A dealer whose answers are kept."""

    def __init__(self, dealer: DealerLink, seen: Seen) -> None:
        self._dealer, self._seen = dealer, seen

    def deal(self, number: int, correlation: Correlation) -> bytes:
        content = self._dealer.deal(number, correlation)
        self._seen.dealt.append((unpack(content, correlation.shape, correlation.bits), correlation.bits))
        return content


def transcript(embeddings: Tensor, number: int, key: bytes, calibration: Calibration) -> Seen:
    """What server `number` is sent in set-up and a pass, its own key given, and the other's fresh."""
    tower, seen = small_tower(), Seen()
    plan, weights, halves = (
        FixedPointPlan.of(tower, calibration),
        shared_weights(tower, calibration),
        share(encode(embeddings, 14)),
    )

    def program(party: Party) -> Shared:
        if party.number == number:
            opening = party.open

            def unmasked(values: Sequence[Tensor], bits: Sequence[int]) -> list[Tensor]:
                raise AssertionError("a share was sent as it is")

            def overheard(masked_shares: Sequence[MaskedShare]) -> list[Tensor]:
                sums = opening(masked_shares)
                for each, found in zip(masked_shares, sums, strict=True):
                    own = unpack(each.packed(), tuple(found.shape), each.bits)
                    seen.online.append((lowest(found - own, each.bits), each.bits))
                    seen.opened.append((lowest(found + each.mask, each.bits), each.bits))
                return sums

            party.open = overheard  # type: ignore[method-assign]
            party.exchange = unmasked  # type: ignore[method-assign]
            if number == 1:
                party.randomness._dealer = Overheard(party.randomness._dealer, seen)  # type: ignore[arg-type]
        encoder = Encoder.mask_and_open(party, weights[party.number], plan)
        return encode_sentences(party, encoder, Shared(halves[party.number], 14), torch.full((len(embeddings),), 8))

    other = os.urandom(32)
    run(program, (key, other) if number == 0 else (other, key), timeout=120)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_servers_transcript_does_not_depend_on_the_sentences(number: int) -> None:
    """Of two batches as different as the ranges allow; every byte of every message is uniform, and alike in both.

    The seed of server `number`, who looks, is fixed: its own masks are the same in both passes. The other's seed is
    fresh in each, and so are the shares of weights and sentences: they alone hide what is sent.
    """
    calibration = Calibration.measure(small_tower(), batches(1))
    same = sentences(1, 8, seed=3).expand(BATCH, -1, -1)  # one sentence, many times
    other = 0.9 * sentences(BATCH, 8, seed=4)
    key = bytes(range(32))
    first, second = (transcript(embeddings, number, key, calibration) for embeddings in (same, other))
    pairs = list(zip(first.counts(), second.counts(), strict=True))
    assert len(first.online) > 60
    assert bool(first.dealt) == (number == 1)
    assert len(pairs) > (800 if number == 0 else 1400)
    tried = FALSE_ALARM / (3 * len(pairs))
    for (name, one), (same_name, two) in pairs:
        assert name == same_name
        assert min(one.sum(), two.sum()) >= ENOUGH * len(one), name
        assert min(uniform(one), uniform(two), alike(one, two)) > tried, name


@pytest.mark.parametrize(("length", "messages"), [(4096, 1), (32, 5)])
def test_without_masks_it_would_be_seen(length: int, messages: int) -> None:
    """The test above can fail: shares of a server that opens its values as they are, many in a message or few."""
    values = encode(sentences(16, 8, seed=3), 14).reshape(-1)[:length]
    seen = Seen(online=[(values, 64)] * messages)
    assert min(uniform(counts) for _, counts in seen.counts()) < FALSE_ALARM / 10**4


Program = Callable[[Party, float], Shared]
root_of = cache(calibrate)


def _triple_product(party: Party, value: float) -> Shared:
    own = [held(torch.full((60_000,), value, dtype=torch.float64), 12, seed)(party) for seed in range(3)]
    return triple_product(party, *mask_and_open(party, *own, bits=[37, 64, 64]))


def _waves(party: Party, value: float) -> Shared:
    x = held(torch.full((30_000,), value, dtype=torch.float64), 20)(party)
    return concatenated(cosine_and_sine(party, x, bits=40)[0])


def _layer_norm(party: Party, value: float) -> Shared:
    sign = 1 - 2 * (torch.arange(64, dtype=torch.float64) % 2)
    (gain,) = mask_and_open(party, held(torch.full((64,), 8.0), 12)(party))
    norm = Norm(gain, party.public(0.0, 14), variance_root(64, 0.1, 8))
    return layer_norm(party, held((value * sign).expand(1000, 64), 14, 1)(party), norm, fraction=14)


def _attention(party: Party, value: float) -> Shared:
    x = held(torch.full((30, 1, 32, 32), 1 / math.sqrt(32), dtype=torch.float64), 14)(party)
    (features,) = mask_and_open(party, held(normal(1, 32, 64) / (4 * torch.pi), 14, 1)(party))
    values = held(torch.full(x.shape, value, dtype=torch.float64), 14, 2)(party)
    return random_feature_attention(party, x, x, values, features, root_of(1, 0.1, 1.2, 1e-4), fraction=14)


def _of_numbers(protocol: Program) -> Program:
    return lambda party, value: protocol(party, held(torch.full((60_000,), value, dtype=torch.float64), 20)(party))


# What is below a cosine's precision depends on what is opened, which is even where both public factors are.
RESULTS: dict[str, tuple[Program, int]] = {
    "truncate": (_of_numbers(lambda party, x: truncate(party, x, fraction=4, bits=37)[0]), 0),
    "triple_product": (_triple_product, 0),
    "cosine_and_sine": (_waves, 14),
    "gelu": (_of_numbers(lambda party, x: gelu(party, x, bits=40)[0]), 14),
    "inverse_root": (_of_numbers(lambda party, x: inverse_root(party, x, root_of(2, 0.1, 3), fraction=20)), 0),
    "inverse_root of no step": (
        _of_numbers(lambda party, x: inverse_root(party, x, root_of(1, 0.1, 3, steps=0), fraction=20)),
        0,
    ),
    "layer_norm": (_layer_norm, 0),
    "attention": (_attention, 0),
}


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", RESULTS)
def test_a_servers_share_of_a_result_is_uniform(name: str, number: int) -> None:
    """Modulo what it is right, by byte from the first bit that must be; and all of it is alike for two inputs.

    Both servers' seeds are fixed, others for each input; so this test always comes out the same.
    """
    program, first = RESULTS[name]
    keys = KEYS, (KEYS[1], KEYS[0])
    one, two = (
        run(lambda party, value=value: program(party, value), both).results[number]
        for value, both in zip((0.5, -1.75 if "root" not in name else 2.5), keys, strict=True)
    )
    shares = [lowest(each.share, each.bits) for each in (one, two)]
    for own in shares:
        for start, counts in by_position(own, one.bits, first):
            assert counts.sum() > 20_000
            assert uniform(counts) > 1e-5, start
    for (start, counts), (_, others) in zip(*(by_position(own, one.bits) for own in shares), strict=True):
        assert alike(counts, others) > 1e-5, start


def test_a_session_never_uses_a_mask_twice() -> None:
    """Neither within a pass nor from one to the next; and a dealer asked again for what it dealt refuses."""
    calibration = Calibration.measure(small_tower(), batches(1))
    tower, numbers = small_tower(), []
    plan, weights = FixedPointPlan.of(tower, calibration), shared_weights(tower, calibration)
    halves = share(encode(sentences(2, 8, seed=1), 14))

    def program(party: Party) -> int:
        encoder = Encoder.mask_and_open(party, weights[party.number], plan)
        with party.randomness.recording() as trace:
            for _ in range(2):
                encode_sentences(party, encoder, Shared(halves[party.number], 14))
        if party.number == 1:
            numbers.extend(getattr(each, "number", None) for each in trace.requests)
            last = next(each for each in reversed(trace.requests) if hasattr(each, "correlation"))
            with pytest.raises(MaskReused, match="was dealt before"):
                party.randomness._dealer.deal(last.number, last.correlation)  # type: ignore[union-attr]
        return 0

    run(program, timeout=120)
    drawn = [number for number in numbers if number is not None]
    assert len(drawn) > 300
    assert len(set(drawn)) == len(drawn)
