"""Identities that hold for every method, and those that make each one what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.states import started_in_double, with_states
from sordino.algorithms import METHODS, algorithm, settings_for
from sordino.algorithms.base import (
    Broadcast,
    ClientState,
    PersonalBroadcast,
    Server,
    Upload,
    Uploads,
    map_tensors,
    named_tensors,
    take,
)
from sordino.errors import ConfigError
from sordino.privacy.gradients import ExactGradients
from sordino.privacy.mechanism import plain_mean
from sordino.runtime import checkpoint
from sordino.runtime.local import LocalRuntime, Training

MakeRuntime = Callable[..., LocalRuntime]

LEARNING = [name for name in METHODS if algorithm(name).ABOUT.trains]
DISCRETE = ("feddtpt", "feddtpt-votes")  # a few words of a tiny tokenizer: what they gain is in test_black_box.py
FEDERATED = [name for name in LEARNING if name != "central"]
# Others are in test_secfpp.py.
SENDING = [name for name in FEDERATED if not hasattr(algorithm(name), "server_exchange")]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
QUICK = {"context_length": 4, "batch_size": 5, "local_steps": 2, "optimizer": {"learning_rate": 0.5}}
QUICK |= {"fedbpt": {"search_width": 6, "population": 8}}
TABLES = QUICK | {"dp-fpl": {"rank": 2, "local_learning_rate": 0.5}}


def train(runtime: LocalRuntime) -> Training:
    training = started_in_double(runtime)
    while training.round < runtime.rounds:
        training, _ = runtime.round(training)
    return training


def close(one: Training, other: Training, clients: list[int] | None = None) -> None:
    for name, tensor in named_tensors(one.server).items():
        torch.testing.assert_close(named_tensors(other.server)[name], tensor, rtol=1e-8, atol=1e-10)
    for name, tensor in named_tensors(one.clients).items():
        expected = named_tensors(other.clients)[name]
        torch.testing.assert_close(tensor if clients is None else tensor[clients], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_the_four_types_say_what_stays_and_what_leaves(name: str, make_runtime: MakeRuntime) -> None:
    module, runtime = algorithm(name), make_runtime(name, ROWS, TABLES)
    start = runtime.start()
    assert isinstance(start.server, Server)
    assert isinstance(start.clients, ClientState)
    assert isinstance(module.broadcast(start.server), Broadcast)
    assert issubclass(module.Upload, Upload)  # type: ignore[attr-defined]
    for tensor in named_tensors(start.clients).values():
        assert len(tensor) == (1 if name == "central" else 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LEARNING if name not in DISCRETE])
def test_loss_goes_down(name: str, make_runtime: MakeRuntime) -> None:
    learning = {"optimizer": {"name": "adam", "learning_rate": 0.05}, "local_learning_rate": 0.3, "local_steps": 3}
    # pFedPG's published rate at the server is for a hundred rounds of five epochs each.
    slow = {"pfedpg": {"server_optimizer": {"name": "adam", "learning_rate": 0.02}}}
    black_box = {"fedbpt": {"search_width": 16, "population": 12, "masked_share": 0.0, "batch_size": 0}}
    black_box |= {"fed-bbpt": {"step_size": 0.05, "smoothing": 0.05, "batch_size": 0}}
    rounds = 40 if name in ("kgcoop", "promptsrc", "fedbpt") else 20  # held near the hand-written one, or searching
    runtime = make_runtime(name, ROWS, QUICK | learning | slow | black_box | {"rank": 2}, rounds=rounds)
    training, losses = runtime.start(), []
    while training.round < runtime.rounds:
        training, record = runtime.round(training)
        losses.append(record.loss)
    # Visual tokens in a tiny random tower come near to guessing, ln 4, which is not far below the start.
    assert losses[-1] < (0.97 if name == "pfedpg" else 0.9) * losses[0]


@pytest.mark.parametrize("name", FEDERATED)
def test_a_stack_of_clients_equals_each_client_alone(name: str, make_runtime: MakeRuntime) -> None:
    """One client's upload and state do not depend on who else is in the stack."""
    runtime = make_runtime(name, ROWS, TABLES)
    training = train(runtime)
    module, number = algorithm(name), training.round + 1
    broadcast = module.broadcast(training.server)
    settings = settings_for(name, TABLES)

    def round_of(clients: list[int]) -> tuple[Upload, ClientState]:
        from sordino.algorithms.base import RoundContext
        from sordino.randomness import Streams
        from sordino.runtime.facts import client_data

        data = client_data(runtime.data.features, runtime.data.labels, [ROWS[k] for k in clients], "examples")
        round_context = RoundContext(number, number, Streams(0, number, clients, torch.device("cpu")))
        state = take(training.clients, torch.tensor(clients))
        gradients = runtime.mechanism.noiseless()
        told = told_to(broadcast, clients)
        result: tuple[Upload, ClientState] = module.client_round(settings, told, state, data, gradients, round_context)
        return result

    together = round_of([0, 1, 2])
    for client in range(3):
        for stacked, alone in zip(together, round_of([client]), strict=True):
            for key, tensor in named_tensors(alone).items():
                torch.testing.assert_close(named_tensors(stacked)[key][[client]], tensor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SENDING)
