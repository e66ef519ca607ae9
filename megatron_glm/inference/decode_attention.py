"""Attention of a step of decode on a GPU, which reads how long rows are on the device.

Two kernels take qkv as the projection leaves it. The first turns query and key, keeps the new key
and value in the cache, and attends to PART tokens of a row by each program, so that one row of a
few heads is enough for a whole GPU; the second merges what the parts say. Neither the grid nor an
argument depends on a length: a launch can be captured once and replayed while rows grow.
"""

import torch
import triton
import triton.language as tl

PART = 64
"""Tokens of a row that a program reads."""
MERGED = 16
"""Parts that are merged at a time."""


def attend(
    qkv: torch.Tensor, rotation: torch.Tensor, places: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Writes a token of every row to the cache, and what its queries see there is [rows, n, d].

    qkv: [rows, n, 3, d], contiguous, not rotated. rotation: of the tokens, fp32 [rows, 1, 1, d].
    places: int64 [rows], each below the capacity: where the token goes, behind all that its row
    holds. keys, values: the cache of a layer, [rows or more, n, capacity, d], contiguous.
    """
    num_rows, num_heads, _, head_dim = qkv.shape
    capacity = keys.shape[2]
    num_parts = triton.cdiv(capacity, PART)
    parts = qkv.new_empty((num_rows, num_heads, num_parts, head_dim), dtype=torch.float32)
    tops, sums = parts.new_empty((2, num_rows, num_heads, num_parts))
    attend_to_part[(num_parts, num_heads, num_rows)](
        qkv, rotation, places, keys, values, parts, tops, sums, capacity,
        head_dim, triton.next_power_of_2(head_dim // 2), PART,
    )
    out = qkv.new_empty(num_rows, num_heads, head_dim)
    merge_parts[(num_heads, num_rows)](
        parts, tops, sums, places, out, num_parts,
        head_dim, triton.next_power_of_2(head_dim), PART, MERGED,
    )
    return out


@triton.jit
def attend_to_part(
    qkv_pointer, rotation_pointer, places_pointer, keys_pointer, values_pointer,
    parts_pointer, tops_pointer, sums_pointer, capacity,
    DIM: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr,
):
    """Of some tokens of a row: the greatest score, and the sums of exp(score - greatest) and of
    that times the value; grid (parts, n, rows). HALF: the power of two from DIM / 2 on."""
    head, row = tl.program_id(1), tl.program_id(2)
    place = tl.load(places_pointer + row)
    first = tl.program_id(0) * PART
    if first > place:
        return
    index = (row * tl.num_programs(1) + head).to(tl.int64)
    dims = tl.arange(0, HALF)
    exists = dims < DIM // 2
    qkv_pointer += index * (3 * DIM) + dims
    rotation_pointer += row * DIM + dims
    cos = tl.load(rotation_pointer, mask=exists, other=0.0)
    sin = tl.load(rotation_pointer + DIM // 2, mask=exists, other=0.0)
    query, query2 = _rotated(qkv_pointer, cos, sin, exists, DIM)
    key, key2 = _rotated(qkv_pointer + DIM, cos, sin, exists, DIM)
    value = tl.load(qkv_pointer + 2 * DIM, mask=exists, other=0.0)
    value2 = tl.load(qkv_pointer + 2 * DIM + DIM // 2, mask=exists, other=0.0)

    tokens = first + tl.arange(0, PART)
    is_new = (tokens == place)[:, None]
    is_kept = (tokens < place)[:, None] & exists[None, :]
    offsets = (index * capacity + tokens)[:, None] * DIM + dims[None, :]
    keys_pointer += offsets
    values_pointer += offsets
    keys = _joined(keys_pointer, key, is_new, is_kept, exists)
    keys2 = _joined(keys_pointer + DIM // 2, key2, is_new, is_kept, exists)
    values = _joined(values_pointer, value, is_new, is_kept, exists)
    values2 = _joined(values_pointer + DIM // 2, value2, is_new, is_kept, exists)

    products = keys * query.to(tl.float32)[None, :] + keys2 * query2.to(tl.float32)[None, :]
    scores = tl.where(tokens <= place, tl.sum(products, 1) * DIM**-0.5, float("-inf"))
    top = tl.max(scores, 0)
    weights = tl.exp(scores - top)
    part = index * tl.num_programs(0) + tl.program_id(0)
    tl.store(tops_pointer + part, top)
    tl.store(sums_pointer + part, tl.sum(weights, 0))
    parts_pointer += part * DIM + dims
    tl.store(parts_pointer, tl.sum(weights[:, None] * values, 0), mask=exists)
    tl.store(parts_pointer + DIM // 2, tl.sum(weights[:, None] * values2, 0), mask=exists)


@triton.jit
def _rotated(pointer, cos, sin, exists, DIM: tl.constexpr):
    """The halves of a vector, turned in fp32 and rounded to its type; see `rotary.rotate`."""
    first = tl.load(pointer, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(pointer + DIM // 2, mask=exists, other=0.0).to(tl.float32)
    kind = pointer.dtype.element_ty
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)


@triton.jit
def _joined(pointers, new, is_new, is_kept, exists):
    """What the cache keeps, and the new vector in its place, where it is stored as well; fp32."""
    kept = tl.load(pointers, mask=is_kept, other=0.0)
    new = tl.broadcast_to(new[None, :], kept.shape)
    tl.store(pointers, new, mask=is_new & exists[None, :])
    return tl.where(is_new, new, kept).to(tl.float32)


# By a multiple of 16 Triton would tell kernels apart, and compile one in the middle of a capture.
@triton.jit(do_not_specialize=["num_parts"])
def merge_parts(
    parts_pointer, tops_pointer, sums_pointer, places_pointer, out_pointer, num_parts,
    DIM: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr, MERGED: tl.constexpr,
):
    """The attention of a row's head from that to its parts; grid (n, rows)."""
    row = tl.program_id(1)
    count = (tl.load(places_pointer + row) // PART + 1).to(tl.int32)
    index = (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    dims = tl.arange(0, SIZE)
    top = float("-inf")
    total = 0.0
    out = tl.zeros((SIZE,), dtype=tl.float32)
    for first in range(0, count, MERGED):
        numbers = first + tl.arange(0, MERGED)
        exists = numbers < count
        places = index * num_parts + numbers
        tops = tl.load(tops_pointer + places, mask=exists, other=float("-inf"))
        sums = tl.load(sums_pointer + places, mask=exists, other=0.0)
        parts = tl.load(
            parts_pointer + places[:, None] * DIM + dims[None, :],
            mask=exists[:, None] & (dims < DIM)[None, :], other=0.0,
        )
        highest = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp(tops - highest)
        before = tl.exp(top - highest)
        total = total * before + tl.sum(weights * sums, 0)
        out = out * before + tl.sum(weights[:, None] * parts, 0)
        top = highest
    out /= total
    tl.store(
        out_pointer + index * DIM + dims, out.to(out_pointer.dtype.element_ty), mask=dims < DIM
    )
