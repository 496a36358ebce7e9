"""Sensitivity, noise and extremes of every mechanism, by properties that a wrong one would break."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from sordino import randomness
from sordino.algorithms.base import ClientData, named_tensors
from sordino.encoders import prompt_model
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel
from sordino.errors import ConfigError, RunError
from sordino.privacy import client_level, cotangent, dp_sgd, example_level
from sordino.privacy.clipping import clip_jointly, clipped_sum
from sordino.privacy.cotangent import (
    CotangentGradients,
    image_directions,
    project,
    public_directions,
    summed_cotangents,
)
from sordino.privacy.dp_sgd import DpSgdGradients, Group, example_gradients
from sordino.privacy.forward import noised as forward_noised
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.privacy.sampling import PoissonSampler, Sampling
from sordino.privacy.settings import LEAST_CLIP, MOST_CLIP, PrivacySettings
from sordino.randomness import SimulatedNoise, Streams, SystemRandomness
from sordino.runtime.local import LocalRuntime, Training

MakeRuntime = Callable[..., LocalRuntime]
CPU = torch.device("cpu")
TABLES = {"context_length": 3, "rank": 2, "batch_size": 4, "local_steps": 1}
ROWS = [list(range(10 * k, 10 * k + 10)) for k in range(4)]


def contexts(model: PromptModel, clients: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(clients, 3, model.encoder.context_width, generator=generator, dtype=torch.float64)


def batch_of(features: Tensor, labels: Tensor, mask: Tensor, expected: float = 4.0) -> Batch:
    clients = len(labels)
    rates = torch.full((clients,), 0.5, dtype=torch.float64)
    return Batch(features, labels, mask, Sampling(rates, torch.full((clients,), expected, dtype=torch.float64), 0))


def real_batch(table: tuple[Tensor, Tensor], clients: int = 2, size: int = 6) -> Batch:
    features, labels = table
    rows = torch.arange(clients * size).view(clients, size)
    return batch_of(features[rows], labels[rows], torch.ones(clients, size, dtype=torch.bool))


def without(batch: Batch, client: int, example: int) -> Batch:
    """The neighboring batch: one example of one client less."""
    mask = batch.mask.clone()
    mask[client, example] = False
    return replace(batch, mask=mask)


def plain(by: dict[str, Tensor]) -> Tensor:
    return by["context"]


def factored(by: dict[str, Tensor]) -> Tensor:
    return by["shared"] + by["u"] @ by["v"]


def noiseless_dp_sgd(model: PromptModel, clients: int, clip: float) -> DpSgdGradients:
    nothing = torch.zeros(clients, dtype=torch.float64)
    streams = Streams(0, 1, range(clients), CPU)
    return DpSgdGradients(model, frozenset({"shared"}), Group(clip, nothing), Group(2 * clip, nothing), streams)


# Sensitivity


@given(
    st.integers(1, 8),
    st.integers(1, 6),
    st.floats(1e-3, 1e3),
    st.floats(1e-6, 1e6),
    st.integers(0, 2**32 - 1),
)
def test_no_example_moves_a_clipped_sum_by_more_than_the_clip(
    examples: int, width: int, clip: float, scale: float, seed: int
) -> None:
    """Over all parameters of a group together, whatever the other examples are, and however large the gradients."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {
        name: scale * torch.randn(examples, width, generator=generator, dtype=torch.float64) for name in ("u", "v")
    }
    less = {name: value[1:] for name, value in gradients.items()}
    whole = clipped_sum(gradients, clip)
    rest = clipped_sum(less, clip) if examples > 1 else {name: torch.zeros(width).double() for name in less}
    moved = math.sqrt(sum(float((whole[name] - rest[name]).square().sum()) for name in whole))
    assert moved <= clip * (1 + 1e-9)
    small = math.sqrt(sum(float(value[0].square().sum()) for value in gradients.values()))
    assert moved == pytest.approx(min(clip, small), rel=1e-6)  # and it uses what it is allowed to


