"""Triton kernels for INT8 and INT4 weights, whose codes become numbers in registers alone.

A weight is stored as 32-bit words [out, groups, n], the columns of a group filled up to
n * 32 / bits. They lie there in 16 / bits planes: columns 2j and 2j + 1 of plane p, which are
columns 2 (p n + j) and the next of the group, are the p-th `bits` bits of the two halves of word j.
So one operation on words works on two codes, in the order and the registers in which tensor cores
take them, and the columns of x that belong to a plane are neighbours.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def multiply(
    x_pointer, words_pointer, scales_pointer, bias_pointer, out_pointer, num_tokens,
    NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr, TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """x [tokens, WIDTH] @ weight.T + bias of some tokens and rows of the weight, which are walked
    by SLICES of so many words of a group, one a warp; grid (blocks of tokens, blocks of rows).

    Blocks of tokens are neighbours, for words to be read from memory once. bias_pointer: or None.
    """
    GROUP: tl.constexpr = WIDTH // GROUPS
    GROUP_WORDS: tl.constexpr = (GROUP * BITS + 31) // 32
    GROUP_SLICES: tl.constexpr = (GROUP_WORDS + WORDS - 1) // WORDS
    TYPE: tl.constexpr = x_pointer.dtype.element_ty
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # Beyond the weight its last row stands, for products that are not stored.
    sources = tl.minimum(rows, NUM_ROWS - 1).to(tl.int64)
    words_pointer += sources[None, :, None] * (GROUPS * GROUP_WORDS)
    scales_pointer += sources * GROUPS
    x_pointer += tokens[None, None, :] * WIDTH

    sums = tl.zeros((SLICES, ROWS, TOKENS), dtype=tl.float32)
    for first in tl.range(0, GROUPS * GROUP_SLICES, SLICES, num_stages=STAGES):
        slices = first + tl.arange(0, SLICES)
        exists = slices < GROUPS * GROUP_SLICES
        groups = slices // GROUP_SLICES
        begin = (slices % GROUP_SLICES * WORDS)[:, None, None]
        places = begin + tl.arange(0, WORDS)[None, None, :]
        words = tl.load(
            words_pointer + groups[:, None, None] * GROUP_WORDS + places,
            mask=exists[:, None, None] & (places < GROUP_WORDS),
            other=0,
        )
        part = sums if GROUPS == 1 else tl.zeros((SLICES, ROWS, TOKENS), dtype=tl.float32)
        for plane in tl.static_range(16 // BITS):
            columns = 2 * (plane * GROUP_WORDS + begin) + tl.arange(0, 2 * WORDS)[None, :, None]
            x = tl.load(
                x_pointer + groups[:, None, None] * GROUP + columns,
                mask=(tokens < num_tokens)[None, None, :]
                & exists[:, None, None] & (columns < GROUP),
                other=0.0,
            )
            part = tl.dot(_codes(words, plane, BITS, TYPE), x, part)
        if GROUPS == 1:
            sums = part
        else:
            pointers = scales_pointer[None, :] + groups[:, None]
            scales = tl.load(pointers, mask=exists[:, None], other=0.0)
            sums += part * scales.to(tl.float32)[:, :, None]

    out = tl.sum(sums, 0)
    if GROUPS == 1:
        out *= tl.load(scales_pointer).to(tl.float32)[:, None]
    if bias_pointer is not None:
        bias = tl.load(bias_pointer + rows, mask=rows < NUM_ROWS, other=0.0)
        out += bias.to(tl.float32)[:, None]
    tl.store(
        out_pointer + tokens[None, :] * NUM_ROWS + rows[:, None],
        out.to(TYPE),
        mask=(tokens < num_tokens)[None, :] & (rows < NUM_ROWS)[:, None],
    )


@triton.jit
def _codes(words, PLANE: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Codes [slices, rows, 2n] of a plane of words [slices, rows, n], exact in fp16 or bf16.

    A code is put under the exponent at which the last bit of a number counts 1, its sign flipped to
    count upwards from the least code, and what this added is taken off. The mantissa of bf16 has
    room for seven bits: there INT8's sign picks one of two exponents to take off.
    """
    bits = words >> (BITS * PLANE)
    if BITS == 4:
        if TYPE == tl.float16:
            return _pairs((bits & 0x000F000F) ^ 0x64086408, TYPE) - (1024.0 + 8.0)
        else:
            return _pairs((bits & 0x000F000F) ^ 0x43084308, TYPE) - (128.0 + 8.0)
    elif TYPE == tl.float16:
        return _pairs((bits & 0x00FF00FF) ^ 0x64806480, TYPE) - (1024.0 + 128.0)
    else:
        magnitude = _pairs((bits & 0x007F007F) | 0x43004300, TYPE)
        return magnitude - _pairs((bits & 0x00800080) | 0x43004300, TYPE)


@triton.jit
def _pairs(words, TYPE: tl.constexpr):
    """The 16-bit halves of words [slices, rows, n] as numbers [slices, rows, 2n]."""
    low = words.to(tl.int16).to(TYPE, bitcast=True)
    high = (words >> 16).to(tl.int16).to(TYPE, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], words.shape[1], 2 * words.shape[2])


@triton.jit
def dequantize(
    words_pointer, scales_pointer, out_pointer,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Codes times scales, [rows, WIDTH]; grid (rows, blocks of words of a row)."""
    GROUP: tl.constexpr = WIDTH // GROUPS
    GROUP_WORDS: tl.constexpr = (GROUP * BITS + 31) // 32
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    exists = places < GROUPS * GROUP_WORDS
    groups = places // GROUP_WORDS
    words = tl.load(words_pointer + row * (GROUPS * GROUP_WORDS) + places, mask=exists, other=0)
    scales = tl.load(scales_pointer + row * GROUPS + groups, mask=exists, other=0.0)
    halves = tl.arange(0, 2)[None, :]
    for plane in tl.static_range(16 // BITS):
        # Up to the sign and down again.
        codes = (words << (32 - BITS * (plane + 1) - 16 * halves)) >> (32 - BITS)
        columns = 2 * (plane * GROUP_WORDS + places % GROUP_WORDS) + halves
        tl.store(
            out_pointer + row * WIDTH + groups * GROUP + columns,
            (codes.to(tl.float32) * scales.to(tl.float32)).to(out_pointer.dtype.element_ty),
            mask=exists & (columns < GROUP),
        )
