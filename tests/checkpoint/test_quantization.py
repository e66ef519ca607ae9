"""INT8 and INT4 against the published formula, a row and an element at a time."""

import numpy as np
import pytest
import torch

from megatron_glm.checkpoint.errors import ShapeError
from megatron_glm.checkpoint.quantization import (
    largest_code,
    pack_int4,
    quantize,
    unpack_int4,
)


def formula(row: np.ndarray, bits: int) -> tuple[np.float16, np.ndarray]:
    """The published formula in fp16, step by step."""
    scale = np.float16(np.float32(np.abs(row).max()) / np.float32(2 ** (bits - 1) - 1))
    quotients = (row.astype(np.float32) / np.float32(scale)).astype(np.float16)
    return scale, np.rint(quotients.astype(np.float64)).astype(np.int64)


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 64, generator=generator)
    spread = 10.0 ** torch.linspace(-3.5, 4, 400)[:, None]
    heavy = torch.randn(100, 64, generator=generator).pow(5).clamp(-6e4, 6e4)
    return torch.cat(((weight * spread).clamp(-6.5e4, 6.5e4), heavy)).half()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_are_those_of_the_formula(bits):
    weight = rows()
    quantized = quantize(weight, bits)
    for row, codes, scale in zip(
        weight.numpy(), quantized.codes.numpy(), quantized.scales.numpy(), strict=True
    ):
        expected_scale, expected_codes = formula(row, bits)
        assert scale[0].tobytes() == expected_scale.tobytes()
        assert np.array_equal(codes, expected_codes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("largest", [0.0, 6e-8, 1e-7, 3e-7, 1e-6, 5e-6, 1.2e-5, 3e-5])
def test_rows_whose_scale_fp16_cannot_hold_stay_whole(bits, largest):
    """By the formula an all-zero row is 0/0, and codes of a row of 1e-6 wrap around."""
    weight = (torch.linspace(-1, 1, 64) * largest).half()[None]
    quantized = quantize(weight, bits)
    assert quantized.codes.abs().max() <= largest_code(bits)
    error = (quantized.dequantize(torch.float64) - weight.double()).abs().max()
    assert error <= quantized.scales.double().max() / 2
    if largest == 0:
        assert quantized.scales.item() == 0 and not quantized.codes.any()
    else:
        # It is the formula's scale, or the next larger one where that does not hold the codes.
        scale, by_formula = quantized.scales.item(), float(formula(weight[0].numpy(), bits)[0])
        step = 2.0**-24
        assert scale > 0
        assert scale in (by_formula, by_formula + step)
        if scale > by_formula > 0:
            assert round(weight.double().max().item() / by_formula) > largest_code(bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_element_is_off_by_more_than_half_a_step(bits):
    # 2^-11 of a weight is what fp16 arithmetic itself loses, in the quotient and in the product.
    weight = rows()[50:].double()
    quantized = quantize(weight.half(), bits)
    step = quantized.scales.double()
    error = (quantized.dequantize(torch.float64) - weight).abs()
    assert (error <= step * 0.5 + weight.abs() * 2**-9).all()


def test_a_group_is_quantised_as_if_it_were_a_row():
    weight = rows()
    grouped = quantize(weight, 4, groups=4)
    for group, columns in enumerate(weight.split(16, dim=1)):
        alone = quantize(columns, 4)
        assert torch.equal(grouped.codes[:, 16 * group : 16 * group + 16], alone.codes)
        assert torch.equal(grouped.scales[:, group : group + 1], alone.scales)
    assert grouped.group_size == 16


def test_dequantising_multiplies_in_fp16():
    quantized = quantize(rows(), 4, groups=2)
    scales = quantized.scales.repeat_interleave(32, dim=1)
    assert torch.equal(quantized.dequantize(), quantized.codes.half() * scales)


def test_packing_keeps_every_pair_of_codes_and_puts_the_even_column_high():
    codes = torch.tensor([[i, j] for i in range(-8, 8) for j in range(-8, 8)], dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (256, 1)
    assert torch.equal(unpack_int4(packed), codes)
    assert packed.view(torch.uint8)[:, 0].tolist() == [
        (i & 15) << 4 | (j & 15) for i in range(-8, 8) for j in range(-8, 8)
    ]


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="3 bits"):
        quantize(rows(), 3)
    with pytest.raises(ShapeError, match="5 groups"):
        quantize(rows(), 4, groups=5)
    with pytest.raises(ShapeError, match="even number of columns"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    for bad in (float("nan"), float("inf"), 1e5):
        with pytest.raises(ValueError, match="65504"):
            quantize(torch.tensor([[1.0, bad]]), 8)
