"""KgCoOp, PromptFolio, ProGrad and ProDA, which learn contexts only: identities, and their losses by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import kgcoop, settings_for
from sordino.encoders.prompt_model import PromptModel
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


@pytest.mark.parametrize(("name", "tables", "key"), [("kgcoop", {"guidance": -1.0}, "guidance")])
def test_bad_settings_are_named(name: str, tables: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.{name}.{key} = "):
        settings_for(name, {name: tables})
