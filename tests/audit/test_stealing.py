from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.states import started_in_double
from sordino.audit.stealing import Replayed, Stealing, steal
from sordino.audit.subject import Subject
from sordino.audit.wiretap import repeated
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.runtime.local import LocalRuntime, Training
from sordino.tasks.splits import Task

MakeRuntime = Callable[..., LocalRuntime]
Table = tuple[Tensor, Tensor]
MakeSubject = Callable[..., Subject]

ROWS = [list(range(0, 12)), list(range(12, 24)), list(range(24, 32))]
TEST = np.arange(32, 40)
TABLES = {"context_length": 4, "rank": 2, "batch_size": 4, "optimizer": {"learning_rate": 0.3}}
TABLES |= {"local_learning_rate": 0.3}
REPEATED = {"simulation": True, "nonce": "0a" * 16}
NOISE = {"mechanism": "dp-sgd", "clip": 0.1, "noise_multiplier": 1.0} | REPEATED
COTANGENT = {"mechanism": "cotangent", "clip": 1.0, "noise_multiplier": 1.0, "subspace": 8} | REPEATED


@pytest.fixture
def make_subject(make_runtime: MakeRuntime, table: Table, monkeypatch: pytest.MonkeyPatch) -> MakeSubject:
    """A whole run from a start in float64."""
    single = LocalRuntime.start

    def start(runtime: LocalRuntime) -> Training:
        monkeypatch.setattr(LocalRuntime, "start", single)
        first = started_in_double(runtime)
        monkeypatch.setattr(LocalRuntime, "start", start)
        return first

    def make(name: str, tables: dict[str, object] | None = None, **options: Any) -> Subject:
        monkeypatch.setattr(LocalRuntime, "start", start)
        runtime = make_runtime(name, ROWS, TABLES | (tables or {}), **options)
        training = runtime.start()
        for _ in range(runtime.rounds):
            training, _ = runtime.round(training)
        config: Any = None  # no attack of these reads it
        return Subject(config, runtime, training, training.ledger, task_of(runtime, table), *table)

    return make


def task_of(runtime: LocalRuntime, table: Table) -> Task:
    none = TEST[:0]
    return Task(
        class_names=runtime.model.classes.names,
        novel_names=(),
        labels=table[1].numpy(),
        train=tuple(np.array(rows) for rows in ROWS),
        test=TEST,
        local=np.full((len(ROWS), len(TEST)), 1 / len(TEST)),
        neighbor=np.zeros((len(ROWS), len(TEST))),
        novel=none,
        domain=none,
        client_classes=(),
        client_domains=(),
    )


def cosines(found: Stealing, thief: str) -> list[float]:
    assert found.reason is None
    assert found.same_run
    return [getattr(victim, thief).cosine for victim in found.victims]


def test_replayed_gradients_are_the_exact_ones(
    gradients: ExactGradients, table: Table, make_runtime: MakeRuntime
) -> None:
    """By factors, a residual, and a sum: all that a context's gradient is chained to."""
    width = make_runtime("local", ROWS).model.encoder.context_width
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return 0.1 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    parameters = {"shared": drawn(4, width), "u": drawn(4, 2), "v": drawn(2, width)}
    fixed = {"residual": drawn(4, width)}
    batch = Batch(
        table[0][:10].view(2, 5, -1), table[1][:10].view(2, 5), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    )

    def prompt_of(p: Any) -> Tensor:
        context: Tensor = p["shared"] + p["u"] @ p["v"] + p["residual"]
        return context

    exact = gradients(prompt_of, parameters, fixed, batch).values
    replayed = Replayed(exact["shared"])(prompt_of, parameters, fixed, batch).values
    assert exact.keys() == replayed.keys()
    for name, value in exact.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-9, atol=1e-12)


def test_the_full_personal_prompt_is_the_servers_to_have(make_subject: MakeSubject) -> None:
    """It takes plain steps by the uploaded gradient: nothing in it is the victim's own."""
    found = steal(make_subject("dp-fpl-full"), seed=1)
    for thief in ("by_server", "by_server_with_luck"):
        assert min(cosines(found, thief)) > 1 - 1e-12
    for victim in found.victims:
        assert victim.by_server.agreement == 1.0
        assert victim.by_server.local_accuracy == victim.local_accuracy
        assert victim.by_client.cosine == 0.0


