"""Backward passes of frozen layers against automatic differentiation of the same forward operations."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sordino.encoders import shared_prefix
from sordino.encoders.frozen import blocks, pullback
from sordino.encoders.frozen.attention import GroupedAttention
from sordino.encoders.frozen.blocks import blocked, many_cotangents
from sordino.encoders.frozen.pullback import Operation, apply, batched_gradients
from sordino.encoders.linear import frozen_linear, frozen_linear_pullback
from sordino.encoders.prompt_model import PromptModel
from sordino.encoders.transformer import ACTIVATIONS, Layer, Linear, Norm

WIDTH, HEADS = 6, 2
GROUPS = ((3, 2), (1, 4))
ATTENTIONS = {
    "sentences": GroupedAttention(HEADS, GROUPS, scale=0.5),
    "prefix": GroupedAttention(HEADS, GROUPS, prefix=3, scale=0.5),
    "causal": GroupedAttention(HEADS, GROUPS, prefix=3, causal=True),
    "prefix of one": GroupedAttention(HEADS, ((2, 1),), prefix=1, causal=True),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int, outputs: int) -> Linear:
    return Linear(random(outputs, inputs, seed=inputs), random(outputs, seed=outputs))


def layer(activation: str, norm_first: bool) -> Layer:
    norm = Norm(1 + random(WIDTH, seed=1), random(WIDTH, seed=2), 1e-5)
    qkv, out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
    fc1, fc2 = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
    return Layer(norm, qkv, out, norm, fc1, ACTIVATIONS[activation], fc2, norm_first)


def cases() -> dict[str, tuple[Operation, tuple[tuple[int, ...], ...]]]:
    """Operations, and the shapes of their inputs without the axis N."""
    found: dict[str, tuple[Operation, tuple[tuple[int, ...], ...]]] = {}
    for name, attention in ATTENTIONS.items():
        rows = attention.prefix + sum(sentences * length for sentences, length in attention.groups)
        found[name] = attention, ((rows, 3 * WIDTH),)
    for activation in ACTIVATIONS:
        for norm_first in (True, False):
            found[f"{activation}, {norm_first}"] = layer(activation, norm_first), ((5, WIDTH),) * 2
    found["norm"] = Norm(random(WIDTH), random(WIDTH, seed=1), 1e-5), ((5, WIDTH),)
    found["linear"] = linear(WIDTH, 4), ((5, WIDTH),)
    return found


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("count", [1, 3])
def test_pullbacks_are_the_derivatives(name: str, count: int) -> None:
    """By automatic differentiation and by finite differences; for one sequence, whose heads are no copy, and more."""
    operation, shapes = cases()[name]
    inputs = [random(count, *shape, seed=7 + number).requires_grad_() for number, shape in enumerate(shapes)]
    plain, output = operation.forward(*inputs)[0], apply(operation, *inputs)
    assert torch.equal(plain, output)
    cotangent = random(*output.shape, seed=20)
    expected = torch.autograd.grad(plain, inputs, cotangent)
    for found, by_rule in zip(torch.autograd.grad(output, inputs, cotangent), expected, strict=True):
        torch.testing.assert_close(found, by_rule, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *inputs: apply(operation, *inputs), inputs, fast_mode=True)


@pytest.mark.parametrize("small", [0, pullback.SMALL])
@pytest.mark.parametrize("name", cases())
def test_many_cotangents_at_once_are_each_alone(name: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pullback, "SMALL", small)
    operation, shapes = cases()[name]
    inputs = [random(2, *shape, seed=7 + number).requires_grad_() for number, shape in enumerate(shapes)]
    output = apply(operation, *inputs)
    cotangents = random(4, *output.shape, seed=20)
    together = batched_gradients(output, inputs, cotangents)
    alone = [torch.autograd.grad(output, inputs, each, retain_graph=True) for each in cotangents]
    for found, each in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(each), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", cases())
def test_forward_mode_goes_through(name: str) -> None:
    """<v, J u> = <J^T v, u>."""
    operation, shapes = cases()[name]
    inputs = tuple(random(2, *shape, seed=7 + number) for number, shape in enumerate(shapes))
    directions = tuple(random(*each.shape, seed=30) for each in inputs)
    jvp = torch.func.jvp(lambda *inputs: apply(operation, *inputs), inputs, directions)
    output, tangent = jvp[0], jvp[1]
    leaves = [each.requires_grad_() for each in inputs]
    cotangent = random(*output.shape, seed=20)
    gradients = torch.autograd.grad(apply(operation, *leaves), leaves, cotangent)
    backward = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    torch.testing.assert_close((cotangent * tangent).sum(), backward, rtol=1e-10, atol=1e-12)


def test_a_prefix_is_attended_as_if_each_sentence_had_its_own() -> None:
    """A sentence behind the shared prefix against one long causal sentence, by PyTorch's own attention."""
    attention, length = GroupedAttention(HEADS, ((3, 2),), prefix=3, causal=True), 2
    qkv = random(2, 3 + 3 * length, 3 * WIDTH)
    found = attention(qkv)
    for sentence in range(3):
        start = 3 + sentence * length
        whole = torch.cat([qkv[:, :3], qkv[:, start : start + length]], dim=1)
        query, key, value = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in whole.chunk(3, dim=2))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        expected = mixed.transpose(1, 2).flatten(2)
        torch.testing.assert_close(found[:, :3], expected[:, :3], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[:, start : start + length], expected[:, 3:], rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    """It would lack what the backward pass does not keep."""
    operation, x = linear(WIDTH, 4), random(5, WIDTH).requires_grad_()
    (gradient,) = torch.autograd.grad(apply(operation, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_layers_pullback_is_the_product_with_its_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cotangent, weight = random(*shape).to(dtype), random(4, 7, seed=1).to(dtype)
    found = frozen_linear_pullback(cotangent, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, cotangent @ weight, rtol=1e-5, atol=1e-5)
    x = random(*shape[:-1], 7, seed=2).to(dtype).requires_grad_()
    (by_rule,) = torch.autograd.grad(frozen_linear(x, weight), x, cotangent)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, by_rule, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [((3, 2), (1, 4)), ((40, 3), (30, 5)), ((2, 130),), ((1, 1),)])
@pytest.mark.parametrize(("prefix", "causal"), [(0, False), (0, True), (5, False), (5, True), (1, True)])
def test_attention_in_blocks_is_the_grouped_one(groups: tuple[tuple[int, int], ...], prefix: int, causal: bool) -> None:
    """In one block and several, with sentences that are longer than a block is at least, and many cotangents."""
    grouped = GroupedAttention(HEADS, groups, prefix, causal, scale=0.7)
    qkv = random(2, prefix + sum(sentences * length for sentences, length in groups), 3 * WIDTH).requires_grad_()
    expected, found = grouped(qkv), blocked(grouped, qkv)(qkv)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    cotangents = random(2, *expected.shape, seed=20)
    for cotangent in cotangents:
        gradients = [torch.autograd.grad(each, qkv, cotangent, retain_graph=True)[0] for each in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    together = [batched_gradients(each, [qkv], cotangents)[0] for each in (found, expected)]
    torch.testing.assert_close(*together, rtol=1e-10, atol=1e-10)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        tangents = [
            torch.func.jvp(each, (qkv.detach(),), (cotangents[0].repeat(1, 1, 3),))[1]
            for each in (blocked(grouped, qkv), grouped)
        ]
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-10)


def test_passes_for_many_cotangents_are_grouped_also_where_backward_recomputes_them(
    model: PromptModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputing has its own thread on an accelerator, and does not see what was asked for when the pass began."""
    monkeypatch.setattr(blocks, "fuses", lambda x: True)
    formed: list[str] = []
    made = shared_prefix.attention_for

    def noted(grouped: GroupedAttention, x: Tensor) -> object:
        formed.append(type(attention := made(grouped, x)).__name__)
        return attention

    monkeypatch.setattr(shared_prefix, "attention_for", noted)
    context = random(1, 2, model.encoder.context_width)
    expected = blocked_gradient(model, context)
    assert formed == ["BlockedAttention"]
    monkeypatch.setattr(PromptModel, "_budget", model.encoder.text_flops(1, 2, model.classes) / 2)
    formed.clear()
    leaf = context.clone().requires_grad_()
    with many_cotangents():
        features = model.text_features(leaf)
    (found,) = torch.autograd.grad(features.sum(), leaf)
    assert formed == ["GroupedAttention"] * 4  # two parts, and both again
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def blocked_gradient(model: PromptModel, context: Tensor) -> Tensor:
    leaf = context.clone().requires_grad_()
    (found,) = torch.autograd.grad(model.text_features(leaf).sum(), leaf)
    return found