def test_averaging_commutes_with_the_clients_order(name: str, make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(name, ROWS, TABLES)
    training = started_in_double(runtime)
    module, settings = algorithm(name), settings_for(name, TABLES)
    round_context, order = runtime_clock(runtime), [2, 0, 1]
    gradients = runtime.mechanism.noiseless()
    upload, _ = module.client_round(
        settings, module.broadcast(training.server), training.clients, runtime.data, gradients, round_context
    )
    shuffled = take(upload, torch.tensor(order))
    one = module.server_round(settings, training.server, Uploads(upload, plain_mean), round_context)
    reordered = replace(round_context, streams=replace(round_context.streams, clients=order))
    other = module.server_round(settings, training.server, Uploads(shuffled, plain_mean), reordered)
    for key, tensor in named_tensors(one).items():
        torch.testing.assert_close(named_tensors(other)[key], tensor)


def told_to(broadcast: Broadcast, clients: list[int]) -> Broadcast:
    """What some clients are told."""
    return take(broadcast, torch.tensor(clients)) if isinstance(broadcast, PersonalBroadcast) else broadcast


def runtime_clock(runtime: LocalRuntime, number: int = 1):
    from sordino.algorithms.base import RoundContext
    from sordino.randomness import Streams

    return RoundContext(number, 5, Streams(0, number, range(len(runtime.data)), torch.device("cpu")))


@pytest.mark.parametrize("name", ["promptfl", "local"])
def test_one_client_with_everything_equals_central_training(name: str, make_runtime: MakeRuntime) -> None:
    """From the same prompt, on the same batches."""
    tables = QUICK | {"initial_context": "a photo of a", "context_length": 4 + extra_tokens(make_runtime)}
    everything = [list(range(40))]
    central = make_runtime("central", ROWS, tables)
    alone = make_runtime(name, everything, tables)
    torch.testing.assert_close(central.prompts(train(central)), alone.prompts(train(alone)), rtol=1e-8, atol=1e-10)


def extra_tokens(make_runtime: MakeRuntime) -> int:
    """So that the context holds exactly the words' tokens, whatever the small tokenizer makes of them."""
    return len(make_runtime("local", ROWS).model.encoder.embed("a photo of a")) - 4


@pytest.mark.parametrize("name", LEARNING)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(name: str, make_runtime: MakeRuntime, tmp_path: Path) -> None:
    """With Adam, whose state at the server or at a client must come back too, and clients that are absent at times."""
    adam = {"optimizer": {"name": "adam", "learning_rate": 0.05}}
    rows = ROWS if name in [*SENDING, "central"] else ROWS + ROWS  # a protocol takes more than two a round
    runtime = make_runtime(name, rows, TABLES | adam | {"secfpp": {"cluster_every": 1}}, participation=0.67)
    halfway = runtime.start()
    for _ in range(2):
        halfway, _ = runtime.round(halfway)
    checkpoint.save(tmp_path, halfway)
    resumed = checkpoint.load(tmp_path, runtime.start())
    assert resumed is not None
    for _ in range(2):
        halfway, resumed = runtime.round(halfway)[0], runtime.round(resumed)[0]
    for state, again in ((halfway.server, resumed.server), (halfway.clients, resumed.clients)):
        for key, tensor in named_tensors(state).items():
            assert torch.equal(named_tensors(again)[key], tensor)


@pytest.mark.parametrize("name", SENDING)
def test_nothing_of_the_state_is_in_the_upload(name: str, make_runtime: MakeRuntime) -> None:
    """Two clients whose personal states differ, but who compute the same gradient, send the same bytes."""
    runtime = make_runtime(name, ROWS, TABLES)
    module, settings = algorithm(name), settings_for(name, TABLES)
    training, round_context = train(runtime), runtime_clock(runtime)
    gradients = runtime.mechanism.noiseless()

    class Constant:
        """Gradients that do not depend on the state, so that the only way for it into the upload is by itself."""

        def __call__(self, prompt_of, parameters, fixed, batch):
            found = gradients(prompt_of, parameters, fixed, batch)
            return replace(found, values={key: torch.ones_like(value) for key, value in found.values.items()})

    def upload(state: ClientState) -> dict[str, Tensor]:
        sent, _ = module.client_round(
            settings, module.broadcast(training.server), state, runtime.data, Constant(), round_context
        )
        return named_tensors(sent)

    other = map_tensors(training.clients, lambda _, tensor: tensor + 1.0)
    first, second = upload(training.clients), upload(other)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_zero_shot_is_the_hand_written_sentence(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("zero-shot", ROWS)
    assert runtime.rounds == 0
    torch.testing.assert_close(
        runtime.prompts(runtime.start())[0], runtime.model.encoder.embed("a photo of a"), rtol=0, atol=0
    )


def test_a_random_prompt_is_local_before_its_first_round(make_runtime: MakeRuntime) -> None:
    """Its first numbers, whatever the images are; wider ones are the same numbers times a factor."""
    random, local = make_runtime("random-prompt", ROWS, QUICK), make_runtime("local", ROWS, QUICK)
    prompts = random.prompts(random.start())
    assert torch.equal(prompts, local.prompts(local.start()))
    assert random.rounds == 0
    assert (prompts[0] - prompts[1]).abs().amax() > 0.01, "each client draws its own"
    others = make_runtime("random-prompt", [[39], [38], [37]], QUICK)
    assert torch.equal(others.prompts(others.start()), prompts)
    wide = make_runtime("random-prompt", ROWS, QUICK | {"random-prompt": {"deviation": 0.5}})
    torch.testing.assert_close(wide.prompts(wide.start()), 25 * prompts)
    words = make_runtime("random-prompt", ROWS, {"context_length": 16, "initial_context": "a photo of a"})
    sentence = words.model.encoder.embed("a photo of a")
    assert torch.equal(words.prompts(words.start())[2, -len(sentence) :], sentence)


def test_local_tells_nobody_anything(make_runtime: MakeRuntime) -> None:
    """Other clients' images make no difference, and no byte is sent."""
    three, one = make_runtime("local", ROWS, TABLES), make_runtime("local", ROWS[:1], TABLES)
    torch.testing.assert_close(three.prompts(train(three))[:1], one.prompts(train(one)), rtol=1e-8, atol=1e-10)
    _, record = three.round(three.start())
    assert (record.upload_bytes, record.broadcast_bytes) == (0, 0)


def test_promptfl_with_one_step_is_the_gradient_step_of_the_mean_loss(make_runtime: MakeRuntime) -> None:
    """Averaging prompts after one SGD step is one step on all examples: central training."""
    tables = TABLES | {"local_steps": 1, "batch_size": 0}
    federated, central = make_runtime("promptfl", ROWS, tables), make_runtime("central", ROWS, tables)
    start = started_in_double(federated)
    context = start.server.context[None]  # type: ignore[attr-defined]
    at = with_states(started_in_double(central), clients=replace(central.start().clients, context=context))
    after, _ = federated.round(start)
    reference, _ = central.round(at)
    torch.testing.assert_close(federated.prompts(after), central.prompts(reference), rtol=1e-8, atol=1e-10)


def test_dp_fpl_without_a_personal_prompt_is_promptfl(make_runtime: MakeRuntime) -> None:
    """With p_L at zero and not learning, averaged gradients of p_G are averaged single steps."""
    tables = TABLES | {"local_steps": 1}
    frozen = tables | {"dp-fpl": {"rank": 2, "local_learning_rate": 0.0}}
    personal, shared = make_runtime("dp-fpl", ROWS, frozen), make_runtime("promptfl", ROWS, tables)
    start = started_in_double(personal)
    at = with_states(start, clients=map_tensors(start.clients, lambda _, tensor: torch.zeros_like(tensor)))
    reference = started_in_double(shared)
    for _ in range(4):
        at, _ = personal.round(at)
        reference, _ = shared.round(reference)
    torch.testing.assert_close(at.server.context, reference.server.context, rtol=1e-8, atol=1e-10)  # type: ignore[attr-defined]


def test_dp_fpl_takes_the_step_of_the_paper(make_runtime: MakeRuntime, gradients: ExactGradients) -> None:
    """p_L <- (U - lr gU)(V - lr gV) + R, with gU = g V^T and gV = U^T g for the prompt's gradient g."""
    from sordino.prompts.lowrank import factorize

    tables = TABLES | {"local_steps": 1, "batch_size": 0}
    runtime = make_runtime("dp-fpl", ROWS, tables)
    start = started_in_double(runtime)
    round_context = runtime_clock(runtime)
    settings = settings_for("dp-fpl", tables)
    module = algorithm("dp-fpl")
    upload, state = module.client_round(
        settings, module.broadcast(start.server), start.clients, runtime.data, gradients, round_context
    )
    personal = start.clients.context  # type: ignore[attr-defined]
    batch = next(iter(runtime.data.batches(1, None, round_context.streams)))
    g = gradients(lambda p: p["x"], {"x": start.server.context + personal}, {}, batch).values["x"]  # type: ignore[attr-defined]
    factors = factorize(personal, round_context.streams.normal("projection 0", personal.shape[-1], 2).double())
    rate = settings.local_learning_rate
    expected = (factors.u - rate * g @ factors.v.mT) @ (factors.v - rate * factors.u.mT @ g) + factors.residual
    torch.testing.assert_close(state.context, expected, rtol=1e-4, atol=1e-7)  # the projection is drawn in float32
    torch.testing.assert_close(upload.gradient, g, rtol=1e-8, atol=1e-10)


def test_dplora_keeps_the_rank_and_dp_fpl_does_not(make_runtime: MakeRuntime) -> None:
    def ranks(name: str) -> list[int]:
        runtime = make_runtime(name, ROWS, TABLES)
        contexts = train(runtime).clients.context  # type: ignore[attr-defined]
        return [int(torch.linalg.matrix_rank(context, rtol=1e-9)) for context in contexts]

    assert max(ranks("dplora")) <= 2
    assert min(ranks("dp-fpl")) > 2


def test_the_full_ablation_is_a_shared_prompt_plus_a_free_one(make_runtime: MakeRuntime) -> None:
    """One client: both prompts see the same gradient, so with the same rate they make the same move."""
    tables = QUICK | {"dp-fpl": {"rank": 2, "local_learning_rate": 0.5}}
    runtime = make_runtime("dp-fpl-full", [list(range(40))], tables | {"local_steps": 1})
    start = started_in_double(runtime)
    after, _ = runtime.round(start)
    moved_shared = after.server.context - start.server.context  # type: ignore[attr-defined]
    moved_personal = after.clients.context[0] - start.clients.context[0]  # type: ignore[attr-defined]
    assert moved_shared.norm() > 1e-4
    torch.testing.assert_close(moved_shared, moved_personal, rtol=1e-6, atol=1e-9)


def test_a_bound_on_gradients_bounds_the_personal_step(make_runtime: MakeRuntime) -> None:
    """By rate times the bound without factors; with U V, where U is orthonormal, by at most 1 + |V| times that."""
    bound, rate = 1e-6, 0.5
    tables = TABLES | {"local_steps": 1, "optimizer": {"learning_rate": 0.5, "max_norm": bound}}
    for name in ("dp-fpl-full", "dp-fpl"):
        runtime = make_runtime(name, ROWS, tables)
        start = started_in_double(runtime)
        after, _ = runtime.round(start)
        before = start.clients.context  # type: ignore[attr-defined]
        moved = (after.clients.context - before).flatten(1).norm(dim=1) / (rate * bound)  # type: ignore[attr-defined]
        if name == "dp-fpl-full":
            torch.testing.assert_close(moved, torch.ones_like(moved), rtol=1e-6, atol=0)
        assert (moved > 0.1).all()
        assert (moved <= 1.001 + torch.linalg.matrix_norm(before, 2)).all()


@pytest.mark.parametrize(
    ("name", "tables", "message"),
    [
        ("dp-fpl", {"rank": 17}, "settings.dp-fpl.*rank.*at most context_length = 16"),
        ("dp-fpl", {"dp-fpl": {"rnak": 3}}, "settings.dp-fpl.rnak = 3: no such key"),
        ("promptfl", {"local_steps": 0}, "settings.promptfl.local_steps = 0: "),
        ("promptfl", {"optimizer": {"name": "lion"}}, "settings.promptfl.optimizer.name = 'lion': .*'sgd'"),
        ("promptfl", {"learning_rte": 1}, "settings.learning_rte = 1: not a setting of any method"),
        ("promptfl", {"context_length": "16"}, "settings.promptfl.context_length = '16': .*integer"),
    ],
)
def test_bad_settings_are_named_with_key_and_value(name: str, tables: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_for(name, tables)


def test_settings_reach_ablations_through_their_parent() -> None:
    tables = {"rank": 3, "dp-fpl": {"rank": 4}, "dplora": {"local_learning_rate": 0.5}}
    assert settings_for("dplora", tables).rank == 4
    assert settings_for("dplora", tables).parameterization == "lora"
    assert settings_for("dp-fpl", tables).local_learning_rate != 0.5
    with pytest.raises(ConfigError, match="not a method; choose from zero-shot"):
        algorithm("promptlf")
