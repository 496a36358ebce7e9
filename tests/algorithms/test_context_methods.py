"""KgCoOp, PromptFolio, ProGrad and ProDA, which learn contexts only: identities, and their losses by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import kgcoop, proda, prograd, promptfolio, settings_for
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.randomness import Streams
from sordino.runtime.local import LocalRuntime, Training

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
TABLES: dict[str, Any] = {
    "context_length": 4,
    "batch_size": 5,
    "local_steps": 2,
    "optimizer": {"learning_rate": 0.5},
}


def train(runtime: LocalRuntime, rounds: int = 3) -> Training:
    training = started_in_double(runtime)
    while training.round < rounds:
        training, _ = runtime.round(training)
    return training


def text(model: PromptModel, contexts: Tensor) -> Tensor:
    """Return class features [..., C, D] by the encoder alone."""
    return model.encoder.text_features(contexts, model.classes)


def contexts(model: PromptModel, *shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(*shape, 4, model.encoder.context_width, generator=generator, dtype=torch.float64)


def some(table: tuple[Tensor, Tensor], clients: int = 2) -> Batch:
    """Return a batch of five images for each of some clients."""
    features, labels = (part[: 5 * clients].unflatten(0, (clients, 5)) for part in table)
    return Batch(features, labels, torch.ones(clients, 5, dtype=torch.bool))


# KgCoOp


def test_kgcoop_without_guidance_is_promptfl_to_the_bit(make_runtime: MakeRuntime) -> None:
    one = make_runtime("kgcoop", ROWS, TABLES | {"guidance": 0.0})
    other = make_runtime("promptfl", ROWS, TABLES)
    assert torch.equal(one.prompts(train(one)), other.prompts(train(other)))


def test_kgcoops_gradient_is_that_of_its_loss_by_hand(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """Cross-entropy plus lambda times one minus the mean cosine: the loss of htyao89/KgCoOp (trainers/kgcoop.py)."""
    own, batch, start = kgcoop.Model(model.encoder, model.classes, guidance=3.0), some(table), contexts(model, 2)
    found = ExactGradients(own)(lambda p: p["x"], {"x": start}, {}, batch)
    general = text(model, model.encoder.embed("a photo of a"))
    for client in range(2):
        leaf = start[client].clone().requires_grad_()
        features = text(model, leaf)
        logits = model.encoder.logit_scale * batch.features[client] @ features.T
        loss = F.cross_entropy(logits, batch.labels[client])
        distance = 1 - torch.cosine_similarity(features, general, dim=1).mean()
        (expected,) = torch.autograd.grad(loss + 3.0 * distance, leaf)
        torch.testing.assert_close(found.values["x"][client], expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.loss[client], loss.detach())


def test_much_guidance_leaves_the_hand_written_features(make_runtime: MakeRuntime) -> None:
    slow = TABLES | {"optimizer": {"name": "adam", "learning_rate": 0.02}}

    def nearness(guidance: float) -> float:
        runtime = make_runtime("kgcoop", ROWS, slow | {"guidance": guidance}, rounds=30)
        general = text(runtime.model, runtime.model.encoder.embed("a photo of a"))
        return float((text(runtime.model, runtime.prompts(train(runtime, 30))[0]) * general).sum(-1).mean())

    assert nearness(100.0) > nearness(0.0) + 0.1


# PromptFolio


def same_start(make_runtime: MakeRuntime) -> dict[str, Any]:
    """Settings by which every context starts at the same words."""
    words = len(make_runtime("local", ROWS).model.encoder.embed("a photo of a"))
    return TABLES | {"initial_context": "a photo of a", "context_length": words}


def test_promptfolio_of_the_shared_context_alone_is_promptfl(make_runtime: MakeRuntime) -> None:
    one = make_runtime("promptfolio", ROWS, TABLES | {"personal": 0.0})
    other = make_runtime("promptfl", ROWS, TABLES)
    shared = one.prompts(train(one))["shared"]
    torch.testing.assert_close(shared, other.prompts(train(other)).expand(3, -1, -1), rtol=1e-9, atol=1e-12)


def test_promptfolio_of_the_personal_context_alone_is_local(make_runtime: MakeRuntime) -> None:
    tables = same_start(make_runtime)
    one, other = make_runtime("promptfolio", ROWS, tables | {"personal": 1.0}), make_runtime("local", ROWS, tables)
    personal = one.prompts(train(one))["personal"]
    torch.testing.assert_close(personal, other.prompts(train(other)), rtol=1e-9, atol=1e-12)


def test_promptfolios_gradient_is_that_of_its_loss_by_hand(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """The loss of PanBikang/PromptFolio: mixed features of unit norm each, which are not normalized again."""
    own, batch = promptfolio.Model(model.encoder, model.classes, 0.3), some(table)
    parts = {"shared": contexts(model, 2), "personal": contexts(model, 2, seed=4)}
    found = ExactGradients(own)(dict, parts, {}, batch)
    for client in range(2):
        leaves = {name: part[client].clone().requires_grad_() for name, part in parts.items()}
        features = 0.7 * text(model, leaves["shared"]) + 0.3 * text(model, leaves["personal"])
        logits = model.encoder.logit_scale * batch.features[client] @ features.T
        expected = torch.autograd.grad(F.cross_entropy(logits, batch.labels[client]), list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found.values[name][client], gradient, rtol=1e-8, atol=1e-12)


# ProGrad


def test_prograd_without_alignment_is_promptfl(make_runtime: MakeRuntime) -> None:
    one = make_runtime("prograd", ROWS, TABLES | {"alignment": 0.0})
    other = make_runtime("promptfl", ROWS, TABLES)
    torch.testing.assert_close(one.prompts(train(one)), other.prompts(train(other)), rtol=1e-9, atol=1e-12)


def test_prograds_two_gradients_are_those_of_its_losses_by_hand(
    model: PromptModel, table: tuple[Tensor, Tensor]
) -> None:
    """Cross-entropy and divergence as in BeierZhu/Prompt-align (ProGradLoss); they come of one call, and one batch."""
    own, batch = prograd.Model(model.encoder, model.classes, temperature=2.0), some(table)
    start, zero_shot = contexts(model, 2), text(model, model.encoder.embed("a photo of a"))
    found = ExactGradients(own)(dict, {"context": start, "general": start}, {}, batch)
    for client in range(2):
        leaf, images, labels = start[client].clone().requires_grad_(), batch.features[client], batch.labels[client]
        logits = model.encoder.logit_scale * images @ text(model, leaf).T
        teacher = model.encoder.logit_scale * images @ zero_shot.T
        entropy = F.cross_entropy(logits, labels)
        divergence = 4 * F.kl_div((logits / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
        for name, loss in (("context", entropy), ("general", divergence)):
            (expected,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            torch.testing.assert_close(found.values[name][client], expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.loss[client], entropy.detach())


def test_prograd_steps_along_or_across_general_knowledge() -> None:
    """Where gradients agree nothing changes; where not, what is left is orthogonal to the general one and in their
    plane."""
    generator = torch.Generator().manual_seed(5)
    own, general = torch.randn(2, 40, 3, 7, generator=generator, dtype=torch.float64)
    agrees = (own * general).flatten(1).sum(1) >= 0
    assert 0 < agrees.sum() < 40
    found = prograd.aligned(own, general, 1.0)
    assert torch.equal(found[agrees], own[agrees])
    across = (found * general).flatten(1).sum(1)[~agrees]
    torch.testing.assert_close(across, torch.zeros_like(across), rtol=0, atol=1e-12)
    removed, along = (own - found)[~agrees].flatten(1), general[~agrees].flatten(1)
    cosines = torch.cosine_similarity(removed, along, dim=1)
    torch.testing.assert_close(cosines, -torch.ones_like(cosines), rtol=1e-12, atol=0)
    assert torch.equal(prograd.aligned(own, 0 * general, 1.0), own), "no general gradient, no direction to lose"


def test_prograd_does_not_climb_the_divergence_in_a_step(make_runtime: MakeRuntime) -> None:
    """One small step of each client: to first order, ProGrad never raises the divergence; PromptFL does for some."""

    def change(name: str, rows: list[list[int]]) -> Tensor:
        tables = {"context_length": 4, "batch_size": 0, "local_steps": 1, "optimizer": {"learning_rate": 1e-5}}
        runtime = make_runtime(name, rows, tables)
        start = started_in_double(runtime)
        after, _ = runtime.round(start)
        model, images = runtime.model, runtime.data.features[rows[0]]
        teacher = (model.encoder.logit_scale * images @ text(model, model.encoder.embed("a photo of a")).T).softmax(-1)

        def divergence(training: Training) -> Tensor:
            context = training.server.context  # type: ignore[attr-defined]
            logits = model.encoder.logit_scale * images @ text(model, context).T
            return F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")

        return divergence(after) - divergence(start)

    sets = [[list(range(first, 40, 4))] for first in range(4)]
    guided = torch.stack([change("prograd", rows) for rows in sets])
    free = torch.stack([change("promptfl", rows) for rows in sets])
    assert free.max() > 1e-7
    assert guided.max() < 1e-3 * free.max()


@pytest.mark.parametrize("mechanism", ["dp-sgd", "statistics", "dp-fedavg"])
def test_prograd_is_private_with_both_gradients_in_one_release(mechanism: str, make_runtime: MakeRuntime) -> None:
    """The ledger has what PromptFL's has: one release a step, or one in all under the mechanism on statistics."""
    privacy = {"mechanism": mechanism, "noise_multiplier": 1.0}
    ledgers = []
    for name in ("prograd", "promptfl"):
        runtime = make_runtime(name, ROWS, TABLES, privacy=privacy, weighting="uniform")
        training = runtime.begun()
        training, _ = runtime.round(training)
        ledgers.append(training.ledger)
    assert ledgers[0].private
    unnamed = [[replace(each, name="") for each in ledger.releases] for ledger in ledgers]
    assert unnamed[0] == unnamed[1]


