"""Random feature attention on shares against torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc.both import computed, held, normal, root_cost
from sordino.mpc.arithmetic.packing import packed_size
from sordino.mpc.protocols.attention import random_feature_attention
from sordino.mpc.protocols.linear import mask_and_open
from sordino.mpc.protocols.party import Party, Shared
from sordino.mpc.protocols.roots import calibrate


@pytest.mark.parametrize(("length", "extra_rounds"), [(32, 0), (80, 1)])
def test_attention_within_the_stated_error(length: int, extra_rounds: int) -> None:
    batch, heads, width, count = 2, 3, 32, 64
    shape = batch, heads, length, width
    query, key = (torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1) for seed in (1, 2))
    value, features = normal(*shape, seed=3).clamp(-3, 3), normal(heads, width, count, seed=4)
    phi_query, phi_key = (torch.cat([(x @ features).cos(), (x @ features).sin()], -1) for x in (query, key))
    scores = phi_query @ phi_key.mT
    oracle = scores @ value / scores.sum(-1, keepdim=True)
    root = calibrate(1, 0.1, 1.2, 1e-4)

    def program(party: Party) -> Shared:
        (masked,) = mask_and_open(party, held(features / (2 * torch.pi), 14)(party))
        with party.costs.label("attention"):
            tensors = (held(x, 14, seed)(party) for seed, x in enumerate((query, key, value), start=1))
            return random_feature_attention(party, *tensors, masked, root, fraction=14)  # type: ignore[misc]

    found, costs = computed(program)
    assert (found - oracle).abs().max() < 2e-3
    cost = costs.by_label()["attention"]
    assert cost.rounds == 7 + extra_rounds + 2 + 2 * root.steps
    angles = batch * heads * length * count
    rows = batch * heads * length

    def order(length: int) -> int:
        """Bytes of step 3, by scores and by state."""
        group, scores = batch * heads, batch * heads * length**2
        if length == 32:
            return (
                2 * packed_size(2 * angles, 25)
                + packed_size(scores, 25 - (16 + 11 - 16))
                + sum(packed_size(n, 50) for n in (scores, batch * heads * length * width))
            )
        bits = 8 + 4 + 2 + max(14 + 7, 16 + 6 + 1)
        beside, state = group * length * (width + 1), group * 2 * count * (width + 1)
        masked = 2 * packed_size(2 * angles, bits) + packed_size(beside, bits) + packed_size(state, bits)
        return masked + packed_size(state, bits - (8 + 14 + 7 - 16)) + packed_size(beside, bits - (8 + 16 + 6 - 16))

    size = rows * width
    online = 2 * packed_size(size, 28) + 2 * packed_size(angles, 14) + order(length)
    online += packed_size(size, 34) + packed_size(rows, 34) + packed_size(size, 34 - 14)
    assert cost.online == online + root_cost(root, rows, 14, 16).online


@settings(max_examples=30)
@given(st.data(), st.sampled_from([1, 2, 3, 8, 17, 32]), st.sampled_from([4, 32]), st.integers(0, 99))
def test_attention_of_tokens_of_any_kind(data: st.DataObject, length: int, width: int, seed: int) -> None:
    """With 64 features and up to 32 tokens, by scores and by state, of values up to 1 in size.

    Tokens may all be the same, or keys opposite to all queries; values constant, or alternating between 1 and -1.
    A mask may leave one token, where so few weights add up to what is in the root's range; padding has the largest
    values that it may have.
    """
    batch, heads, count, root = 2, 2, 64, calibrate(1, 0.1, 1.2, 1e-4)
    shape = batch, heads, length, width
    query, key = (torch.nn.functional.normalize(normal(*shape, seed=2 * seed + i), dim=-1) for i in range(2))
    tokens = data.draw(st.sampled_from(["normal", "same", "opposite"]))
    if tokens != "normal":
        key = key[:, :, :1].expand(shape)
        query = key if tokens == "same" else -key
    sign = 1 - 2 * (torch.arange(length, dtype=torch.float64) % 2)[:, None]
    kind = data.draw(st.sampled_from(["normal", "ones", "alternating", "zeros"]))
    value = {"ones": sign.abs(), "alternating": sign, "zeros": 0 * sign}.get(kind, normal(*shape, seed=seed))
    value = value.clamp(-1, 1).expand(shape)
    fewest = 1 if length <= 3 else length // 2 + 1
    lengths = torch.tensor([data.draw(st.sampled_from([fewest, length])) for _ in range(batch)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    value = torch.where(mask[:, None, :, None] == 1, value, 15.9)
    features = 0.5 * normal(heads, width, count, seed=seed + 1)
    phi_query, phi_key = (torch.cat([(x @ features).cos(), (x @ features).sin()], -1) for x in (query, key))
    scores = phi_query @ phi_key.mT * mask[:, None, None, :]
    means = scores.sum(-1) / count / 2 ** math.ceil(math.log2(length))
    assert 0.1 < means.min() <= means.max() < 1.2

    def program(party: Party) -> Shared:
        (masked,) = mask_and_open(party, held(features / (2 * torch.pi), 14)(party))
        own = (held(x, 14, number)(party) for number, x in enumerate((query, key, value), start=1))
        return random_feature_attention(
            party, *own, masked, root, fraction=14, mask=mask if bool((mask == 0).any()) else None
        )

    found, _ = computed(program)
    assert (found - scores @ value / scores.sum(-1, keepdim=True)).abs().max() < 2e-3


def test_a_long_sequence_costs_no_more_than_linearly() -> None:
    """The state is spread over more tokens at 256 than at 128; all that grows is a bit, for sums of twice as many."""
    root = calibrate(1, 0.1, 1.2, 1e-3)

    def bytes_a_token(length: int) -> float:
        def program(party: Party) -> Shared:
            (masked,) = mask_and_open(party, party.public(torch.zeros(1, 8, 16), 14))
            x = party.public(torch.ones(1, 1, length, 8) / math.sqrt(8), 14)
            return random_feature_attention(party, x, x, x, masked, root, fraction=14)

        return computed(program)[1].by_protocol()["random_feature_attention"].online / length

    assert bytes_a_token(256) / 1.03 < bytes_a_token(128) < 1.3 * bytes_a_token(256)
