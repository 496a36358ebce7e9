"""The audit catches mechanisms that public code has, at a claimed epsilon that the honest one keeps to.

The setting: 20 clients with 200 examples each, all of them in every batch, a bound on norms that every example exceeds,
two rounds, epsilon = 1 at delta = 1e-6; ten canaries a client. Labels are random, so examples' gradients point
anywhere, and their mean is far shorter than each of them, as it is near the end of any training. Class statistics are
released once, of the same clients.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from audit.test_one_run import federation
from sordino.audit.broken import (
    DEFECTS,
    RELEASES,
    STATISTICS_DEFECTS,
    AlteredRandomness,
    BatchClippedGradients,
    Defect,
    StatisticsDefect,
    with_defect,
)
from sordino.audit.canaries import Canaries, with_canaries
from sordino.audit.one_run import audit_in_one_run
from sordino.audit.subject import train
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy.dp_sgd import DpSgdGradients, Group
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.privacy.sampling import Sampling
from sordino.randomness import GRID_BITS, Streams
from sordino.runtime.local import LocalRuntime

SETTINGS = {"context_length": 8, "local_steps": 1, "batch_size": 0}
REPEATED = {"simulation": True, "nonce": "a5" * 16}
PRIVACY = {"mechanism": "dp-sgd", "epsilon": 1.0, "delta": 1e-6, "clip": 0.01} | REPEATED
CANARIES = 200
MARGINS: dict[Defect, float] = {"batch clipped": 0.3, "noise skipped": 1.0, "noise repeated": 1.5}
STATISTICS = {"mechanism": "statistics", "epsilon": 1.0, "delta": 1e-6} | REPEATED
FOUND: tuple[StatisticsDefect, ...] = ("noise left out", "noise divided", "exact counts", "released anew")


@pytest.fixture(scope="module")
def mild(model: PromptModel) -> PromptModel:
    """The model at a temperature of 1, so that what it expects of random features is no class in particular."""
    encoder = copy.copy(model.encoder)
    encoder.logit_scale = 1.0
    return PromptModel(encoder, model.classes)


def honest(mild: PromptModel, **privacy: Any) -> LocalRuntime:
    return federation(mild, "promptfl", 20, 200, 2, SETTINGS, PRIVACY | privacy)


@pytest.mark.slow
def test_the_honest_mechanism_keeps_to_its_claim(mild: PromptModel) -> None:
    """Seeds are fixed: one audit in twenty may exceed an honest claim, none of these does."""
    for seed in range(2):
        audit = audit_in_one_run(honest(mild), CANARIES, seed)
        assert audit.claimed_epsilon == pytest.approx(1.0, abs=1e-3)
        assert audit.strongest.epsilon <= audit.claimed_epsilon


@pytest.mark.slow
@pytest.mark.parametrize("defect", MARGINS)  # the others are too small for the audit
def test_broken_mechanisms_are_caught(mild: PromptModel, defect: Defect) -> None:
    broken = with_defect(honest(mild), defect)
    for seed in range(2):
        audit = audit_in_one_run(broken, CANARIES, seed)
        assert audit.claimed_epsilon == pytest.approx(1.0, abs=1e-3)
        assert audit.refuted
        assert audit.strongest.epsilon > audit.claimed_epsilon + MARGINS[defect]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_changes_what_is_released_and_nothing_that_is_claimed(model: PromptModel, defect: Defect) -> None:
    own = federation(model, "promptfl", 2, 10, 2, SETTINGS, PRIVACY)
    broken = with_defect(own, defect)
    ended, badly = train(own), train(broken)
    assert type(own.mechanism) not in DEFECTS.values()
    assert replace(ended.ledger, run="") == replace(badly.ledger, run="")
    assert not torch.equal(own.prompts(ended), broken.prompts(badly))
    drawn = Canaries.draw(4, 2, model, (model.encoder.feature_width,), 0)
    assert type(with_canaries(broken, drawn, 0).mechanism) is DEFECTS[defect]  # and so it is what the audit trains


def test_defects_are_of_dp_sgd_alone(model: PromptModel) -> None:
    other = federation(model, "promptfl", 2, 10, 2, SETTINGS, PRIVACY | {"mechanism": "cotangent"})
    with pytest.raises(ConfigError, match="those of 'dp-sgd'"):
        with_defect(other, "noise skipped")
    with pytest.raises(ConfigError, match="those of 'statistics'"):
        with_defect(other, "noise divided")


@pytest.mark.parametrize(("clip", "skip"), [(1e-3, False), (1e-3, True), (1e3, False), (1e3, True)])
def test_the_batch_is_clipped_and_noise_skipped_above_the_bound(model: PromptModel, clip: float, skip: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(2, 6, model.encoder.context_width, generator=generator).double()
    features = torch.randn(2, 5, model.encoder.feature_width, generator=generator).double()
    sampling = Sampling(torch.ones(2).double(), torch.full((2,), 5.0).double(), 0)
    batch = Batch(features, torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5).bool(), sampling)
    streams = Streams(0, 1, [0, 1], torch.device("cpu"))
    group = Group(clip, torch.tensor([0.5, 0.7]))
    settings = DpSgdGradients(model, frozenset(), group, group, streams)
    released, exact = (
        gradients(lambda p: p["context"], {"context": context}, {}, batch).values["context"]
        for gradients in (BatchClippedGradients(settings, skip), ExactGradients(model))
    )
    norms = exact.flatten(1).norm(dim=1)
    assert ((norms > 1e-3) & (norms < 1e3)).all()
    clipped = exact * (clip / norms.clamp(min=clip))[:, None, None]
    noise = streams.normal("noise on context, 0", *context.shape[1:]) * torch.tensor([0.1, 0.14])[:, None, None]
    added = torch.zeros_like(noise) if skip and clip == 1e-3 else noise
    torch.testing.assert_close(released, clipped + added.double(), rtol=1e-6, atol=1e-7)


def test_repeated_noise_has_its_deviation_and_cancels_in_every_difference(model: PromptModel) -> None:
    """Of two rows, of two calls and of two rounds; and clients do not share it."""
    generator = torch.Generator().manual_seed(0)
    own = federation(model, "promptfl", 2, 10, 2, SETTINGS, PRIVACY | {"epsilon": None, "noise_multiplier": 2.0})
    silent = federation(model, "promptfl", 2, 10, 2, SETTINGS, PRIVACY | {"epsilon": None, "noise_multiplier": 0.0})
    broken = with_defect(own, "noise repeated")
    width = model.encoder.context_width
    context = torch.randn(2, 6, width, generator=generator).double()
    features = torch.randn(2, 5, model.encoder.feature_width, generator=generator).double()
    sampling = Sampling(torch.ones(2).double(), torch.full((2,), 5.0).double(), 0)
    batch = Batch(features, torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5).bool(), sampling)
    noises = []
    for number in (1, 2):
        streams = Streams(0, number, [0, 1], torch.device("cpu"))
        noised, plain = (each.mechanism.client_end(streams, [0, 1]).gradients for each in (broken, silent))
        for draw in range(2):
            drawn = replace(batch, sampling=replace(sampling, draw=draw))
            released, exact = (
                gradients(lambda p: p["context"], {"context": context}, {}, drawn).values["context"]
                for gradients in (noised, plain)
            )
            noises.append(released - exact)
    together = torch.stack(noises)  # [calls, clients, tokens, width]
    same = together[0, :, 0]
    grid = PRIVACY["clip"] * 2.0 * 2.0**-GRID_BITS / 5  # to which results are rounded
    torch.testing.assert_close(together, same[:, None].expand_as(together), rtol=0, atol=grid)
    assert not torch.isclose(same[0], same[1]).any()
    deviation = PRIVACY["clip"] * 2.0 / 5
    squares = float((same / deviation).square().sum())
    low, high = chi2.ppf([1e-4, 1 - 1e-4], 2 * width)
    assert low < squares < high


# --- a release of class statistics


def releasing(model: PromptModel, rare: bool = False, **privacy: Any) -> LocalRuntime:
    """Twenty clients with 200 examples each; if `rare`, all classes but the first have few examples."""
    made = federation(model, "promptfl", 20, 200, 1, {"context_length": 4}, STATISTICS | privacy)
    if rare:
        frequent = torch.rand(len(made.data.labels), generator=torch.Generator().manual_seed(1)) < 0.97
        made.data.labels[frequent] = 0
    return made


@pytest.mark.parametrize("noise_by", ["client", "server"])
@pytest.mark.parametrize("rare", [False, True])
def test_an_honest_release_keeps_to_its_claim(model: PromptModel, noise_by: str, rare: bool) -> None:
    """Seeds are fixed: one audit in twenty may exceed an honest claim, none of these does."""
    for seed in range(4):
        audit = audit_in_one_run(releasing(model, rare, noise_by=noise_by), CANARIES, seed, rounds=0)
        assert audit.claimed_epsilon == pytest.approx(1.0, abs=1e-3)
        assert audit.strongest.epsilon <= audit.claimed_epsilon


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "noise_by"),
    [
        *((defect, "client") for defect in FOUND),
        *((defect, "server") for defect in FOUND if defect != "exact counts"),
    ],
)
def test_broken_releases_are_caught(model: PromptModel, defect: StatisticsDefect, noise_by: str) -> None:
    """Exact counts are found in clients' own matrices; in the sum of all, the audit does not try."""
    broken = with_defect(releasing(model, rare=defect == "exact counts", noise_by=noise_by), defect)
    for seed in range(4):
        audit = audit_in_one_run(broken, CANARIES, seed, rounds=0)
        assert audit.claimed_epsilon == pytest.approx(1.0, abs=1e-3)
        assert audit.refuted
        assert audit.strongest is audit.white_box


