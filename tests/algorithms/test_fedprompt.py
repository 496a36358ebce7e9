"""FedPrompt is PromptFL with another start, another optimizer, and a server that averages and does nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from runtime.states import started_in_double, with_states
from sordino.algorithms import settings_for
from sordino.algorithms.base import RoundContext, named_tensors
from sordino.algorithms.fedprompt import Server
from sordino.errors import ConfigError
from sordino.privacy.accounting import spent
from sordino.privacy.gradients import ExactGradients
from sordino.privacy.ledger import OBSERVERS
from sordino.prompts.contexts import FREQUENT_WORDS, vocabulary_context
from sordino.randomness import Streams
from sordino.runtime.local import LocalRuntime, Training

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
OPTIMIZERS = [{"name": "adam", "learning_rate": 0.02}, {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9}]
LOCAL_NOISE = {"mechanism": "dp-fedavg", "noise_by": "client", "epsilon": 8.0, "clip": 0.1}
REPEATED_NOISE = LOCAL_NOISE | {"simulation": True, "nonce": "a5" * 16}
FEDERATIONS = [
    {},
    {"weighting": "uniform", "privacy": REPEATED_NOISE},
    {"participation": 0.7, "aggregation": "norm-bound", "norm_bound": 0.1},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["name"])
@pytest.mark.parametrize("federation", FEDERATIONS, ids=["plain", "local noise", "norm-bound"])
def test_from_the_same_prompt_it_is_promptfl(
    federation: dict[str, object], optimizer: dict[str, object], make_runtime: MakeRuntime
) -> None:
    """With PromptFL's default server, which takes the mean change as it is."""
    tables = {"context_length": 4, "batch_size": 5, "local_steps": 3, "optimizer": optimizer}
    ours, theirs = (make_runtime(name, ROWS, tables, **federation) for name in ("fedprompt", "promptfl"))
    ours.identity = theirs.identity  # of two methods, so that both draw the same noise
    reference = started_in_double(theirs)
    training: Training = with_states(started_in_double(ours), server=Server(reference.server.context))  # type: ignore[attr-defined]
    for _ in range(4):
        training, record = ours.round(training)
        reference, expected = theirs.round(reference)
        assert record.upload_bytes == expected.upload_bytes
    assert replace(training.ledger, run="") == replace(reference.ledger, run="")
    contexts = [each.server.context for each in (training, reference)]  # type: ignore[attr-defined]
    torch.testing.assert_close(*contexts, rtol=1e-8, atol=1e-10)


def test_it_starts_at_words(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("fedprompt", ROWS, {"context_length": 12})
    words = runtime.model.encoder.embed(FREQUENT_WORDS)
    context = runtime.prompts(runtime.start())[0]
    assert bool((context[:, None] == words).all(-1).any(1).all())
    other = make_runtime("fedprompt", ROWS, {"context_length": 12}, seed=1)
    assert not torch.equal(other.prompts(other.start())[0], context)


def test_a_word_comes_twice_only_when_all_have_come() -> None:
    words = torch.arange(5.0)[:, None]
    generator = torch.Generator().manual_seed(0)
    context = vocabulary_context("", 12, lambda text: words, lambda count: torch.randn(count, generator=generator))
    counts = torch.bincount(context[:, 0].long(), minlength=5)
    assert context.shape == (12, 1)
    assert sorted(counts.tolist()) == [2, 2, 2, 3, 3]
    assert sorted(context[:5, 0].tolist()) == [0, 1, 2, 3, 4]


def test_hand_written_words_end_the_context(make_runtime: MakeRuntime) -> None:
    words = "a photo of a"
    embedded = make_runtime("fedprompt", ROWS).model.encoder.embed(words)
    tables = {"context_length": len(embedded) + 2, "initial_context": words}
    runtime = make_runtime("fedprompt", ROWS, tables)
    torch.testing.assert_close(runtime.prompts(runtime.start())[0, 2:], embedded, rtol=0, atol=0)
    short = make_runtime("fedprompt", ROWS, tables | {"context_length": len(embedded) - 1})
    with pytest.raises(ConfigError, match="initial_context = 'a photo of a': has .* more than context_length"):
        short.start()


def test_defaults_are_those_of_the_paper() -> None:
    """Section IV.A."""
    settings = settings_for("fedprompt", {})
    assert (settings.context_length, settings.optimizer.name, settings.optimizer.weight_decay) == (20, "adam", 0.0)
    assert not hasattr(settings, "server_optimizer")


def test_only_the_prompt_is_exchanged(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("fedprompt", ROWS, {"context_length": 4})
    start = runtime.start()
    shape = (4, runtime.model.encoder.context_width)
    sent, _ = runtime.algorithm.client_round(
        runtime.settings,
        runtime.algorithm.broadcast(start.server),
        start.clients,
        runtime.data,
        ExactGradients(runtime.model),
        RoundContext(1, runtime.rounds, Streams(0, 1, range(3), torch.device("cpu"))),
    )
    assert {name: tensor.shape for name, tensor in named_tensors(sent).items()} == {
        "change": (3, *shape),
        "weight": (3,),
    }
    assert {name: tensor.shape for name, tensor in named_tensors(start.server).items()} == {"context": shape}
    assert not named_tensors(start.clients)


def test_local_noise_covers_all_that_leaves(make_runtime: MakeRuntime) -> None:
    """The paper's option: each client noises its upload for itself, and the server is not trusted."""
    runtime = make_runtime("fedprompt", ROWS, {"context_length": 4}, weighting="uniform", privacy=LOCAL_NOISE)
    training = runtime.start()
    for _ in range(runtime.rounds):
        training, _ = runtime.round(training)
    assert training.ledger.private
    assert training.ledger.trusted == ()
    for observer in OBSERVERS:
        assert spent(training.ledger, observer, "client").epsilon == pytest.approx(8.0, rel=1e-3)
