import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sordino.encoders.linear import FrozenLinear, freeze, frozen_linear


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (2, 3, 4, 7), (0, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_linear_forward_and_backward(shape: tuple[int, ...], with_bias: bool) -> None:
    weight, bias = torch.randn(11, 7), torch.randn(11) if with_bias else None
    x = torch.randn(shape, requires_grad=True)
    ours, theirs = frozen_linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(ours)
    (found,) = torch.autograd.grad(ours, x, cotangent)
    torch.testing.assert_close(found, cotangent @ weight, rtol=1e-5, atol=1e-5)


def test_strides_do_not_matter() -> None:
    weight, x = torch.randn(11, 7), torch.randn(7, 5).T
    torch.testing.assert_close(frozen_linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_go_the_usual_way(dtype: torch.dtype) -> None:
    weight, x = torch.randn(11, 7, dtype=dtype), torch.randn(5, 7, dtype=dtype)
    assert torch.equal(frozen_linear(x, weight), F.linear(x, weight))


def test_freezing_keeps_the_function_and_stops_the_training() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Sequential(nn.Linear(9, 3, bias=False)))
    x = torch.randn(4, 7)
    before = model(x)
    frozen = freeze(model)
    torch.testing.assert_close(frozen(x), before, rtol=1e-5, atol=1e-5)
    assert isinstance(frozen[0], FrozenLinear)  # type: ignore[index]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
