from collections.abc import Callable
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from sordino.algorithms.base import named_tensors
from sordino.errors import RunError
from sordino.runtime import messages
from sordino.runtime.local import LocalRuntime
from sordino.runtime.messages import RoundHeader

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(4 * k, 4 * k + 4)) for k in range(10)]
TABLES = {"context_length": 3, "rank": 2, "local_steps": 1}


def test_a_round_changes_its_participants_only(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("local", ROWS, TABLES, participation=0.3)
    before, seen = runtime.start(), set()
    for _ in range(6):
        after, record = runtime.round(before)
        changed = (after.clients.context != before.clients.context).flatten(1).any(1)
        assert record.participants == int(changed.sum()) == 3
        seen |= set(changed.nonzero().flatten().tolist())
        before = after
    assert len(seen) > 3  # others are drawn in other rounds


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_runtime: MakeRuntime) -> None:
    def final(seed: int) -> torch.Tensor:
        runtime = make_runtime("dp-fpl", ROWS, TABLES | {"batch_size": 2}, seed=seed, participation=0.5)
        training = runtime.start()
        while training.round < runtime.rounds:
            training, _ = runtime.round(training)
        return runtime.prompts(training)

    assert torch.equal(final(0), final(0))
    assert not torch.equal(final(0), final(1))


def test_global_randomness_is_neither_used_nor_changed(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("dp-fpl", ROWS, TABLES | {"batch_size": 2})
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, _ = runtime.round(runtime.start())
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    other, _ = runtime.round(runtime.start())
    assert torch.equal(one.clients.context, other.clients.context)


def test_divergence_is_told(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("promptfl", ROWS, TABLES)
    runtime.data = replace(runtime.data, features=runtime.data.features * float("inf"))
    training = runtime.start()
    with pytest.raises(RunError, match="diverged in round 1 .*lower the learning rate"):
        runtime.round(training)


def test_only_messages_can_be_sent(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("dp-fpl", ROWS, TABLES)
    training = runtime.start()
    for kept in (training.clients, training.server):
        with pytest.raises(TypeError, match="may not leave its party"):
            messages.encode(kept, RoundHeader(1, 0, 1))  # type: ignore[arg-type]


def test_a_message_is_its_declared_tensors_and_comes_back_whole(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("dp-fpl", ROWS, TABLES)
    training = runtime.start()
    broadcast = runtime.algorithm.broadcast(training.server)
    content = messages.encode(broadcast, RoundHeader(1, 0, len(ROWS)))
    assert set(safetensors.torch.load(content)) == set(named_tensors(broadcast)) == {"context"}
    assert torch.equal(messages.decode(content, broadcast).context, broadcast.context)
    _, record = runtime.round(training)
    assert record.broadcast_bytes == len(content)
    assert record.upload_bytes > broadcast.context.numel() * 4  # a gradient of p_G and a weight, for one client


def test_one_clients_upload_is_measured_not_the_stacks(make_runtime: MakeRuntime) -> None:
    few, many = make_runtime("promptfl", ROWS[:2], TABLES), make_runtime("promptfl", ROWS, TABLES)
    assert few.round(few.start())[1].upload_bytes == many.round(many.start())[1].upload_bytes


def test_sizes_are_named_as_disclosed_where_they_are(make_runtime: MakeRuntime) -> None:
    told = make_runtime("promptfl", ROWS, TABLES).start().ledger.disclosures
    untold = make_runtime("promptfl", ROWS, TABLES, weighting="uniform").start().ledger.disclosures
    assert [each.content for each in told if each not in untold] == [
        "how many examples each client holds, to the server every round"
    ]
    local = make_runtime("local", ROWS, TABLES)
    assert local.start().ledger.disclosures == local.algorithm.ABOUT.discloses
