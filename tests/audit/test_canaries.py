"""Canaries: one that is left out is nothing at all, and one that is in is as much as an example may be.

For every method that learns and every mechanism that audits by canaries take, as methods read images in different ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from sordino.algorithms import METHODS, algorithm
from sordino.algorithms.base import ClientData, model_class, named_tensors
from sordino.audit.canaries import Canaries, with_canaries
from sordino.audit.one_run import audit_in_one_run
from sordino.audit.subject import train, vary
from sordino.audit.white_box import contributions
from sordino.privacy.gradients import Batch, Gradient, Parameters, PromptOf
from sordino.privacy.mechanism import ClientRoundMechanism
from sordino.privacy.sampling import PoissonSampler
from sordino.randomness import Streams, derive_key
from sordino.runtime.local import LocalRuntime, Training

Make = Callable[..., LocalRuntime]
LEARNING = [name for name in METHODS if algorithm(name).ABOUT.trains]
IMAGE_SIDE = ["pfedpt", "pfedpg", "fedperfix", "sgpt"]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
QUICK: dict[str, Any] = {
    "context_length": 4,
    "local_steps": 2,
    "optimizer": {"learning_rate": 0.5},
    "secfpp": {"cluster_every": 1},
    "dp-fpl": {"rank": 2},
    "sgpt": {"groups": 3},
    "fedbpt": {"search_width": 6, "masked_share": 0.0},
}
REPEATED = {"simulation": True, "nonce": "a5" * 16}
NOISE: dict[str, dict[str, Any]] = {
    "none": {},
    "dp-sgd": {"mechanism": "dp-sgd", "noise_multiplier": 0.5, "clip": 0.5} | REPEATED,
    "cotangent": {"mechanism": "cotangent", "noise_multiplier": 0.5, "clip": 0.5} | REPEATED,
}
EVERY = [
    (name, mechanism)
    for name in LEARNING
    for mechanism in NOISE
    if mechanism != "cotangent" or (model_class(algorithm(name)).linear and not algorithm(name).ABOUT.forward_only)
]


def canaries_of(runtime: LocalRuntime, count: int, seed: int = 0) -> Canaries:
    shape = runtime.data.features.shape[1:]
    return Canaries.draw(count, len(runtime.data), runtime.model, shape, seed).to(runtime.data.features)


def same(one: Training, other: Training) -> None:
    """To the last bit."""
    assert replace(one.ledger, run="", data={}) == replace(other.ledger, run="", data={})
    for part in ("server", "clients"):
        ours, theirs = (named_tensors(getattr(each, part)) for each in (one, other))
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


def first_calls(runtime: LocalRuntime) -> list[tuple[PromptOf, Parameters, Parameters, Batch, Gradient]]:
    """What the gradients of the first round were asked, and answered."""
    calls: list[tuple[PromptOf, Parameters, Parameters, Batch, Gradient]] = []
    mechanism = runtime.mechanism

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return getattr(mechanism, name)

        def client_end(self, *given: Any) -> ClientRoundMechanism:
            mechanism_round = mechanism.client_end(*given)

            def gradients(prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
                found = mechanism_round.gradients(prompt_of, parameters, fixed, batch)
                calls.append((prompt_of, dict(parameters), dict(fixed), batch, found))
                return found

            return replace(mechanism_round, gradients=gradients)

    runtime.mechanism = Recording()  # type: ignore[assignment]
    runtime.round(runtime.start())
    runtime.mechanism = mechanism
    return calls


# --- left out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism"), EVERY)
def test_a_canary_that_is_left_out_is_never_read(name: str, mechanism: str, make_runtime: Make) -> None:
    """Its features may be anything, not a number even: every state and the ledger stay as they are, to the last bit."""
    runtime = make_runtime(name, ROWS, QUICK | {"batch_size": 5}, rounds=2, privacy=NOISE[mechanism])
    drawn = canaries_of(runtime, 9)
    assert 0 < drawn.included.sum() < 9
    ended = train(with_canaries(runtime, drawn, 0))
    out = (~drawn.included).nonzero().flatten()
    assert len(out) > 1
    for values in ((float("nan"), float("inf")), (0.0,)):
        features = drawn.features
        for number, value in enumerate(values):  # in turn
            features = features.index_fill(0, out[number :: len(values)], value)
        labels = drawn.labels.index_fill(0, out, 0)
        same(ended, train(with_canaries(runtime, replace(drawn, features=features, labels=labels), 0)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism"), EVERY)
def test_with_all_canaries_out_the_sums_are_those_of_the_federation_alone(
    name: str, mechanism: str, make_runtime: Make
) -> None:
    """Every example in every batch, no noise; divisors are public, and larger by the canaries' places where there is a
    mechanism. A penalty on prompts is not divided, so there is none."""
    privacy = NOISE[mechanism] | ({"noise_multiplier": 0.0} if mechanism != "none" else {})
    tables = QUICK | {
        "batch_size": 0,
        "fedpgp": {"contrast": 0.0},
        "kgcoop": {"guidance": 0.0},
        "proda": {"orthogonality": 0.0},
        "promptsrc": {"text_guidance": 0.0},
    }
    runtime = make_runtime(name, ROWS, tables, rounds=2, privacy=privacy)
    drawn = canaries_of(runtime, 9)
    nobody = replace(drawn, included=torch.zeros(9, dtype=torch.bool))
    rows = [row[:count].tolist() for row, count in zip(runtime.data.rows, runtime.data.counts, strict=True)]
    alone = vary(runtime, runtime.data.features, runtime.data.labels, rows, derive_key(0, "training"))
    (*_, batch, found), (*_, expected_batch, expected) = (
        first_calls(each)[0] for each in (with_canaries(runtime, nobody, 0), alone)
    )
    for key, value in expected.values.items():
        sums = [
            gradient.values[key]
            * (1.0 if each.sampling is None else each.sampling.expected.view(-1, *[1] * (value.ndim - 1)))
            for gradient, each in ((found, batch), (expected, expected_batch))
        ]
        assert (sums[0] - sums[1]).norm() <= 1e-6 * sums[1].norm()  # a batch of another shape is rounded otherwise
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)


def test_hiding_keeps_coins_places_and_rates() -> None:
    features, labels = torch.arange(12.0)[:, None], torch.zeros(12, dtype=torch.int64)
    rows, counts = torch.arange(12).view(2, 6), torch.tensor([6, 5])
    data = ClientData(features, labels, rows, counts, torch.ones(2))
    hidden = torch.zeros(12, dtype=torch.bool)
    hidden[[0, 4, 7]] = True

    class Coins:
        def uniform(self, purpose: str, counts: list[int]) -> list[Tensor]:
            generator = torch.Generator().manual_seed(len(purpose))
            return [torch.rand(count, generator=generator, dtype=torch.float64) for count in counts]

    streams = Streams(0, 1, [0, 1], torch.device("cpu"))
    for size in (None, 4):
        for coins in (False, True):
            plain, other = (
                replace(data, poisson=PoissonSampler(Coins()) if coins else None)  # type: ignore[arg-type]
                for _ in range(2)
            )
            whole, masked = (list(each.batches(3, size, streams)) for each in (plain, replace(other, hidden=hidden)))
            for one, other in zip(whole, masked, strict=True):
                numbers = one.features[..., 0].long()
                assert torch.equal(other.mask, one.mask & ~hidden[numbers])
                assert torch.equal(other.features[other.mask], one.features[other.mask])
                assert not hidden[other.features[..., 0].long()].any()
                if one.sampling is not None:
                    assert torch.equal(one.sampling.rate, other.sampling.rate)  # type: ignore[union-attr]
                    assert torch.equal(one.sampling.expected, other.sampling.expected)  # type: ignore[union-attr]


def test_balanced_batches_do_not_count_the_hidden() -> None:
    labels, hidden = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([False, False, False, True, True, True])
    data = ClientData(
        torch.zeros(6, 1), labels, torch.tensor([[0, 1, 2, 3], [4, 5, 0, 0]]), torch.tensor([4, 2]), torch.ones(2)
    )
    balanced = replace(data, hidden=hidden).balanced()
    assert sorted(balanced.rows[0][: int(balanced.counts[0])].tolist()) == [0, 1, 2, 2]
    (batch,) = balanced.batches(1, None, None)  # type: ignore[arg-type]
    assert batch.mask.sum(1).tolist() == [4, 0]  # a client with nothing to show shows nothing


def test_a_memory_of_images_has_no_hidden_one(make_runtime: Make) -> None:
    runtime = make_runtime("pfedprompt", ROWS, QUICK)
    drawn = canaries_of(runtime, 9)
    audited = with_canaries(runtime, drawn, 0)
    keys = audited.start().clients.keys.flatten(0, 1)  # type: ignore[attr-defined]
    found = torch.isclose(keys[:, None], drawn.features).all(-1).any(0)
    assert torch.equal(found, drawn.included)


# --- included


# Those of feddtpt are told errors, 0 or 1: an image that is wrong under all candidates adds nothing, canary or not.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LEARNING if not name.startswith("feddtpt")])
def test_a_canary_is_as_much_as_an_example(name: str, make_runtime: Make) -> None:
    """Its gradient is finite and as long as an image's of a wrong class, give or take, in every call of a round."""
    runtime = make_runtime(name, ROWS, QUICK | {"batch_size": 0}, privacy=NOISE["dp-sgd"])
    drawn = canaries_of(runtime, 12)
    real = torch.arange(12)
    assert drawn.features.isfinite().all()
    assert drawn.features.shape[1:] == runtime.data.features.shape[1:]
    wrong = (runtime.data.labels[real] + 1) % 4
    for prompt_of, parameters, fixed, _, _ in first_calls(runtime):
        at, held = ({key: value[:1] for key, value in each.items()} for each in (parameters, fixed))

        def norms(features: Tensor, labels: Tensor, at: Any = at, held: Any = held, prompt: Any = prompt_of) -> Tensor:
            batch = Batch(features[None], labels[None], torch.ones(1, len(labels), dtype=torch.bool))
            pieces = list(contributions(runtime.model, prompt, at, held, batch).pieces)
            return torch.cat([torch.cat([v.flatten(1) for v in piece.values()], 1) for piece in pieces]).norm(dim=1)

        found, expected = norms(drawn.features, drawn.labels), norms(runtime.data.features[real], wrong)
        assert found.isfinite().all()
        assert found.median() > 0.3 * expected.median()


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_behind_an_image_tower_canaries_are_found_without_noise_and_honest_claims_stand(
    name: str, make_runtime: Make
) -> None:
    rows = [[*range(number, 40, 8)] * 4 for number in range(8)]
    tables = QUICK | {"batch_size": 0, "local_steps": 1, "optimizer": {"learning_rate": 0.01}}
    audit = audit_in_one_run(make_runtime(name, rows, tables, rounds=2), 96, 0)
    assert audit.claimed_epsilon is None
    assert audit.white_box.epsilon > 1.0
    honest = make_runtime(
        name,
        rows,
        tables,
        rounds=2,
        privacy={"mechanism": "dp-sgd", "epsilon": 1.0, "delta": 1e-6, "clip": 0.05} | REPEATED,
    )
    refuted = [audit_in_one_run(honest, 96, seed).refuted for seed in range(6)]
    likely = binom.isf(1e-3, len(refuted), 0.05)  # so many honest audits of six go wrong once in a thousand times
    assert sum(refuted) <= likely
