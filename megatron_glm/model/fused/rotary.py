"""Rotary positions applied where queries and keys lie: no copy of them is made or kept.

Forward, one kernel turns queries and keys inside the mixed projection, whose linear does not need
its output again; attention then reads three views of it. Backward, one kernel turns the gradients
back as it writes them, with the value's, into the gradient of the projection. Products and sums
are in fp32 by the fp32 rotation and rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1024
"""Elements of a tile, halves of some heads: 16 bytes of a 16-bit type for each of its threads."""
NUM_WARPS = 4


def rotate_query_key_(mixed: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [s, b, n, d] as views of `mixed`, in which query and key now turned.

    mixed: [s, b, n, 3d], per head [q, k, v], on a GPU. It is overwritten: whoever saved it for a
    backward gets autograd's error there. rotation: fp32 [s, b, 1, d] as `RotaryTable` gives it.
    The results must not be changed in place, which autograd refuses.
    """
    return _RotateQueryKey.apply(mixed, rotation)


class _RotateQueryKey(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, rotation):
        # Detached, because autograd has a returned input as one output only.
        mixed = mixed.detach().contiguous()
        rotation = rotation.contiguous()
        seq_length, batch, heads, triple = mixed.shape
        grid, constants = _launch(seq_length * batch, heads, triple // 3)
        rotate_forward[grid](mixed, rotation, heads, **constants)
        torch.autograd.graph.increment_version(mixed)
        ctx.save_for_backward(rotation)
        return mixed.chunk(3, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (rotation,) = ctx.saved_tensors
        grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
        seq_length, batch, heads, dim = grads[0].shape
        mixed = grads[0].new_empty(seq_length, batch, heads, 3 * dim)
        grid, constants = _launch(seq_length * batch, heads, dim)
        strides = [stride for grad in grads for stride in grad.stride()[:3]]
        rotate_backward[grid](*grads, mixed, rotation, *strides, batch, heads, **constants)
        return mixed, None


def _launch(tokens: int, heads: int, dim: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of either kernel: a program turns some heads of one token."""
    halves = triton.next_power_of_2(dim // 2)
    block = min(max(1, TILE // halves), triton.next_power_of_2(heads))
    constants = {"HALF": dim // 2, "HALVES": halves, "HEADS": block, "num_warps": NUM_WARPS}
    return (tokens, triton.cdiv(heads, block)), constants


@triton.jit
def rotate_forward(
    mixed_pointer, rotation_pointer, num_heads,
    HALF: tl.constexpr, HALVES: tl.constexpr, HEADS: tl.constexpr,
):
    """Turns query and key of some heads of one token in place; grid (s * b, blocks of heads)."""
    token = tl.program_id(0).to(tl.int64)
    heads, dims, mask = _tile(num_heads, HALF, HALVES, HEADS)
    cos, sin = _rotation(rotation_pointer, token, dims, HALF)
    query = mixed_pointer + (token * num_heads + heads) * (6 * HALF) + dims
    _turn(query, query, cos, sin, mask, HALF)
    key = query + 2 * HALF
    _turn(key, key, cos, sin, mask, HALF)


@triton.jit
def rotate_backward(
    q_pointer, k_pointer, v_pointer, mixed_pointer, rotation_pointer,
    q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n, batch, num_heads,
    HALF: tl.constexpr, HALVES: tl.constexpr, HEADS: tl.constexpr,
):
    """Gradient of the mixed projection from those of query, key and value; grid as forward."""
    token = tl.program_id(0).to(tl.int64)
    row, column = token // batch, token % batch
    heads, dims, mask = _tile(num_heads, HALF, HALVES, HEADS)
    cos, sin = _rotation(rotation_pointer, token, dims, HALF)
    query = q_pointer + row * q_s + column * q_b + heads * q_n + dims
    key = k_pointer + row * k_s + column * k_b + heads * k_n + dims
    value = v_pointer + row * v_s + column * v_b + heads * v_n + dims
    mixed = mixed_pointer + (token * num_heads + heads) * (6 * HALF) + dims
    _turn(query, mixed, cos, -sin, mask, HALF)
    _turn(key, mixed + 2 * HALF, cos, -sin, mask, HALF)
    mixed += 4 * HALF
    tl.store(mixed, tl.load(value, mask=mask), mask=mask)
    tl.store(mixed + HALF, tl.load(value + HALF, mask=mask), mask=mask)


@triton.jit
def _tile(num_heads, HALF: tl.constexpr, HALVES: tl.constexpr, HEADS: tl.constexpr):
    """Heads [HEADS, 1], dimensions [1, HALVES] of half a head, and which of them exist."""
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    dims = tl.arange(0, HALVES)[None, :]
    return heads, dims, (heads < num_heads) & (dims < HALF)


@triton.jit
def _rotation(pointer, token, dims, HALF: tl.constexpr):
    """Cosine and sine of a token, fp32 [1, HALVES] each."""
    pointer += token * (2 * HALF) + dims
    return (
        tl.load(pointer, mask=dims < HALF, other=0.0),
        tl.load(pointer + HALF, mask=dims < HALF, other=0.0),
    )


@triton.jit
def _turn(source, target, cos, sin, mask, HALF: tl.constexpr):
    """Writes to `target` what lies at `source`, turned; both may be the same."""
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target + HALF, (second * cos + first * sin).to(dtype), mask=mask)
