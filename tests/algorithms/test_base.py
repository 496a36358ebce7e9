from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from sordino.algorithms.base import ClientState, map_tensors, named_tensors, put, take
from sordino.privacy.mechanism import plain_mean
from sordino.randomness import Streams
from sordino.runtime.facts import client_data


@dataclass(frozen=True)
class Example(ClientState):
    context: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict)


def example() -> Example:
    return Example(torch.arange(12.0).view(4, 3), {"momentum": torch.arange(4.0)})


def streams(clients: list[int], number: int = 1) -> Streams:
    return Streams(0, number, clients, torch.device("cpu"))


def data(sizes: list[int], weighting: str = "examples"):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    total = sum(sizes)
    return client_data(torch.arange(total, dtype=torch.float32)[:, None], torch.arange(total), rows, weighting)


def test_names_are_dotted_and_complete() -> None:
    assert set(named_tensors(example())) == {"context", "optimizer.momentum"}


def test_put_undoes_take_and_leaves_the_others() -> None:
    state, chosen = example(), torch.tensor([3, 1])
    changed = map_tensors(take(state, chosen), lambda _, tensor: -tensor)
    after = put(state, chosen, changed)
    for name, before in named_tensors(state).items():
        now = named_tensors(after)[name]
        torch.testing.assert_close(now[chosen], -before[chosen], rtol=0, atol=0)
        torch.testing.assert_close(now[[0, 2]], before[[0, 2]], rtol=0, atol=0)


def test_weighted_mean_commutes_with_the_clients_order_and_counts_weights() -> None:
    values, weights = torch.randn(5, 2, 3).double(), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    order = torch.tensor([4, 2, 0, 1, 3])
    mean = plain_mean("", values, weights)
    torch.testing.assert_close(plain_mean("", values[order], weights[order]), mean)
    torch.testing.assert_close(mean, torch.cat([values[k : k + 1].repeat(k + 1, 1, 1) for k in range(5)]).mean(0))


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_a_pass_takes_every_example_once(size: int) -> None:
    clients = data([7, 4])
    steps = -(-7 // size)
    taken: list[list[int]] = [[], []]
    for batch in clients.batches(steps, size, streams([0, 1])):
        for client in range(2):
            taken[client] += batch.labels[client][batch.mask[client]].tolist()
    assert sorted(taken[0]) == list(range(7))
    first_pass = taken[1][:4]
    assert sorted(first_pass) == [7, 8, 9, 10]  # the smaller client goes on with a second pass
    assert set(taken[1]) <= {7, 8, 9, 10}


def test_features_belong_to_their_labels_and_to_their_client() -> None:
    for batch in data([5, 3]).batches(4, 2, streams([0, 1])):
        assert torch.equal(batch.features[..., 0].long()[batch.mask], batch.labels[batch.mask])


def test_no_size_takes_everything_each_time() -> None:
    for batch in data([5, 3]).batches(2, None, streams([0, 1])):
        assert batch.mask.sum(1).tolist() == [5, 3]
        assert sorted(batch.labels[1][batch.mask[1]].tolist()) == [5, 6, 7]


def test_a_client_draws_the_same_alone_and_in_a_stack() -> None:
    together = list(data([6, 6]).batches(5, 4, streams([3, 8])))
    second = client_data(torch.arange(12.0)[:, None], torch.arange(12), [range(6, 12)], "examples")
    alone = list(second.batches(5, 4, streams([8])))
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.labels[1][a.mask[1]], b.labels[0][b.mask[0]])
    torch.testing.assert_close(streams([3, 8]).normal("x", 4)[1], streams([8]).normal("x", 4)[0], rtol=0, atol=0)


def test_streams_differ_by_round_client_purpose_and_seed() -> None:
    device = torch.device("cpu")
    draws = [
        Streams(seed, number, [client], device).normal(purpose, 4)
        for seed in (0, 1)
        for number in (1, 2)
        for client in (0, 1)
        for purpose in ("a", "b")
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 16


def test_sizes_stay_untold_under_uniform_weighting() -> None:
    assert data([5, 3]).weights.tolist() == [5, 3]
    assert data([5, 3], "uniform").weights.tolist() == [1, 1]
