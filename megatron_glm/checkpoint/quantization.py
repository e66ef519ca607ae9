"""Weight-only INT8 and INT4, as the tools of the released GLM-130B compute them.

The scale of a row is its largest magnitude over 2^(bits-1) - 1 and its codes are round(w / scale),
all in fp16; GLM-130B paper (arXiv 2210.02414), section 4. Two kinds of rows break that formula and
are kept whole here: see `_scales`.
"""

from dataclasses import dataclass

import torch

from megatron_glm.checkpoint.errors import ShapeError

BIT_WIDTHS = (4, 8)
_SMALLEST_SCALE = 2.0**-24  # fp16's smallest positive number


def largest_code(bits: int) -> int:
    """Codes lie in [-largest_code, largest_code]: 127 for INT8, 7 for INT4."""
    return 2 ** (bits - 1) - 1


@dataclass
class QuantizedWeight:
    """A linear weight as integers: codes int8 [out, in] (one code an element for INT4 too), scales
    fp16 [out, groups], each for in / groups neighbouring columns of its row."""

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """The weight [out, in] that the codes stand for, each product rounded once, to fp16."""
        result = torch.empty(self.codes.shape, dtype=dtype)
        for rows in _row_ranges(self.codes):
            groups = self.codes[rows].unflatten(1, (self.scales.shape[1], -1))
            product = groups.to(torch.float16) * self.scales[rows].unsqueeze(-1)
            result[rows] = product.flatten(1).to(dtype)
        return result


def quantize(weight: torch.Tensor, bits: int, groups: int = 1) -> QuantizedWeight:
    """Codes and scales of a weight [out, in], each row cut into `groups` with a scale each.

    A weight in another precision is rounded to fp16 first, as the released tools load it. A value
    that fp16 cannot hold, NaN included, is a ValueError.
    """
    if bits not in BIT_WIDTHS:
        raise ValueError(f"{bits} bits: must be 8 or 4")
    if weight.shape[1] % groups:
        raise ShapeError(f"{groups} groups a row: must divide its {weight.shape[1]} columns")
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], groups, dtype=torch.float16)
    for rows in _row_ranges(weight):
        block = weight[rows].to(torch.float16).unflatten(1, (groups, -1))
        if not block.isfinite().all():
            raise ValueError("holds NaN, infinity or a value beyond fp16's 65504")
        scale = _scales(block, bits)
        # The quotient is rounded to fp16 before it is rounded to an integer, as on the GPU.
        quotient = block / scale.clamp_min(_SMALLEST_SCALE).unsqueeze(-1)
        codes[rows] = quotient.round_().to(torch.int8).flatten(1)
        scales[rows] = scale
    return QuantizedWeight(codes, scales, bits)


def _scales(block: torch.Tensor, bits: int) -> torch.Tensor:
    """fp16 scales [rows, groups] of fp16 weights [rows, groups, columns].

    A row of zeros keeps the formula's scale 0 (its codes, 0/0 by the formula, become 0). Where the
    scale is so small that fp16 rounds it down by more than half a code (down to 0 for a row of
    1e-6), codes would leave their range and wrap around; such a row gets the next larger scale.
    """
    largest = block.abs().amax(dim=-1)
    scale = largest / largest_code(bits)
    overflows = (largest / scale).nan_to_num(nan=0.0).round() > largest_code(bits)
    # The next larger positive number has the next larger bit pattern.
    return torch.where(overflows, (scale.view(torch.int16) + 1).view(torch.float16), scale)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] in [-8, 7] to int8 [out, in / 2]: the even column in the high four bits."""
    if codes.shape[1] % 2:
        raise ShapeError(f"INT4 needs an even number of columns, not {codes.shape[1]}")
    return (codes[:, 0::2] << 4) | (codes[:, 1::2] & 0x0F)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """What `pack_int4` packed."""
    # Shifts of int8 keep the sign: up and down again spreads bit 3 over the high bits.
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(1)


def _row_ranges(matrix: torch.Tensor, block_elements: int = 1 << 20) -> list[slice]:
    rows = max(1, block_elements // matrix.shape[1])
    return [slice(i, i + rows) for i in range(0, matrix.shape[0], rows)]
