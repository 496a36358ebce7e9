"""MaPLe, with prompts in the first layers of both towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import maple, settings_for
from sordino.encoders import load_encoder
from sordino.encoders.cache import Kind
from sordino.encoders.prompt_model import PromptModel, named_parts
from sordino.errors import ConfigError, EncoderError
from sordino.privacy.gradients import Batch, ExactGradients
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
                x = torch.cat([x[:, :, :first], tokens[layer][None, None], x[:, :, behind:]], dim=2)
            x = tower.forward(x, layer, layer + 1)
        features.append(tower.features(x)[0, 0])
    return encoder.deep_text_features(contexts, model.classes), torch.stack(features)


# MaPLe


def test_maples_gradient_is_that_of_its_loss_by_hand(
    make_runtime: MakeRuntime, read: Callable[[Kind], Tensor], table: tuple[Tensor, Tensor]
) -> None:
    """As in muzairkhattak/multimodal-prompt-learning: the image tower's tokens are linear in the text tower's."""
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


@pytest.mark.parametrize("name", ["maple"])
def test_an_encoder_without_such_towers_is_refused(name: str) -> None:
    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    with pytest.raises(EncoderError, match=f"encoder 'bundled' has no visual-prompts, which {name} needs.*clip"):
        maple.Model.of(settings_for(name, {}), encoder, encoder.class_tokens(["cat", "dog"]))


@pytest.mark.parametrize("name", ["maple"])
@pytest.mark.parametrize("mechanism", ["cotangent", "statistics"])
def test_mechanisms_of_one_feature_refuse_the_inside_of_a_tower(
    name: str, mechanism: str, make_runtime: MakeRuntime
) -> None:
    with pytest.raises(ConfigError, match=f"privacy.mechanism = '{mechanism}'.*use 'dp-sgd'"):
        make_runtime(name, ROWS, TABLES, privacy={"mechanism": mechanism, "noise_multiplier": 1.0})


@pytest.mark.parametrize(("name", "tables", "key"), [("maple", {"layers": 0}, "layers")])
def test_bad_settings_are_named(name: str, tables: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.{name}.{key} = "):
        settings_for(name, {name: tables})
