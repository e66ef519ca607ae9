"""Bias and GeGLU under Triton's interpreter, against torch in fp64."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch
import torch.nn.functional as F

from megatron_glm.model.fused import geglu

# Largest error against the largest of the exact result: half a unit in the last place of 16 bits,
# and a whole one of bf16, to which the interpreter truncates.
TOLERANCES = {torch.float32: 2**-21, torch.float16: 2**-11, torch.bfloat16: 2**-7}
# Leading dimensions and 2f: one row, no multiple of a tile, several programs each way, a tile.
CASES = [
    ((1, 1, 6), torch.float32), ((7, 3, 90), torch.float32), ((150, 1, 300), torch.float32),
    ((8, 1, 256), torch.float32), ((7, 3, 90), torch.float16), ((7, 3, 90), torch.bfloat16),
]


def by_torch(x, bias):
    first, second = (x + bias).chunk(2, dim=-1)
    return F.gelu(first) * second


def run(function, x, bias, grad):
    """Output and the gradients of x and bias."""
    x, bias = (tensor.detach().clone().requires_grad_() for tensor in (x, bias))
    out = function(x, bias)
    out.backward(grad)
    return out.detach(), x.grad, bias.grad


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(shape[-1])
    shapes = (shape, shape[-1:], (*shape[:-1], shape[-1] // 2))
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def assert_close(actual, expected, dtype):
    for got, exact in zip(actual, expected, strict=True):
        assert got.dtype == dtype and got.shape == exact.shape
        assert (got.double() - exact).abs().max() <= TOLERANCES[dtype] * exact.abs().max()


@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_both_passes_equal_torch_in_fp64(shape, dtype):
    tensors = inputs(shape, dtype)
    exact = run(by_torch, *(tensor.double() for tensor in tensors))
    assert_close(run(geglu.bias_geglu, *tensors), exact, dtype)


def test_it_is_the_exact_gelu():
    """The tanh form is 5e-4 off."""
    x = torch.linspace(-6, 6, 256).repeat_interleave(2).view(-1, 2)
    x[:, 1] = 1.0
    out = geglu.bias_geglu(x, torch.zeros(2))[:, 0]
    exact = F.gelu(x[:, 0].double())
    error = (out - exact).abs()
    assert error.max() < 1e-6
    # Far below zero, where little is left of the input, that little is right.
    assert (error / exact.abs())[(x[:, 0] > -5) & (x[:, 0] < 0)].max() < 1e-5
    assert (F.gelu(x[:, 0].double(), approximate="tanh") - exact).abs().max() > 4e-4


def test_far_from_zero_nothing_overflows():
    x = torch.tensor([[-3e4, 5.0], [3e4, 5.0], [-3e38, 1.0]])
    out, dx, _ = run(geglu.bias_geglu, x, torch.zeros(2), torch.ones(3, 1))
    assert out[:, 0].tolist() == [0.0, 1.5e5, 0.0]
    assert dx.tolist() == [[0.0, 0.0], [5.0, 3e4], [0.0, 0.0]]


def test_gradients_that_are_not_contiguous():
    x, bias, _ = inputs((6, 2, 40), torch.float32)
    grad = torch.randn(20, 2, 6, generator=torch.Generator().manual_seed(1)).transpose(0, 2)
    exact = run(by_torch, x.double(), bias.double(), grad.double())
    assert_close(run(geglu.bias_geglu, x, bias, grad), exact, torch.float32)


def test_equal_results_on_every_run():
    tensors = inputs((150, 1, 300), torch.float32)
    first, second = (run(geglu.bias_geglu, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
