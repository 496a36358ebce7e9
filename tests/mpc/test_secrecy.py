"""What a server sees of a whole forward pass: the same, statistically, whatever is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from mpc.small import batches, sentences, small_tower
from scipy import stats
from torch import Tensor

from sordino.mpc.calibration import Calibration
from sordino.mpc.correlations import Correlation
from sordino.mpc.encoder import Encoder, encode_sentences, shared_weights
from sordino.mpc.errors import MaskReused
from sordino.mpc.packing import Covered, unpack
from sordino.mpc.party import Party, Shared, run
from sordino.mpc.plan import Plan
from sordino.mpc.ring import encode, lowest, share
from sordino.mpc.supply import Assistant

ENOUGH = 5 * 256  # entries, so that each of 256 values is expected five times
TRIED = 1e-9  # significance: some thousand tests are made of fresh randomness, and all must pass


@dataclass
class Seen:
    """Integers that a server was sent, with their bits: one entry a tensor, in order."""

    online: list[tuple[Tensor, int]] = field(default_factory=list)
    dealt: list[tuple[Tensor, int]] = field(default_factory=list)

    def columns(self) -> list[tuple[str, np.ndarray]]:
        """By message and position of a byte within its integers: the bytes, and of the bits left over their values."""
        found = []
        for kind, messages in (("online", self.online), ("dealt", self.dealt)):
            for number, (values, bits) in enumerate(messages):
                flat = values.reshape(-1).numpy()
                for position in range(0, bits, 8):
                    width = min(8, bits - position)
                    found.append((f"{kind} {number}, bit {position} of {bits}", flat >> position & 2**width - 1))
        return found


class Overheard:
    """An assistant whose answers are kept."""

    def __init__(self, assistant: Assistant, seen: Seen) -> None:
        self._assistant, self._seen = assistant, seen

    def deal(self, number: int, correlation: Correlation) -> bytes:
        content = self._assistant.deal(number, correlation)
        self._seen.dealt.append((unpack(content, correlation.shape, correlation.bits), correlation.bits))
        return content


def transcript(embeddings: Tensor, number: int, key: bytes, calibration: Calibration) -> Seen:
    """What server `number` is sent in set-up and a pass, its own key given, and the other's fresh."""
    tower, seen = small_tower(), Seen()
    plan, weights, halves = (
        Plan.of(tower, calibration),
        shared_weights(tower, calibration),
        share(encode(embeddings, 14)),
    )

    def program(party: Party) -> Shared:
        if party.number == number:
            opening = party.open

            def unmasked(values: Sequence[Tensor], bits: Sequence[int]) -> list[Tensor]:
                raise AssertionError("a share was sent as it is")

            def overheard(covered: Sequence[Covered]) -> list[Tensor]:
                sums = opening(covered)
                for each, found in zip(covered, sums, strict=True):
                    own = unpack(each.packed(), tuple(found.shape), each.bits)
                    seen.online.append((lowest(found - own, each.bits), each.bits))
                return sums

            party.open = overheard  # type: ignore[method-assign]
            party.exchange = unmasked  # type: ignore[method-assign]
            if number == 1:
                party.supply._assistant = Overheard(party.supply._assistant, seen)  # type: ignore[arg-type]
        encoder = Encoder.hide(party, weights[party.number], plan)
        return encode_sentences(party, encoder, Shared(halves[party.number], 14), torch.full((len(embeddings),), 8))

    other = os.urandom(32)
    run(program, (key, other) if number == 0 else (other, key), timeout=120)
    return seen


@pytest.mark.parametrize("number", [0, 1])
def test_a_servers_transcript_does_not_depend_on_the_sentences(number: int) -> None:
    """Of two batches as different as the ranges allow; every byte is uniform, and alike in both."""
    calibration = Calibration.measure(small_tower(), batches(1))
    same = sentences(1, 8, seed=3).expand(16, -1, -1)  # one sentence, sixteen times
    other = 0.9 * sentences(16, 8, seed=4)
    key = bytes(range(32))
    first, second = (transcript(embeddings, number, key, calibration) for embeddings in (same, other))
    assert [name for name, _ in first.columns()] == [name for name, _ in second.columns()]
    assert len(first.online) > 60
    assert bool(first.dealt) == (number == 1)
    tested = 0
    for (name, one), (_, two) in zip(first.columns(), second.columns(), strict=True):
        if len(one) < ENOUGH:
            continue
        counts = [np.bincount(column, minlength=int(max(one.max(), two.max())) + 1) for column in (one, two)]
        assert min(stats.chisquare(each).pvalue for each in counts) > TRIED, name
        table = np.stack(counts)
        assert stats.chi2_contingency(table[:, table.any(0)]).pvalue > TRIED, name  # of values that were seen at all
        tested += 1
    assert tested > 150


def test_without_masks_it_would_be_seen() -> None:
    """The test above can fail: shares of a server that opens its values as they are."""
    values = encode(sentences(16, 8, seed=3), 14).reshape(-1)
    seen = Seen(online=[(values, 64)])
    assert min(stats.chisquare(np.bincount(column, minlength=256)).pvalue for _, column in seen.columns()) < TRIED


def test_a_session_never_uses_a_mask_twice() -> None:
    """Neither within a pass nor from one to the next; and a dealer asked again for what it dealt refuses."""
    calibration = Calibration.measure(small_tower(), batches(1))
    tower, numbers = small_tower(), []
    plan, weights = Plan.of(tower, calibration), shared_weights(tower, calibration)
    halves = share(encode(sentences(2, 8, seed=1), 14))

    def program(party: Party) -> int:
        encoder = Encoder.hide(party, weights[party.number], plan)
        with party.supply.recording() as tape:
            for _ in range(2):
                encode_sentences(party, encoder, Shared(halves[party.number], 14))
        if party.number == 1:
            numbers.extend(getattr(each, "number", None) for each in tape.wanted)
            last = next(each for each in reversed(tape.wanted) if hasattr(each, "correlation"))
            with pytest.raises(MaskReused, match="was dealt before"):
                party.supply._assistant.deal(last.number, last.correlation)  # type: ignore[union-attr]
        return 0

    run(program, timeout=120)
    drawn = [number for number in numbers if number is not None]
    assert len(drawn) > 300
    assert len(set(drawn)) == len(drawn)
