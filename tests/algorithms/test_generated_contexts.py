"""FedTPG and CoCoOp, whose contexts a network makes: of class names, or of an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.states import started_in_double
from sordino.algorithms import fedtpg, settings_for
from sordino.encoders import prompt_model
from sordino.encoders.prompt_model import named_parts
from sordino.errors import ConfigError
from sordino.privacy.gradients import Batch, ExactGradients
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


def some(table: tuple[Tensor, Tensor]) -> Batch:
    """Return a batch of five images for each of two clients."""
    features, labels = (part[:10].unflatten(0, (2, 5)) for part in table)
    return Batch(features, labels, torch.ones(2, 5, dtype=torch.bool))


def of_two(prompt: Any, seed: int = 7) -> dict[str, Tensor]:
    """Return the parameters of two clients, near to those of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    parts = named_parts(prompt)
    return {
        name: part + 0.1 * torch.randn(2, *part.shape[1:], generator=generator, dtype=torch.float64)
        for name, part in parts.items()
    }


# FedTPG


def by_torch(parts: dict[str, Tensor], names: Tensor, heads: int) -> Tensor:
    """Return the context [M, E] of one generator by torch's own layers, which the authors' code is made of."""
    width, features = parts["query"].shape[0], names.shape[1]
    attention = nn.MultiheadAttention(width, heads, kdim=features, vdim=features, batch_first=True).double()
    weights = {
        "q_proj_weight": parts["query"],
        "k_proj_weight": parts["key"],
        "v_proj_weight": parts["value"],
        "in_proj_bias": torch.cat([parts["query_bias"], 0 * parts["query_bias"], parts["value_bias"]]),
        "out_proj.weight": parts["output"],
        "out_proj.bias": parts["output_bias"],
    }

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], parts[name], parts[f"{name}_bias"])

    queries, keys = norm(parts["queries"], "query_norm")[None], norm(names, "name_norm")[None]
    found = torch.func.functional_call(attention, weights, (queries, keys, keys), {"need_weights": False})[0][0]
    inner, gates = F.linear(norm(found, "inner_norm"), parts["inner"], parts["inner_bias"]).chunk(2, dim=-1)
    return found + F.linear(inner * F.gelu(gates), parts["outer"], parts["outer_bias"])


def test_fedtpgs_gradient_is_that_of_torchs_own_layers(make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]) -> None:
    runtime = make_runtime("fedtpg", ROWS, TABLES)
    model, batch = runtime.model, some(table)
    parts = of_two(runtime.prompts(started_in_double(runtime)))
    found = ExactGradients(model)(dict, parts, {}, batch)
    names = model.encoder.text_features(torch.zeros(0, model.encoder.context_width), model.classes).detach()
    for client in range(2):
        leaves = {name: part[client].clone().requires_grad_() for name, part in parts.items()}
        features = model.encoder.text_features(by_torch(leaves, names, 4), model.classes)
        logits = model.encoder.logit_scale * batch.features[client] @ features.T
        expected = torch.autograd.grad(F.cross_entropy(logits, batch.labels[client]), list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found.values[name][client], gradient, rtol=1e-7, atol=1e-11)


