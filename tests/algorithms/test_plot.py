"""PLOT: the transport between several shared contexts and an image's patches, by an oracle and in its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import plot, settings_for
from sordino.encoders.cache import Kind
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.runtime.local import LocalRuntime

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
TABLES: dict[str, Any] = {"context_length": 4, "batch_size": 5, "local_steps": 2, "contexts": 3}


def contexts(model: PromptModel, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.3 * torch.randn(*shape, 4, model.encoder.context_width, generator=generator, dtype=torch.float64)


def test_one_context_and_one_patch_are_a_cosine(model: PromptModel, read: Callable[[Kind], Tensor]) -> None:
    """PromptFL's logits, where the one patch is the image's feature."""
    own, start = plot.Model(model.encoder, model.classes, 1.0, 0.1, 100, 1e-9), contexts(model, 2, 1)
    images = read("image")[:6].expand(2, -1, -1)
    found = own.scores(own.class_features({"contexts": start}), {}, images[:, :, None])
    torch.testing.assert_close(found, model.logits(model.text_features(start[:, 0]), images))


def test_plots_gradient_is_that_of_a_plan_by_scaling(
    model: PromptModel, read: Callable[[Kind], Tensor], table: tuple[Tensor, Tensor]
) -> None:
    """By the equations: Sinkhorn's scaling of exp(-cost / 0.1) without a gradient, then sum T cos / tau."""
    own, start = plot.Model(model.encoder, model.classes, 1.0, 0.1, 20_000, 1e-13), contexts(model, 2, 3)
    patches, labels = read("patch")[:10].unflatten(0, (2, 5)), table[1][:10].unflatten(0, (2, 5))
    batch = Batch(patches, labels, torch.ones(2, 5, dtype=torch.bool))
    found = ExactGradients(own)(lambda p: {"contexts": p["x"]}, {"x": start}, {}, batch).values["x"]
    for client in range(2):
        leaf = start[client].clone().requires_grad_()
        features = model.encoder.text_features(leaf, model.classes)  # [N, C, D]
        logits = torch.zeros(5, 4, dtype=torch.float64)
        for image in range(5):
            for label in range(4):
                cosines = patches[client, image] @ features[:, label].T  # [V, N]
                kernel = torch.exp(-(1 - cosines.detach()) / 0.1)
                left, right = torch.ones(5, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
                for _ in range(300):
                    left = 1 / 5 / (kernel @ right)
                    right = 1 / 3 / (kernel.T @ left)
                plan = left[:, None] * kernel * right
                logits = logits.index_put(
                    (torch.tensor([image]), torch.tensor([label])), model.encoder.logit_scale * (plan * cosines).sum()
                )
        (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels[client]), leaf)
        torch.testing.assert_close(found[client], expected, rtol=1e-6, atol=1e-10)


def test_plot_averages_all_its_contexts(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("plot", ROWS, TABLES | {"optimizer": {"learning_rate": 0.5}})
    start = started_in_double(runtime)
    after, record = runtime.round(start)
    moved = after.server.shared["contexts"] - start.server.shared["contexts"]  # type: ignore[attr-defined]
    assert (moved.flatten(1).norm(dim=1) > 1e-4).all()
    assert len(runtime.prompts(after)["contexts"]) == 1, "all clients have the same"
    assert record.upload_bytes >= start.server.shared["contexts"].nbytes  # type: ignore[attr-defined]


@pytest.mark.parametrize("mechanism", ["cotangent", "statistics"])
def test_mechanisms_of_one_feature_refuse_patches(mechanism: str, make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=f"privacy.mechanism = '{mechanism}'.*use 'dp-sgd'"):
        make_runtime("plot", ROWS, TABLES, privacy={"mechanism": mechanism, "noise_multiplier": 1.0})


@pytest.mark.parametrize(
    ("tables", "key"), [({"contexts": 0}, "contexts"), ({"regularization": 0.0}, "regularization")]
)
def test_bad_settings_are_named(tables: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.plot.{key} = "):
        settings_for("plot", {"plot": tables})
