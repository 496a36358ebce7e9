"""MaPLe and PromptSRC, with prompts in the first layers of both towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import algorithm, maple, promptsrc, settings_for
from sordino.algorithms.base import model_class
from sordino.encoders import load_encoder
from sordino.encoders.cache import Kind
from sordino.encoders.prompt_model import PromptModel, named_parts
from sordino.errors import ConfigError, EncoderError
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.prompts.sentences import SENTENCES
from sordino.runtime.local import LocalRuntime

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
TABLES: dict[str, Any] = {"context_length": 3, "batch_size": 5, "local_steps": 2, "optimizer": {"learning_rate": 0.5}}
LAYERS = 2  # as the small checkpoint's text tower has


def of_two(prompt: Any) -> dict[str, Tensor]:
    """Return the parameters of two clients, near to those of a prompt."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: part + 0.1 * torch.randn(2, *part.shape[1:], generator=generator, dtype=torch.float64)
        for name, part in named_parts(prompt).items()
    }


def some(read: Callable[[Kind], Tensor], table: tuple[Tensor, Tensor], clients: int = 2) -> Batch:
    """Return a batch of three images for each of some clients, as they enter the image tower's first layer."""
    features, labels = (part[: 3 * clients].unflatten(0, (clients, 3)) for part in (read("layer 0"), table[1]))
    return Batch(features, labels, torch.ones(clients, 3, dtype=torch.bool))