@pytest.mark.parametrize("privacy", [None, COTANGENT])
def test_the_stolen_prompt_equals_the_victims(make_subject: MakeSubject, privacy: dict[str, object] | None) -> None:
    """Noise on the cotangent too: personal and shared gradients are made of one noisy release, so one gives both."""
    from sordino.audit.stealing import replayed

    subject = make_subject("dp-fpl-full", privacy=privacy)
    training, messages = repeated(subject)
    stolen = replayed(subject.runtime, messages, subject.runtime.start().clients, thief=99)
    torch.testing.assert_close(stolen.context, training.clients.context, rtol=0, atol=1e-6)  # type: ignore[attr-defined]
    moved = training.clients.context - subject.runtime.start().clients.context  # type: ignore[attr-defined]
    assert float(moved.flatten(1).norm(dim=1).min()) > 1e-2


def test_factors_hide_little_more_than_their_projections(make_subject: MakeSubject) -> None:
    """With the victim's projections the replay is exact; without them it loses part of the direction."""
    found = steal(make_subject("dp-fpl", {"local_learning_rate": 0.01}), seed=1)
    assert min(cosines(found, "by_server_with_luck")) > 1 - 1e-9
    own = cosines(found, "by_server")
    assert min(own) > 3 / 128**0.5  # three deviations of the cosine of random directions in 4 x 32 entries
    assert max(own) < 0.999
    assert cosines(found, "by_client") == [0.0] * 3


def test_noise_of_its_own_keeps_the_personal_prompt(make_subject: MakeSubject) -> None:
    """Under dp-sgd personal gradients are noised apart from shared ones, and that noise never leaves."""
    plain = cosines(steal(make_subject("dp-fpl-full", privacy=NOISE | {"noise_multiplier": 0.0}), 1), "by_server")
    noised = cosines(steal(make_subject("dp-fpl-full", privacy=NOISE), 1), "by_server")
    strong = cosines(steal(make_subject("dp-fpl-full", privacy=NOISE | {"noise_multiplier": 50.0}), 1), "by_server")
    assert min(plain) > 1 - 1e-9
    assert max(noised) < min(plain) - 0.05
    # Independent noise in 4 x 32 entries: a cosine of deviation 1 / sqrt(128).
    assert max(map(abs, strong)) < 4 / 128**0.5


@pytest.mark.parametrize("options", [{"participation": 0.67}, {"privacy": NOISE | {"noise_by": "server"}}])
def test_the_repeated_run_is_the_run(make_subject: MakeSubject, options: dict[str, Any]) -> None:
    """Whoever takes part, and whatever is drawn; a server that adds the noise sees uploads without it."""
    subject = make_subject("dp-fpl", rounds=4, **options)
    _, messages = repeated(subject)
    assert [message.number for message in messages] == [1, 2, 3, 4]
    assert all(len(message.upload["gradient"]) == len(message.clients) for message in messages)
    found = steal(subject, seed=1)
    assert found.same_run
    assert len(found.victims) == 3


def test_with_noise_from_the_system_the_repeated_run_is_another(make_subject: MakeSubject) -> None:
    system = {"simulation": False, "nonce": None}
    found = steal(make_subject("dp-fpl-full", rounds=2, privacy=COTANGENT | system), seed=1)
    assert not found.same_run
    assert min(victim.by_server.cosine for victim in found.victims) > 1 - 1e-9


def test_several_local_steps_are_replayed_by_their_mean(make_subject: MakeSubject) -> None:
    found = steal(make_subject("dp-fpl-full", {"local_steps": 3}), seed=1)
    assert min(cosines(found, "by_server")) > 0.99


@pytest.mark.parametrize(
    ("name", "reason"), [("local", "nothing that was learned leaves"), ("promptfl", "known to all"), ("central", "own")]
)
def test_where_there_is_nothing_to_steal_it_says_so(name: str, reason: str, make_subject: MakeSubject) -> None:
    found = steal(make_subject(name, rounds=1), seed=1)
    assert found.reason is not None
    assert reason in found.reason
    assert found.as_dict() == {"reason": found.reason, "same_run": True, "victims": ()}