@pytest.mark.parametrize("name", ["prograd", "proda"])
def test_the_cotangent_mechanism_refuses_other_losses(name: str, make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"privacy.mechanism = 'cotangent'.*use 'dp-sgd'"):
        make_runtime(name, ROWS, TABLES, privacy={"mechanism": "cotangent", "noise_multiplier": 1.0})


# ProDA


def test_prodas_surrogate_is_the_loss_of_the_mean_of_exponentials(
    model: PromptModel, table: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Monte Carlo over normal class features: log of the mean of the sum over classes of exp(x (w_c - w_y) / tau).

    By Jensen's inequality the mean cross-entropy over the same draws is below it.
    """
    monkeypatch.setattr(model.encoder, "logit_scale", 3.0)
    own = proda.Model(model.encoder, model.classes)
    generator = torch.Generator().manual_seed(6)
    features = F.normalize(torch.randn(1, 5, 5, 8, generator=generator, dtype=torch.float64), dim=-1)
    images = F.normalize(torch.randn(3, 8, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.tensor([0, 3, 1])
    found = own.losses(features, {}, images[None], labels[None])[0]

    named = features[0, :, :4]  # [N, C, D]
    mean, deviations = named.mean(0), named - named.mean(0)
    # A draw is the mean plus, in each dimension alone, a combination of the contexts' deviations: of that covariance.
    weights = torch.randn(200_000, 5, 8, generator=generator, dtype=torch.float64) / (5 + 1) ** 0.5
    drawn = mean + torch.einsum("snd,ncd->scd", weights, deviations)
    logits = 3.0 * torch.einsum("bd,scd->sbc", images, drawn)
    entropies = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none").view(-1, 3)
    exponentials = entropies.exp()
    error = exponentials.std(0) / len(exponentials) ** 0.5 / exponentials.mean(0)
    assert ((exponentials.mean(0).log() - found).abs() < 5 * error).all(), "five standard errors"
    assert (entropies.mean(0) < found).all()
    assert error.max() < 0.01


def test_prodas_gradient_is_that_of_its_loss_by_hand(model: PromptModel, table: tuple[Tensor, Tensor]) -> None:
    """Bound and orthogonality as in the authors' equations, with every covariance written out."""
    own, batch, start = proda.Model(model.encoder, model.classes, 0.7), some(table), contexts(model, 2, 3)
    found = ExactGradients(own)(lambda p: {"contexts": p["x"]}, {"x": start}, {}, batch)
    scale, nameless = model.encoder.logit_scale, model.encoder.class_tokens([""], compete=False)
    for client in range(2):
        leaf = start[client].clone().requires_grad_()
        features = text(model, leaf)  # [N, C, D]
        mean = features.mean(0)
        loss = torch.zeros((), dtype=torch.float64)
        for image, label in zip(batch.features[client], batch.labels[client].tolist(), strict=True):
            logits = []
            for other in range(4):
                difference = (features - mean)[:, other] - (features - mean)[:, label]
                covariance = difference.T @ difference / 4  # three contexts, and one
                variance = image @ torch.diag(torch.diag(covariance)) @ image
                logits.append(scale * image @ mean[other] + scale**2 * variance / 2)
            loss = loss + F.cross_entropy(torch.stack(logits)[None], torch.tensor([label])) / 5
        bare = model.encoder.text_features(leaf, nameless)[:, 0]
        cosines = torch.stack([bare[i] @ bare[j] for i in range(3) for j in range(3) if i != j])
        (expected,) = torch.autograd.grad(loss + 0.7 * cosines.abs().mean(), leaf)
        torch.testing.assert_close(found.values["x"][client], expected, rtol=1e-8, atol=1e-12)


def test_proda_of_one_context_is_promptfl(make_runtime: MakeRuntime) -> None:
    """One context has no variance and nothing to be orthogonal to."""
    tables = same_start(make_runtime)
    one = make_runtime("proda", ROWS, tables | {"contexts": 1})
    other = make_runtime("promptfl", ROWS, tables)
    found = one.prompts(train(one))["contexts"][:, 0]
    torch.testing.assert_close(found, other.prompts(train(other)), rtol=1e-9, atol=1e-12)


def test_every_context_of_proda_is_trained_once_in_a_pass() -> None:
    streams = Streams(0, 1, range(3), torch.device("cpu"))
    batches = proda.context_batches(7, 3, 0, streams)
    passes = [torch.cat([next(batches) for _ in range(3)], dim=1) for _ in range(2)]
    for order in passes:
        assert torch.equal(order.sort(1).values, torch.arange(7).expand(3, -1))
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0][0], passes[0][1])


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_pass_of_proda_over_its_contexts_goes_on_over_rounds(steps: int) -> None:
    """The steps of rounds after each other are those of one long round."""

    def batches(taken: int, number: int) -> Iterator[Tensor]:
        return proda.context_batches(7, 3, taken, Streams(0, number, range(3), torch.device("cpu")))

    whole = list(islice(batches(0, 1), 4 * steps))
    rounds = [list(islice(batches(steps * (number - 1), number), steps)) for number in range(1, 5)]
    for one, other in zip(whole, chain(*rounds), strict=True):
        assert torch.equal(one, other)