@pytest.mark.parametrize("noise_by", ["client", "server"])
@pytest.mark.parametrize("defect", STATISTICS_DEFECTS)
def test_a_broken_release_claims_what_the_honest_one_does(
    model: PromptModel, defect: StatisticsDefect, noise_by: str
) -> None:
    own = releasing(model, noise_by=noise_by)
    broken = with_defect(own, defect)
    ended, badly = train(own, 0), train(broken, 0)
    assert replace(ended.ledger, run="") == replace(badly.ledger, run="")
    assert len(badly.ledger.releases) == 20
    released, altered = ended.at_clients.release, badly.at_clients.release
    assert released.keys() == altered.keys()
    assert not all(torch.equal(sums, altered[name]) for name, sums in released.items())
    drawn = Canaries.draw(4, 20, model, (model.encoder.feature_width,), 0)
    assert type(with_canaries(broken, drawn, 0).mechanism) is STATISTICS_DEFECTS[defect]


@pytest.mark.parametrize(("draws", "scale", "deviation"), [(RELEASES, 1.0, RELEASES**-0.5), (1, 0.25, 0.25)])
def test_a_mean_of_many_releases_has_less_noise(draws: int, scale: float, deviation: float) -> None:
    altered = AlteredRandomness(Streams(0, 0, [0, 1], torch.device("cpu")), scale, draws)
    for numbers in (altered.normal("noise", 1000), altered.common_normal("noise", 1000)):
        low, high = chi2.ppf([1e-4, 1 - 1e-4], numbers.numel())
        assert low < float((numbers / deviation).square().sum()) < high
