"""A quantised linear layer on a GPU, by the kernels of `quantized_kernels`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from megatron_glm.inference import quantized_kernels as kernels
from megatron_glm.inference.linear import QuantizedLinear


class Tile(NamedTuple):
    """What a program reads of a weight at a time."""

    ROWS: int
    WORDS: int
    """Words of a slice of a row."""
    STAGES: int
    """Times' worth of loads that are in flight while another is worked on, and that one."""


# Chosen by compiling, untimed: `python -m benchmarks.decode` on the machine has the last word.
TILE = Tile(ROWS=32, WORDS=16, STAGES=3)
SLICES = {8: 8, 16: 8, 32: 4}
"""Slices of every row that a program reads at a time, one a warp, by the tokens that it has."""
MAX_TOKENS = 128
"""Tokens up to which codes are multiplied as such: four blocks of tokens read INT8 codes four
times, at worst, where a 16-bit weight would be written and read."""
BLOCK = 1024
"""Words that a program dequantises."""


class TritonLinear(QuantizedLinear):
    """Codes int8 [out, in] of `bits` bits, as words; scales stay fp16. In fp32 without a kernel."""

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, bits: int,
        dtype: torch.dtype,
    ):
        super().__init__(scales.contiguous(), bias)
        self.max_packed_rows = 0 if dtype == torch.float32 else MAX_TOKENS
        self._shape = *codes.shape, scales.shape[1], bits
        self._words = pack(codes, scales.shape[1], bits)
        # By tokens of a program and the alignment of x: Triton takes three times as long to find
        # the kernel that it has compiled as to launch it, which is longer than many a product.
        self._compiled = {}

    def weight(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        words, scales = self._words[rows], self.scales[rows]
        _, *shape = self._shape
        out = words.new_empty(len(words), shape[0], dtype=dtype)
        grid = len(words), triton.cdiv(words[0].numel(), BLOCK)
        kernels.dequantize[grid](words, scales, out, *shape, BLOCK)
        return out

    def _packed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        num_tokens, num_rows = len(x), self._shape[0]
        tokens = next((size for size in SLICES if size >= num_tokens), max(SLICES))
        out = x.new_empty(num_tokens, num_rows)
        grid = -(-num_tokens // tokens), -(-num_rows // TILE.ROWS), 1
        arguments = (
            x, self._words, self.scales, self.bias, out, num_tokens,
            *self._shape, *TILE, tokens, SLICES[tokens],
        )
        key = tokens, x.data_ptr() % 16
        compiled = self._compiled.get(key)
        if compiled is None:
            num_warps = SLICES[tokens]
            self._compiled[key] = kernels.multiply[grid](*arguments, num_warps=num_warps)
        else:
            compiled[grid](*arguments)
        return out

    @property
    def num_bytes(self) -> int:
        return self._words.nbytes + self.scales.nbytes


def pack(codes: torch.Tensor, groups: int, bits: int) -> torch.Tensor:
    """Codes int8 [out, in] to the words of `quantized_kernels`, int32 [out, groups, n]."""
    planes = 16 // bits
    columns = codes.unflatten(1, (groups, -1))
    columns = F.pad(columns, (0, -columns.shape[2] % (2 * planes))).unflatten(2, (planes, -1))
    halves = torch.zeros_like(columns[:, :, 0], dtype=torch.int16)
    for plane in range(planes):
        halves |= (columns[:, :, plane].to(torch.int16) & (2**bits - 1)) << (bits * plane)
    return halves.view(torch.int32)
