"""The kernels of INT8 and INT4 weights under Triton's interpreter, against fp64."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch

from megatron_glm.inference import triton_linear
from megatron_glm.inference.triton_linear import TritonLinear
from tests.inference.test_linear import dequantized, random_weight

# Largest error against the largest of the exact result: half a unit in the last place of fp16, and
# a whole one of bf16, to which the interpreter truncates.
TOLERANCES = {torch.float16: 2**-11, torch.bfloat16: 2**-7}
# out, in and groups: whole slices in each way; no multiple of anything, in one group and in groups
# that are smaller than a slice, odd, or single columns; many slices.
SHAPES = [
    ((64, 512), 1), ((64, 512), 4), ((37, 250), 1), ((37, 250), 5), ((5, 90), 18), ((3, 14), 14),
    ((33, 5000), 1),
]


def make_linear(bits, shape, groups, dtype, with_bias=True):
    weight = random_weight(bits, *shape, groups)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    linear = TritonLinear(weight.codes, weight.scales, bias if with_bias else None, bits, dtype)
    return linear, dequantized(weight), bias.double() if with_bias else 0.0


def tokens(count, width, dtype):
    generator = torch.Generator().manual_seed(count)
    # Of one sign, as what an activation has left: what is added up does not cancel.
    return torch.rand(count, width, generator=generator).to(dtype)


def assert_close(found, exact, dtype):
    assert found.dtype == dtype and found.shape == exact.shape
    assert (found.double() - exact).abs().max() <= TOLERANCES[dtype] * exact.abs().max()


@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_equal_those_in_fp64(bits, dtype, shape, groups):
    linear, weight, bias = make_linear(bits, shape, groups, dtype)
    x = tokens(3, shape[1], dtype)
    assert_close(linear(x), x.double() @ weight.T + bias, dtype)


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 32, 33, 100])
@pytest.mark.parametrize("bits", [8, 4])
def test_any_number_of_tokens(bits, count):
    linear, weight, bias = make_linear(bits, (40, 300), 3, torch.float16)
    x = tokens(count, 300, torch.float16)
    assert_close(linear._packed(x), x.double() @ weight.T + bias, torch.float16)


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float32], ids=str)
@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_is_dequantized(bits, shape, groups, dtype):
    linear, weight, _ = make_linear(bits, shape, groups, dtype)
    rows = slice(1, 3)
    found = linear.weight(rows, dtype).double()
    # Rounded once, the interpreter's way.
    assert ((found - weight[rows]).abs() <= 2**-7 * weight[rows].abs()).all()
    if dtype != torch.bfloat16:
        assert torch.equal(found, weight[rows].to(dtype).double())


def test_many_tokens_and_fp32_take_the_dequantized_weight(monkeypatch):
    packed = []
    monkeypatch.setattr(TritonLinear, "_packed", lambda self, x: packed.append(len(x)))
    limit = triton_linear.MAX_TOKENS
    for dtype, counts in ((torch.float16, (1, limit, limit + 1)), (torch.float32, (1,))):
        linear, weight, _ = make_linear(8, (16, 64), 1, dtype, with_bias=False)
        out = [linear(tokens(count, 64, dtype)) for count in counts][-1]
        exact = tokens(counts[-1], 64, dtype).double() @ weight.T
        # The weight is rounded as well.
        assert (out.double() - exact).abs().max() <= 2**-10 * exact.abs().max()
    assert packed == [1, limit]


@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_is_exact_by_every_column(bits):
    """The unit vectors pick single codes, each of which is a number of 16 bits."""
    largest = 2 ** (bits - 1)
    codes = torch.arange(-largest, largest, dtype=torch.int8)
    codes = torch.stack([codes.roll(shift) for shift in range(3)])
    scales = torch.ones(3, 1, dtype=torch.float16)
    for dtype in TOLERANCES:
        linear = TritonLinear(codes, scales, None, bits, dtype)
        for columns in torch.eye(2 * largest, dtype=dtype).split(128):
            assert torch.equal(linear(columns).T.to(torch.int8), codes[:, columns.any(0)])


def test_equal_results_on_every_run_and_of_a_view():
    linear, *_ = make_linear(4, (64, 512), 4, torch.float16)
    x = tokens(5, 512, torch.float16)
    assert torch.equal(linear(x), linear(x))
    assert torch.equal(linear(x.T.contiguous().T), linear(x))


@pytest.mark.parametrize("bits, bytes_a_weight", [(8, 1), (4, 0.5)])
def test_memory_is_that_of_codes_and_scales(bits, bytes_a_weight):
    linear, *_ = make_linear(bits, (64, 512), 4, torch.bfloat16)
    assert linear.num_bytes == 64 * (512 * bytes_a_weight + 4 * 2)