@given(
    st.integers(1, 6),
    st.integers(2, 6),
    st.integers(1, 5),
    st.floats(0.01, 1.4),
    st.floats(0.1, 100.0),
    st.integers(0, 2**32 - 1),
)
def test_no_example_moves_the_cotangent_by_more_than_the_clip(
    examples: int, classes: int, rank: int, clip: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(8, rank, generator=generator, dtype=torch.float64)).Q
    logits = scale * torch.randn(1, examples, classes, generator=generator, dtype=torch.float64)
    features = torch.randn(1, examples, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (1, examples), generator=generator)
    batch = batch_of(features, labels, torch.ones(1, examples, dtype=torch.bool))
    whole = summed_cotangents(logits, batch, directions, clip)
    rest = summed_cotangents(logits, without(batch, 0, 0), directions, clip)
    moved = float((whole - rest).norm())
    assert moved <= clip * (1 + 1e-9)
    error = (logits.softmax(-1) - torch.nn.functional.one_hot(labels, classes))[0, 0].norm()
    assert moved == pytest.approx(min(clip, float(error)), rel=1e-6, abs=1e-12)


def test_nor_by_rounding_where_a_hundred_thousand_are_alike() -> None:
    """A sum in float32 has steps of 1/128 there: one more example moved it by up to 1.0005 clips."""
    generator, count = torch.Generator().manual_seed(0), 100_000
    directions = torch.linalg.qr(torch.randn(16, 8, generator=generator)).Q
    one = torch.randn(16, generator=generator) + 0.02 * torch.randn(1, count, 16, generator=generator)
    logits = torch.tensor([0.0, 3.0]) + 0.1 * torch.randn(1, count, 2, generator=generator)  # all wrong
    labels = torch.zeros(1, count, dtype=torch.int64)
    batch = batch_of(one, labels, torch.ones(1, count, dtype=torch.bool))
    whole = summed_cotangents(logits, batch, directions, 1.0)
    moved = [float((whole - summed_cotangents(logits, without(batch, 0, i), directions, 1.0)).norm()) for i in range(4)]
    assert max(moved) <= 1 + 1e-6
    assert min(moved) >= 1 - 1e-6


