"""The text tower on shares against the same tower in the clear."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mpc.small import FREQUENCIES, HEADS, INNER, WIDTH, Batch, batches, sentences, small_tower
from sordino.encoders.bundled import TEXT_MODEL, TextTower, package_path
from sordino.mpc.arithmetic.packing import packed_size
from sordino.mpc.arithmetic.ring import encode, share
from sordino.mpc.dealing.costs import Cost
from sordino.mpc.errors import MpcError, OutOfRange
from sordino.mpc.protocols.party import Party, Shared, reconstruct, run
from sordino.mpc.tower.calibration import GROUPS, Calibration
from sordino.mpc.tower.encoder import Encoder, encode_sentences, shared_weights
from sordino.mpc.tower.fixed_point_plan import UNIT, WEIGHT, FixedPointPlan
from sordino.mpc.tower.public_text import definitions
from sordino.mpc.tower.sentences import batches as padded
from sordino.mpc.tower.tower import PrivateTower


@pytest.fixture(scope="module")
def tower() -> PrivateTower:
    return small_tower()


@pytest.fixture(scope="module")
def calibration(tower: PrivateTower) -> Calibration:
    return Calibration.measure(tower, batches(1))


def clear(tower: PrivateTower, embeddings: Tensor) -> Tensor:
    """Mean-pooled sentences [B, E] of the tower in the clear, float64."""
    return tower(embeddings, torch.ones(embeddings.shape[:2]))[-1].mean(1).double()


def on_shares(
    tower: PrivateTower,
    calibration: Calibration,
    embeddings: Tensor,
    times: int = 1,
    lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, Cost]]:
    """The same on shares, computed so many times, and what it costs by label."""
    plan = FixedPointPlan.from_json(FixedPointPlan.of(tower, calibration).to_json())
    weights, halves = shared_weights(tower, calibration), share(encode(embeddings, 14))

    def program(party: Party) -> Shared:
        encoder = Encoder.mask_and_open(party, weights[party.number], plan)
        x = Shared(halves[party.number], 14)
        passes = [encode_sentences(party, encoder, x, lengths) for _ in range(times)]
        return passes[-1]

    result = run(program, timeout=120)
    return reconstruct(result.results), result.costs.by_label()


@pytest.mark.parametrize("length", [2, 7, 32, 50])
def test_sentences_equal_those_in_the_clear(tower: PrivateTower, calibration: Calibration, length: int) -> None:
    """At lengths that are no powers of two, and by scores as by state."""
    embeddings = sentences(8, length, seed=5)
    assert calibration.outside(tower, [(embeddings, torch.ones(8, length))]) == []
    found, _ = on_shares(tower, calibration, embeddings)
    oracle = clear(tower, embeddings)
    assert cosine_similarity(found, oracle, dim=-1).min() >= 0.99999
    assert ((found - oracle).norm(dim=-1) / oracle.norm(dim=-1)).max() < 0.0045  # as that cosine: sqrt(2 - 2 c)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(17, 20, 32), (33, 50, 64)])
def test_padding_changes_no_sentence_and_costs_nothing(
    tower: PrivateTower, calibration: Calibration, lengths: tuple[int, ...]
) -> None:
    """By scores and by state; each sentence alone is what it is in a batch, within twice the error of either."""
    rows = [sentences(1, length, seed=length)[0] for length in lengths]
    (group,), _ = padded(rows, 8)
    found, costs = on_shares(tower, calibration, group.embeddings, lengths=group.lengths)
    for row, own in zip(rows, found, strict=True):
        alone, _ = on_shares(tower, calibration, row[None])
        assert cosine_similarity(own, alone[0], dim=-1) >= 0.99999
        assert (own - alone[0]).norm() / alone[0].norm() < 0.0045
        assert cosine_similarity(own, clear(tower, row[None])[0], dim=-1) >= 0.99999
    _, full = on_shares(tower, calibration, group.embeddings)
    assert costs == full
    without, _ = on_shares(tower, calibration, group.embeddings)
    assert (without[0] - found[0]).norm() / found[0].norm() > 0.05  # what padding would change


def test_lengths_of_another_bracket_are_refused(tower: PrivateTower, calibration: Calibration) -> None:
    for lengths in ((8, 16), (16, 17), (16, 0)):
        with pytest.raises(OutOfRange, match="of one bracket"):
            on_shares(tower, calibration, sentences(2, 16, seed=1), lengths=torch.tensor(lengths))


@pytest.mark.parametrize(("limit", "ahead"), [(2**40, False), (2**16, False), (2**16, True)])
def test_a_prepared_pass_is_the_same_and_asks_for_no_more(
    tower: PrivateTower, calibration: Calibration, limit: int, ahead: bool
) -> None:
    """All at once, and by turns; another pass than the one that was prepared for is refused."""
    plan, weights = FixedPointPlan.of(tower, calibration), shared_weights(tower, calibration)
    embeddings = sentences(4, 8, seed=3)
    halves = share(encode(embeddings, 14))

    def program(party: Party) -> Shared:
        encoder, x = Encoder.mask_and_open(party, weights[party.number], plan), Shared(halves[party.number], 14)
        with party.costs.label("recorded"), party.randomness.recording() as trace:
            encode_sentences(party, encoder, x)
        party.randomness.prepare(trace, limit, ahead)
        with pytest.raises(MpcError, match="did not come"):
            party.randomness.prepare(trace)
        found = encode_sentences(party, encoder, x)
        assert party.randomness.seconds > 0
        party.randomness.prepare(trace, limit)
        with pytest.raises(MpcError, match="another computation"):
            encode_sentences(party, encoder, x.view(lambda own: own[:2]))
        return found

    found = reconstruct(run(program, timeout=120).results)
    assert cosine_similarity(found, clear(tower, embeddings), dim=-1).min() >= 0.9995


def test_weights_are_opened_at_set_up_only(tower: PrivateTower, calibration: Calibration) -> None:
    """A second pass costs what the first did, and so does a batch of twice the size: nothing of a pass is fixed."""
    _, once = on_shares(tower, calibration, sentences(8, 8, seed=6))
    again, more = (
        on_shares(tower, calibration, sentences(batch, 8, seed=6), times)[1] for batch, times in ((8, 2), (16, 1))
    )
    assert list(once) == ["set-up", "embeddings", "layer 0", "layer 1"]
    assert once["set-up"] == again["set-up"] == more["set-up"]
    for label in list(once)[1:]:
        assert again[label] == once[label] + once[label]
        assert more[label].online == 2 * once[label].online
        assert more[label].rounds == once[label].rounds


def test_blocks_are_dealt_what_they_say(tower: PrivateTower, calibration: Calibration) -> None:
    """Beside their protocols: `attention_block` and `feed_forward_block` together."""
    plan = FixedPointPlan.of(tower, calibration)
    weights, halves = shared_weights(tower, calibration), share(encode(sentences(2, 8, seed=6), 14))

    def program(party: Party) -> Shared:
        return encode_sentences(
            party, Encoder.mask_and_open(party, weights[party.number], plan), Shared(halves[party.number], 14)
        )

    costs = run(program, timeout=120).costs.by_label_and_protocol()
    states, inner = 2 * 8 * WIDTH, 2 * 8 * INNER
    for number, layer in enumerate(plan.layers):
        due = packed_size(3 * states, layer.projected) + packed_size(states, layer.out)
        due += packed_size(inner, layer.inner) + packed_size(states, layer.outer)
        assert costs[f"layer {number}"]["product"] == Cost(offline=due)
        assert costs[f"layer {number}"]["truncate"].offline == (64 + 16) * states


def test_set_up_costs_the_bits_of_the_plan(tower: PrivateTower, calibration: Calibration) -> None:
    _, costs = on_shares(tower, calibration, sentences(1, 2, seed=6))
    due = packed_size(WIDTH, 64) * 5
    for layer in FixedPointPlan.of(tower, calibration).layers:
        due += packed_size(3 * WIDTH**2, layer.projected) + packed_size(WIDTH**2, layer.out)
        due += packed_size(WIDTH * INNER, layer.inner) + packed_size(WIDTH * INNER, layer.outer)
        due += packed_size(WIDTH * FREQUENCIES, UNIT + WEIGHT)
    assert costs["set-up"] == Cost(rounds=1, online=due)


def test_sentences_that_were_not_measured_are_within_the_margin(tower: PrivateTower) -> None:
    """A wide one: queries of 8 normal entries have small norms more often than those of a real tower, see below."""
    assert Calibration.measure(tower, batches(1), margin=4.0).outside(tower, batches(2)) == []
    tight = Calibration.measure(tower, batches(1, count=3), margin=1.0)
    assert tight.outside(tower, batches(1, count=3)) == []
    assert tight.outside(tower, batches(2)) != []


def test_the_margin_widens_both_ends(tower: PrivateTower) -> None:
    tight, wide = (Calibration.measure(tower, batches(1, count=3), margin) for margin in (1.0, 2.0))
    low, high = tight.layers[1].norm1.rest
    assert wide.layers[1].norm1.rest == (low / 2, high * 2)
    assert wide.layers[0].query[3] == (tight.layers[0].query[3][0] / 2, tight.layers[0].query[3][1] * 2)
    assert wide.margin == 2


def test_inner_units_have_the_range_of_the_widest_in_their_group(tower: PrivateTower) -> None:
    """Where few units are wide, most need few frequencies; what is dealt is far less than with one series for all."""
    wide = [{**layer, "inner.bias": layer["inner.bias"].clone()} for layer in tower.layers]
    wide[0]["inner.bias"][[3, 40]] += torch.tensor([25.0, -40.0])
    wide[0]["inner.bias"][17] += 12.0
    uneven = dataclasses.replace(tower, layers=tuple(wide))
    calibration = Calibration.measure(uneven, batches(1), margin=1.2)
    ends = torch.tensor([high for _, high in calibration.layers[0].inner], dtype=torch.float64)
    (embeddings, mask) = next(iter(batches(1)))
    x = torch.nn.functional.layer_norm(embeddings, (WIDTH,), *tower.norm, tower.epsilon)
    attended, _ = uneven.attend(x, wide[0], mask)
    x = x + attended @ wide[0]["out.weight"].T + wide[0]["out.bias"]
    x = torch.nn.functional.layer_norm(x, (WIDTH,), wide[0]["norm1.weight"], wide[0]["norm1.bias"], tower.epsilon)
    seen = (x @ wide[0]["inner.weight"].T + wide[0]["inner.bias"]).abs().flatten(0, 1).amax(0)
    assert (1.2 * seen <= ends).all()  # of each unit by itself
    assert len(set(ends.tolist())) <= GROUPS
    assert ends[[3, 40]].min() > 25
    assert sorted(ends.tolist())[-4] < 10
    plan = FixedPointPlan.of(uneven, calibration).layers[0].gelu
    assert plan[-1].count <= 3
    assert sum(units.count for units in plan) == INNER
    assert all(units.series.high == end for units, end in zip(plan, sorted(set(ends.tolist())), strict=True))
    dealt = sum(units.count * len(units.series.frequencies) for units in plan)
    assert dealt < 0.4 * INNER * len(plan[-1].series.frequencies)
    found, _ = on_shares(uneven, calibration, embeddings[:8])
    assert cosine_similarity(found, clear(uneven, embeddings[:8]), dim=-1).min() >= 0.99999


def test_ranges_are_those_of_the_tower(tower: PrivateTower) -> None:
    """Some, computed by other means, of sentences with padding."""
    (embeddings, mask) = list(batches(1, count=3))[-1]
    ranges = Calibration.measure(tower, [(embeddings, mask)], margin=1.0)
    variances = embeddings[:, 1:30].double().var(-1, correction=0)
    assert ranges.norm.rest == pytest.approx((variances.min().item(), variances.max().item()), rel=1e-5)
    x = torch.nn.functional.layer_norm(embeddings[:, :30], (WIDTH,), *tower.norm, tower.epsilon)
    query, key, value = (x @ tower.layers[0]["qkv.weight"].T + tower.layers[0]["qkv.bias"]).chunk(3, -1)
    squares = (key[..., -8:] ** 2).sum(-1)  # of the last head
    assert ranges.layers[0].key[-1] == pytest.approx((squares.min().item(), squares.max().item()), rel=1e-4)
    assert ranges.layers[0].value == pytest.approx((0, value.abs().max().item()), rel=1e-4)
    units = [torch.nn.functional.normalize(part.unflatten(-1, (HEADS, -1)), dim=-1) for part in (query, key)]
    differences = units[0][:, :, None] - units[1][:, None]  # [B, T, T, H, d]
    weights = (differences[..., None, :] @ tower.layers[0]["features"]).cos().mean((-1, -2)).mean(2)
    assert ranges.layers[0].weights == pytest.approx((weights.min().item(), weights.max().item()), rel=1e-4)


def test_a_range_too_narrow_is_noticed_in_the_clear_and_not_on_shares(
    tower: PrivateTower, calibration: Calibration
) -> None:
    """The embeddings' norm is a number of their scale only where that is in its range."""
    embeddings = 6 * sentences(8, 8, seed=7)
    assert calibration.outside(tower, [(embeddings, torch.ones(8, 8))]) == ["norm.first", "norm.rest"]
    found, _ = on_shares(tower, calibration, embeddings)  # and no error
    assert cosine_similarity(found, clear(tower, embeddings), dim=-1).min() < 0.99