def test_fedtpg_names_classes_that_nobody_trained_on(make_runtime: MakeRuntime) -> None:
    """Their context is made of their names: another than that of the trained ones, whatever the names' order."""
    runtime = make_runtime("fedtpg", ROWS, TABLES)
    prompt = named_parts(runtime.prompts(train(runtime)))
    trained = runtime.model
    assert isinstance(trained, fedtpg.Model)

    def of(names: list[str]) -> tuple[Tensor, Tensor]:
        model = replace(trained, classes=trained.encoder.class_tokens(names))
        return model.context(prompt)[0], model.class_features(prompt)[0]

    new = ["violin", "barge", "lamp"]
    context, features = of(new)
    bare = torch.zeros(0, trained.encoder.context_width)
    names = trained.encoder.text_features(bare, trained.encoder.class_tokens(new))
    expected = by_torch({name: part[0] for name, part in prompt.items()}, names, 4)
    torch.testing.assert_close(context, expected, rtol=1e-9, atol=1e-12)
    alone = trained.encoder.text_features(expected, trained.encoder.class_tokens(new[1:2]))
    torch.testing.assert_close(features[1:2], alone, rtol=1e-9, atol=1e-12)
    assert (context - trained.context(prompt)[0]).norm() > 1e-3 * context.norm()
    backward, turned = of(new[::-1])
    torch.testing.assert_close(backward, context, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(turned.flip(0), features, rtol=1e-9, atol=1e-12)


def test_heads_that_do_not_share_the_width_are_refused(make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"settings\.fedtpg\.heads = 5: must divide the width of a context"):
        make_runtime("fedtpg", ROWS, TABLES | {"heads": 5})


# CoCoOp


def test_cocoop_with_a_network_of_zeros_is_promptfl(make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]) -> None:
    """Its logits, and the gradient by its context."""
    own, other = make_runtime("cocoop", ROWS, TABLES).model, make_runtime("promptfl", ROWS, TABLES).model
    parts = of_two(
        make_runtime("cocoop", ROWS, TABLES).prompts(started_in_double(make_runtime("cocoop", ROWS, TABLES)))
    )
    silent = {name: part if name == "context" else 0 * part for name, part in parts.items()}
    found = own.predict(silent, table[0][:6])
    torch.testing.assert_close(found, other.predict(parts["context"], table[0][:6]), rtol=1e-9, atol=1e-12)
    gradient = ExactGradients(own)(dict, silent, {}, some(table)).values["context"]
    expected = ExactGradients(other)(lambda p: p["context"], {"context": parts["context"]}, {}, some(table))
    torch.testing.assert_close(gradient, expected.values["context"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("budget", [1e11, 1.0])  # all images in one pass, or each in its own
def test_cocoops_gradient_is_that_of_its_loss_by_hand(
    budget: float, make_runtime: MakeRuntime, table: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the equations: a prompt for each image, its logits, and their cross-entropy."""
    runtime = make_runtime("cocoop", ROWS, TABLES | {"reduction": 3})
    parts, batch, model = of_two(runtime.prompts(started_in_double(runtime))), some(table), runtime.model
    monkeypatch.setitem(prompt_model.FLOPS_AT_ONCE, "cpu", budget)
    found = ExactGradients(model)(dict, parts, {}, batch)
    for client in range(2):
        leaves = {name: part[client].clone().requires_grad_() for name, part in parts.items()}
        logits = []
        for image in batch.features[client]:
            inner = F.relu(F.linear(image, leaves["down"], leaves["down_bias"]))
            context = leaves["context"] + F.linear(inner, leaves["up"], leaves["up_bias"])
            logits.append(model.encoder.logit_scale * model.encoder.text_features(context, model.classes) @ image)
        loss = F.cross_entropy(torch.stack(logits), batch.labels[client])
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found.values[name][client], gradient, rtol=1e-7, atol=1e-11)


def test_cocoop_predicts_an_image_whatever_others_there_are(
    make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]
) -> None:
    runtime = make_runtime("cocoop", ROWS, TABLES)
    prompt = runtime.prompts(train(runtime))
    together = runtime.model.predict(prompt, table[0][:6])
    alone = torch.cat([runtime.model.predict(prompt, table[0][row : row + 1]) for row in range(6)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_the_cotangent_mechanism_refuses_class_features_by_image(make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"privacy.mechanism = 'cotangent'.*use 'dp-sgd'"):
        make_runtime("cocoop", ROWS, TABLES, privacy={"mechanism": "cotangent", "noise_multiplier": 1.0})


@pytest.mark.parametrize(
    ("name", "mechanism"),
    [
        ("fedtpg", "dp-sgd"),
        ("fedtpg", "cotangent"),
        ("fedtpg", "statistics"),
        ("cocoop", "dp-sgd"),
        ("cocoop", "statistics"),
    ],
)
def test_mechanisms_that_fit_leave_a_private_ledger(name: str, mechanism: str, make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(name, ROWS, TABLES, privacy={"mechanism": mechanism, "noise_multiplier": 1.0})
    training, _ = runtime.round(runtime.begun())
    assert training.ledger.private


@pytest.mark.parametrize(
    ("name", "tables", "key"), [("fedtpg", {"heads": 0}, "heads"), ("cocoop", {"reduction": 0}, "reduction")]
)
def test_bad_settings_are_named(name: str, tables: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.{name}.{key} = "):
        settings_for(name, {name: tables})