@pytest.mark.parametrize("mechanism", ["dp-sgd", "cotangent", "losses", "dp-fedavg", "server"])
def test_what_noise_is_added_to_is_summed_in_double_precision(
    mechanism: str, make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def noised(exact: Tensor, *given: Any) -> Tensor:
        seen.append(exact.dtype)
        return randomness.noised(exact, *given)

    for module in (dp_sgd, cotangent, forward_noised, client_level, example_level):
        monkeypatch.setattr(module, "noised", noised)
    rows = [list(range(k, 40, 3)) for k in range(3)]
    privacy: dict[str, Any] = {"mechanism": mechanism, "noise_multiplier": 1.0, "delta": 1e-3}
    if mechanism == "losses":
        privacy["mechanism"] = "dp-sgd"
    if mechanism in ("dp-fedavg", "server"):
        privacy |= {"mechanism": "dp-fedavg" if mechanism == "dp-fedavg" else "dp-sgd", "noise_by": "server"}
    tables = {"context_length": 2, "batch_size": 0, "local_steps": 1}
    method = {"losses": "fedbpt", "server": "dp-fpl"}.get(mechanism, "promptfl")
    tables |= {"rank": 2} if mechanism == "server" else {}
    runtime = make_runtime(method, rows, tables, privacy=privacy, weighting="uniform")
    after, _ = runtime.round(runtime.start())
    # A client's own upload is no sum, and a server's sum comes last.
    assert set(seen[-1:] if mechanism == "dp-fedavg" else seen) == {torch.float64}
    parts = [*named_tensors(after.server).values(), *named_tensors(after.clients).values()]
    assert {part.dtype for part in parts if part.is_floating_point()} <= {torch.float32, torch.float64}
    if mechanism in ("dp-sgd", "cotangent", "dp-fedavg"):
        assert after.server.context.dtype == torch.float32


@given(st.integers(1, 6), st.floats(1e-3, 1e3), st.floats(1e-6, 1e6), st.integers(0, 2**32 - 1))
def test_no_client_moves_the_sum_of_uploads_by_more_than_the_clip(
    clients: int, clip: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    uploads = {name: scale * torch.randn(clients, 3, 2, generator=generator) for name in ("change", "more")}
    clipped, below = clip_jointly(uploads, clip)
    norms = sum(tensor.double().flatten(1).square().sum(1) for tensor in clipped.values()).sqrt()
    before = sum(tensor.double().flatten(1).square().sum(1) for tensor in uploads.values()).sqrt()
    assert bool((norms <= clip * (1 + 1e-6)).all())
    assert torch.equal(below, before <= clip)
    torch.testing.assert_close(norms, before.clamp(max=clip), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mechanism", ["dp-sgd", "cotangent"])
def test_a_whole_step_moves_by_what_is_accounted(
    mechanism: str, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """Through the text tower, before the noise: what an example changes is bounded, and other clients do not change."""
    clip, batch = 0.01, real_batch(table)
    by = {"shared": contexts(model, 2), "u": contexts(model, 2)[..., :2], "v": contexts(model, 2)[:, :2]}
    if mechanism == "dp-sgd":
        take = noiseless_dp_sgd(model, 2, clip)
        for example in range(6):
            one, other = (take(factored, by, {}, each).values for each in (batch, without(batch, 0, example)))
            move = {name: 4.0 * (one[name] - other[name]) for name in by}  # 4 is the expected size it was divided by
            assert max(float(value[1].abs().max()) for value in move.values()) == 0.0
            personal = torch.cat([move["u"][0].flatten(), move["v"][0].flatten()]).norm()
            assert float(personal) <= clip * (1 + 1e-9)
            assert float(move["shared"][0].norm()) <= 2 * clip * (1 + 1e-9)
        return
    directions = torch.linalg.qr(torch.randn(model.encoder.feature_width, 4, dtype=torch.float64)).Q
    text = model.text_features(factored(by))
    logits = model.logits(text, batch.features)
    for example in range(6):
        one, other = (summed_cotangents(logits, each, directions, clip) for each in (batch, without(batch, 0, example)))
        assert float((one - other)[0].norm()) <= clip * (1 + 1e-9)
        assert torch.equal(one[1], other[1])


# What the sums are


def test_example_gradients_are_the_gradients_of_single_examples(
    model: PromptModel, gradients: ExactGradients, table: tuple[Tensor, Tensor]
) -> None:
    batch = real_batch(table, clients=1)
    by = {"shared": contexts(model, 1), "u": contexts(model, 1, 1)[..., :2], "v": contexts(model, 1, 2)[:, :2]}
    found = example_gradients(model, factored, by, {}, batch)
    examples = [
        {name: value[i] for name, value in piece.items()} for piece in found.pieces for i in range(len(piece["u"]))
    ]
    assert len(examples) == 6
    losses = []
    for index, mine in enumerate(examples):
        single = Batch(batch.features[:, [index]], batch.labels[:, [index]], batch.mask[:, [index]])
        expected = gradients(factored, by, {}, single)
        losses.append(expected.loss)
        for name in by:
            torch.testing.assert_close(mine[name], expected.values[name][0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.losses, torch.cat(losses))


def test_pieces_of_examples_change_nothing(
    model: PromptModel, table: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, by = real_batch(table), {"context": contexts(model, 2)}
    whole = noiseless_dp_sgd(model, 2, 0.3)(plain, by, {}, batch)
    monkeypatch.setitem(prompt_model.FLOPS_AT_ONCE, "cpu", 1.0)
    parts = noiseless_dp_sgd(model, 2, 0.3)(plain, by, {}, batch)
    torch.testing.assert_close(parts.values["context"], whole.values["context"], rtol=1e-9, atol=1e-12)


def test_a_clip_beyond_reach_gives_the_plain_gradient(
    model: PromptModel, gradients: ExactGradients, table: tuple[Tensor, Tensor]
) -> None:
    """Of the examples' sum over the expected size; for the cotangent too, if no direction is left out."""
    batch, by = real_batch(table), {"context": contexts(model, 2)}
    expected = gradients(plain, by, {}, batch)
    exact = expected.values["context"] * (6 / 4)
    found = noiseless_dp_sgd(model, 2, 1e9)(plain, by, {}, batch)
    torch.testing.assert_close(found.values["context"], exact, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.loss, expected.loss)
    everything = torch.eye(model.encoder.feature_width, dtype=torch.float64)
    streams = Streams(0, 1, range(2), CPU)
    cotangent = CotangentGradients(model, everything, math.sqrt(2), 0.0, streams)(plain, by, {}, batch)
    torch.testing.assert_close(cotangent.values["context"], exact, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(cotangent.loss, expected.loss)


def test_projected_features_have_unit_norm_or_none() -> None:
    directions = torch.eye(5)[:, :2]
    features = torch.tensor([[3.0, 4.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(project(features, directions), expected)


def test_public_directions_are_orthonormal_nested_and_need_no_image(model: PromptModel) -> None:
    eight, three = public_directions(model.encoder, 8), public_directions(model.encoder, 3)
    torch.testing.assert_close(eight.T @ eight, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(eight[:, :3], three)
    assert public_directions(model.encoder, 10_000).shape == (model.encoder.feature_width,) * 2


def test_public_directions_are_kept(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For encoders of the same weights and precision, which read the names once, to the bit."""
    encoders = [ClipEncoder.load(str(clip_folder), torch.device("cpu"), dtype) for dtype in (torch.float32,) * 2]
    once = public_directions(encoders[0], 8)
    monkeypatch.setattr(ClipEncoder, "text_features", None)
    assert torch.equal(public_directions(encoders[1], 8), once)
    other = ClipEncoder.load(str(clip_folder), torch.device("cpu"), torch.bfloat16)
    with pytest.raises(TypeError):  # of this precision they would have to be computed
        public_directions(other, 8)


def test_directions_of_images_are_orthonormal_and_span_the_images() -> None:
    """Three images have two directions besides their mean; the oracle is the span itself."""
    images = torch.randn(3, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    directions = image_directions(images, 2).double()
    torch.testing.assert_close(directions.T @ directions, torch.eye(2).double(), rtol=0, atol=1e-5)
    centered = images - images.mean(0)
    torch.testing.assert_close(centered @ directions @ directions.T, centered, rtol=0, atol=1e-5)


def test_directions_of_images_need_more_images_than_directions(make_runtime: MakeRuntime) -> None:
    privacy = {"mechanism": "cotangent", "epsilon": 8.0, "delta": 1e-3, "directions": "images", "subspace": 2}
    with pytest.raises(ConfigError, match=r"privacy\.directions.*there are 0; put more into data\.public"):
        make_runtime("promptfl", [[0, 1], [2, 3]], privacy=privacy)
    with pytest.raises(ConfigError, match=r"privacy\.directions.*only 'cotangent'"):
        PrivacySettings(**privacy | {"mechanism": "dp-sgd"})


# Noise


def chi_square_accepts(noise: Tensor, deviation: float) -> bool:
    """Whether a sample may have this standard deviation and mean zero, each at one in a hundred million."""
    values = noise.double().flatten().numpy()
    statistic = float((values**2).sum()) / deviation**2
    low, high = stats.chi2.ppf([5e-9, 1 - 5e-9], len(values))
    return bool(low < statistic < high and abs(values.mean()) < 6 * deviation / math.sqrt(len(values)))


@pytest.mark.parametrize("simulated", [False, True])
def test_noise_has_the_stated_deviation(simulated: bool, model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    clients, clip, z, expected = 40, 0.5, 3.0, 4.0
    randomness = Streams(7, 1, range(clients), CPU) if simulated else SystemRandomness(clients, CPU)
    nobody = torch.zeros(clients, 1, dtype=torch.bool)
    features, labels = table
    batch = batch_of(features[:, None], labels[:, None], nobody, expected)
    start = contexts(model, clients)
    by = {"shared": start, "u": start[..., :2], "v": start[:, :2]}
    spread = torch.full((clients,), z * clip, dtype=torch.float64)
    noised = DpSgdGradients(model, frozenset({"shared"}), Group(clip, spread), Group(clip, 2 * spread), randomness)
    found = noised(factored, by, {}, batch).values
    assert chi_square_accepts(torch.cat([found["u"].flatten(), found["v"].flatten()]), z * clip / expected)
    assert chi_square_accepts(found["shared"], 2 * z * clip / expected)
    assert not chi_square_accepts(found["shared"], 1.2 * 2 * z * clip / expected)  # the test can tell
    alike = torch.cat([found["u"].flatten(1), found["v"].flatten(1), found["shared"].flatten(1) / 2], 1)
    correlation = np.corrcoef(alike.numpy()) - np.eye(clients)
    size, pairs = alike.shape[1], clients * (clients - 1) // 2
    # Of independent noise, r^2 of a pair has this beta distribution; any pair is above the bound at 1e-8.
    bound = math.sqrt(stats.beta.isf(1e-8 / pairs, 1 / 2, (size - 2) / 2))
    assert np.abs(correlation).max() < bound < 0.6  # no two clients share their noise


@pytest.mark.parametrize("noise_by", ["client", "server", "shares"])
def test_the_mean_of_uploads_has_the_noise_that_the_ledger_says(noise_by: str, make_runtime: MakeRuntime) -> None:
    """With clipped changes near zero, what is left of the mean is noise: z clip / K, however it comes about.

    With shares, that is what is left without the share of one colluder.
    """
    z, clip, clients = 2.0, 1e-3, 4
    privacy = {"mechanism": "dp-fedavg", "noise_multiplier": z, "clip": clip, "noise_by": noise_by, "delta": 0.1}
    tables = TABLES | {"optimizer": {"learning_rate": 1e-12}}
    runtime = make_runtime("promptfl", ROWS, tables, rounds=60, privacy=privacy, weighting="uniform")
    moves = []
    training = runtime.start()
    while training.round < 60:
        after, _ = runtime.round(training)
        moves.append(after.server.context - training.server.context)  # type: ignore[attr-defined]
        training = after
    more = {"client": clients, "server": 1, "shares": clients / (clients - 1)}[noise_by]
    expected = z * clip / clients * math.sqrt(more)
    assert chi_square_accepts(torch.stack(moves), expected)
    assert not chi_square_accepts(torch.stack(moves), 1.2 * expected)


@pytest.mark.slow
@pytest.mark.parametrize("noise_by", ["server", "shares"])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_noise_on_the_mean_gradient_covers_the_client_that_counts_most(
    noise_by: str, weighting: str, make_runtime: MakeRuntime
) -> None:
    """DP-FPL's global noise, for clients of unlike sizes: z times what one example can move the mean."""
    rows = [list(range(3)), list(range(3, 40))]
    clip, z = 1e-4, 5.0
    privacy = {"mechanism": "dp-sgd", "noise_multiplier": z, "clip": clip, "noise_by": noise_by, "delta": 0.01}
    tables = TABLES | {"optimizer": {"learning_rate": 1.0}, "local_learning_rate": 0.0}
    runtime = make_runtime("dp-fpl", rows, tables, rounds=60, privacy=privacy, weighting=weighting)
    training, moves = runtime.start(), []
    while training.round < 60:
        after, _ = runtime.round(training)
        moves.append(after.server.context - training.server.context)  # type: ignore[attr-defined]
        training = after
    weights = [3.0, 37.0] if weighting == "examples" else [1.0, 1.0]
    expected_sizes = [3.0, 4.0]  # a batch of 4 of 3 takes all
    moved = max(w / size for w, size in zip(weights, expected_sizes, strict=True)) * clip / sum(weights)
    z_shared = z * math.sqrt(2)  # half of the budget goes to the personal factors
    # What one example moves is clipped to be invisible beside the noise, but not nothing: allow one percent for it.
    values = torch.stack(moves).double()
    more = {"server": 1, "shares": 2}[noise_by]  # of two shares, one colluder knows its own
    assert float(values.std()) == pytest.approx(z_shared * moved * math.sqrt(more), rel=0.06)  # six deviations
    seen_by_others = [each for each in after.ledger.releases if "public" in each.observers]
    assert len(seen_by_others) == 2
    # A secure sum's noise is rounded up to whole steps of its quantization, and charged as it is.
    most = {"server": 1 + 1e-9, "shares": 1.001}[noise_by]
    assert all(z * (1 - 1e-9) <= each.noise_multiplier <= z * most for each in seen_by_others)


@pytest.mark.parametrize(("clip", "share"), [(1e6, 1.0), (1e-9, 0.0)])
def test_a_client_moves_the_count_behind_an_adaptive_clip_by_a_half(
    clip: float, share: float, make_runtime: MakeRuntime
) -> None:
    """So that noise of z / 2 is noise multiplier z; and the clip follows Andrew et al.'s rule."""
    privacy = {"mechanism": "dp-fedavg", "noise_multiplier": 0.0, "clip": clip, "clip_quantile": 0.3, "delta": 0.1}
    runtime = make_runtime("promptfl", ROWS, TABLES, privacy=privacy, weighting="uniform")
    training = runtime.start()
    streams = Streams(0, 1, range(4), CPU)
    clients = runtime.mechanism.client_end(streams, range(4), training.mechanism["clip"])
    clients.protect({"change": torch.ones(4, 3, 2), "weight": torch.ones(4)})
    assert clients.below_clip is not None
    assert clients.below_clip.tolist() == [share - 0.5] * 4  # a client who is absent counts as nothing, 0
    server = runtime.mechanism.server_end(streams, range(4), training.mechanism)
    assert float(server.finish(clients.below_clip)["clip"]) == pytest.approx(clip * math.exp(-0.2 * (share - 0.3)))


@pytest.mark.parametrize("told", [0.0, -1.0, 8e-44, 1e-21, 1e21, 1e300])
def test_a_clip_that_rounding_would_undo_is_neither_set_nor_taken_from_a_server(
    told: float, make_runtime: MakeRuntime
) -> None:
    """Under a clip near the least float, a clipped upload may be twice as long, and its noise is lost."""
    for key in ("clip", "personal_clip"):
        with pytest.raises(ValueError, match=key):
            PrivacySettings(**{"mechanism": "dp-sgd", "noise_multiplier": 1.0, key: told})
    privacy = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "clip_quantile": 0.5, "delta": 0.1}
    runtime = make_runtime("promptfl", ROWS, TABLES, privacy=privacy, weighting="uniform")
    with pytest.raises(RunError, match="the server tells a clip"):
        runtime.mechanism.client_end(runtime.randomness(1, [0]), [0], torch.tensor(told, dtype=torch.float64))


@pytest.mark.parametrize("below", [-1e6, 1e6])
def test_an_adaptive_clip_stays_where_clipping_holds(below: float, make_runtime: MakeRuntime) -> None:
    privacy = {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "clip_quantile": 0.5, "delta": 0.1}
    runtime = make_runtime("promptfl", ROWS, TABLES, privacy=privacy, weighting="uniform")
    mechanism = runtime.mechanism
    end = mechanism.server_end(runtime.randomness(1, range(4)), range(4), mechanism.initial_state())
    clip = end.finish(torch.full((4,), below))["clip"]
    mechanism.client_end(runtime.randomness(2, [0]), [0], clip)  # takes it
    assert float(clip) == (MOST_CLIP if below < 0 else LEAST_CLIP)


def test_no_two_steps_share_their_noise(make_runtime: MakeRuntime) -> None:
    privacy = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "simulation": True}
    runtime = make_runtime("local", ROWS, TABLES | {"local_steps": 2}, privacy=privacy)
    drawn: list[Tensor] = []
    original = SimulatedNoise.normal

    def spy(self: SimulatedNoise, purpose: str, *shape: int) -> Tensor:
        noise = original(self, purpose, *shape)
        if purpose.startswith("noise"):
            drawn.append(noise)
        return noise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedNoise, "normal", spy)
        training, _ = runtime.round(runtime.start())
        runtime.round(training)
    assert len(drawn) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_the_operating_systems_noise_never_repeats() -> None:
    randomness = SystemRandomness(3, CPU)
    one, other = randomness.normal("x", 5), randomness.normal("x", 5)
    assert one.shape == (3, 5)
    assert not torch.equal(one, other)
    coins = randomness.uniform("x", [4, 0, 2])
    assert [len(each) for each in coins] == [4, 0, 2]
    assert all(bool(((each >= 0) & (each < 1)).all()) for each in coins)


# Samples


def test_examples_are_sampled_by_independent_coins(table: tuple[Tensor, Tensor]) -> None:
    features, labels = table
    rows = torch.tensor([list(range(20)), [*range(20, 30), *[20] * 10]])
    data = ClientData(features, labels, rows, torch.tensor([20, 10]), torch.ones(2))
    counts = torch.zeros(2, 2)
    sizes = []
    for number in range(600):
        coins = Streams(0, number, [0, 1], CPU)
        (batch,) = replace(data, poisson=PoissonSampler(coins)).batches(1, 5, coins)
        assert batch.sampling is not None
        assert batch.sampling.rate.tolist() == [0.25, 0.5]
        assert batch.sampling.expected.tolist() == [5.0, 5.0]
        taken = batch.mask.sum(1)
        sizes.append(taken)
        for client in range(2):
            mine = batch.features[client, batch.mask[client]]
            assert len(mine.unique(dim=0)) == len(mine)  # nobody twice
            counts[client] += torch.stack([(mine == features[rows[client, j]]).all(1).any().float() for j in (0, 1)])
    deviation = torch.tensor([math.sqrt(600 * 0.25 * 0.75), math.sqrt(600 * 0.25)])
    assert bool(((counts - 600 * torch.tensor([[0.25], [0.5]])).abs() < 5 * deviation[:, None]).all())
    spread = torch.stack(sizes).double().var(0)
    torch.testing.assert_close(spread, torch.tensor([20 * 0.25 * 0.75, 10 * 0.25]).double(), rtol=0.25, atol=0)


def test_what_is_noised_must_have_been_sampled(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    batch = replace(real_batch(table), sampling=None)
    with pytest.raises(RunError, match="Poisson sample"):
        noiseless_dp_sgd(model, 2, 1.0)(plain, {"context": contexts(model, 2)}, {}, batch)


# Extremes


def noiseless(mechanism: str, model: PromptModel, clip: float) -> DpSgdGradients | CotangentGradients:
    if mechanism == "dp-sgd":
        return noiseless_dp_sgd(model, 2, clip)
    generator = torch.Generator().manual_seed(3)
    width = model.encoder.feature_width
    directions = torch.linalg.qr(torch.randn(width, 4, generator=generator, dtype=torch.float64)).Q
    return CotangentGradients(model, directions, clip, 0.0, Streams(0, 1, range(2), CPU))


@pytest.mark.parametrize("mechanism", ["dp-sgd", "cotangent"])
@pytest.mark.parametrize("case", ["empty", "one example", "all equal", "a class without any", "huge"])
def test_extremes_neither_crash_nor_leak(
    mechanism: str, case: str, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    batch, by = real_batch(table), {"context": contexts(model, 2)}
    features, labels, mask = batch.features.clone(), batch.labels.clone(), batch.mask.clone()
    if case == "empty":
        mask[:] = False
    elif case == "one example":
        mask[:, 1:] = False
    elif case == "all equal":
        features[:], labels[:] = features[0, 0].clone(), 1
    elif case == "a class without any":
        labels.clamp_(max=1)
    else:
        features *= 1e30
    clip, batch = 0.1, batch_of(features, labels, mask)
    found = noiseless(mechanism, model, clip)(plain, by, {}, batch).values["context"]
    assert bool(found.isfinite().all())
    if case == "empty":
        assert float(found.abs().max()) == 0.0
    if mechanism == "dp-sgd":
        assert float(4.0 * found[0].norm()) <= 6 * clip * (1 + 1e-9)


@pytest.mark.parametrize("mechanism", ["dp-sgd", "cotangent"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["everywhere", "in one entry"])
def test_an_example_that_is_not_finite_counts_as_nothing(
    mechanism: str, bad: float, where: str, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """What is released is the same as if it were not there."""
    batch, by = real_batch(table), {"context": contexts(model, 2)}
    features = batch.features.clone()
    features[0, 2, slice(None) if where == "everywhere" else slice(5, 6)] = bad
    features[1, 0, slice(None) if where == "everywhere" else slice(5, 6)] = bad
    absent = without(without(batch, 0, 2), 1, 0)
    take = noiseless(mechanism, model, 0.1)
    found, expected = take(plain, by, {}, replace(batch, features=features)), take(plain, by, {}, absent)
    assert bool(found.loss.isfinite().all())
    assert bool((expected.values["context"].flatten(1).norm(dim=1) > 1e-4).all())
    torch.testing.assert_close(found.values["context"], expected.values["context"], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("mechanism", ["dp-sgd", "cotangent"])
@pytest.mark.parametrize("size", [1e30, 1e200, 1e300])
def test_an_example_of_any_size_is_clipped_to_the_clip(
    mechanism: str, size: float, model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """Its error is in the class that it fits least, so that its gradient is as large as itself."""
    batch, by, clip = real_batch(table, 1), {"context": contexts(model, 1)}, 0.01
    features, labels = batch.features.clone(), batch.labels.clone()
    features[0, 1] *= size
    labels[0, 1] = model.logits(model.text_features(by["context"]), features)[0, 1].argmin()
    batch = replace(batch, features=features, labels=labels)
    rest = without(batch, 0, 1)
    if mechanism == "dp-sgd":
        take = noiseless_dp_sgd(model, 1, clip)
        one, other = (4.0 * take(plain, by, {}, each).values["context"][0] for each in (batch, rest))
    else:
        logits = model.logits(model.text_features(by["context"]), features)
        directions = noiseless(mechanism, model, clip).directions  # type: ignore[union-attr]
        one, other = (summed_cotangents(logits, each, directions, clip)[0] for each in (batch, rest))
    assert float(other.norm()) > 0
    assert float((one - other).norm()) == pytest.approx(clip, rel=1e-9)


@dataclass(frozen=True)
class RootModel(PromptModel):
    """Logits with a root, of which the derivative at zero is infinite: an image of zeros has a finite loss only."""

    linear: ClassVar[bool] = False

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        return self.logits(features, images).abs().sqrt()


@pytest.mark.parametrize("budget", [1e11, 1.0])  # all examples in one vectorized backward pass, or each in its own
def test_an_infinite_derivative_stays_with_its_example(
    budget: float, model: PromptModel, table: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(prompt_model.FLOPS_AT_ONCE, "cpu", budget)
    rooted, batch, by = RootModel(model.encoder, model.classes), real_batch(table), {"context": contexts(model, 2)}
    features = batch.features.clone()
    features[0, 3] = 0.0
    assert (
        not ExactGradients(rooted)(plain, by, {}, replace(batch, features=features))
        .values["context"][0]
        .isfinite()
        .all()
    )
    take = noiseless_dp_sgd(rooted, 2, 0.01)
    found = take(plain, by, {}, replace(batch, features=features))
    expected = take(plain, by, {}, without(batch, 0, 3))
    assert bool((expected.values["context"].flatten(1).norm(dim=1) > 1e-4).all())
    torch.testing.assert_close(found.values["context"], expected.values["context"], rtol=1e-9, atol=1e-13)
    assert bool(found.loss.isfinite().all())


def test_an_empty_batch_still_has_its_noise(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """Or its emptiness would show."""
    batch = replace(real_batch(table), mask=torch.zeros(2, 6, dtype=torch.bool))
    spread = torch.ones(2, dtype=torch.float64)
    streams = Streams(0, 1, range(2), CPU)
    noised = DpSgdGradients(model, frozenset(), Group(1.0, spread), Group(1.0, spread), streams)
    assert float(noised(plain, {"context": contexts(model, 2)}, {}, batch).values["context"].abs().min()) > 0


@pytest.mark.parametrize("privacy", [{"mechanism": "dp-sgd"}, {"mechanism": "cotangent", "subspace": 4}])
def test_rounds_of_almost_empty_batches_go_through(privacy: dict[str, object], make_runtime: MakeRuntime) -> None:
    """Batches of which most are empty, and a client with one example."""
    rows = [[0], list(range(1, 40))]
    runtime = make_runtime("dp-fpl", rows, TABLES | {"batch_size": 1}, rounds=8, privacy=privacy | {"epsilon": 2.0})
    training = finished(runtime)
    assert training.round == 8
    for tensor in (*named_tensors(training.server).values(), *named_tensors(training.clients).values()):
        assert bool(tensor.isfinite().all())


def finished(runtime: LocalRuntime) -> Training:
    training = runtime.start()
    while training.round < runtime.rounds:
        training, _ = runtime.round(training)
    return training