def test_one_step_of_proda_a_round_trains_every_context_once_in_a_pass(make_runtime: MakeRuntime) -> None:
    """Those that a client did not train enter the average as no change."""
    tables = TABLES | {"local_steps": 1, "contexts": 6, "contexts_at_once": 2}
    runtime = make_runtime("proda", ROWS[:1], tables, rounds=6)
    training, moved = started_in_double(runtime), []
    for _ in range(6):
        before = training.server.shared["contexts"]  # type: ignore[attr-defined]
        training, _ = runtime.round(training)
        after = training.server.shared["contexts"]  # type: ignore[attr-defined]
        moved.append((after - before).flatten(1).any(1).nonzero().flatten().tolist())
    assert sorted(chain(*moved[:3])) == list(range(6))
    assert sorted(chain(*moved[3:])) == list(range(6))
    assert moved[:3] != moved[3:]


def test_proda_trains_the_contexts_of_a_step_and_no_other(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("proda", ROWS[:1], TABLES | {"local_steps": 1, "contexts": 6, "contexts_at_once": 2})
    start = started_in_double(runtime)
    after, _ = runtime.round(start)
    moved = (after.server.shared["contexts"] - start.server.shared["contexts"]).flatten(1)  # type: ignore[attr-defined]
    assert int((moved != 0).any(1).sum()) == 2


@pytest.mark.parametrize(
    ("name", "tables", "key"),
    [
        ("proda", {"contexts": 0}, "contexts"),
        ("proda", {"orthogonality": -0.1}, "orthogonality"),
        ("kgcoop", {"guidance": -1.0}, "guidance"),
        ("promptfolio", {"personal": 1.5}, "personal"),
        ("promptfolio", {"personal": -0.1}, "personal"),
        ("prograd", {"alignment": -1.0}, "alignment"),
        ("prograd", {"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_settings_are_named(name: str, tables: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.{name}.{key} = "):
        settings_for(name, {name: tables})
