"""The residual norm under Triton's interpreter, against torch in fp64."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_glm.model.dropout import Dropout, drop_channels
from megatron_glm.model.fused import residual_norm as fused
from megatron_glm.model.residual import Sum

EPS, ALPHA = 1e-5, 140**0.5
DROPOUT = Dropout(0.3, torch.tensor([20221005, -7], dtype=torch.int32))
# Largest error against the largest of the exact result: one unit in the last place of 16 bits,
# since z and y are both rounded, and the interpreter truncates where it should round to bf16.
TOLERANCES = {torch.float32: 2**-21, torch.float16: 2**-11, torch.bfloat16: 2**-7}
# Leading dimensions and h: one row, rows that no tile divides, a power of two, and none.
SHAPES = [(1, 1, 5), (3, 3, 100), (2, 2, 128), (7, 1, 300)]
CASES = [(shape, torch.float32) for shape in SHAPES] + [
    (SHAPES[1], torch.float16), (SHAPES[1], torch.bfloat16)
]


@pytest.fixture(params=["whole rows", "parts of rows"])
def tiles(request, monkeypatch):
    """Every row in one block of the backward pass, or few rows and columns at a time."""
    if request.param == "parts of rows":
        monkeypatch.setattr(fused, "WHOLE_ROW", 4)
        monkeypatch.setattr(fused, "PART_OF_ROWS", (4, 64))
        monkeypatch.setattr(fused, "ELEMENTS_PER_PROCESSOR", 4 * 64 * 4)


def inputs(shape, dtype):
    """x, bias, residual, weight and norm_bias, and gradients of the two results."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])

    def draw(*shape, centre=0.0, deviation=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (centre + deviation * values).to(dtype)

    h = shape[-1]
    leaves = (draw(*shape), draw(h), draw(*shape), draw(h, centre=1.0, deviation=0.3), draw(h))
    return leaves, (draw(*shape), draw(*shape))


def run(function, leaves, grads):
    """Results of `function(*leaves)`, and the gradients of the leaves that took part."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, grads[: len(out)])
    return *(x.detach() for x in out), *(leaf.grad for leaf in leaves)


def assert_close(actual, expected, dtype):
    for got, exact in zip(actual, expected, strict=True):
        if exact is None:
            assert got is None
            continue
        assert got.dtype == dtype
        error = (got.double() - exact).abs().max()
        assert error <= TOLERANCES[dtype] * exact.abs().max()


def add_up(x, bias, residual, dropout):
    """What a Sum says."""
    return ALPHA * residual + drop_channels(x + bias, dropout)


def both(dropout):
    """The residual norm in one pass, and by torch."""
    def one_pass(x, bias, residual, weight, norm_bias):
        return fused.residual_norm(Sum(x, bias, residual, ALPHA, dropout), weight, norm_bias, EPS)

    def by_torch(x, bias, residual, weight, norm_bias):
        z = add_up(x, bias, residual, dropout)
        y = F.layer_norm(z, weight.shape, weight, norm_bias, EPS)
        return y, y

    return one_pass, by_torch


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["all", "dropped"])
@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_residual_norm(shape, dtype, dropout, tiles):
    leaves, grads = inputs(shape, dtype)
    one_pass, by_torch = both(dropout)
    exact = run(by_torch, [leaf.double() for leaf in leaves], [grad.double() for grad in grads])
    assert_close(run(one_pass, leaves, grads), exact, dtype)


@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_norm_alone(shape, dtype, tiles):
    (x, _, _, weight, norm_bias), grads = inputs(shape, dtype)

    def by_torch(x, weight, norm_bias):
        y = F.layer_norm(x, weight.shape, weight, norm_bias, EPS)
        return y, y

    exact = run(by_torch, [leaf.double() for leaf in (x, weight, norm_bias)],
                [grad.double() for grad in grads])
    actual = run(lambda *leaves: fused.layer_norm(*leaves, EPS), (x, weight, norm_bias), grads)
    assert_close(actual, exact, dtype)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["all", "dropped"])
@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_sum_alone(shape, dtype, dropout, tiles):
    leaves, grads = inputs(shape, dtype)
    exact = run(lambda *terms: add_up(*terms, dropout),
                [leaf.double() for leaf in leaves[:3]], [grad.double() for grad in grads])
    actual = run(lambda *terms: fused.residual_sum(Sum(*terms, ALPHA, dropout)), leaves[:3], grads)
    assert_close(actual, exact, dtype)


def test_both_passes_drop_what_the_hash_says():
    shape = (5, 2, 800)
    x = torch.ones(shape, requires_grad=True)
    zeros = torch.zeros(shape)
    out = fused.residual_sum(Sum(x, torch.zeros(800), zeros, ALPHA, DROPOUT))
    out.backward(torch.ones(shape))
    expected = drop_channels(torch.ones(shape), DROPOUT)
    torch.testing.assert_close(out.detach(), expected)
    torch.testing.assert_close(x.grad, expected)
    kept = (out != 0).double().mean()
    assert abs(kept - 0.7) < 4 * (0.3 * 0.7 / out.numel()) ** 0.5


def test_equal_results_on_every_run():
    leaves, grads = inputs((5, 2, 100), torch.float32)
    one_pass, _ = both(DROPOUT)
    first, second = (run(one_pass, leaves, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_far_from_zero_keep_their_digits():
    """Statistics in two passes: a mean of 1000 deviations costs no more than its own rounding."""
    x = 1000 + torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.ones(96), torch.zeros(96)
    y, _ = fused.layer_norm(x, weight, bias, EPS)
    exact = F.layer_norm(x.double(), (96,), eps=EPS)
    assert (y - exact).abs().max() < 2e-4


def test_gradients_that_are_not_contiguous():
    leaves, _ = inputs((3, 2, 40), torch.float32)
    grads = torch.randn(2, 40, 2, 3, generator=torch.Generator().manual_seed(1)).transpose(1, 3)
    one_pass, by_torch = both(None)
    exact = run(by_torch, [leaf.double() for leaf in leaves], list(grads.double()))
    assert_close(run(one_pass, leaves, list(grads)), exact, torch.float32)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_may_be_left_unused(used):
    leaves, grads = inputs((3, 2, 40), torch.float32)
    one_pass, by_torch = both(DROPOUT)
    exact = run(lambda *x: by_torch(*x)[used], [leaf.double() for leaf in leaves],
                [grads[0].double()])
    assert_close(run(lambda *x: one_pass(*x)[used], leaves, grads[:1]), exact, torch.float32)


def test_another_seed_drops_others():
    leaves, _ = inputs((3, 2, 40), torch.float32)
    terms = Sum(*leaves[:3], ALPHA, DROPOUT)
    other = replace(terms, dropout=Dropout(0.3, DROPOUT.seed + 1))
    assert not torch.equal(fused.residual_sum(terms), fused.residual_sum(other))


def test_only_what_the_backward_pass_reads_is_kept():
    leaves, _ = inputs((3, 2, 40), torch.float32)
    x, bias, residual, weight, norm_bias = (leaf.requires_grad_() for leaf in leaves)
    for dropout in (None, DROPOUT):
        terms = Sum(x, bias, residual, ALPHA, dropout)
        seed = set() if dropout is None else {dropout.seed.data_ptr()}
        z = fused.residual_sum(terms)
        assert {tensor.data_ptr() for tensor in kept_by(z)} == seed
        y, _ = fused.residual_norm(terms, weight, norm_bias, EPS)
        kept = [tensor for tensor in kept_by(y) if tensor.shape == x.shape]
        assert len(kept) == 1 and torch.equal(kept[0], z)
        y, _ = fused.layer_norm(x, weight, norm_bias, EPS)
        assert [tensor.data_ptr() for tensor in kept_by(y) if tensor.shape == x.shape] == [
            x.data_ptr()
        ]


def kept_by(result):
    """Tensors that the node of a result keeps."""
    return [tensor for tensor in result.grad_fn.saved_tensors if tensor is not None]
