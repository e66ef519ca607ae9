"""Triton kernel that completes, token by token, what two parts of an attention say of it."""

import triton
import triton.language as tl


@triton.jit
def merge(
    origin_pointer, x_pointer, other_pointer, lse_pointer, other_lse_pointer, num_heads,
    DIM: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):
    """`cudnn.merge` for BLOCK heads of a token; grid (s * b, blocks of heads)."""
    token = tl.program_id(0).to(tl.int64)
    origin = tl.load(origin_pointer + token)
    if origin == 0:
        return
    heads = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = token * num_heads + heads
    dims = tl.arange(0, SIZE)
    places = words[:, None] * DIM + dims[None, :]
    inside = (heads < num_heads)[:, None] & (dims < DIM)[None, :]
    other = tl.load(other_pointer + places, mask=inside, other=0.0).to(tl.float32)
    # Without a context the rectangle has left these places as they were found.
    has_both = origin == 1
    x = tl.load(x_pointer + places, mask=inside & has_both, other=0.0).to(tl.float32)
    if WEIGHTED:
        other_lse = tl.load(other_lse_pointer + words, mask=heads < num_heads, other=0.0)
        lse = tl.load(
            lse_pointer + words, mask=(heads < num_heads) & has_both, other=float("-inf")
        )
        # The triangle has at least the token itself, so its log-sum-exp is finite.
        largest = tl.maximum(lse, other_lse)
        weight, other_weight = tl.exp(lse - largest), tl.exp(other_lse - largest)
        total = weight + other_weight
        x = x * (weight / total)[:, None] + other * (other_weight / total)[:, None]
        tl.store(lse_pointer + words, largest + tl.log(total), mask=heads < num_heads)
    else:
        x += other
    tl.store(x_pointer + places, x.to(x_pointer.dtype.element_ty), mask=inside)