def by_hand(model: PromptModel, contexts: Tensor, tokens: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return class features [C, D] and image features [B, D] of one client, layer by layer and image by image."""
    encoder = model.encoder
    tower, features = encoder.image_tower, []
    for image in images:
        x = image[None, None]
        for layer in range(encoder.image_layers):
            if layer < len(tokens):
                first, behind = tower.class_tokens, tower.class_tokens + (tokens.shape[1] if layer else 0)
                joining = tokens[layer] if layer else encoder._vision.pre_layrnorm(tokens[layer])  # type: ignore[attr-defined]
                x = torch.cat([x[:, :, :first], joining[None, None], x[:, :, behind:]], dim=2)
            x = tower.forward(x, layer, layer + 1)
        features.append(tower.features(x)[0, 0])
    return encoder.deep_text_features(contexts, model.classes), torch.stack(features)


# MaPLe


def test_maples_gradient_is_that_of_its_loss_by_hand(
    make_runtime: MakeRuntime, read: Callable[[Kind], Tensor], table: tuple[Tensor, Tensor]
) -> None:
    """By the equations: the image tower's tokens are linear in the text tower's."""
    runtime = make_runtime("maple", ROWS, TABLES)
    parts, batch, model = of_two(runtime.prompts(started_in_double(runtime))), some(read, table), runtime.model
    assert parts["contexts"].shape[1] == LAYERS
    found = ExactGradients(model)(dict, parts, {}, batch)
    for client in range(2):
        leaves = {name: part[client].clone().requires_grad_() for name, part in parts.items()}
        layers = [
            F.linear(leaves["contexts"][layer], leaves["coupling"][layer], leaves["coupling_bias"][layer])
            for layer in range(LAYERS)
        ]
        text, images = by_hand(model, leaves["contexts"], torch.stack(layers), batch.features[client])
        loss = F.cross_entropy(model.encoder.logit_scale * images @ text.T, batch.labels[client])
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found.values[name][client], gradient, rtol=1e-7, atol=1e-11)
            assert float(gradient.norm()) > 0


def test_the_image_tower_feels_the_text_tokens_through_the_maps_alone(
    make_runtime: MakeRuntime, read: Callable[[Kind], Tensor]
) -> None:
    """With maps of zeros the image features are those of tokens of zeros, whatever the text tokens are."""
    runtime = make_runtime("maple", ROWS, TABLES)
    model = runtime.model
    assert isinstance(model, maple.Model)
    parts = of_two(runtime.prompts(started_in_double(runtime)))
    images = read("layer 0")[:4].expand(2, -1, -1, -1)
    cut = parts | {"coupling": 0 * parts["coupling"], "coupling_bias": 0 * parts["coupling_bias"]}
    found = model.image_features(cut, images)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    assert (model.image_features(parts, images) - found).norm(dim=-1).min() > 1e-4


# PromptSRC


def test_promptsrcs_gradient_is_that_of_its_loss_by_hand(
    make_runtime: MakeRuntime, read: Callable[[Kind], Tensor], table: tuple[Tensor, Tensor]
) -> None:
    """By the equations: l1 losses, and the mean divergence over all logits."""
    guidance = {"text_guidance": 2.0, "image_guidance": 3.0, "logit_guidance": 5.0, "sentences": 3}
    runtime = make_runtime("promptsrc", ROWS, TABLES | guidance)
    parts, batch, model = of_two(runtime.prompts(started_in_double(runtime))), some(read, table), runtime.model
    found, encoder = ExactGradients(model)(dict, parts, {}, batch), model.encoder
    before = [
        encoder.deep_text_features(encoder.embed(each)[None], model.classes, unit=False) for each in SENTENCES[:3]
    ]
    for sentence, features in zip(SENTENCES, before, strict=False):
        torch.testing.assert_close(
            F.normalize(features, dim=-1), encoder.text_features(encoder.embed(sentence), model.classes)
        )
    lengths = torch.stack(before).norm(dim=-1)
    assert lengths.max() > 1.01 * lengths.min(), "or the order of mean and norm would not matter"
    frozen_text = F.normalize(torch.stack(before).mean(0), dim=-1)
    for client in range(2):
        leaves = {name: part[client].clone().requires_grad_() for name, part in parts.items()}
        text, images = by_hand(model, leaves["contexts"], leaves["tokens"], batch.features[client])
        tower = encoder.image_tower
        frozen = tower.features(tower.forward(batch.features[client][None], 0, encoder.image_layers))[0]
        logits, zero_shot = (encoder.logit_scale * each for each in (images @ text.T, frozen @ frozen_text.T))
        divergence = (
            F.kl_div(logits.log_softmax(-1), zero_shot.log_softmax(-1), reduction="sum", log_target=True)
            / logits.numel()
        )
        loss = F.cross_entropy(logits, batch.labels[client])
        loss = loss + 2.0 * F.l1_loss(text, frozen_text) + 3.0 * F.l1_loss(images, frozen) + 5.0 * divergence
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found.values[name][client], gradient, rtol=1e-7, atol=1e-11)


def test_promptsrc_uses_the_normal_mean_of_all_rounds(make_runtime: MakeRuntime) -> None:
    """Weights by scipy's density; training goes on from the last prompts, not from their mean."""
    runtime = make_runtime("promptsrc", ROWS, TABLES | {"peak": 0.6, "spread": 0.3, "sentences": 2}, rounds=5)
    training, seen = started_in_double(runtime), []
    first = named_parts(runtime.prompts(training))
    torch.testing.assert_close(first["tokens"][0], training.server.shared["tokens"], rtol=0, atol=0)  # type: ignore[attr-defined]
    for _ in range(5):
        training, _ = runtime.round(training)
        seen.append(dict(training.server.shared))  # type: ignore[attr-defined]
        weights = norm.pdf([(number + 1) / 5 for number in range(len(seen))], 0.6, 0.3)
        prompt = named_parts(runtime.prompts(training))
        for name, part in prompt.items():
            expected = sum(weight * each[name] for weight, each in zip(weights / weights.sum(), seen, strict=True))
            torch.testing.assert_close(part[0], expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(prompt["tokens"][0], seen[-1]["tokens"])


def test_a_narrow_density_far_from_its_peak_still_has_weights(make_runtime: MakeRuntime) -> None:
    """In float32 the density itself would be zero; the first round's prompts have all the weight of the first mean."""
    runtime = make_runtime("promptsrc", ROWS, TABLES | {"spread": 1e-3, "sentences": 1}, rounds=4)
    training, _ = runtime.round(runtime.start())
    prompt = named_parts(runtime.prompts(training))
    assert torch.equal(prompt["tokens"][0], training.server.shared["tokens"])  # type: ignore[attr-defined]


def test_guidance_holds_the_image_features(make_runtime: MakeRuntime, read: Callable[[Kind], Tensor]) -> None:
    def apart(weight: float) -> float:
        free = {"text_guidance": 0.0, "logit_guidance": 0.0, "image_guidance": weight, "sentences": 1}
        adam = {"optimizer": {"name": "adam", "learning_rate": 0.02}}
        runtime = make_runtime("promptsrc", ROWS, TABLES | free | adam, rounds=8)
        training = started_in_double(runtime)
        while training.round < 8:
            training, _ = runtime.round(training)
        model, tower, images = runtime.model, runtime.model.encoder.image_tower, read("layer 0")[None, :8]
        assert isinstance(model, promptsrc.Model)
        frozen = tower.features(tower.forward(images, 0, model.encoder.image_layers))
        return float((model.image_features(runtime.prompts(training), images) - frozen).norm(dim=-1).mean())

    assert apart(100.0) < 0.7 * apart(0.0)


def test_a_penalty_is_no_examples_and_is_not_clipped(make_runtime: MakeRuntime) -> None:
    """With a clip that leaves nothing of any example, a step of DP-SGD goes along the penalty's gradient, all of it."""
    tables = TABLES | {"batch_size": 0, "local_steps": 1, "text_guidance": 30.0, "sentences": 2}
    privacy = {"mechanism": "dp-sgd", "clip": 1e-12, "noise_multiplier": 1e-6}
    runtime = make_runtime("promptsrc", ROWS, tables, privacy=privacy)
    start = started_in_double(runtime)
    after = runtime.round(start)[0].server.shared  # type: ignore[attr-defined]
    before = start.server.shared  # type: ignore[attr-defined]
    leaf = before["contexts"].clone().requires_grad_()
    features = runtime.model.class_features({"contexts": leaf[None]})
    penalty = runtime.model.penalty(features)
    assert penalty is not None
    (gradient,) = torch.autograd.grad(penalty.sum(), leaf)
    torch.testing.assert_close(before["contexts"] - after["contexts"], 0.5 * gradient, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(before["tokens"], after["tokens"], rtol=0, atol=1e-9)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("name", ["maple", "promptsrc"])
def test_an_encoder_without_such_towers_is_refused(name: str) -> None:
    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    with pytest.raises(EncoderError, match=f"encoder 'bundled' has no visual-prompts, which {name} needs.*clip"):
        model_class(algorithm(name)).of(settings_for(name, {}), encoder, encoder.class_tokens(["cat", "dog"]))


@pytest.mark.parametrize("name", ["maple", "promptsrc"])
@pytest.mark.parametrize("mechanism", ["cotangent", "statistics"])
def test_mechanisms_of_one_feature_refuse_the_inside_of_a_tower(
    name: str, mechanism: str, make_runtime: MakeRuntime
) -> None:
    with pytest.raises(ConfigError, match=f"privacy.mechanism = '{mechanism}'.*use 'dp-sgd'"):
        make_runtime(name, ROWS, TABLES, privacy={"mechanism": mechanism, "noise_multiplier": 1.0})


@pytest.mark.parametrize(
    ("name", "tables", "key"),
    [
        ("maple", {"layers": 0}, "layers"),
        ("promptsrc", {"sentences": 61}, "sentences"),
        ("promptsrc", {"spread": 0.0}, "spread"),
        ("promptsrc", {"image_guidance": -1.0}, "image_guidance"),
    ],
)
def test_bad_settings_are_named(name: str, tables: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.{name}.{key} = "):
        settings_for(name, {name: tables})
