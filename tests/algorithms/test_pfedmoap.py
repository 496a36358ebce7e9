"""pFedMoAP: a gate over other clients' contexts, who is given which, what the mean is for, and what is told to whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.states import started_in_double, with_states
from sordino.algorithms import pfedmoap, settings_for
from sordino.algorithms.base import map_tensors
from sordino.encoders.prompt_model import named_parts
from sordino.errors import ConfigError
from sordino.privacy.gradients import Batch, ExactGradients, Gradient
from sordino.privacy.ledger import Observer
from sordino.runtime.local import LocalRuntime, Training

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 30)), list(range(30, 40))]
TABLES: dict[str, Any] = {
    "context_length": 4,
    "batch_size": 5,
    "local_steps": 2,
    "optimizer": {"learning_rate": 0.5},
    "experts": 3,
    "heads": 4,
}


def states_of(training: Training) -> tuple[pfedmoap.Server, pfedmoap.ClientState]:
    server, clients = training.server, training.clients
    assert isinstance(server, pfedmoap.Server)
    assert isinstance(clients, pfedmoap.ClientState)
    return server, clients


def train(runtime: LocalRuntime, rounds: int = 3) -> Training:
    training = started_in_double(runtime)
    while training.round < rounds:
        training, _ = runtime.round(training)
    return training


def test_all_start_at_the_context_of_promptfl(make_runtime: MakeRuntime) -> None:
    start = make_runtime("pfedmoap", ROWS, TABLES).start()
    common = make_runtime("promptfl", ROWS, TABLES).start().server.context  # type: ignore[attr-defined]
    server, clients = states_of(start)
    assert torch.equal(server.context, common)
    assert torch.equal(server.contexts, common.expand(4, -1, -1))
    assert torch.equal(clients.context, server.contexts)


def test_without_experts_the_mean_is_promptfls(make_runtime: MakeRuntime) -> None:
    """With clients of several sizes, who are absent at times."""
    one = make_runtime("pfedmoap", ROWS, TABLES | {"experts": 1}, participation=0.5)
    other = make_runtime("promptfl", ROWS, TABLES, participation=0.5)
    expected = train(other, 6).server.context  # type: ignore[attr-defined]
    torch.testing.assert_close(states_of(train(one, 6))[0].context, expected, rtol=1e-9, atol=1e-12)


def test_a_gate_that_ignores_its_experts_leaves_promptfl(make_runtime: MakeRuntime) -> None:
    shut = TABLES | {"local_weight": 1.0, "gate_optimizer": {"learning_rate": 0.0}}
    runtime, other = make_runtime("pfedmoap", ROWS, shut), make_runtime("promptfl", ROWS, TABLES)
    start = started_in_double(runtime)
    training = with_states(start, clients=map_tensors(start.clients, _closed))
    while training.round < 4:
        training, _ = runtime.round(training)
    assert bool(named_parts(runtime.prompts(training))["known"].all())
    expected = train(other, 4).server.context  # type: ignore[attr-defined]
    torch.testing.assert_close(states_of(training)[0].context, expected, rtol=1e-8, atol=1e-10)


def _closed(name: str, part: Tensor) -> Tensor:
    return 0 * part if name.startswith("gate.output") else part


def test_every_participant_trains_from_the_mean_of_the_last_ones(make_runtime: MakeRuntime) -> None:
    """Who was absent too. The mean weighs a client by its size; the server has of each what the client has."""
    runtime = make_runtime("pfedmoap", ROWS, TABLES, participation=0.5)
    training, sizes = started_in_double(runtime), torch.tensor([12.0, 8.0, 10.0, 10.0], dtype=torch.float64)

    def at_rest(prompt_of: Any, parameters: Any, fixed: Any, batch: Batch) -> Gradient:
        return Gradient({name: 0 * part for name, part in parameters.items()}, batch.features.new_zeros(4))

    for number in range(1, 7):
        module, settings, told = pfedmoap, runtime.settings, pfedmoap.broadcast(states_of(training)[0])
        context = runtime.round_context(number)
        upload, rested = module.client_round(settings, told, states_of(training)[1], runtime.data, at_rest, context)
        mean = states_of(training)[0].context.expand(4, -1, -1)
        assert torch.equal(rested.context, mean), "a client that learns nothing has the mean"
        assert not upload.change.any()
        assert torch.equal(upload.weight.double(), sizes)
        present, before = runtime.server.participants(number), states_of(training)[0]
        training, _ = runtime.round(training)
        server, clients = states_of(training)
        weights = sizes[present] / sizes[present].sum()
        expected = torch.einsum("k,kme->me", weights, server.contexts[present])
        torch.testing.assert_close(server.context, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(server.contexts[present], clients.context[present], rtol=1e-9, atol=1e-12)
        absent = [client for client in range(4) if client not in present]
        assert torch.equal(server.contexts[absent], before.contexts[absent])


def test_who_never_trained_is_evaluated_with_the_mean(make_runtime: MakeRuntime) -> None:
    """Who did, with its own context as it trained it last."""
    runtime = make_runtime("pfedmoap", ROWS, TABLES, participation=0.5)
    training, _ = runtime.round(started_in_double(runtime))
    present = runtime.server.participants(1)
    absent = [client for client in range(4) if client not in present]
    server, clients = states_of(training)
    context = named_parts(runtime.prompts(training))["context"]
    assert torch.equal(context[absent], server.context.expand(2, -1, -1))
    assert torch.equal(context[present], clients.context[present])
    assert (context[present] - server.context).flatten(1).norm(dim=1).min() > 1e-4
    assert (server.context - states_of(started_in_double(runtime))[0].context).norm() > 1e-4


@pytest.mark.parametrize("privacy", [{}, {"mechanism": "dp-sgd", "noise_multiplier": 1.0}], ids=["plain", "noised"])
def test_a_clients_first_round_trains_no_gate(privacy: dict[str, Any], make_runtime: MakeRuntime) -> None:
    """Even if noise, or decay, would move one without a gradient. Nor is it evaluated with a gate that is untrained."""
    decay = {"name": "adamw", "learning_rate": 0.05, "weight_decay": 0.5}
    runtime = make_runtime("pfedmoap", ROWS, TABLES | {"gate_optimizer": decay}, participation=0.5, privacy=privacy)
    training, taken = runtime.begun(), [0] * 4
    firsts_beside_others = 0
    for number in range(1, 7):
        present, before = runtime.server.participants(number), states_of(training)[1].gate
        firsts_beside_others += len({taken[client] == 0 for client in present}) - 1
        training, _ = runtime.round(training)
        after, prompt = states_of(training)[1].gate, named_parts(runtime.prompts(training))
        for client in range(4):
            taken[client] += client in present
            mixes = client in present and taken[client] > 1
            for name in after:
                assert torch.equal(after[name][client], before[name][client]) != mixes, (number, client, name)
            assert bool(prompt["known"][client].any()) == (taken[client] > 1)
            assert bool(prompt["experts"][client].any()) == (taken[client] > 1)
    assert firsts_beside_others, "some round had a newcomer beside one that mixes"
    assert min(taken) > 1


def test_a_closed_gate_leaves_the_own_context(make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]) -> None:
    """Its logits are lambda times those of training alone, and so is the gradient by the context with lambda 1."""
    runtime = make_runtime("pfedmoap", ROWS, TABLES | {"local_weight": 1.0})
    alone = make_runtime("local", ROWS, TABLES).model
    prompt = named_parts(runtime.prompts(train(runtime)))
    assert bool(prompt["known"].all())
    closed = prompt | {"output": 0 * prompt["output"], "output_bias": 0 * prompt["output_bias"]}
    expected = alone.predict(prompt["context"], table[0][:7])
    torch.testing.assert_close(runtime.model.predict(closed, table[0][:7]), expected, rtol=1e-9, atol=1e-12)
    assert (runtime.model.predict(prompt, table[0][:7]) - expected).abs().max() > 1e-3, "an open gate matters"
    features, labels = (part[:20].unflatten(0, (4, 5)) for part in table)
    batch = Batch(features, labels, torch.ones(4, 5, dtype=torch.bool))
    fixed = {name: part for name, part in closed.items() if name != "context"}
    by_context = {"context": prompt["context"]}
    found = ExactGradients(runtime.model)(dict, by_context, fixed, batch).values["context"]
    plain = ExactGradients(alone)(lambda p: p["context"], by_context, {}, batch).values["context"]
    torch.testing.assert_close(found, plain, rtol=1e-8, atol=1e-12)


def test_a_client_that_knows_nobody_yet_has_its_own_logits(
    make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]
) -> None:
    runtime = make_runtime("pfedmoap", ROWS, TABLES)
    prompt = named_parts(runtime.prompts(started_in_double(runtime)))
    assert not prompt["known"].any()
    assert not prompt["experts"].any()
    expected = make_runtime("local", ROWS, TABLES).model.predict(prompt["context"], table[0][:7])
    torch.testing.assert_close(runtime.model.predict(prompt, table[0][:7]), expected, rtol=1e-12, atol=1e-12)


def test_its_gradient_is_that_of_its_loss_by_hand(make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]) -> None:
    """The equations, image by image and head by head; the second expert is not known yet."""
    runtime = make_runtime("pfedmoap", ROWS, TABLES | {"scaling": 3.0, "gate_width": 12})
    model = runtime.model
    assert isinstance(model, pfedmoap.Model)
    prompt = named_parts(runtime.prompts(train(runtime)))
    prompt["known"] = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, -1)
    features, labels = (part[:20].unflatten(0, (4, 5)) for part in table)
    batch = Batch(features, labels, torch.ones(4, 5, dtype=torch.bool))
    parameters = {name: part for name, part in prompt.items() if name not in ("experts", "known")}
    fixed = {name: prompt[name] for name in ("experts", "known")}
    found = ExactGradients(model)(dict, parameters, fixed, batch)
    encoder = model.encoder
    pooled = slice(None, None, encoder.feature_width // 12)
    for client in range(4):
        leaves = {name: part[client].clone().requires_grad_() for name, part in parameters.items()}
        own = encoder.text_features(leaves["context"], model.classes)
        other = encoder.text_features(prompt["experts"][client, 0], model.classes)
        logits = []
        for image in batch.features[client]:
            query = F.linear(image[pooled], leaves["query"], leaves["query_bias"])
            rows = []
            for label in range(4):
                mixed = []
                given = torch.stack([own[label][pooled], other[label][pooled]])
                key, value = F.linear(given, leaves["key"]), F.linear(given, leaves["value"], leaves["value_bias"])
                for head in range(4):
                    part = slice(3 * head, 3 * head + 3)
                    weights = (3.0 * key[:, part] @ query[part]).softmax(0)
                    mixed.append(weights @ value[:, part])
                gated = F.linear(torch.cat(mixed), leaves["output"], leaves["output_bias"])
                rows.append(encoder.logit_scale * (0.5 * image @ own[label] + image[pooled] @ gated))
            logits.append(torch.stack(rows))
        loss = F.cross_entropy(torch.stack(logits), batch.labels[client])
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found.values[name][client], gradient, rtol=1e-7, atol=1e-11)


def test_the_server_gives_the_nearest_that_were_trained() -> None:
    contexts = torch.tensor([0.0, 1.0, 3.0, 3.5, 10.0])[:, None, None].expand(-1, 2, 3)
    trained = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    assert pfedmoap.nearest(contexts, trained, 2).tolist() == [[2, 3], [0, 2], [3, 0], [2, 0], [3, 2]]
    nobody = pfedmoap.nearest(contexts, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), 2)
    assert nobody.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4]], "itself where there is nobody"
    two = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    server = pfedmoap.Server(contexts[0], contexts, two, pfedmoap.nearest(contexts, two, 2))
    told = pfedmoap.broadcast(server)
    assert told.known.tolist() == [[1, 0], [0, 0], [0, 0], [1, 0], [0, 0]], "nothing for who was never there"
    assert torch.equal(told.experts[[0, 3], 0], contexts[[3, 0]])
    assert not told.experts[told.known == 0].any(), "nothing of a context that is no expert yet"


def test_who_was_absent_is_nobodys_expert_and_has_none(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("pfedmoap", ROWS, TABLES, participation=0.5)
    training, record = runtime.round(started_in_double(runtime))
    assert record.participants == 2
    server, _ = states_of(training)
    present = server.trained.nonzero().flatten().tolist()
    assert present == runtime.server.participants(1)
    told = pfedmoap.broadcast(server)
    for client in range(4):
        others = {int(each) for each, known in zip(server.nearest[client], told.known[client], strict=True) if known}
        assert others == (set(present) - {client} if client in present else set())


def test_a_gate_stays_with_its_client(make_runtime: MakeRuntime) -> None:
    """Other gates than these make other uploads only through the gradient; a round sends a context and no more."""
    runtime = make_runtime("pfedmoap", ROWS, TABLES)
    training = train(runtime, 2)
    after, record = runtime.round(training)
    moved = [after.clients.gate[name] - training.clients.gate[name] for name in after.clients.gate]  # type: ignore[attr-defined]
    assert max(float(each.abs().max()) for each in moved) > 1e-6
    contexts = after.server.contexts  # type: ignore[attr-defined]
    assert record.upload_bytes < 4 * 2 * contexts[0].nbytes
    turned = with_states(training, clients=map_tensors(training.clients, lambda _, part: -part))
    assert not torch.equal(runtime.round(turned)[0].server.contexts, contexts)  # type: ignore[attr-defined]


def test_it_says_that_other_clients_see_a_context(make_runtime: MakeRuntime) -> None:
    """Without noise other clients, the server and whoever is given a prompt; with DP-SGD nobody sees one bare."""
    seen: dict[str, tuple[Observer, ...]] = {each.content: each.observers for each in pfedmoap.ABOUT.discloses}
    assert "clients" in seen["each client's context, to the clients that have it as an expert"]
    assert "clients" in seen["the mean of the participants' contexts, to all"]
    plain = make_runtime("pfedmoap", ROWS, TABLES).start().ledger
    assert not plain.private
    assert "sizes" in {each.channel for each in plain.disclosures}, "by which the mean is weighted"
    noised = make_runtime("pfedmoap", ROWS, TABLES, privacy={"mechanism": "dp-sgd", "noise_multiplier": 1.0})
    training, _ = noised.round(noised.begun())
    assert training.ledger.private
    assert not training.ledger.disclosures


@pytest.mark.parametrize(
    ("mechanism", "remedy"),
    [("cotangent", "use 'dp-sgd'"), ("dp-fedavg", "looks at each upload by itself; use 'dp-sgd'")],
)
def test_mechanisms_that_do_not_fit_are_refused(mechanism: str, remedy: str, make_runtime: MakeRuntime) -> None:
    privacy = {"mechanism": mechanism, "noise_multiplier": 1.0}
    with pytest.raises(ConfigError, match=f"privacy.mechanism = '{mechanism}'.*{remedy}"):
        make_runtime("pfedmoap", ROWS, TABLES, privacy=privacy, weighting="uniform")


@pytest.mark.parametrize("noise_by", ["server", "shares"])
def test_noise_on_the_mean_alone_is_refused(noise_by: str, make_runtime: MakeRuntime) -> None:
    """The server, and other clients, would see each context without it."""
    privacy = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "noise_by": noise_by}
    with pytest.raises(ConfigError, match=f"privacy.noise_by = '{noise_by}'.*use 'client'"):
        make_runtime("pfedmoap", ROWS, TABLES | {"local_steps": 1}, privacy=privacy)


@pytest.mark.parametrize("aggregation", ["median", "trimmed-mean", "norm-bound"])
def test_an_aggregation_that_replaces_the_mean_is_refused(aggregation: str, make_runtime: MakeRuntime) -> None:
    """Single contexts go on to other clients, so that no aggregation keeps a few from steering them."""
    with pytest.raises(ConfigError, match=f"runtime.aggregation = '{aggregation}'.*looks at each upload by itself"):
        make_runtime("pfedmoap", ROWS, TABLES, aggregation=aggregation, norm_bound=1.0)


@pytest.mark.parametrize(
    ("tables", "key"),
    [({"experts": 0}, "experts"), ({"local_weight": -1.0}, "local_weight"), ({"scaling": 0.0}, "scaling")],
)
def test_bad_settings_are_named(tables: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.pfedmoap.{key} = "):
        settings_for("pfedmoap", {"pfedmoap": tables})


def test_heads_that_do_not_share_the_width_are_refused(make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"settings\.pfedmoap\.heads = 5: must divide the gate's width"):
        make_runtime("pfedmoap", ROWS, TABLES | {"heads": 5})
