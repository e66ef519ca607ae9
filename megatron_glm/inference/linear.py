"""Linear layers by the form of their weights: plain, INT8 or INT4.

Quantised weights stay codes. A few rows (decode) are multiplied by packed kernels, on a CPU torch's
where these are fast, on a GPU those of `quantized_kernels`; for many (prefill), and everywhere
else, a block of the weight at a time is dequantised and multiplied as a plain one.
"""

from abc import ABC, abstractmethod
from functools import cache

import torch
import torch.nn.functional as F

from megatron_glm.checkpoint.quantization import QuantizedWeight, pack_int4, unpack_int4

# Elements of a weight that are dequantised at a time.
_BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


class Linear(ABC):
    """x [t, in] @ weight.T + bias: [t, out]. bias None where it is added elsewhere."""

    def __init__(self, bias: torch.Tensor | None):
        self.bias = bias

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory of the weight, its scales included."""


class PlainLinear(Linear):
    """weight [out, in] in the type of x."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(bias)
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes


class QuantizedLinear(Linear):
    """A weight as codes.

    scales: [out, groups], each for in / groups neighbouring columns.
    max_packed_rows: rows up to which the packed kernel is the faster way, 0 where there is none.
    row_multiple: rows of the weight that are stored together.
    """

    max_packed_rows = 0
    row_multiple = 1

    def __init__(self, scales: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(bias)
        self.scales = scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._dequantized(x) if len(x) > self.max_packed_rows else self._packed(x)

    @abstractmethod
    def weight(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Codes times scales [rows, in]; `rows` is cut at multiples of `row_multiple`."""

    @abstractmethod
    def _packed(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T + bias by the packed kernel."""

    def _dequantized(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = len(self.scales)
        out = x.new_empty(len(x), num_rows)
        block = _BLOCK_ELEMENTS[x.device.type] // x.shape[1]
        block = max(block // self.row_multiple, 1) * self.row_multiple
        for start in range(0, num_rows, block):
            rows = slice(start, min(start + block, num_rows))
            bias = None if self.bias is None else self.bias[rows]
            out[:, rows] = F.linear(x, self.weight(rows, x.dtype), bias)
        return out


class CPULinear(QuantizedLinear):
    """Codes as torch's packed kernels of a CPU take them; scales in the type of x."""

    def weight(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        groups = self.codes(rows).unflatten(1, (self.scales.shape[1], -1)).to(dtype)
        return groups.mul_(self.scales[rows].unsqueeze(-1)).flatten(1)

    def _packed(self, x: torch.Tensor) -> torch.Tensor:
        out = self._product(x)
        return out if self.bias is None else out.add_(self.bias)

    @abstractmethod
    def codes(self, rows: slice) -> torch.Tensor:
        """int8 codes [rows, in]; `rows` is cut at multiples of `row_multiple`."""

    @abstractmethod
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x @ weight.T by the packed kernel."""


class Int8Linear(CPULinear):
    """codes: int8 [out, in]; torch's kernel reads those of one scale a row as they are."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(scales, bias)
        # In fp32 and fp16 the kernel is scalar.
        if scales.dtype == torch.bfloat16:
            self.max_packed_rows = 32
        self._groups = [part.contiguous() for part in codes.chunk(scales.shape[1], dim=1)]

    def codes(self, rows: slice) -> torch.Tensor:
        return torch.cat([part[rows] for part in self._groups], dim=1)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        parts = [
            torch._weight_int8pack_mm(columns.contiguous(), codes, scale.contiguous())
            for columns, codes, scale in zip(
                x.chunk(len(self._groups), dim=1), self._groups, self.scales.unbind(1), strict=True
            )
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).float().sum(0).to(x.dtype)

    @property
    def num_bytes(self) -> int:
        return sum(codes.nbytes for codes in self._groups) + self.scales.nbytes


class Int4Linear(CPULinear):
    """Codes in nibbles, without a kernel: an even column in the high four bits, [out, in / 2]."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(scales, bias)
        self._nibbles = pack_int4(codes)

    def codes(self, rows: slice) -> torch.Tensor:
        return unpack_int4(self._nibbles[rows])

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        return self._nibbles.nbytes + self.scales.nbytes


class PackedInt4Linear(CPULinear):
    """Codes in the order of the packed kernel, bf16 alone."""

    # Columns that may share a scale.
    GROUP_SIZES = (256, 128, 64, 32)
    max_packed_rows = 64
    row_multiple = 64

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(scales, bias)
        num_columns = codes.shape[1]
        self._group_size = _group_size(num_columns // scales.shape[1])
        self._store = _pack(codes)
        groups = num_columns // self._group_size
        kernel_scales = scales.repeat_interleave(groups // scales.shape[1], dim=1).T
        # The kernel computes code * scale + zero, with code 8 for 0.
        self._scales_and_zeros = torch.stack(
            (kernel_scales, torch.zeros_like(kernel_scales)), dim=-1
        ).contiguous()

    @classmethod
    def can_hold(cls, codes: torch.Tensor, scales: torch.Tensor) -> bool:
        """True where the kernel takes such a weight."""
        return (
            scales.dtype == torch.bfloat16
            and codes.shape[0] % cls.row_multiple == 0
            and _group_size(codes.shape[1] // scales.shape[1]) is not None
        )

    def codes(self, rows: slice) -> torch.Tensor:
        # A column of some rows behind the other.
        height = self.row_multiple
        stored = self._store.view(torch.uint8).view(len(self.scales) // height, -1, height // 2)
        stored = stored[rows.start // height : -(-rows.stop // height)]
        nibbles = torch.cat((stored & 15, stored >> 4), dim=-1)
        order = _row_order()
        if order is not None:
            nibbles = nibbles[..., order]
        return nibbles.transpose(1, 2).flatten(0, 1).view(torch.int8).sub_(8)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(
            x, self._store, self._group_size, self._scales_and_zeros
        )

    @property
    def num_bytes(self) -> int:
        return self._store.nbytes + self._scales_and_zeros.nbytes + self.scales.nbytes


def quantized_linear(
    weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> QuantizedLinear:
    """The layer for a quantised weight, for x of `dtype` on `device`."""
    if device.type != "cpu":
        from megatron_glm.inference.triton_linear import TritonLinear

        codes, scales = weight.codes.to(device), weight.scales.to(device)
        return TritonLinear(codes, scales, bias, weight.bits, dtype)
    codes, scales = weight.codes, weight.scales.to(dtype)
    if weight.bits == 8:
        return Int8Linear(codes, scales, bias)
    kind = PackedInt4Linear if PackedInt4Linear.can_hold(codes, scales) else Int4Linear
    return kind(codes, scales, bias)


def _group_size(num_columns: int) -> int | None:
    """The largest group of the kernel of which `num_columns` are whole ones."""
    sizes = PackedInt4Linear.GROUP_SIZES
    return next((size for size in sizes if num_columns % size == 0), None)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)


@cache
def _row_order() -> torch.Tensor | None:
    """For each of the rows that are stored together, which of their nibbles holds it, counting all
    low nibbles first and then all high ones; None where that is the order of the rows.

    The order depends on the CPU's instructions, so it is found by packing each row's own number,
    four bits at a time.
    """
    height = PackedInt4Linear.row_multiple
    # The kernel packs no fewer columns than a group.
    numbers = torch.arange(height)[:, None].repeat(1, 32)
    found = torch.zeros(height, dtype=torch.int64)
    for shift in range(0, (height - 1).bit_length(), 4):
        digits = ((numbers >> shift) % 16 - 8).to(torch.int8)
        packed = _pack(digits).view(torch.uint8).flatten()[: height // 2]
        found += torch.cat((packed & 15, packed >> 4)).long() << shift
    order = found.argsort()
    return None if torch.equal(order, torch.arange(height)) else order
