from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sordino.encoders import prompt_model
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.gradients import Batch, ExactGradients, client_losses


def contexts(model: PromptModel, clients: int, length: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 0.3 * torch.randn(clients, length, model.encoder.context_width, generator=generator, dtype=torch.float64)


def batch_of(table: tuple[Tensor, Tensor], clients: int, size: int = 6) -> Batch:
    features, labels = table
    rows = torch.arange(clients * size).view(clients, size)
    return Batch(features[rows], labels[rows], torch.ones(clients, size, dtype=torch.bool))


def plain(by: Mapping[str, Tensor]) -> Tensor:
    return by["context"]


def test_gradient_of_the_prompt_equals_finite_differences(
    model: PromptModel, gradients: ExactGradients, table: tuple[Tensor, Tensor]
) -> None:
    context, batch = contexts(model, 1), batch_of(table, 1)
    exact = gradients(plain, {"context": context}, {}, batch).values["context"]

    def loss(at: Tensor) -> Tensor:
        return client_losses(model.logits(model.text_features(at), batch.features), batch).sum()

    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        direction = torch.randn(context.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        slope = (loss(context + step * direction) - loss(context - step * direction)) / (2 * step)
        torch.testing.assert_close((exact * direction).sum(), slope, rtol=1e-6, atol=1e-9)


def test_factors_get_the_gradients_of_the_chain_rule(
    model: PromptModel, gradients: ExactGradients, table: tuple[Tensor, Tensor]
) -> None:
    context, batch = contexts(model, 2, length=4), batch_of(table, 2)
    u, v = contexts(model, 2, length=4)[..., :2], contexts(model, 2, length=2)
    by = gradients(
        lambda p: p["g"] + p["u"] @ p["v"] + p["r"], {"g": context, "u": u, "v": v}, {"r": context}, batch
    ).values
    torch.testing.assert_close(by["u"], by["g"] @ v.mT)
    torch.testing.assert_close(by["v"], u.mT @ by["g"])
    assert set(by) == {"g", "u", "v"}  # what is fixed has no gradient


@pytest.mark.parametrize("budget", [1.0, 4e5, 2e6])
def test_pieces_change_nothing(
    model: PromptModel,
    gradients: ExactGradients,
    table: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    budget: float,
) -> None:
    """Whether clients, or even one client's classes, are taken a part at a time."""
    context, batch = contexts(model, 5), batch_of(table, 5)
    whole = gradients(plain, {"context": context}, {}, batch)
    monkeypatch.setitem(prompt_model.FLOPS_AT_ONCE, "cpu", budget)
    assert model.prompts_at_once(context[:1], 8) < 5
    parts = gradients(plain, {"context": context}, {}, batch)
    torch.testing.assert_close(parts.values["context"], whole.values["context"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts.loss, whole.loss)


def test_padding_is_invisible(model: PromptModel, gradients: ExactGradients, table: tuple[Tensor, Tensor]) -> None:
    context, batch = contexts(model, 2), batch_of(table, 2)
    short = Batch(batch.features[:, :4], batch.labels[:, :4], batch.mask[:, :4])
    mask = batch.mask.clone()
    mask[:, 4:] = False
    padded = Batch(batch.features, batch.labels, mask)
    expected = gradients(plain, {"context": context}, {}, short)
    found = gradients(plain, {"context": context}, {}, padded)
    torch.testing.assert_close(found.values["context"], expected.values["context"])
    torch.testing.assert_close(found.loss, expected.loss)


def test_an_empty_batch_has_no_gradient(
    model: PromptModel, gradients: ExactGradients, table: tuple[Tensor, Tensor]
) -> None:
    context, batch = contexts(model, 2), batch_of(table, 2)
    empty = Batch(batch.features, batch.labels, torch.zeros_like(batch.mask))
    found = gradients(plain, {"context": context}, {}, empty)
    assert found.values["context"].abs().max() == 0
    assert found.loss.abs().max() == 0


def test_a_client_sees_only_its_own_examples(
    model: PromptModel, gradients: ExactGradients, table: tuple[Tensor, Tensor]
) -> None:
    context, batch = contexts(model, 3), batch_of(table, 3)
    before = gradients(plain, {"context": context}, {}, batch).values["context"]
    labels = batch.labels.clone()
    labels[1] = (labels[1] + 1) % 4
    after = gradients(plain, {"context": context}, {}, Batch(batch.features, labels, batch.mask)).values["context"]
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_with_their_client(
    model: PromptModel, gradients: ExactGradients, table: tuple[Tensor, Tensor], bad: float
) -> None:
    """Plain gradients show them, so that a run ends with an error; no other client's gradient has them."""
    context, batch = contexts(model, 3), batch_of(table, 3)
    features = batch.features.clone()
    features[1, 2, 4] = bad
    found = gradients(plain, {"context": context}, {}, Batch(features, batch.labels, batch.mask))
    expected = gradients(plain, {"context": context}, {}, batch)
    assert not found.values["context"][1].isfinite().any()
    assert not bool(found.loss[1].isfinite())
    assert torch.equal(found.values["context"][[0, 2]], expected.values["context"][[0, 2]])
    assert torch.equal(found.loss[[0, 2]], expected.loss[[0, 2]])


@pytest.mark.parametrize("case", ["feature", "loss", "parameter"])
def test_before_a_mechanism_what_is_not_finite_counts_as_nothing(
    model: PromptModel, table: tuple[Tensor, Tensor], case: str
) -> None:
    """An example by its features or its loss; a client's batch where it is the parameters that are not finite."""
    context, batch = contexts(model, 3), batch_of(table, 3)
    features, mask = batch.features.clone(), batch.mask.clone()
    if case == "parameter":
        context[1, 0, 0] = float("nan")
    else:
        features[1, 2] *= float("nan") if case == "feature" else 1e308  # times the logit scale it is infinite
        mask[1, 2] = False
    take = ExactGradients(model, finite_only=True)
    found = take(plain, {"context": context}, {}, Batch(features, batch.labels, batch.mask))
    expected = take(plain, {"context": contexts(model, 3)}, {}, Batch(batch.features, batch.labels, mask))
    assert torch.equal(found.values["context"][[0, 2]], expected.values["context"][[0, 2]])
    if case == "parameter":
        assert not found.values["context"][1].any()
    else:
        torch.testing.assert_close(found.values["context"], expected.values["context"], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(found.loss, expected.loss)