def test_stored_and_read(tower: PrivateTower, calibration: Calibration) -> None:
    assert Calibration.from_json(calibration.to_json()) == calibration
    plan = FixedPointPlan.of(tower, calibration)
    assert FixedPointPlan.from_json(plan.to_json()) == plan
    with pytest.raises(MpcError, match="not a FixedPointPlan"):
        FixedPointPlan.from_json(calibration.to_json())
    with pytest.raises(MpcError, match="not a Calibration"):
        Calibration.from_json("[]")


def test_what_cannot_be_calibrated_is_refused(tower: PrivateTower, calibration: Calibration) -> None:
    with pytest.raises(MpcError, match="give some"):
        Calibration.measure(tower, [])
    with pytest.raises(MpcError, match="give some"):
        Calibration.measure(tower, [(sentences(3, 1, seed=1), torch.ones(3, 1))])
    many = tuple({**layer, "features": 30 * layer["features"][..., :4]} for layer in tower.layers)
    with pytest.raises(OutOfRange, match="mean attention weights of layer 0"):
        Calibration.measure(dataclasses.replace(tower, layers=many), batches(1))
    large = dataclasses.replace(calibration.layers[0], value=(0.0, 40.0))
    with pytest.raises(OutOfRange, match="value: sizes up to 40"):
        FixedPointPlan.of(tower, dataclasses.replace(calibration, layers=(large, calibration.layers[1])))


