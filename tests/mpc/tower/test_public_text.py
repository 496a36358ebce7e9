"""What a tower is calibrated on covers text that it was not calibrated on."""

from __future__ import annotations

import copy

import pytest
import torch

from sordino.encoders.bundled import TextTower
from sordino.mpc.errors import OutOfRange
from sordino.mpc.tower.calibration import Calibration
from sordino.mpc.tower.distill import teacher_of
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan
from sordino.mpc.tower.public_text import LENGTHS, calibration_batches, calibration_of, embedded, held_out_rows
from sordino.mpc.tower.tower import PrivateTower, bundled_tower


@pytest.fixture(scope="module")
def embedder() -> TextTower:
    return teacher_of(None)


def test_batches_are_of_all_lengths_and_none_is_held_out(embedder: TextTower) -> None:
    batches = list(calibration_batches(embedder, 300, seed=0))
    lengths = torch.cat([mask.sum(1) for _, mask in batches])
    assert 200 <= len(lengths) <= 400
    for longest in LENGTHS:
        assert ((lengths > longest / 2) & (lengths <= longest)).any()
    held_out = [embedded(embedder, [row])[0][0] for row in held_out_rows(embedder, 128, 100)]
    for embeddings, mask in batches:
        for sentence, own in zip(embeddings, mask, strict=True):
            count = int(own.sum())
            assert not any(len(row) == count and torch.equal(row, sentence[:count]) for row in held_out)


def test_a_tower_of_few_positions_has_shorter_sentences(embedder: TextTower) -> None:
    few = copy.copy(embedder)
    few.positions = embedder.positions[:40]
    lengths = torch.cat([mask.sum(1) for _, mask in calibration_batches(few, 300, seed=0)])
    assert 16 < lengths.max() <= 40
    few.positions = embedder.positions[:31]
    with pytest.raises(OutOfRange, match="31 positions"):
        next(calibration_batches(few, 300, seed=0))


def test_held_out_rows_are_cut_and_end_as_sentences_do(embedder: TextTower) -> None:
    rows = held_out_rows(embedder, 16, 1000)
    start, end = (embedder.tokenizer.token_to_id(mark) for mark in ("[CLS]", "[SEP]"))
    assert len(rows) == 1000
    assert max(map(len, rows)) == 16
    assert all(row[0] == start and row[-1] == end and end not in row[:-1] for row in rows)


@pytest.fixture(scope="module")
def tower() -> PrivateTower:
    return bundled_tower()


@pytest.fixture(scope="module")
def calibration(tower: PrivateTower, embedder: TextTower) -> Calibration:
    return calibration_of(tower, embedder)


@pytest.mark.slow
def test_held_out_text_is_within_the_ranges(tower: PrivateTower, embedder: TextTower, calibration: Calibration) -> None:
    """Definitions, alone and in pairs, and names behind other soft contexts."""
    rows = sorted(held_out_rows(embedder, 64, 1000), key=len)
    batches = [embedded(embedder, rows[start : start + 50]) for start in range(0, 1000, 50)]
    assert calibration.outside(tower, batches) == []
    assert calibration.outside(tower, calibration_batches(embedder, 300, seed=1)) == []


@pytest.mark.slow
def test_every_range_can_be_served(tower: PrivateTower, calibration: Calibration) -> None:
    """With at most four steps of Newton's method a layer, which makes 40 rounds."""
    for layer in FixedPointPlan.of(tower, calibration).layers:
        assert layer.unit.steps + layer.weights.steps + layer.norm1.root.steps + layer.norm2.root.steps <= 4
