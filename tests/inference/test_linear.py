"""Every form of a quantised weight multiplies as code times scale, and takes its memory."""

import pytest
import torch

from megatron_glm.checkpoint.quantization import QuantizedWeight
from megatron_glm.inference.linear import (
    CPULinear,
    Int4Linear,
    Int8Linear,
    PackedInt4Linear,
    quantized_linear,
)

# Largest relative error: of the arithmetic, and of the scale in its type.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def random_weight(bits, num_rows, num_columns, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (num_rows, num_columns), generator=generator)
    scales = torch.rand(num_rows, groups, generator=generator) / largest + 1e-4
    return QuantizedWeight(codes.to(torch.int8), scales.half(), bits)


def dequantized(weight):
    """fp64 [out, in]."""
    groups = weight.scales.double().repeat_interleave(weight.group_size, dim=1)
    return weight.codes.double() * groups


def check(device, bits, dtype, shape, groups, kind):
    weight = random_weight(bits, *shape, groups)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    linear = quantized_linear(weight, bias.to(device, dtype), dtype, torch.device(device))
    assert type(linear) is kind
    if isinstance(linear, CPULinear):
        assert torch.equal(linear.codes(slice(0, shape[0])), weight.codes)
    whole = dequantized(weight)
    # Decode and prefill: on either side of what goes to the packed kernel.
    for rows in (1, 5, 16, 32, 70, 200):
        x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
        expected = x.double() @ whole.T + bias.to(dtype).double()
        found = linear(x.to(device)).double().cpu()
        assert found.shape == expected.shape
        assert (found - expected).norm() < TOLERANCES[dtype] * expected.norm()


SHAPES = [((192, 64), 1), ((128, 256), 2), ((64, 512), 8), ((352, 96), 1)]


@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_int8(dtype, shape, groups):
    check("cpu", 8, dtype, shape, groups, Int8Linear)


@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_int4(dtype, shape, groups):
    has_kernel = dtype is torch.bfloat16 and shape[0] % 64 == 0
    check("cpu", 4, dtype, shape, groups, PackedInt4Linear if has_kernel else Int4Linear)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, groups", [((256, 512), 1), ((256, 1024), 4), ((100, 90), 3), ((4608, 12288), 1)]
)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("bits", [8, 4])
def test_on_a_gpu(bits, dtype, shape, groups):
    from megatron_glm.inference.triton_linear import TritonLinear

    check("cuda", bits, dtype, shape, groups, TritonLinear)


@pytest.mark.parametrize("bits, share", [(8, 0.53), (4, 0.28)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_memory_is_a_share_of_that_of_fp16(bits, share, dtype):
    weight = random_weight(bits, 1024, 1024, 1)
    linear = quantized_linear(weight, None, dtype, torch.device("cpu"))
    assert linear.num_bytes <= share * 2 * 1024 * 1024


def test_packed_kernels_take_few_rows_alone(monkeypatch):
    calls = []
    for name in ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"):
        kernel = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, kernel=kernel: calls.append(len(args[0])) or kernel(*args)
        )
    for bits in (8, 4):
        weight = random_weight(bits, 64, 64, 1)
        linear = quantized_linear(weight, None, torch.bfloat16, torch.device("cpu"))
        for rows in (1, 16, 100):
            linear(torch.ones(rows, 64, dtype=torch.bfloat16))
    assert calls == [1, 16, 1, 16]