def full_batches(tower: TextTower, start: int) -> Iterator[Batch]:
    """Definitions of WordNet, each 40th, by length."""
    rows = sorted((tower.tokenizer.encode(text).ids[:32] for text in definitions()[start::40]), key=len)
    for first in range(0, len(rows), 64):
        some = rows[first : first + 64]
        longest = max(map(len, some))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in some])
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in some])
        yield tower.words[tokens] + tower.positions[:longest], mask


@pytest.mark.slow
def test_the_full_tower_within_its_budget() -> None:
    """The bundled tower, its softmax replaced: 4 sentences of 32 tokens, whose ranges were measured on others."""
    bundled = TextTower.load(package_path(*TEXT_MODEL), torch.device("cpu"))
    tower = PrivateTower.from_softmax(bundled, 64, 0)
    calibration = Calibration.measure(tower, full_batches(bundled, 0))
    held_out = list(full_batches(bundled, 1))
    assert calibration.outside(tower, held_out) == []
    embeddings = held_out[-1][0][-4:]
    assert embeddings.shape == (4, 32, 384)
    found, costs = on_shares(tower, calibration, embeddings)
    assert cosine_similarity(found, clear(tower, embeddings), dim=-1).min() >= 0.99999
    for number in range(6):
        assert costs[f"layer {number}"].online <= 8_500_000
        assert costs[f"layer {number}"].rounds <= 40
